"""Feeds units to API replicas, by the same loop and dispatcher as local ones, until the dataset holds what it can."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray

from storage.config import CacheConfig
from storage.errors import LecternError, WorkerError
from storage.identity import DatasetIdentity
from storage.sample_set import SampleSet
from storage.samples import Int64Array
from workers.api.actor import ApiJob, ApiReceipt, ApiScorer, LedgerOwner
from workers.api.generated import NOT_FOUND, GeneratedText
from workers.api.scoring import ScoringMethod, targets_of, text_targets
from workers.config import TeacherConfig
from workers.fleet import classify, fleet_policy, root_cause
from workers.ledger.ledger import Budget, Standing
from workers.loop import FleetLoop, OnEvent, brief
from workers.policy import FailureKind, ReplicaKind
from workers.replica import Done, Failed, Lost, Placed, Post, Ready, Seen
from workers.result import CaptureResult
from workers.units import WorkUnit, unit_of
from workers.work import plan_work

UNITS_AT_ONCE = 4
"""Units that an API replica works on at a time: enough requests while the last ones of a unit are waited for."""


@dataclass
class ApiCaptureResult(CaptureResult):
    """What a capture through an API did, and what it left out."""

    unanswered: dict[str, int] = field(default_factory=dict)
    """Reason → samples that got no answer."""
    stopped: str | None = None
    """The cap that ended it."""
    standing: Standing | None = None
    """The run's account at the end."""

    def add_receipt(self, unit: WorkUnit, receipt: ApiReceipt) -> dict[str, Any]:
        """Count a unit; returns the facts of its `unit_done` event."""
        self.unanswered = dict(Counter(self.unanswered) + Counter(receipt.failed))
        self.stopped = self.stopped or receipt.stopped
        scored = receipt.receipt is not None and receipt.receipt.committed
        self.scored_samples += receipt.samples if scored else 0
        self.reused_samples += 0 if scored else receipt.samples
        self.tokens += receipt.tokens if scored else 0
        self.forward_s += receipt.forward_s
        self.commit_s += receipt.commit_s
        return {
            "samples": receipt.samples,
            "tokens": unit.num_tokens,
            "bytes": receipt.receipt.bytes if receipt.receipt is not None else 0,
            "refused": len(receipt.refused),
            "forward_s": round(receipt.forward_s, 4),
            "commit_s": round(receipt.commit_s, 4),
        }


class ApiReplica:
    """One actor; keeps `workers.replica.Replica`."""

    def __init__(self, number: int, job: ApiJob, owner: Any, post: Post) -> None:
        self.number, self._job, self._owner, self.post = number, job, owner, post
        self._actor: Any = None

    def start(self) -> None:
        """Make the actor and open its connections."""
        options = {"num_cpus": 0, "max_restarts": 0, "max_task_retries": 0, "max_concurrency": 2 * UNITS_AT_ONCE + 2}
        self._actor = ray.remote(ApiScorer).options(**options).remote(self._job, self._owner)
        self.post(Placed(self.number))
        self._when(self._actor.load.remote(), lambda facts: Ready(self.number, [facts]), None)

    def give(self, unit: WorkUnit, attempt: int) -> None:
        """Score and commit a unit."""
        receipt = self._actor.score.remote(unit, f"a{attempt}r{self.number}")
        self._when(receipt, lambda result: Done(self.number, unit.unit_id, result), unit.unit_id)

    def beat(self) -> None:
        """Ask how far it is."""
        self._when(self._actor.beat.remote(), lambda progress: Seen(self.number, progress), None)

    def kill(self) -> None:
        """End the actor."""
        if self._actor is not None:
            ray.kill(self._actor, no_restart=True)

    def _when(self, reference: Any, news: Any, unit_id: str | None) -> None:
        def arrived(future: Any) -> None:
            error = future.exception()
            if error is None:
                self.post(news(future.result()))
                return
            error = root_cause(error)
            kind = classify(error)
            if unit_id is not None and kind is not FailureKind.LOST:
                self.post(Failed(self.number, unit_id, kind, error))
            else:
                self.post(Lost(self.number, kind, error, unit_id))

        reference.future().add_done_callback(arrived)


