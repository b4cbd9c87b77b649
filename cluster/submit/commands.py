"""`lectern submit` and `lectern job`: between the command line and the job server."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import Any

from cluster.config import RunConfig
from cluster.figures import duration, size
from cluster.loader import load_config
from cluster.submit import job as jobs
from cluster.submit.connect import JobServer, connect
from cluster.submit.environment import api_key_name, job_environment, secret_values
from cluster.submit.places import check_places
from cluster.submit.shipment import CAP_BYTES, NEVER, Shipment, pack, survey
from cluster.terminal import Terminal
from storage.errors import InputError
from storage.store_errors import redact

_SHOWN = 12


@dataclass(frozen=True)
class SubmitOptions:
    """What `lectern submit` was told besides the config."""

    address: str
    run_dir: str | None
    overrides: Sequence[str] = ()
    environment: Sequence[str] = ()
    working_dir: str = "."
    follow: bool = True
    dry_run: bool = False
    any_version: bool = False


def submit(out: Terminal, path: str, options: SubmitOptions) -> dict[str, Any]:
    """Show what would ship, submit `lectern run` as a job, and follow it; its exit code is the job's.

    A run that a job is at work on is followed instead of submitted again.

    Raises:
        InputError: before anything is sent; see the modules beside this one.
        WorkerError: the job was stopped or ended from outside.
    """
    config = load_config(path, options.overrides)
    environment = job_environment(config, options.environment, os.environ)
    key = api_key_name(config)
    secrets = secret_values(environment, os.environ, [] if key is None else [key])
    shipment = survey(Path(options.working_dir).expanduser(), secrets)
    config_path = _config_path(path, shipment)
    folders = check_places(config, options.run_dir, shipment, config_path)
    assert options.run_dir is not None
    command = jobs.entrypoint(config_path, options.run_dir, options.overrides)
    for line in describe(shipment, environment, folders, command):
        out.say(line)
    if note := _key_note(config, environment):
        out.say(note)
    if options.dry_run:
        with tempfile.TemporaryDirectory(prefix="lectern-ship-") as folder:
            packed = pack(shipment, Path(folder) / "working_dir.zip")
        out.say(f"nothing was sent (--dry-run); the package would be {size(packed)}")
        return {"files": len(shipment.files), "bytes": packed, "secrets": shipment.secrets, "command": command}
    server = connect(options.address, options.any_version)
    for note in server.notes:
        out.say(f"note: {note}")
    job_id = _start(out, server, shipment, command, environment, options.run_dir, config_path)
    if not options.follow:
        out.say(_hints(job_id, server.address))
        return {"job": job_id, "run_dir": redact(options.run_dir), "status": "submitted"}
    return _follow(out, server, job_id)


def _config_path(path: str, shipment: Shipment) -> str:
    if "://" in path:
        return path
    file = Path(path).expanduser().resolve()
    if not file.is_relative_to(shipment.folder):
        raise InputError(
            f"config {path} lies outside of {shipment.folder}, which ships; name its folder with --working-dir"
        )
    return file.relative_to(shipment.folder).as_posix()


def describe(shipment: Shipment, environment: dict[str, str], folders: list[str], command: str) -> list[str]:
    """Return the lines that say what goes and what stays."""
    largest = ", ".join(f"{name} {size(num_bytes)}" for name, num_bytes in shipment.largest(3))
    reasons: dict[str, list[str]] = {}
    for name, why in shipment.left_out.items():
        # Every package has its __pycache__; once is enough.
        shown = PurePath(name).name + name[len(name.rstrip("/")) :] if why == NEVER else name
        reasons.setdefault(why, [])
        if shown not in reasons[why]:
            reasons[why].append(shown)
    lines = [
        f"ships      {len(shipment.files):,} files of {shipment.folder}, {size(shipment.num_bytes)} before compression "
        f"(a package may have {size(CAP_BYTES)}); the largest: {largest or 'none'}"
    ]
    lines += [f"stays      {_listed(names)} ({why})" for why, names in reasons.items()]
    lines += [f"SECRET     {name} stays here ({why})" for name, why in shipment.secrets.items()]
    lines.append(f"takes      {', '.join(environment)} (values are not shown)")
    if folders:
        lines.append(f"must be    on every node: {', '.join(folders)}")
    lines.append(f"runs       {redact_words(command)}")
    return lines


def _key_note(config: RunConfig, environment: dict[str, str]) -> str:
    key = api_key_name(config)
    if key is None or key in environment:
        return ""
    return f"note: {key} is not set here, so the nodes must have it: the teacher's endpoint asks for that key"


def redact_words(command: str) -> str:
    """Return a command whose URLs show no user, password or query."""
    return " ".join(redact(word) if "://" in word else word for word in command.split(" "))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _start(
    out: Terminal,
    server: JobServer,
    shipment: Shipment,
    command: str,
    environment: dict[str, str],
    run_dir: str,
    config_path: str,
) -> str:
    prefix = jobs.job_prefix(config_path, run_dir)
    with tempfile.TemporaryDirectory(prefix="lectern-ship-") as folder:
        archive = Path(folder) / "working_dir.zip"
        packed: int | None = None
        while True:
            taken = {found.submission_id: found.status.is_terminal() for found in jobs.jobs_of(server.client)}
            job_id, at_work = jobs.next_id(prefix, taken)
            if at_work:
                out.say(f"job {job_id} is at work on {redact(run_dir)} already; following it instead of a second one")
                return job_id
            packed = packed or pack(shipment, archive)
            runtime_env = {"working_dir": str(archive), "env_vars": environment}
            if jobs.start(server.client, job_id, command, runtime_env, redact(run_dir)):
                out.say(f"submitted  {job_id}, {size(packed)}, to {redact(server.address)} (Ray {server.ray_version})")
                return job_id


def _follow(out: Terminal, server: JobServer, job_id: str) -> dict[str, Any]:
    hints = _hints(job_id, server.address)
    out.say(hints)

    def write(text: str) -> None:
        out.stream.write(text)
        out.stream.flush()

    try:
        found = jobs.follow(server.client, job_id, write)
    except KeyboardInterrupt:
        out.say(f"\nno longer following; {job_id} goes on\n{hints}")
        return {"job": job_id, "status": "RUNNING", "exit_code": 1}
    began, ended = found.start_time, found.end_time
    took = f" after {duration((ended - began) / 1000)}" if began and ended else ""
    code = jobs.outcome(found, "The same `lectern submit` goes on from there.")
    out.say(f"job {job_id}: {found.status}{took}, exit code {code}")
    return {"job": job_id, "status": str(found.status), "exit_code": code}


def _hints(job_id: str, address: str) -> str:
    return (
        f"follow it  lectern job logs {job_id} --address {redact(address)}\n"
        f"stop it    lectern job stop {job_id} --address {redact(address)}"
    )


def job_command(out: Terminal, action: str, job_id: str | None, address: str, any_version: bool) -> dict[str, Any]:
    """Do what `lectern job` asks: `list`, `status`, `logs` or `stop`."""
    server = connect(address, any_version)
    if action == "list":
        listed = [_facts(found) for found in jobs.jobs_of(server.client)]
        for facts in listed:
            out.say(_line(facts))
        if not listed:
            out.say("no jobs yet")
        return {"jobs": listed}
    if job_id is None:
        raise InputError(f"name the job: lectern job {action} JOB; `lectern job list` shows them")
    found = jobs.find(server.client, job_id)
    if action == "logs":
        return _follow(out, server, job_id)
    if action == "stop":
        stopped = bool(server.client.stop_job(job_id))
        out.say(f"{job_id} is being stopped" if stopped else f"{job_id} had ended already ({found.status})")
        return {"job": job_id, "stopped": stopped}
    facts = _facts(found)
    out.say(_line(facts))
    if found.message:
        out.say(f"  {found.message.strip().splitlines()[0]}")
    return facts


def _facts(found: Any) -> dict[str, Any]:
    return {
        "job": found.submission_id,
        "status": str(found.status),
        "started": _moment(found.start_time),
        "ended": _moment(found.end_time),
        "run_dir": (found.metadata or {}).get(jobs.RUN_DIR_KEY),
    }


def _line(facts: dict[str, Any]) -> str:
    ended = f", ended {facts['ended']}" if facts["ended"] else ""
    return f"{facts['job']}  {facts['status']}  since {facts['started']}{ended}  {facts['run_dir'] or ''}".rstrip()


def _moment(milliseconds: int | None) -> str | None:
    if not milliseconds:
        return None
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds")
