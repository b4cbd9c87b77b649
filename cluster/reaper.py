"""Ends what a killed run leaves behind: started beside a local Ray, it waits for its parent's end of a pipe to close.

Ray's head and workers go by themselves, but its two agents only after a minute, and ranks may linger while they hold
files of the run directory. A process belongs to the session when it carries the session's environment variable or
has a file of the session's folder open: setting a process title wipes out part of the environment that can be read.

Runs alone (`python -I -S reaper.py NAME=VALUE DRIVER_PID GRACE_S`), so it imports the standard library only.
"""

import contextlib
import os
import re
import signal
import sys
import time
from pathlib import Path


def session_processes(mark: str, driver_pid: int) -> list[int]:
    """Return the ids of this user's other processes that belong to the session of a driver.

    `mark` is `NAME=VALUE` as in the environment; Ray names its session folder after the time and the driver's id.
    """
    folder = re.compile(rf"/session_[0-9_-]+_{driver_pid}/")
    own = {os.getpid(), driver_pid}
    numbers = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in numbers if pid not in own and _belongs(pid, mark.encode(), folder)]


def _belongs(pid: int, mark: bytes, folder: re.Pattern[str]) -> bool:
    process = Path(f"/proc/{pid}")
    with contextlib.suppress(OSError):  # ended meanwhile, or another user's
        if mark in (process / "environ").read_bytes().split(b"\0"):
            return True
        for descriptor in (process / "fd").iterdir():
            with contextlib.suppress(OSError):
                if folder.search(str(descriptor.readlink())):
                    return True
    return False


def end_all(mark: str, driver_pid: int, grace_s: float) -> None:
    """Ask all processes of a session to end, and kill after `grace_s` seconds those that did not."""
    for number, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 1.0)):
        for pid in session_processes(mark, driver_pid):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)
        deadline = time.monotonic() + wait_s
        while session_processes(mark, driver_pid) and time.monotonic() < deadline:
            time.sleep(0.1)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.stdin.buffer.read()
    end_all(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
