"""Finds processes that this test process has started, and none of anybody else's."""

import os
from pathlib import Path


def own_processes(name: str) -> list[int]:
    """Return the ids of this process's descendants whose command line begins with `name`, rising."""
    numbers = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return sorted(pid for pid in numbers if _command(pid).startswith(name.encode()) and _descends(pid, os.getpid()))


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _descends(pid: int, ancestor: int) -> bool:
    while pid > 1:
        if pid == ancestor:
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return False
