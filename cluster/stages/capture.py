"""The teacher scores what the dataset does not hold yet."""

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from cluster.budget import standing_text
from cluster.checks import check_dataset
from cluster.figures import count
from cluster.progress import Shown
from cluster.selection import capture_rows
from cluster.stages.capture_api import score_api
from cluster.workspace import Workspace
from storage.card import write_card
from storage.compaction import compact_if_due
from storage.errors import BudgetError, WorkerError
from storage.info import read_info
from storage.object_store import Store
from storage.reader import Dataset
from storage.samples import Int64Array
from storage.shard_source import Reading
from storage.union import open_existing
from workers.ledger.ledger import Standing
from workers.resources import Machines
from workers.work import Lacking, check_refused, lacking

FLEET_EVERY_S = 30.0
"""Seconds between lines about the fleet in events.jsonl."""
_SHOWN_NAMES = 4
_RATES = ("tokens_per_s", "forward_tokens_per_s", "efficiency", "padding")


def capture(work: Workspace) -> dict[str, Any]:
    """Score the training samples, and the held-out ones that the evaluation needs, as far as they are missing.

    Starts Ray only when something is missing. Returns `{scored_samples, reused_samples, last}`, where `last` holds
    the figures of the last capture that scored anything. Raises WorkerError when units had to be set aside.
    """
    rows = capture_rows(work.samples, work.config.evaluate.samples_per_source)
    failed: list[dict[str, Any]] = []
    stopped: str | None = None
    unanswered: dict[str, int] = {}
    with work.stage("capture") as outcome, work.progress.task("Capturing soft targets", "tokens") as task:
        before = (work.run.result("capture") or {}).get("last", {})
        result: dict[str, Any] = {"scored_samples": 0, "reused_samples": len(rows), "last": before}
        left = still_lacking(work, rows)
        refused: Mapping[str, int] = left.refused
        check_refused(left.refused, len(rows), work.config.cache)
        if len(left.rows):
            result = _score(work, rows, task)
            stopped = result["last"].get("stopped")
            unanswered = result["last"].get("unanswered", {})
            failed = result["last"]["failed_units"]
            refused = result["last"]["refused"]
        else:
            result["reused_samples"] -= left.refused.total()
        tell_refused(task, refused)
        if len(rows):
            _compact(work)
        outcome.skipped = not result["scored_samples"]
        outcome.facts = {key: result[key] for key in ("scored_samples", "reused_samples")}
        if result["scored_samples"]:
            outcome.facts["work_s"] = round(result["last"].get("seconds", 0.0), 3)
        task.note(f"{count(result['scored_samples'])} samples scored, {count(result['reused_samples'])} reused")
    work.run.finish("capture", work.identity.fingerprint, result)
    if result["scored_samples"]:
        write_card(open_dataset(work))
    if stopped is not None:
        raise BudgetError(stopped)
    if unanswered:
        reason, number = max(unanswered.items(), key=lambda item: item[1])
        raise WorkerError(
            f"{sum(unanswered.values())} samples got no answer, {number} of them because of {reason}; all others are "
            "committed, and the same command asks only for these again"
        )
    if failed:
        raise WorkerError(
            f"{len(failed)} units could not be scored, the first after {failed[0]['attempts']} attempts: "
            f"{failed[0]['error']}. All others are committed; the same command tries only these again"
        )
    return result


def tell_refused(task: Shown, reasons: Mapping[str, int]) -> None:
    """Say how many samples are left out because the teacher refuses them, and why most of them are."""
    if reasons:
        reason, number = max(reasons.items(), key=lambda item: item[1])
        total = sum(reasons.values())
        task.say(
            f"  {count(total)} samples are left out: the teacher refuses them, {count(number)} because of: {reason}"
        )


def still_lacking(work: Workspace, rows: Int64Array) -> Lacking:
    """Return those of `rows` that no dataset of the run holds yet, and what the teacher refused of them before."""
    check_dataset(work.config, work.tokenizer, work.identity)
    dataset = open_existing(work.config.cache, work.identity)
    if dataset is None:
        return Lacking(rows, Counter())
    return lacking(work.config.teacher, work.config.cache, work.samples, rows, work.identity, dataset)


def _compact(work: Workspace) -> None:
    """Fold what was committed into one index when enough of it lies in manifests of its own."""
    store = Store(work.config.cache.url)
    report = compact_if_due(store, read_info(store))
    if report is not None:
        work.run.event("compacted", **asdict(report))


def open_dataset(work: Workspace) -> Dataset:
    """Open the run's dataset as it is now."""
    cache = work.config.cache
    return Dataset.open(cache.url, work.identity, Reading.of(cache))