def capture_api(
    teacher: TeacherConfig,
    cache: CacheConfig,
    samples: SampleSet,
    rows: Sequence[int] | Int64Array,
    identity: DatasetIdentity,
    method: ScoringMethod,
    ledger_url: str,
    budget: Budget,
    on_event: OnEvent,
) -> ApiCaptureResult:
    """Score the samples at `rows` that the dataset lacks through an endpoint; Ray must be running.

    Samples that are refused, or left by a cap, are told in the result. Events as of `workers.coordinator.capture`, and
    `spending` with the fields of `Standing` after each unit.

    Raises:
        InputError: key, model or a setting is wrong.
        StorageError: the dataset's or the ledger's store failed.
        WorkerError: no replica could be started, or the endpoint refuses too many samples.
    """
    with plan_work(teacher, cache, samples, rows, identity, on_event) as work:
        result = ApiCaptureResult(reused_samples=work.reused, refused=dict(work.refused.reasons))
        if not len(work.units):
            return result
        job = ApiJob(teacher, samples.url, cache.url, identity, method, cache.retry_refused)

        with spending(result, ledger_url, budget, "the API teacher") as owner:

            def on_done(unit: WorkUnit, receipt: ApiReceipt) -> dict[str, Any]:
                told = result.add_receipt(unit, receipt)
                on_event({"event": "spending", **vars(ray.get(owner.standing.remote()))})
                work.refused.add(receipt.refused)
                return told

            def make(number: int, _kind: ReplicaKind, post: Post) -> ApiReplica:
                return ApiReplica(number, job, owner, post)

            kinds = [api_kind(teacher)]
            loop = FleetLoop(work.units, work.units.tokens, kinds, make, fleet_policy(teacher), on_event, on_done)
            result.run(loop, work.refused.reasons)
        return result


@contextmanager
def spending(result: ApiCaptureResult, ledger_url: str, budget: Budget, who: str) -> Iterator[Any]:
    """Give the actor that owns the ledger while a fleet works; the account at the end goes into the result.

    Errors of the fleet come out as those of ours that they are, or as WorkerError that says `who` did not work.
    """
    owner = ray.remote(LedgerOwner).options(num_cpus=0, max_restarts=0).remote(ledger_url, budget)
    try:
        ray.get(owner.standing.remote())
        yield owner
        result.standing = ray.get(owner.standing.remote())
    except LecternError as error:
        raise root_cause(error) from None
    except Exception as error:
        raise WorkerError(f"{who} did not work: {brief(root_cause(error))}") from error
    finally:
        ray.kill(owner)


def api_kind(teacher: TeacherConfig) -> ReplicaKind:
    """Return what the fleet needs to know of an API teacher's replicas."""
    return ReplicaKind(
        name="api",
        needs="a connection",
        min=1,
        max=teacher.replicas.max,
        parallel=UNITS_AT_ONCE,
        cost_per_token=teacher.api.prices.input / 1e6 if teacher.api.prices is not None else 0.0,
        duplicates=False,
    )


def capture_generated(
    teacher: TeacherConfig,
    cache: CacheConfig,
    samples: SampleSet,
    rows: Sequence[int] | Int64Array,
    identity: DatasetIdentity,
    text: GeneratedText,
    on_event: OnEvent,
) -> ApiCaptureResult:
    """Commit the samples at `rows` that the teacher wrote itself, with what it thought of them; asks nobody anything.

    Samples of other text are refused. Raises WorkerError when these are too many.
    """
    with plan_work(teacher, cache, samples, rows, identity, on_event) as work:
        result = ApiCaptureResult(reused_samples=work.reused, refused=dict(work.refused.reasons))
        for unit in work.units:
            batch = samples.read(unit.rows)
            found = [text.score(batch.sample(n)) for n in range(len(batch))]
            done = [n for n, scored in enumerate(found) if scored is not None]
            if done:
                whole = unit_of(
                    [unit.rows[n] for n in done], samples.num_tokens, samples.sample_ids, identity.fingerprint
                )
                part = batch.take(done)
                targets = targets_of(part, [scored for scored in found if scored is not None])
                work.writer.commit(whole.unit_id, part, targets, "a1")
                result.scored_samples += len(part)
                result.tokens += part.num_tokens
            work.refused.add({batch.ids()[n]: NOT_FOUND for n, scored in enumerate(found) if scored is None})
        result.refused = dict(work.refused.reasons)
        return result


def keep_text(
    teacher: TeacherConfig,
    cache: CacheConfig,
    samples: SampleSet,
    rows: Sequence[int] | Int64Array,
    identity: DatasetIdentity,
) -> ApiCaptureResult:
    """Commit the samples at `rows` that the dataset lacks with kind `text`; asks nobody anything."""
    with plan_work(teacher, cache, samples, rows, identity, lambda event: None) as work:
        result = ApiCaptureResult(reused_samples=work.reused)
        for unit in work.units:
            batch = samples.read(unit.rows)
            work.writer.commit(unit.unit_id, batch, text_targets(batch), "a1")
            result.scored_samples += len(batch)
            result.tokens += batch.num_tokens
        return result
