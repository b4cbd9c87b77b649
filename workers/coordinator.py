"""Feeds a fleet of teacher replicas until every sample asked for is in the dataset.

The manifests are the only durable state: the coordinator may die at any moment, and the next one plans again from what
is missing. Work in flight is bounded; nothing bigger than a receipt comes through here.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ray

from storage.config import CacheConfig
from storage.errors import WorkerError
from storage.identity import DatasetIdentity
from storage.reader import Dataset
from storage.sample_set import SampleSet
from storage.samples import Int64Array
from storage.writer import DatasetWriter
from workers.config import TeacherConfig
from workers.fleet import FailureDecision, Replica, ReplicaState, decide, is_loss, log_hint, root_cause
from workers.local.rank import CaptureJob, UnitReceipt
from workers.model_folder import model_facts
from workers.units import WorkUnit, plan_units

UNITS_IN_FLIGHT = 2
"""Units given to a replica at once: the next one starts while the receipt of the last travels."""
POLL_S = 1.0
"""Longest wait before deadlines are looked at."""
WAITING_NOTICE_S = 15.0
"""A replica that waits longer for resources is reported."""

OnEvent = Callable[[dict[str, Any]], None]


@dataclass
class CaptureResult:
    """What a capture did. Seconds of `forward_s`, `selection_s` and `commit_s` are summed over units."""

    scored_samples: int = 0
    reused_samples: int = 0
    tokens: int = 0
    """Tokens of the scored samples."""
    seconds: float = 0.0
    """Wall-clock time from the first ready replica to the last receipt."""
    forward_s: float = 0.0
    selection_s: float = 0.0
    commit_s: float = 0.0
    failed_units: list[dict[str, Any]] = field(default_factory=list)
    """Units set aside: `{unit, samples, attempts, error}`."""
    ranks: list[dict[str, Any]] = field(default_factory=list)
    """What each rank of the first replica held: `{rank, parameters_held, parameters_total, replicated}`."""
    replicas_lost: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Tokens scored per second of wall-clock time, all replicas together."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def forward_tokens_per_s(self) -> float:
        """Tokens per second of one replica's forward passes alone."""
        return self.tokens / self.forward_s if self.forward_s else 0.0

    @property
    def efficiency(self) -> float:
        """Share of the replicas' working time that went into forward passes."""
        busy = self.forward_s + self.selection_s + self.commit_s
        return self.forward_s / busy if busy else 0.0


def missing_rows(samples: SampleSet, rows: Sequence[int] | Int64Array, dataset: Dataset) -> list[int]:
    """Return those of `rows` whose samples are not in the dataset yet."""
    ids = samples.ids(rows)
    return [int(rows[index]) for index in dataset.missing(ids)]


def capture(
    teacher: TeacherConfig,
    cache: CacheConfig,
    model_folder: Path,
    samples: SampleSet,
    rows: Sequence[int] | Int64Array,
    identity: DatasetIdentity,
    device: str = "cpu",
    on_event: OnEvent | None = None,
) -> CaptureResult:
    """Score the samples at `rows` that the dataset lacks; Ray must be running.

    Args:
        device: `cpu` or `gpu`, what each rank runs on.
        on_event: called in this process with `{event: …}` dicts: `units_planned`, `replica_started`, `ranks`,
            `waiting_for_resources`, `unit_done`, `unit_failed`, `replica_lost`.

    Raises:
        InputError: the model, the dataset or a setting is wrong.
        StorageError: the store failed.
        WorkerError: no replica could be started.
    """
    DatasetWriter.create(cache.url, identity, model_facts(model_folder).vocab_size)
    missing = missing_rows(samples, rows, Dataset.open(cache.url, identity))
    units = plan_units(missing, samples.num_tokens, samples.sample_ids, identity.fingerprint, cache.unit_tokens)
    job = CaptureJob(teacher, model_folder, samples.url, cache.url, identity)
    result = CaptureResult(reused_samples=len(rows) - len(missing))
    notify = on_event or (lambda event: None)
    notify(
        {
            "event": "units_planned",
            "units": len(units),
            "samples": len(missing),
            "tokens": sum(unit.num_tokens for unit in units),
            "reused_samples": result.reused_samples,
        }
    )
    if units:
        _Coordinator(job, units, "cuda" if device in {"gpu", "cuda"} else "cpu", notify, result).run()
    return result