def _score(work: Workspace, rows: Int64Array, task: Shown) -> dict[str, Any]:
    if work.config.teacher.kind != "local":
        return score_api(work, rows, task, _Follower(work, task).on_event)
    machines = work.machines(task)
    from workers.coordinator import capture as score_missing

    follower = _Follower(work, task)
    config = work.config
    if work.identity.capture.hidden_projection and not work.identity.capture.projection:
        _fit_projection(work, rows, machines, task, follower)
    found = score_missing(
        config.teacher,
        config.cache,
        work.model_folder,
        work.samples,
        rows,
        work.identity,
        machines,
        follower.on_event,
    )
    rates = {key: round(getattr(found, key), 4) for key in _RATES}
    return {
        "scored_samples": found.scored_samples,
        "reused_samples": found.reused_samples,
        "last": {**asdict(found), **rates},
    }


def _fit_projection(work: Workspace, rows: Int64Array, machines: Machines, task: Shown, follower: "_Follower") -> None:
    """Fit the projection of the hidden states, which completes the dataset's identity."""
    from workers.projection import fit_teacher_projection

    task.say("  fitting the projection of the hidden states")
    config = work.config
    work.identity = fit_teacher_projection(
        config.teacher,
        config.cache,
        work.model_folder,
        work.samples,
        rows,
        work.identity,
        machines,
        follower.on_event,
    )
    facts = work.run.result("teacher") or {}
    work.run.finish("teacher", work.identity.fingerprint, {**facts, "fingerprint": work.identity.fingerprint})


class _Follower:
    """Passes the coordinator's events on to events.jsonl and the progress bar."""

    def __init__(self, work: Workspace, task: Shown) -> None:
        self._work, self._task = work, task
        self._done = 0
        self._total = 0
        self._told = False
        self._kept_at = float("-inf")

    def on_event(self, event: dict[str, Any]) -> None:
        """Take one event; see `workers.coordinator.capture`."""
        facts = {key: value for key, value in event.items() if key != "event"}
        if event["event"] != "fleet" or self._is_due(facts):
            self._work.run.event(event["event"], **facts)
        match event["event"]:
            case "single_writer":
                self._task.say(
                    f"  {facts['url']} ignores conditional creates: this run alone may write to it until it ends"
                )
            case "units_planned":
                self._total = facts["tokens"]
                self._task.update(0, self._total, f"{facts['units']} units, starting the teacher")
            case "replica_started":
                if not self._told and all("rank" in rank for rank in facts["ranks"]):
                    self._told = True
                    self._task.start_from(self._done, self._total)
                    self._task.say(describe_ranks(facts["ranks"]))
            case "unit_done":
                self._done += facts["tokens"]
                self._task.update(self._done, self._total)
            case "fleet":
                self._task.update(self._done, self._total, describe_fleet(facts, self._work.config.budget.currency))
            case "waiting_for_resources":
                self._task.say(f"  replica {facts['replica']} waits for {facts['needed']}: {facts['why']}")
            case "spending":
                self._task.note(standing_text(Standing(**facts), 0))
            case "unit_failed" | "replica_lost" | "unit_retried":
                self._task.say(f"  {event['event'].replace('_', ' ')}: {facts['error']}")

    def _is_due(self, facts: dict[str, Any]) -> bool:
        """Keep one line of the fleet's state in `FLEET_EVERY_S`, and its last."""
        now = time.monotonic()
        if now - self._kept_at < FLEET_EVERY_S and not facts.get("ended"):
            return False
        self._kept_at = now
        return True


def describe_fleet(facts: dict[str, Any], currency: str) -> str:
    """Return the state of a fleet (see `meter.FleetStatus`) as the end of a progress line."""
    states = dict(facts["replicas"])
    busy, ready = states.pop("busy"), states.pop("ready")
    parts = [f"{busy} of {ready} replicas busy", *(f"{number} {state}" for state, number in states.items() if number)]
    parts.append(f"{facts['units_in_flight']} units in flight, {facts['units_queued']} queued")
    if facts["units_failed"]:
        parts.append(f"{facts['units_failed']} failed")
    if facts["idle_cost"]:
        parts.append(f"idle {facts['idle_cost']:.2f} {currency}")
    return ", ".join(parts)


def describe_ranks(ranks: list[dict[str, Any]]) -> str:
    """Return how the teacher's parameters lie over its ranks, in one line."""
    parts = [
        f"rank {rank['rank']} holds {rank['parameters_held'] / max(rank['parameters_total'], 1):.0%}" for rank in ranks
    ]
    replicated = sorted({name for rank in ranks for name in rank["replicated"]})
    total = f"{count(ranks[0]['parameters_total'])} parameters: " if ranks else ""
    more = f" and {len(replicated) - _SHOWN_NAMES} more" if len(replicated) > _SHOWN_NAMES else ""
    whole = f"; whole on every rank: {', '.join(replicated[:_SHOWN_NAMES])}{more}" if replicated else ""
    return f"  teacher of {total}{', '.join(parts)}{whole}"
