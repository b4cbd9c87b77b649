"""What the dispatcher knows of replicas and of units on their way, and which replica has room for one more."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic

from workers.policy import FleetPolicy, ReplicaKind, ReplicaState
from workers.replica import UnitT


@dataclass
class ReplicaView:
    """What the dispatcher knows of one replica."""

    number: int
    kind: ReplicaKind
    asked_at: float
    seen_at: float
    state: ReplicaState = ReplicaState.PLACING
    progress: int = -1
    work: OrderedDict[str, float] = field(default_factory=OrderedDict)
    """Unit id → when it was given; the oldest is worked on first."""
    turn_at: float = 0.0
    """When the last unit ended, or when the oldest was given to an idle replica."""


@dataclass
class Flight(Generic[UnitT]):
    """A unit on its way, on one replica or several."""

    unit: UnitT
    attempt: int
    replicas: list[int]


def hangs(view: ReplicaView, policy: FleetPolicy, now: float) -> BaseException | None:
    """Return why a replica that has its resources counts as lost, or None while it is within its limits of time."""
    silent = now - view.seen_at
    if silent > policy.heartbeat_timeout_s and (view.state is ReplicaState.READY or view.progress >= 0):
        return TimeoutError(
            f"replica {view.number} hangs: no progress for {silent:.0f} s, more than "
            f"teacher.heartbeat_timeout_s = {policy.heartbeat_timeout_s:g}"
        )
    if view.state is ReplicaState.LOADING and now - view.asked_at > policy.startup_timeout_s:
        return TimeoutError(
            f"replica {view.number} was still {view.state} after teacher.startup_timeout_s = "
            f"{policy.startup_timeout_s:g}"
        )
    if view.work:
        name, given_at = next(iter(view.work.items()))
        if now - max(given_at, view.turn_at) > policy.unit_timeout_s:
            return TimeoutError(f"unit {name} took longer than teacher.unit_timeout_s = {policy.unit_timeout_s:g}")
    return None


class Room:
    """The ready replicas that can be given one more unit; every change costs the same with any number of them."""

    def __init__(self, kinds: Sequence[ReplicaKind]) -> None:
        """`kinds` in the order in which they are filled."""
        self._kinds = list(kinds)
        self._free: dict[tuple[int, float], OrderedDict[int, None]] = {}
        """(kind, units in flight over capacity) → replicas."""

    def best(self) -> int | None:
        """Return the replica that gets the next unit: of the first kind with room, the one with the least work."""
        return next(iter(self._free[min(self._free)])) if self._free else None

    def update(self, view: ReplicaView) -> None:
        """Note that a replica may have got ready, or has more or less work by one unit."""
        self.remove(view)
        if view.state is ReplicaState.READY and len(view.work) < view.kind.capacity:
            key = (self._kinds.index(view.kind), len(view.work) / view.kind.capacity)
            self._free.setdefault(key, OrderedDict())[view.number] = None

    def remove(self, view: ReplicaView) -> None:
        """Take a replica out, wherever it is: it lies by what it had before its work changed by one unit."""
        kind, count = self._kinds.index(view.kind), len(view.work)
        for n in (count - 1, count, count + 1):
            bucket = self._free.get((kind, n / view.kind.capacity))
            if bucket is not None and bucket.pop(view.number, self) is None and not bucket:
                del self._free[kind, n / view.kind.capacity]
