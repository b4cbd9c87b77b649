"""metrics.jsonl: one line per logged step, appended by rank 0 and followed by the driver."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from storage.object_store import Store

METRICS_KEY = "metrics.jsonl"
REWRITE_EVERY_S = 10.0
"""Where objects cannot be appended to, the whole file is written this often."""

Line = dict[str, Any]


class MetricsLog:
    """Appends lines of one run to `<run_dir>/metrics.jsonl`, dropping first what a resumed run will write again."""

    def __init__(self, run_dir: str, run: str, resumed_from: int) -> None:
        """Open the log; lines of `run` after step `resumed_from` are taken out, other runs' lines stay."""
        store = Store(run_dir)
        lines = [line for line in parse_lines(store.read_if_exists(METRICS_KEY)) if not _again(line, run, resumed_from)]
        store.write(METRICS_KEY, _to_bytes(lines))
        self._run = run
        self._sink: _Sink = _LocalSink(Path(store.url) / METRICS_KEY) if store.is_local else _RemoteSink(store, lines)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Hand over what is left."""
        self._sink.close()

    def write(self, line: Line) -> None:
        """Append one line; `run` is put first."""
        self._sink.write({"run": self._run, **line})


def parse_lines(raw: bytes | None) -> list[Line]:
    """Return the whole lines of a metrics file; one torn by a crash is left out."""
    lines = []
    for text in (raw or b"").split(b"\n"):
        try:
            line = json.loads(text) if text else None
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


class Follower:
    """Reads the lines that were added since it last looked; for the driver's progress."""

    def __init__(self, run_dir: str, run: str) -> None:
        self._store = Store(run_dir)
        self._run = run
        self._step = -1
        self._offset = 0
        self.newest: Line | None = None
        """The run's last line so far; after a restart of the ranks it may be of a step that was taken before."""

    def new_lines(self) -> Iterator[Line]:
        """Yield the lines of the run with a step not yet yielded, in order."""
        size = self._store.size(METRICS_KEY) if self._store.exists(METRICS_KEY) else 0
        if size < self._offset:
            self._offset = 0
        if size == self._offset:
            return
        raw = self._store.read_range(METRICS_KEY, self._offset, size)
        whole = raw[: raw.rfind(b"\n") + 1]
        self._offset += len(whole)
        own = [line for line in parse_lines(whole) if line.get("run") == self._run]
        self.newest = own[-1] if own else self.newest
        for line in own:
            if line.get("step", -1) > self._step:
                self._step = line["step"]
                yield line


class _Sink(Protocol):
    def write(self, line: Line) -> None: ...
    def close(self) -> None: ...


class _LocalSink:
    def __init__(self, path: Path) -> None:
        self._file = path.open("ab")

    def write(self, line: Line) -> None:
        self._file.write(_to_bytes([line]))
        self._file.flush()

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()


class _RemoteSink:
    def __init__(self, store: Store, lines: list[Line]) -> None:
        self._store = store
        self._text = _to_bytes(lines)
        self._written_at = time.monotonic()

    def write(self, line: Line) -> None:
        self._text += _to_bytes([line])
        if time.monotonic() - self._written_at >= REWRITE_EVERY_S:
            self.close()

    def close(self) -> None:
        self._store.write(METRICS_KEY, self._text)
        self._written_at = time.monotonic()


def _again(line: Line, run: str, resumed_from: int) -> bool:
    return line.get("run") == run and line.get("step", 0) > resumed_from


def _to_bytes(lines: list[Line]) -> bytes:
    return "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode()
