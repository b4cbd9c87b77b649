"""Real faults for the tests: a filesystem that drops requests and replies, a full disk, a user without rights."""

import contextlib
import ctypes
import os
import resource
from collections.abc import Iterator
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
