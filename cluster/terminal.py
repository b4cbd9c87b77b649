"""How a command ends: its result, or one clear message and an exit code."""

import json
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from storage.errors import LecternError


class Terminal:
    """Where a command writes: progress and prose to `stream`, one JSON object last where it is asked for."""

    def __init__(self, as_json: bool, debug: bool) -> None:
        self.as_json = as_json
        self.debug = debug
        self.stream: TextIO = sys.stderr if as_json else sys.stdout
        self.log_folder: str | None = None
        """Run directory, for the traceback of an unexpected error."""
        self.hint: Callable[[], str | None] = lambda: None
        """Gives one more sentence for an error that broke a run, e.g. where the workers' logs lie."""

    def say(self, text: str = "") -> None:
        """Print a line for people."""
        self.stream.write(text + "\n")
        self.stream.flush()

    def show(self, renderable: Any) -> None:
        """Print a Rich table or text."""
        from rich.console import Console

        console = Console(file=self.stream, highlight=False)
        if not self.stream.isatty():
            console.width = max(console.width, 120)
        console.print(renderable)

    def run(self, command: Callable[["Terminal"], dict[str, Any]]) -> int:
        """Run a command and return its exit code; a result with a key `exit_code` decides by itself."""
        try:
            result = command(self)
        except LecternError as error:
            return self._fail(str(error), error.exit_code, error)
        except KeyboardInterrupt as error:
            return self._fail("stopped; the same command goes on from here", 1, error)
        except Exception as error:
            return self._unexpected(error)
        code = int(result.pop("exit_code", 0))
        if self.as_json:
            self._print_json({**result, "exit_code": code})
        return code

    def _fail(self, message: str, code: int, error: BaseException) -> int:
        if code == 1 and (hint := self.hint()):
            message = f"{message}\n{hint}"
        sys.stderr.write(f"error: {message}\n")
        if self.debug:
            traceback.print_exception(error)
        if self.as_json:
            self._print_json({"error": message, "exit_code": code})
        return code

    def _unexpected(self, error: Exception) -> int:
        detail = str(error).strip().splitlines()
        summary = f"{type(error).__name__}: {detail[0]}" if detail else type(error).__name__
        log = self._write_log(error)
        return self._fail(f"unexpected {summary} (traceback in {log}; --debug shows it here)", 1, error)

    def _write_log(self, error: Exception) -> Path:
        text = "".join(traceback.format_exception(error))
        folders = [Path(self.log_folder)] if self.log_folder else []
        for folder in [*folders, Path(tempfile.gettempdir())]:
            path = folder / "lectern-error.log"
            try:
                path.write_text(text, encoding="utf-8")
            except OSError:
                continue
            return path
        raise error

    @staticmethod
    def _print_json(value: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(value, ensure_ascii=False, default=str) + "\n")
        sys.stdout.flush()
