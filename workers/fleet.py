"""Replicas of a local teacher on Ray: how one comes up, what it works on, and what a failure means.

A replica is a placement group with one rank actor per shard. It comes up in steps, each waiting for the references of
the one before, and dies whole: a rank lost takes its replica with it, and a new one is made in its place.
"""

import os
import time
from collections import Counter
from enum import StrEnum
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from storage.errors import IntegrityError, LecternError
from workers.local.rank import CaptureJob, Rank, RankPlace
from workers.units import WorkUnit


class ReplicaState(StrEnum):
    """What a replica is waiting for."""

    PLACING = "placing"
    """for the cluster to give its resources"""
    CONNECTING = "connecting"
    """for its rank actors to answer"""
    LOADING = "loading"
    """for the model to be loaded and sharded"""
    READY = "ready"
    """for units"""


class FailureDecision(StrEnum):
    """What is done about a failed unit or replica."""

    RETRY = "retry"
    """queue the unit again"""
    SET_ASIDE = "set_aside"
    """report the unit as failed and go on with the others"""
    STOP = "stop"
    """end the capture with the error: trying again cannot help"""


def decide(error: BaseException, attempts: int, max_attempts: int, starting: bool) -> FailureDecision:
    """Decide what a failure of a unit (or of a starting replica) after so many attempts means.

    An error of ours during start-up, or one of the store, would only come again. One of ours from scoring is about
    the unit's own samples. Anything else may be the machine's fault and is tried again, a limited number of times.
    """
    if isinstance(error, IntegrityError) and not starting:
        return FailureDecision.SET_ASIDE
    if isinstance(error, LecternError):
        return FailureDecision.STOP
    if attempts < max_attempts:
        return FailureDecision.RETRY
    return FailureDecision.STOP if starting else FailureDecision.SET_ASIDE


def root_cause(error: BaseException) -> BaseException:
    """Return the error behind Ray's wrapping of it."""
    while isinstance(error, RayTaskError) and error.cause is not None:
        error = error.cause
    return error


class Replica:
    """One copy of the teacher: a placement group, its rank actors, and the units it has been given."""

    def __init__(self, number: int, job: CaptureJob, device: str, start_timeout_s: float) -> None:
        """Ask the cluster for the resources; `step` carries on from there."""
        self.number = number
        self.job = job
        self.device = device
        self.state = ReplicaState.PLACING
        self.deadline = time.monotonic() + start_timeout_s
        self.work: dict[Any, tuple[WorkUnit, int, float]] = {}
        """Receipt reference → (unit, attempt, deadline) of the units given."""
        self.ranks: list[Any] = []
        self.noticed = False
        """Whether its waiting for resources has been reported."""
        self._group = placement_group([self.bundle] * job.teacher.ranks, strategy="PACK")
        self.waiting_for: list[Any] = [self._group.ready()]

    @property
    def bundle(self) -> dict[str, float]:
        """Resources of one rank."""
        return {"CPU": 1.0, "GPU": 1.0} if self.device == "cuda" else {"CPU": 1.0}

    def step(self) -> list[Any] | None:
        """Go on to the next state, since everything waited for is there; returns shard reports when it is READY.

        Raises what the finished step raised.
        """
        results = ray.get(self.waiting_for)
        if self.state is ReplicaState.PLACING:
            self.ranks = [self._actor(index) for index in range(self.job.teacher.ranks)]
            self.waiting_for = [rank.address.remote() for rank in self.ranks]
            self.state = ReplicaState.CONNECTING
        elif self.state is ReplicaState.CONNECTING:
            places = _places(results, self.device)
            self.waiting_for = [
                rank.load.remote(self.job, place) for rank, place in zip(self.ranks, places, strict=True)
            ]
            self.state = ReplicaState.LOADING
        else:
            self.waiting_for = []
            self.state = ReplicaState.READY
            return list(results)
        return None

    def give(self, unit: WorkUnit, attempt: int, timeout_s: float) -> None:
        """Start scoring a unit on all ranks and its commit on rank 0; parts go between the ranks, not through here."""
        parts = [rank.score.remote(unit) for rank in self.ranks]
        receipt = self.ranks[0].commit.remote(unit, f"a{attempt}", *parts)
        # Units given at once are worked on one after the other: each has its own time.
        self.work[receipt] = (unit, attempt, time.monotonic() + timeout_s * (1 + len(self.work)))

    def kill(self) -> None:
        """End the actors and give the resources back."""
        for rank in self.ranks:
            ray.kill(rank, no_restart=True)
        remove_placement_group(self._group)

    def _actor(self, index: int) -> Any:
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
        actor = ray.remote(Rank).options(
            num_cpus=self.bundle["CPU"],
            num_gpus=self.bundle.get("GPU", 0),
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=strategy,
        )
        return actor.remote()


def is_loss(error: BaseException) -> bool:
    """Tell whether an error means that a process, an object or a node is gone."""
    return isinstance(error, RayError) and not isinstance(error, RayTaskError)


def _places(addresses: list[tuple[str, str, int, int]], device: str) -> list[RankPlace]:
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
