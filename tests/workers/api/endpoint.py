"""Starts the faulty server in a process of its own and asks it what it billed."""

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("faulty_server.py")


class Endpoint:
    """A running server."""

    def __init__(self, port: int) -> None:
        self.root = f"http://127.0.0.1:{port}"
        self.url = f"{self.root}/v1"

    def stats(self) -> Any:
        """Return what it billed and was asked."""
        with urllib.request.urlopen(f"{self.root}/stats", timeout=10) as answer:
            return json.load(answer)

    def control(self, **settings: Any) -> None:
        """Change its settings."""
        data = json.dumps(settings).encode()
        urllib.request.urlopen(urllib.request.Request(f"{self.root}/control", data), timeout=10).close()


@contextmanager
def endpoint(**settings: Any) -> Iterator[Endpoint]:
    """Run a server with these settings; it ends with the block."""
    command = [sys.executable, str(SCRIPT), json.dumps(settings)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            yield Endpoint(int(process.stdout.readline()))
        finally:
            process.stdin.close()
            process.wait(timeout=10)
