"""Real faults for the tests: a filesystem that drops requests and replies, a full disk, a user without rights."""

import contextlib
import ctypes
import os
import random
import resource
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

from fsspec.implementations.memory import MemoryFileSystem

from storage.object_store import Store

NOBODY = 65_534
T = TypeVar("T")


class FlakyFileSystem(MemoryFileSystem):
    """Memory that fails: `faults` maps a call's number to what happens to it."""

    protocol = "flaky"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    calls = 0
    faults: dict[int, str] = {}  # noqa: RUF012

    def _fault(self) -> str:
        FlakyFileSystem.calls += 1
        return FlakyFileSystem.faults.get(FlakyFileSystem.calls, "")

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        """Put, or fail before or after having put."""
        fault = self._fault()
        if fault == "before":
            raise TimeoutError("the request got lost")
        super().pipe_file(path, value, mode=mode, **kwargs)
        if fault == "after":
            raise ConnectionResetError("the reply got lost")

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        """Get, or fail."""
        if self._fault():
            raise TimeoutError("the request got lost")
        return bytes(super().cat_file(path, start=start, end=end, **kwargs))


@contextlib.contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """Leave about 100 kB of room: a tiny filesystem where mounting is allowed, else a limit on file sizes."""
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() == 0 and libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, b"size=100k") == 0:
        try:
            yield
        finally:
            libc.umount2(str(folder).encode(), 2)
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def as_ordinary_user() -> Iterator[None]:
    """Drop root's rights, which know no permissions, for the while of a test."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


class CarelessFileSystem(MemoryFileSystem):
    """Memory that ignores the condition of a create, as some object stores do."""

    protocol = "careless"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        """Put, whatever is there."""
        super().pipe_file(path, value, mode="overwrite", **kwargs)


class FaultyProxy:
    """An S3 server in front of another one that fails a share of the requests: 500, 503, short bodies, hang-ups.

    `careless`: it hands no `If-None-Match` on, like look-alikes that know nothing of conditional writes.
    """

    def __init__(self, endpoint: str, rate: float, seed: int, careless: bool = False) -> None:
        rng = random.Random(seed)
        host = endpoint.removeprefix("http://")
        self.num_faults = 0
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _forward(self) -> None:
                fault = rng.choice(["500", "503", "short", "lost", "hang up"]) if rng.random() < rate else ""
                proxy.num_faults += bool(fault)
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if fault in {"500", "503"}:
                    self._answer(int(fault), {}, b"")
                    return
                if fault == "hang up":
                    self.close_connection = True
                    return
                upstream = HTTPConnection(host, timeout=30)
                headers = {k: v for k, v in self.headers.items() if not careless or k.lower() != "if-none-match"}
                upstream.request(self.command, self.path, body, headers)
                reply = upstream.getresponse()
                content = reply.read()
                upstream.close()
                self.close_connection = fault in {"short", "lost"}
                if fault != "lost":
                    short = fault == "short" and self.command == "GET"
                    self._answer(
                        reply.status, dict(reply.headers), content, content[: len(content) // 2] if short else content
                    )

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _forward

            def _answer(self, status: int, headers: dict[str, str], content: bytes, sent: bytes | None = None) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    if name.lower() not in {"content-length", "connection", "transfer-encoding", "server", "date"}:
                        self.send_header(name, value)
                length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(content))
                self.send_header("Content-Length", length)
                self.end_headers()
                self.wfile.write(content if sent is None else sent)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FaultyProxy":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class Killed(BaseException):
    """Stands for the end of the process: nothing in the code catches it."""


class SteppedStore(Store):
    """A store whose process ends at the n-th change it makes, right before it or right after; 0 = never."""

    def __init__(self, url: str | Path, step: int = 0, after: bool = False) -> None:
        super().__init__(url)
        self.steps = 0
        self._last, self._after = step, after

    def write(self, key: str, data: bytes) -> None:
        """Count, and end here if it is time."""
        self._step(lambda: super(SteppedStore, self).write(key, data))

    def create(self, key: str, data: bytes) -> bool:
        """Count, and end here if it is time."""
        return self._step(lambda: super(SteppedStore, self).create(key, data))

    def delete(self, key: str) -> None:
        """Count, and end here if it is time."""
        self._step(lambda: super(SteppedStore, self).delete(key))

    def _step(self, change: Callable[[], T]) -> T:
        self.steps += 1
        if self.steps == self._last and not self._after:
            raise Killed
        result = change()
        if self.steps == self._last:
            raise Killed
        return result


class CountingStore(Store):
    """A store that counts its requests by kind."""

    def __init__(self, url: str | Path) -> None:
        super().__init__(url)
        self.requests: Counter[str] = Counter()
        self.bytes = 0

    def _retry(self, action: str, key: str, operation: Callable[[], T]) -> T:
        self.requests[action] += 1
        result = super()._retry(action, key, operation)
        self.bytes += len(result) if isinstance(result, bytes) else 0
        return result
