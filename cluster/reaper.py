"""Ends what a killed run leaves behind: started beside a local Ray, it waits for its parent's end of a pipe to close.

Ray's head, workers and agents go by themselves, but the agents only after a minute, and ranks may linger while
they hold files of the run directory. Every process of the session carries one environment variable, by which it
is found here. Runs alone (`python -I -S reaper.py NAME=VALUE GRACE_S`), so it imports the standard library only.
"""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path


def marked_processes(mark: bytes) -> list[int]:
    """Return the ids of this user's other processes whose environment holds `mark` (`NAME=VALUE`)."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            with contextlib.suppress(OSError):  # ended meanwhile, or another user's
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
    return found


def end_all(mark: bytes, grace_s: float) -> None:
    """Ask all marked processes to end, and kill after `grace_s` seconds those that did not."""
    for number, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 1.0)):
        for pid in marked_processes(mark):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)
        deadline = time.monotonic() + wait_s
        while marked_processes(mark) and time.monotonic() < deadline:
            time.sleep(0.1)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.stdin.buffer.read()
    end_all(sys.argv[1].encode(), float(sys.argv[2]))
