"""A replica of a local teacher on Ray: a placement group with one rank actor per shard.

It comes up in steps, each begun when the references of the one before are there, and dies whole: a rank lost takes its
replica with it, and the coordinator makes a new one in its place.
"""

import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from storage.errors import IntegrityError, LecternError, StorageError
from workers.config import TeacherConfig
from workers.local.base_rank import BaseRank, BatchTooLargeError, RankPlace
from workers.policy import FailureKind, FleetPolicy, ReplicaKind
from workers.replica import Done, Failed, Lost, News, Placed, Post, Ready, Seen, Unit
from workers.resources import Machines, describe

SIDE_WORK = {"beat": 1, "commit": 1}
"""Methods of a rank that run beside scoring, one thread each: answers to heartbeats; encoding and upload."""


def root_cause(error: BaseException) -> BaseException:
    """Return the error behind Ray's wrapping of it."""
    while isinstance(error, RayTaskError) and error.cause is not None:
        error = error.cause
    return error


def classify(error: BaseException) -> FailureKind:
    """Tell whose fault an error that came through Ray is; `root_cause` first."""
    if isinstance(error, RayError) and not isinstance(error, RayTaskError):
        return FailureKind.LOST
    if isinstance(error, BatchTooLargeError):
        return FailureKind.MEMORY
    if isinstance(error, IntegrityError):
        return FailureKind.UNIT
    if isinstance(error, StorageError):
        return FailureKind.STORE
    return FailureKind.FATAL if isinstance(error, LecternError) else FailureKind.BROKEN


def when_all(
    references: Sequence[Any], then: Callable[[list[Any]], None], otherwise: Callable[[BaseException], None]
) -> None:
    """Call `then` with all results, or `otherwise` with the first error as soon as there is one; from Ray's threads.

    One failed rank is enough to know: the others may wait for it in vain.
    """
    lock, futures, left = threading.Lock(), [reference.future() for reference in references], [len(references)]

    def arrived(future: Any) -> None:
        with lock:
            left[0] -= 1
            failed = left[0] >= 0 and future.exception() is not None
            complete = left[0] == 0
            if failed:
                left[0] = -1
        if failed:
            otherwise(root_cause(future.exception()))
        elif complete:
            then([done.result() for done in futures])

    for future in futures:
        future.add_done_callback(arrived)


class Job(Protocol):
    """What the ranks of a replica are told when they load."""

    @property
    def teacher(self) -> TeacherConfig:
        """The model, and how it is split."""
        ...

    @property
    def batch_tokens(self) -> int:
        """Limit of a batch."""
        ...

    def limited(self, batch_tokens: int) -> "Job":
        """Return the job with another limit of a batch."""
        ...


