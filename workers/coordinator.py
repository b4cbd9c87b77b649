"""Feeds a fleet of teacher replicas until every sample asked for is in the dataset.

The manifests are the only durable state: the coordinator may die at any moment, and the next one plans again from what
is missing. Work in flight is bounded; nothing bigger than a receipt comes through here.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from storage.config import CacheConfig
from storage.errors import LecternError, WorkerError
from storage.identity import DatasetIdentity
from storage.parts import TargetReader
from storage.sample_set import SampleSet
from storage.samples import Int64Array
from storage.union import DatasetUnion, dataset_urls
from storage.writer import DatasetWriter
from workers.config import TeacherConfig
from workers.fleet import LocalReplica, log_hint, rank_bundle
from workers.local.rank import CaptureJob, Rank, UnitReceipt
from workers.loop import FleetLoop, OnEvent, brief
from workers.metrics import FleetMetrics
from workers.model_folder import model_facts
from workers.policy import FailureKind, FleetPolicy, ReplicaKind
from workers.replica import Done, Lost, News, Post
from workers.resources import autoscaler_refuses, describe, free_resources, placement_strategy
from workers.units import WorkUnit, plan_units


@dataclass
class CaptureResult:
    """What a capture did. Seconds of `forward_s`, `selection_s` and `commit_s` are summed over units."""

    scored_samples: int = 0
    reused_samples: int = 0
    """In the dataset before, or put there by another capture meanwhile."""
    tokens: int = 0
    """Tokens of the scored samples."""
    seconds: float = 0.0
    """Wall-clock time from the first ready replica to the last receipt."""
    forward_s: float = 0.0
    selection_s: float = 0.0
    commit_s: float = 0.0
    padded_tokens: int = 0
    """Tokens of the forward passes, padding included."""
    failed_units: list[dict[str, Any]] = field(default_factory=list)
    """Units set aside: `{unit, samples, attempts, error}`."""
    ranks: list[dict[str, Any]] = field(default_factory=list)
    """What each rank of the first replica held: `{rank, parameters_held, parameters_total, replicated}`."""
    replicas_lost: int = 0
    fleet: dict[str, Any] = field(default_factory=dict)
    """The fleet at the end, see `meter.FleetStatus`: machine seconds, idle seconds, their cost."""

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

    @property
    def padding(self) -> float:
        """Share of the forward passes' tokens that were padding."""
        return 1 - self.tokens / self.padded_tokens if self.padded_tokens else 0.0

    def add(self, unit: WorkUnit, receipt: UnitReceipt) -> dict[str, Any]:
        """Count a unit; returns the facts of its `unit_done` event."""
        if not receipt.scored:
            self.reused_samples += len(unit.rows)
            return {"samples": 0, "tokens": unit.num_tokens, "committed_elsewhere": True}
        self.scored_samples += len(unit.rows)
        self.tokens += unit.num_tokens
        self.forward_s += receipt.forward_s
        self.selection_s += receipt.selection_s
        self.commit_s += receipt.commit_s
        self.padded_tokens += receipt.padded_tokens
        return {
            "samples": len(unit.rows),
            "tokens": unit.num_tokens,
            "bytes": receipt.receipt.bytes,
            "padded_tokens": receipt.padded_tokens,
            "batch_tokens": receipt.batch_tokens,
            "forward_s": round(receipt.forward_s, 4),
            "selection_s": round(receipt.selection_s, 4),
            "commit_s": round(receipt.commit_s, 4),
        }


