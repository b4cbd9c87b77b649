"""Real faults for the tests: a filesystem that drops requests and replies, a full disk, a user without rights."""

import contextlib
import ctypes
import os
import random
import resource
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from fsspec.implementations.memory import MemoryFileSystem

NOBODY = 65_534


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


class FaultyProxy:
    """An S3 server in front of another one that fails a share of the requests: 500, 503, short bodies, hang-ups."""

    def __init__(self, endpoint: str, rate: float, seed: int) -> None:
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
                upstream.request(self.command, self.path, body, dict(self.headers))
                reply = upstream.getresponse()
                content = reply.read()
                upstream.close()
                self.close_connection = fault in {"short", "lost"}
                if fault != "lost":
                    short = fault == "short" and self.command == "GET"
                    self._answer(
                        reply.status, dict(reply.headers), content, content[: len(content) // 2] if short else content
                    )

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _forward  # noqa: N815

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