class LocalReplica:
    """One copy of the teacher; keeps `workers.replica.Replica`."""

    def __init__(
        self,
        number: int,
        job: Job,
        device: str,
        strategy: str,
        post: Post,
        rank_class: type[BaseRank],
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """`device` is `cpu` or `cuda`, `strategy` the placement group's; `rank_class` does the work.

        Its `load` takes the job and a `RankPlace`, `score` a unit, `commit` a unit, a label of the attempt and what
        the ranks' `score` returned. `labels` are those that a node must carry to hold a rank.
        """
        self.number, self.job, self.device, self.strategy, self.post = number, job, device, strategy, post
        self._labels = dict(labels or {})
        self._rank_class = rank_class
        self._ranks: list[Any] = []
        self._group: PlacementGroup | None = None
        self._beating = False

    def start(self) -> None:
        """Ask the cluster for the resources; a pending placement group is what an autoscaler looks at."""
        num_ranks = self.job.teacher.ranks
        selectors = [self._labels] * num_ranks if self._labels else None
        bundles = [rank_bundle(self.device)] * num_ranks
        self._group = placement_group(bundles, strategy=self.strategy, bundle_label_selector=selectors)
        self._ranks = [self._actor(index) for index in range(num_ranks)]
        self._then([rank.address.remote() for rank in self._ranks], self._load)

    def give(self, unit: Unit, attempt: int) -> None:
        """Score a unit on all ranks and commit it on rank 0; parts go between the ranks, not through here."""
        boxes = [rank.score.remote(unit) for rank in self._ranks]
        label = f"a{attempt}r{self.number}"
        receipt = self._ranks[0].commit.options(concurrency_group="commit").remote(unit, label, *boxes)
        when_all(
            [*boxes, receipt],
            lambda results: self.post(Done(self.number, unit.unit_id, results[-1])),
            lambda error: self._unit_failed(unit.unit_id, error),
        )

    def beat(self) -> None:
        """Ask all ranks how far they are; one question at a time."""
        if self._beating:
            return
        self._beating = True

        def answered(progress: list[int]) -> None:
            self._beating = False
            self.post(Seen(self.number, min(progress)))

        asked = [rank.beat.options(concurrency_group="beat").remote() for rank in self._ranks]
        self._then(asked, answered)

    def kill(self) -> None:
        """End the actors and give the resources back."""
        for rank in self._ranks:
            ray.kill(rank, no_restart=True)
        if self._group is not None:
            remove_placement_group(self._group)

    def _load(self, addresses: list[Any]) -> None:
        self.post(Placed(self.number))
        places = rank_places(addresses, self.device)
        loading = [rank.load.remote(self.job, place) for rank, place in zip(self._ranks, places, strict=True)]
        self._then(loading, lambda reports: self.post(Ready(self.number, [asdict(report) for report in reports])))

    def _then(self, references: Sequence[Any], step: Callable[[list[Any]], None]) -> None:
        when_all(references, step, lambda error: self.post(Lost(self.number, classify(error), error)))

    def _unit_failed(self, unit_id: str, error: BaseException) -> None:
        kind = classify(error)
        # Of several ranks one has stopped within a unit, and the others wait for it: they are out of step for good.
        sound = len(self._ranks) == 1 and kind in {FailureKind.UNIT, FailureKind.STORE}
        self.post((Failed if sound else _lost)(self.number, unit_id, kind, error))

    def _actor(self, index: int) -> Any:
        assert self._group is not None
        bundle = rank_bundle(self.device)
        actor = ray.remote(num_cpus=bundle["CPU"], num_gpus=bundle.get("GPU", 0), concurrency_groups=SIDE_WORK)(
            self._rank_class
        )
        place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
        return actor.options(max_restarts=0, max_task_retries=0, scheduling_strategy=place).remote()


class LocalReplicas:
    """Makes replicas, and remembers for new ones what size of batch ran out of memory on earlier ones."""

    def __init__(
        self,
        job: Job,
        device: str,
        strategy: str,
        rank_class: type[BaseRank],
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """The arguments are those of `LocalReplica`."""
        self._job, self._device, self._strategy, self._rank_class = job, device, strategy, rank_class
        self._labels = labels
        self._batch_tokens = job.batch_tokens

    def make(self, number: int, _kind: ReplicaKind, post: Post) -> LocalReplica:
        """Return a replica, not started yet."""
        job = self._job.limited(self._batch_tokens)
        return LocalReplica(
            number, job, self._device, self._strategy, self._watched(post), self._rank_class, self._labels
        )

    def _watched(self, post: Post) -> Post:
        given = self._batch_tokens

        def watched(news: News) -> None:
            if isinstance(news, Lost) and news.kind is FailureKind.MEMORY:
                self._batch_tokens = max(1, min(self._batch_tokens, given // 2))
            elif isinstance(news, Done) and news.receipt.batch_tokens:
                self._batch_tokens = min(self._batch_tokens, news.receipt.batch_tokens)
            post(news)

        return watched


def local_kind(teacher: TeacherConfig, machines: Machines) -> ReplicaKind:
    """Return what the fleet needs to know of a local teacher's replicas."""
    return ReplicaKind(
        name="local",
        needs=describe(rank_bundle(machines.torch_device), teacher.ranks),
        min=teacher.replicas.min,
        max=teacher.replicas.max,
        price_per_hour=machines.price_per_hour,
    )


def fleet_policy(teacher: TeacherConfig) -> FleetPolicy:
    """Return the limits that the config sets."""
    return FleetPolicy(
        max_attempts=teacher.max_attempts,
        startup_timeout_s=teacher.startup_timeout_s,
        unit_timeout_s=teacher.unit_timeout_s,
        heartbeat_timeout_s=teacher.heartbeat_timeout_s,
    )


def _lost(replica: int, unit_id: str, kind: FailureKind, error: BaseException) -> Lost:
    return Lost(replica, kind, error, unit_id)


def rank_bundle(device: str) -> dict[str, float]:
    """Return the resources of one rank."""
    return {"CPU": 1.0, "GPU": 1.0} if device == "cuda" else {"CPU": 1.0}


def rank_places(addresses: Sequence[tuple[str, str, int, int]], device: str) -> list[RankPlace]:
    """Number the ranks on their nodes; rank 0's node is the meeting point."""
    per_node = Counter(node for node, _, _, _ in addresses)
    seen: Counter[str] = Counter()
    places = []
    for rank, (node, _, _, num_cpus) in enumerate(addresses):
        places.append(
            RankPlace(
                rank=rank,
                num_ranks=len(addresses),
                local_rank=seen[node],
                num_local_ranks=per_node[node],
                master_address=addresses[0][1],
                master_port=addresses[0][2],
                device=device,
                threads=max(1, num_cpus // per_node[node]),
            )
        )
        seen[node] += 1
    return places


def log_hint() -> str:
    """Return where the ranks' logs lie."""
    return f"see the worker logs in {os.environ.get('RAY_TMPDIR', '/tmp')}/ray/session_latest/logs"