def missing_rows(samples: SampleSet, rows: Sequence[int] | Int64Array, dataset: TargetReader) -> list[int]:
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
    price_per_hour: float = 0.0,
    rank_class: type[Rank] = Rank,
    may_grow: bool = False,
    labels: Mapping[str, str] | None = None,
) -> CaptureResult:
    """Score the samples at `rows` that the dataset lacks; Ray must be running.

    Args:
        device: `cpu` or `gpu`, what each rank runs on.
        on_event: called in this process with `{event: …}` dicts: `single_writer`, `units_planned`, and those of
            `workers.loop`.
        price_per_hour: of one replica's machines, for the cost of idle time.
        rank_class: the actor class of a rank; another one may score in another way.
        may_grow: whether Ray is a cluster that an autoscaler may add nodes to.
        labels: what the nodes of the ranks must carry.

    Raises:
        InputError: the model, the dataset or a setting is wrong, or no node can hold a rank.
        StorageError: the store failed.
        WorkerError: no replica could be started.
    """
    notify = on_event or (lambda event: None)
    writer = DatasetWriter.create(cache.url, identity, model_facts(model_folder).vocab_size, cache.codec)
    if writer.lease is not None:
        notify({"event": "single_writer", "url": writer.store.shown(), "owner": writer.lease.record.owner})
    missing = missing_rows(samples, rows, DatasetUnion.open(dataset_urls(cache), identity))
    units = plan_units(missing, samples.num_tokens, samples.sample_ids, identity.fingerprint, cache.unit_tokens, rows)
    result = CaptureResult(reused_samples=len(rows) - len(missing))
    notify(
        {
            "event": "units_planned",
            "units": len(units),
            "samples": len(missing),
            "tokens": units.tokens,
            "reused_samples": result.reused_samples,
        }
    )
    if not len(units):
        writer.close()
        return result
    job = CaptureJob(teacher, model_folder, samples.url, cache.url, identity)
    on_device = "cuda" if device in {"gpu", "cuda"} else "cpu"
    kind = local_kind(teacher, on_device, price_per_hour)
    strategy = placement_strategy(rank_bundle(on_device), teacher.ranks, may_grow=may_grow)

    batches, metrics = _BatchLimit(teacher.batch_tokens), FleetMetrics()

    def tell(event: dict[str, Any]) -> None:
        metrics.take(event)
        notify(event)

    def make(number: int, _kind: ReplicaKind, post: Post) -> LocalReplica:
        smaller = replace(job, teacher=teacher.model_copy(update={"batch_tokens": batches.tokens}))
        return LocalReplica(number, smaller, on_device, strategy, batches.watch(post), rank_class, labels)

    # Two captures of the same dataset begin at different places, so that each finds the other's units done.
    ordered = units.rotated(random.SystemRandom().randrange(len(units)))
    loop = FleetLoop(
        ordered,
        units.tokens,
        [kind],
        make,
        fleet_policy(teacher),
        tell,
        result.add,
        why_waiting=free_resources,
        hopeless=lambda kind: may_grow and autoscaler_refuses(rank_bundle(on_device)),
    )
    try:
        loop.run()
    except LecternError:
        raise
    except Exception as error:
        raise WorkerError(
            f"the teacher did not start, {teacher.max_attempts} times in a row: {brief(error)}; a rank that dies while "
            f"loading is often out of memory: {log_hint()}, or raise teacher.ranks"
        ) from error
    finally:
        writer.close()
        result.failed_units, result.replicas_lost = loop.failed_units, loop.replicas_lost
        result.seconds, result.fleet = loop.seconds, loop.status().to_json()
        result.ranks = loop.first_report or []
    return result


class _BatchLimit:
    """Remembers for new replicas what size of batch ran out of memory on earlier ones."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def watch(self, post: Post) -> Post:
        """Return `post` with an eye on the news of a new replica; its smaller limit holds for those made later."""
        given = self.tokens

        def watched(news: News) -> None:
            if isinstance(news, Lost) and news.kind is FailureKind.MEMORY:
                self.tokens = max(1, min(self.tokens, given // 2))
            elif isinstance(news, Done) and news.receipt.batch_tokens:
                self.tokens = min(self.tokens, news.receipt.batch_tokens)
            post(news)

        return watched


def local_kind(teacher: TeacherConfig, device: str, price_per_hour: float = 0.0) -> ReplicaKind:
    """Return what the fleet needs to know of a local teacher's replicas."""
    return ReplicaKind(
        name="local",
        needs=describe(rank_bundle(device), teacher.ranks),
        min=teacher.replicas.min,
        max=teacher.replicas.max,
        price_per_hour=price_per_hour,
    )


def fleet_policy(teacher: TeacherConfig) -> FleetPolicy:
    """Return the limits that the config sets."""
    return FleetPolicy(
        max_attempts=teacher.max_attempts,
        startup_timeout_s=teacher.startup_timeout_s,
        unit_timeout_s=teacher.unit_timeout_s,
        heartbeat_timeout_s=teacher.heartbeat_timeout_s,
    )
