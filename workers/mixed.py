"""A fleet of two kinds on one queue: local replicas, and actors that ask an endpoint which serves the same weights.

Both commit the same units to the same dataset. The kind whose token costs less is started and filled first; the other
one takes what the first has no room for. What the endpoint leaves undone, because of a cap or for want of an answer,
the local replicas do in the end.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from storage.config import CacheConfig
from storage.identity import DatasetIdentity
from storage.sample_set import SampleSet
from storage.samples import Int64Array
from workers.api.actor import ApiJob, ApiReceipt
from workers.api.capture import ApiCaptureResult, ApiReplica, api_kind, spending
from workers.api.scoring import ScoringMethod
from workers.config import TeacherConfig
from workers.coordinator import capture
from workers.fleet import LocalReplicas, fleet_policy, local_kind
from workers.ledger.ledger import Budget
from workers.local.rank import CaptureJob, Rank
from workers.local_fleet import local_replicas, never_comes
from workers.loop import FleetLoop, OnEvent
from workers.model_folder import model_facts
from workers.policy import ReplicaKind
from workers.replica import Post, Replica
from workers.resources import Machines, free_resources
from workers.units import WorkUnit
from workers.work import Work, plan_work


def capture_mixed(
    teacher: TeacherConfig,
    cache: CacheConfig,
    model_folder: Path,
    samples: SampleSet,
    rows: Sequence[int] | Int64Array,
    identity: DatasetIdentity,
    method: ScoringMethod,
    ledger_url: str,
    budget: Budget,
    machines: Machines,
    on_event: OnEvent,
    tokens_per_s: float | None = None,
) -> ApiCaptureResult:
    """Score the samples at `rows` that the dataset lacks, here and through an endpoint; Ray must be running.

    `tokens_per_s` is a local replica's rate, where one is known: with the machines' price it says what a token costs
    here. Otherwise as `workers.coordinator.capture` and `workers.api.capture.capture_api`.

    Raises:
        InputError: model, endpoint, dataset or a setting is wrong.
        StorageError: a store failed.
        WorkerError: no replica could be started, or too many samples are refused.
    """
    with plan_work(teacher, cache, samples, rows, identity, on_event, model_facts(model_folder).vocab_size) as work:
        result = ApiCaptureResult(reused_samples=work.reused, refused=dict(work.refused.reasons))
        if len(work.units):
            local = CaptureJob(teacher, model_folder, samples.url, cache.url, identity)
            api = ApiJob(teacher, samples.url, cache.url, identity, method, cache.retry_refused)
            here = local_replicas(local, teacher, machines, Rank)
            kinds = mixed_kinds(teacher, machines, tokens_per_s)
            _run(work, result, here, api, kinds, machines, ledger_url, budget, on_event)
    if result.stopped is None and not result.unanswered:
        return result
    rest = capture(teacher, cache, model_folder, samples, rows, identity, machines, on_event)
    result.scored_samples += rest.scored_samples
    result.tokens += rest.tokens
    result.failed_units += rest.failed_units
    result.replicas_lost += rest.replicas_lost
    result.stopped, result.unanswered = None, {}
    return result


def mixed_kinds(teacher: TeacherConfig, machines: Machines, tokens_per_s: float | None) -> list[ReplicaKind]:
    """Return the two kinds of replicas with what a token costs on each; a local one is free while that is unknown."""
    here = machines.price_per_hour / 3600 / tokens_per_s if tokens_per_s else 0.0
    return [
        replace(local_kind(teacher, machines), cost_per_token=here),
        replace(api_kind(teacher), max=1),
    ]


def _run(
    work: Work,
    result: ApiCaptureResult,
    here: LocalReplicas,
    api: ApiJob,
    kinds: Sequence[ReplicaKind],
    machines: Machines,
    ledger_url: str,
    budget: Budget,
    on_event: OnEvent,
) -> None:
    with spending(result, ledger_url, budget, "the teacher") as owner:

        def make(number: int, kind: ReplicaKind, post: Post) -> Replica[WorkUnit]:
            return ApiReplica(number, api, owner, post) if kind.name == "api" else here.make(number, kind, post)

        def on_done(unit: WorkUnit, receipt: Any) -> dict[str, Any]:
            work.refused.add(receipt.refused)
            if not isinstance(receipt, ApiReceipt):
                return {"by": "local", **result.add(unit, receipt)}
            on_event({"event": "spending", **vars(ray.get(owner.standing.remote()))})
            return {"by": "api", **result.add_receipt(unit, receipt)}

        loop = FleetLoop(
            work.in_any_order(),
            work.units.tokens,
            kinds,
            make,
            fleet_policy(api.teacher),
            on_event,
            on_done,
            why_waiting=free_resources,
            hopeless=lambda kind: kind.name != "api" and never_comes(machines),
        )
        result.run(loop, work.refused.reasons)