class _Coordinator:
    """One capture in progress."""

    def __init__(
        self, job: CaptureJob, units: list[WorkUnit], device: str, notify: OnEvent, result: CaptureResult
    ) -> None:
        self.job, self.device, self.notify, self.result = job, device, notify, result
        self.queue: deque[tuple[WorkUnit, int]] = deque((unit, 1) for unit in units)
        self.replicas: list[Replica] = []
        self.num_started = 0
        self.failed_starts = 0
        self.first_ready: float | None = None

    def run(self) -> None:
        """Work until nothing is queued or in flight."""
        try:
            while self.queue or any(replica.work for replica in self.replicas):
                self._add_replicas()
                self._give_units()
                self._wait()
                self._check_deadlines()
        finally:
            for replica in self.replicas:
                replica.kill()

    def _add_replicas(self) -> None:
        in_flight = sum(len(replica.work) for replica in self.replicas)
        wanted = min(self.job.teacher.replicas, len(self.queue) + in_flight)
        while len(self.replicas) < wanted:
            self.num_started += 1
            self.replicas.append(Replica(self.num_started, self.job, self.device, self.job.teacher.startup_timeout_s))

    def _give_units(self) -> None:
        ready = [replica for replica in self.replicas if replica.state is ReplicaState.READY]
        for depth in range(UNITS_IN_FLIGHT):
            for replica in ready:
                if self.queue and len(replica.work) <= depth:
                    unit, attempt = self.queue.popleft()
                    replica.give(unit, attempt, self.job.teacher.unit_timeout_s)

    def _wait(self) -> None:
        """Wait for the next news of any replica and deal with it."""
        references = [ref for replica in self.replicas for ref in [*replica.waiting_for, *replica.work]]
        done, _ = ray.wait(references, num_returns=1, timeout=POLL_S)
        for replica in list(self.replicas):
            if replica.state is not ReplicaState.READY:
                self._advance(replica)
            elif done and done[0] in replica.work:
                self._collect(replica, done[0])

    def _advance(self, replica: Replica) -> None:
        finished, open_ = ray.wait(replica.waiting_for, num_returns=len(replica.waiting_for), timeout=0)
        try:
            # One failed rank is enough to know: the others may wait for it in vain.
            ray.get(finished)
            reports = None if open_ else replica.step()
        except Exception as error:
            self._start_failed(replica, root_cause(error))
            return
        if reports is not None:
            self.failed_starts = 0
            self.first_ready = self.first_ready or time.monotonic()
            held = [asdict(report) for report in reports]
            self.result.ranks = self.result.ranks or held
            self.notify({"event": "replica_started", "replica": replica.number, "ranks": held})

    def _collect(self, replica: Replica, reference: Any) -> None:
        unit, attempt, _ = replica.work[reference]
        try:
            receipt: UnitReceipt = ray.get(reference)
        except Exception as error:
            self._lose(replica, root_cause(error), unit)
            return
        del replica.work[reference]
        self.result.scored_samples += receipt.samples
        self.result.tokens += receipt.tokens
        self.result.forward_s += receipt.forward_s
        self.result.selection_s += receipt.selection_s
        self.result.commit_s += receipt.commit_s
        self.result.seconds = time.monotonic() - (self.first_ready or time.monotonic())
        self.notify(
            {
                "event": "unit_done",
                "unit": unit.unit_id,
                "replica": replica.number,
                "attempt": attempt,
                "samples": receipt.samples,
                "tokens": receipt.tokens,
                "bytes": receipt.receipt.bytes,
                "forward_s": round(receipt.forward_s, 4),
                "selection_s": round(receipt.selection_s, 4),
                "commit_s": round(receipt.commit_s, 4),
            }
        )

    def _lose(self, replica: Replica, error: BaseException, failed: WorkUnit) -> None:
        """Replace a replica whose unit failed: its ranks may be out of step. Its other units lose no attempt."""
        self.replicas.remove(replica)
        replica.kill()
        self.result.replicas_lost += is_loss(error)
        self.notify({"event": "replica_lost", "replica": replica.number, "error": _brief(error)})
        for unit, attempt, _ in replica.work.values():
            if unit is failed:
                self._decide_unit(unit, attempt, error)
            else:
                self.queue.appendleft((unit, attempt))

    def _decide_unit(self, unit: WorkUnit, attempt: int, error: BaseException) -> None:
        decision = decide(error, attempt, self.job.teacher.max_attempts, starting=False)
        if decision is FailureDecision.STOP:
            raise error
        if decision is FailureDecision.RETRY:
            self.queue.append((unit, attempt + 1))
            return
        failure = {
            "unit": unit.unit_id,
            "samples": len(unit.rows),
            "attempts": attempt,
            "error": _brief(error),
        }
        self.result.failed_units.append(failure)
        self.notify({"event": "unit_failed", **failure})

    def _start_failed(self, replica: Replica, error: BaseException) -> None:
        self.replicas.remove(replica)
        replica.kill()
        self.failed_starts += 1
        self.notify({"event": "replica_lost", "replica": replica.number, "error": _brief(error)})
        decision = decide(error, self.failed_starts, self.job.teacher.max_attempts, starting=True)
        if decision is FailureDecision.RETRY:
            return
        if is_loss(error) or not hasattr(error, "exit_code"):
            raise WorkerError(
                f"the teacher did not start, {self.failed_starts} times in a row: {_brief(error)}; a rank that dies "
                f"while loading is often out of memory: {log_hint()}, or raise teacher.ranks"
            ) from error
        raise error

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        for replica in list(self.replicas):
            if replica.state is not ReplicaState.READY:
                self._check_start(replica, now)
                continue
            late = [unit for unit, _, deadline in replica.work.values() if now > deadline]
            if late:
                limit = self.job.teacher.unit_timeout_s
                error = TimeoutError(f"unit {late[0].unit_id} took longer than teacher.unit_timeout_s = {limit:g}")
                self._lose(replica, error, late[0])

    def _check_start(self, replica: Replica, now: float) -> None:
        limit = self.job.teacher.startup_timeout_s
        waited = now - (replica.deadline - limit)
        if replica.state is ReplicaState.PLACING and waited > WAITING_NOTICE_S and not replica.noticed:
            replica.noticed = True
            self.notify(
                {
                    "event": "waiting_for_resources",
                    "replica": replica.number,
                    "needed": [replica.bundle] * self.job.teacher.ranks,
                    "available": ray.available_resources(),
                }
            )
        if now > replica.deadline:
            raise WorkerError(
                f"a replica was still {replica.state} after teacher.startup_timeout_s = {limit:g}; it needs "
                f"{self.job.teacher.ranks} × {replica.bundle}, the cluster has {ray.cluster_resources()}"
            )


def _brief(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
