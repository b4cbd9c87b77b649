"""One job on a cluster: its name, its start, its log, its end."""

import asyncio
import re
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from pathlib import PurePosixPath
from typing import Any

from storage.errors import InputError, StorageError, WorkerError

RUN_DIR_KEY = "lectern_run_dir"
"""Key of a job's metadata: the run directory, without user, password and query."""
POLL_S = 1.0
"""Seconds between looks at a job whose log has ended or cannot be followed."""
_RECONNECTS = 20
_CLOSING_S = 15.0


def job_prefix(config_path: str, run_dir: str) -> str:
    """Return what the ids of all jobs of a run begin with: equal for equal run directories."""
    stem = re.sub(r"[^A-Za-z0-9]+", "-", PurePosixPath(config_path).stem).strip("-").lower()[:24] or "run"
    digest = blake2b(run_dir.rstrip("/").encode(), digest_size=4, person=b"lectern.job").hexdigest()
    return f"lectern-{stem}-{digest}-"


def next_id(prefix: str, taken: Mapping[str, bool]) -> tuple[str, bool]:
    """Return the id of the job that is at work on a run and True, or a fresh id and False.

    Two submissions at once find the same fresh id, of which the server takes one.

    Args:
        prefix: of the run's jobs, see `job_prefix`.
        taken: id → whether the job has ended, of all jobs of the cluster.
    """
    own = {name: ended for name, ended in taken.items() if name.startswith(prefix)}
    at_work = [name for name, ended in own.items() if not ended]
    if at_work:
        return max(at_work, key=_number), True
    return f"{prefix}{max((_number(name) for name in own), default=0) + 1}", False


def entrypoint(config_path: str, run_dir: str, overrides: Sequence[str]) -> str:
    """Return the command that runs on the cluster; `python -m` takes the shipped code before an installed one."""
    words = ["python", "-m", "cluster.cli", "run", config_path, "--run-dir", run_dir]
    for override in overrides:
        words += ["--set", override]
    return shlex.join(words)


def jobs_of(client: Any) -> list[Any]:
    """Return the cluster's submitted jobs, oldest first."""
    return sorted((job for job in client.list_jobs() if job.submission_id), key=lambda job: job.start_time or 0)


def find(client: Any, job_id: str) -> Any:
    """Return a job's details; InputError, naming the jobs that there are, when it is unknown."""
    try:
        return client.get_job_info(job_id)
    except RuntimeError as error:
        known = ", ".join(job.submission_id for job in jobs_of(client)[-5:]) or "none"
        raise InputError(f"the cluster knows no job {job_id}; its latest are: {known}") from error


def start(client: Any, job_id: str, command: str, runtime_env: dict[str, Any], run_dir: str) -> bool:
    """Submit a job; returns False when another submission took the id at the same moment."""
    try:
        client.submit_job(
            entrypoint=command, submission_id=job_id, runtime_env=runtime_env, metadata={RUN_DIR_KEY: run_dir}
        )
    except RuntimeError as error:
        if "already exists" in str(error):
            return False
        raise InputError(f"the cluster did not take the job: {_reason(error)}") from error
    return True


def follow(client: Any, job_id: str, write: Callable[[str], None]) -> Any:
    """Pass a job's log to `write` until it ends; returns its details.

    A log that breaks off is taken up where it broke off. KeyboardInterrupt passes through: the job goes on.

    Raises StorageError when the cluster cannot be reached any more.
    """
    shown = 0
    for attempt in range(_RECONNECTS):
        try:
            shown = asyncio.run(_tail(client, job_id, shown, write))
            return _wait_for_end(client, job_id)
        except (RuntimeError, OSError, TimeoutError) as error:
            reason = error
            shown = error.shown if isinstance(error, _BrokenOffError) else shown
        time.sleep(min(POLL_S * 2**attempt, 30.0))
    raise StorageError(f"the log of {job_id} cannot be followed any more ({_reason(reason)}); the job itself goes on")


class _BrokenOffError(RuntimeError):
    def __init__(self, message: str, shown: int) -> None:
        super().__init__(message)
        self.shown = shown


async def _tail(client: Any, job_id: str, shown: int, write: Callable[[str], None]) -> int:
    """Write what of the log comes after the first `shown` characters; returns its length."""
    seen = 0
    try:
        async for text in client.tail_job_logs(job_id):
            fresh = text[max(shown - seen, 0) :]
            seen += len(text)
            if fresh:
                write(fresh)
    except Exception as error:
        raise _BrokenOffError(_reason(error), max(shown, seen)) from error
    return max(shown, seen)


def _wait_for_end(client: Any, job_id: str) -> Any:
    """Wait for the state that belongs to a log's end."""
    deadline = time.monotonic() + _CLOSING_S
    while True:
        found = client.get_job_info(job_id)
        if found.status.is_terminal():
            return found
        if time.monotonic() > deadline:
            raise RuntimeError("its log ended and it did not")
        time.sleep(POLL_S)


def outcome(job: Any, again: str) -> int:
    """Return the exit code of a job that has ended: its own command's.

    Raises WorkerError when it did not end by itself, with `again`, the way to go on.
    """
    status, code = str(job.status), job.driver_exit_code
    if status == "SUCCEEDED":
        return 0
    if status == "FAILED" and code in {1, 2, 3}:
        return int(code)
    how = "was stopped" if status == "STOPPED" else f"was ended from outside ({_reason(job.message or status)})"
    raise WorkerError(f"job {job.submission_id} {how}; what it committed is kept. {again}")


def _number(job_id: str) -> int:
    tail = job_id.rpartition("-")[2]
    return int(tail) if tail.isdigit() else 0


def _reason(error: object) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
