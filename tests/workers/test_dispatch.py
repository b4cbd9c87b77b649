"""The dispatcher's decisions under a simulated clock."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import IntegrityError, StorageError, WorkerError
from workers.commands import Beat, Give, Kill, Retry, SetAside, Start
from workers.dispatch import Dispatcher
from workers.policy import FailureKind, FleetPolicy, ReplicaKind
from workers.replica import Done, Failed, Lost, Placed, Ready, Seen


@dataclass(frozen=True)
class SmallUnit:
    unit_id: str
    num_tokens: int = 100


@dataclass
class Fleet:
    """A dispatcher, a clock, and what was commanded so far."""

    units: int
    kinds: list[ReplicaKind] = field(default_factory=lambda: [ReplicaKind("local")])
    policy: FleetPolicy = field(default_factory=FleetPolicy)
    now: float = 0.0

    def __post_init__(self) -> None:
        units = [SmallUnit(f"u{n}") for n in range(self.units)]
        self.dispatcher: Dispatcher[SmallUnit] = Dispatcher(units, 100 * len(units), self.kinds, self.policy)
        self.commands: list[Any] = []
        self.go()

    def go(self, seconds: float = 0.0) -> list[Any]:
        """Let time pass and return the commands of this moment."""
        self.now += seconds
        new = self.dispatcher.commands(self.now)
        self.commands += new
        return new

    def tell(self, news: Any) -> list[Any]:
        self.dispatcher.tell(news, self.now)
        return self.go()

    def ready(self, *replicas: int) -> None:
        for replica in replicas:
            self.tell(Placed(replica))
            self.tell(Ready(replica))

    def all(self, kind: type) -> list[Any]:
        return [command for command in self.commands if isinstance(command, kind)]

    def held(self, replica: int) -> list[str]:
        return [give.unit.unit_id for give in self.all(Give) if give.replica == replica]


def lost(replica: int, unit: str | None = None, kind: FailureKind = FailureKind.LOST) -> Lost:
    return Lost(replica, kind, RuntimeError("gone"), unit)


def test_replicas_are_asked_for_by_backlog_up_to_the_maximum() -> None:
    assert len(Fleet(2, [ReplicaKind("local", max=5)]).all(Start)) == 2
    assert len(Fleet(50, [ReplicaKind("local", max=5)]).all(Start)) == 5


def test_units_are_spread_before_any_replica_gets_its_second() -> None:
    fleet = Fleet(3, [ReplicaKind("local", max=2)])
    fleet.ready(1)
    assert fleet.held(1) == ["u0", "u1"]
    fleet.ready(2)
    assert fleet.held(2) == ["u2"]
    fleet.tell(Done(2, "u2"))
    assert fleet.held(2) == ["u2", "u1"], "what only waits behind the other's work"


def test_cheaper_kinds_are_filled_first() -> None:
    kinds = [ReplicaKind("api", parallel=4, cost_per_token=2.0), ReplicaKind("local", max=2, cost_per_token=1.0)]
    fleet = Fleet(30, kinds)
    assert [start.kind.name for start in fleet.all(Start)] == ["local", "local", "api"]
    fleet.ready(3)
    assert len(fleet.held(3)) == 5, "what it works on at once, and one more"
    few = Fleet(2, kinds)
    assert [start.kind.name for start in few.all(Start)] == ["local", "local"]


def test_a_lost_replica_costs_only_the_unit_it_worked_on_an_attempt() -> None:
    fleet = Fleet(5)
    fleet.ready(1)
    fleet.tell(lost(1))
    assert [r.unit.unit_id for r in fleet.all(Retry)] == ["u0"]
    assert [k.replica for k in fleet.all(Kill)] == [1]
    fleet.ready(2)
    gives = [(g.unit.unit_id, g.attempt) for g in fleet.all(Give) if g.replica == 2]
    assert gives == [("u1", 1), ("u2", 1)], "the blamed unit comes last"


def test_a_poisoned_unit_is_set_aside_and_the_rest_is_done() -> None:
    fleet = Fleet(4, policy=FleetPolicy(max_attempts=3))
    replica, done = 1, 0
    fleet.ready(1)
    while not fleet.dispatcher.finished:
        give = [g for g in fleet.all(Give) if g.replica == replica][done]
        if give.unit.unit_id == "u1":
            fleet.tell(lost(replica, "u1", FailureKind.BROKEN))
            replica, done = replica + 1, 0
            fleet.ready(replica)
        else:
            fleet.tell(Done(replica, give.unit.unit_id))
            done += 1
    assert [(s.unit.unit_id, s.attempts) for s in fleet.all(SetAside)] == [("u1", 3)]
    assert fleet.dispatcher.error is None
    assert fleet.dispatcher.status(0.0).units_done == 3


def test_a_unit_of_bad_samples_is_set_aside_at_once_and_its_sound_replica_stays() -> None:
    fleet = Fleet(2)
    fleet.ready(1)
    fleet.tell(Failed(1, "u0", FailureKind.UNIT, IntegrityError("NaN")))
    assert [s.attempts for s in fleet.all(SetAside)] == [1] and not fleet.all(Kill)
    fleet.tell(Done(1, "u1"))
    assert fleet.dispatcher.finished


def test_a_store_that_fails_three_times_ends_the_work() -> None:
    fleet = Fleet(1)
    fleet.ready(1)
    for attempt in (1, 2, 3):
        assert fleet.dispatcher.error is None
        fleet.tell(Failed(1, "u0", FailureKind.STORE, StorageError(f"disk full {attempt}")))
    assert str(fleet.dispatcher.error) == "disk full 3"


def test_a_full_store_is_found_out_before_each_unit_is_scored_in_vain() -> None:
    fleet = Fleet(100)
    fleet.ready(1)
    failed = 0
    while fleet.dispatcher.error is None:
        fleet.tell(Failed(1, fleet.all(Give)[failed].unit.unit_id, FailureKind.STORE, StorageError("disk full")))
        failed += 1
    assert failed <= 3 * ReplicaKind("local").capacity


def test_failed_starts_back_off_and_end_the_work_when_nobody_is_ready() -> None:
    fleet = Fleet(3)
    fleet.tell(lost(1, kind=FailureKind.BROKEN))
    assert len(fleet.all(Start)) == 1
    assert [type(c) for c in fleet.go(1.0)] == [Start]
    fleet.tell(lost(2, kind=FailureKind.BROKEN))
    assert fleet.go(1.0) == [] and len(fleet.go(1.0)) == 1
    fleet.tell(lost(3, kind=FailureKind.BROKEN))
    assert fleet.dispatcher.finished and str(fleet.dispatcher.error) == "gone"


def test_failed_starts_wait_for_those_on_their_way() -> None:
    fleet = Fleet(100, [ReplicaKind("local", max=5)])
    for replica in (1, 2, 3):
        fleet.tell(lost(replica))
    fleet.go(60.0)
    assert fleet.dispatcher.error is None and len(fleet.all(Start)) == 5, "no new ones before it is known"
    fleet.ready(4)
    fleet.go(60.0)
    assert len(fleet.all(Start)) == 8
    hopeless = Fleet(100, [ReplicaKind("local", max=5)])
    for replica in (1, 2, 3, 4, 5):
        hopeless.tell(lost(replica))
    assert hopeless.dispatcher.error is not None


def test_failed_starts_do_not_end_the_work_while_others_work() -> None:
    fleet = Fleet(100, [ReplicaKind("local", max=2)])
    fleet.ready(1)
    for replica in range(2, 12):
        fleet.tell(lost(replica, kind=FailureKind.FATAL))
        fleet.go(60.0)
        fleet.tell(Seen(1, replica))
    assert fleet.dispatcher.error is None


def test_a_replica_without_progress_is_replaced() -> None:
    fleet = Fleet(4, policy=FleetPolicy(heartbeat_timeout_s=20))
    fleet.ready(1)
    for progress in range(10):
        fleet.go(5.0)
        fleet.tell(Seen(1, progress))
    assert fleet.all(Beat) and not fleet.all(Kill)
    for _ in range(6):
        fleet.go(5.0)
        fleet.tell(Seen(1, 9))
    (kill,) = fleet.all(Kill)
    assert "heartbeat_timeout_s = 20" in str(kill.error)
    assert [start.replica for start in fleet.all(Start)] == [1, 2]


def test_a_unit_beyond_its_time_takes_its_replica_along() -> None:
    fleet = Fleet(1, policy=FleetPolicy(unit_timeout_s=40))
    fleet.ready(1)
    for progress in range(12):
        fleet.go(5.0)
        fleet.tell(Seen(1, progress))
    (kill,) = fleet.all(Kill)
    assert "teacher.unit_timeout_s = 40" in str(kill.error)


def test_resources_that_do_not_come_end_the_work_below_the_minimum_only() -> None:
    policy = FleetPolicy(startup_timeout_s=100)
    fleet = Fleet(9, [ReplicaKind("local", min=1, max=2)], policy)
    fleet.ready(1)
    for progress in range(30):
        fleet.go(10.0)
        fleet.tell(Seen(1, progress))
    assert fleet.dispatcher.error is None
    short = Fleet(9, [ReplicaKind("local", needs="2 × {GPU: 1}", min=2, max=2)], policy)
    short.ready(1)
    for progress in range(30):
        short.go(10.0)
        short.tell(Seen(1, progress))
    assert isinstance(short.dispatcher.error, WorkerError)
    assert "it needs 2 × {GPU: 1}" in str(short.dispatcher.error)


def test_a_late_unit_is_given_to_an_idle_replica_and_counts_once() -> None:
    fleet = Fleet(4, [ReplicaKind("local", max=2, prefetch=0)])
    fleet.ready(1, 2)
    fleet.now = 10.0
    fleet.tell(Done(1, "u0"))
    fleet.now = 20.0
    fleet.tell(Done(1, "u2"))
    fleet.now = 30.0
    fleet.tell(Done(1, "u3"))
    (late,) = [give for give in fleet.all(Give) if give.duplicate]
    assert (late.replica, late.unit.unit_id) == (1, "u1")
    fleet.tell(Done(1, "u1"))
    assert fleet.dispatcher.finished
    fleet.tell(Done(2, "u1"))
    assert fleet.dispatcher.status(30.0).units_done == 4


def test_paid_units_are_never_duplicated() -> None:
    fleet = Fleet(3, [ReplicaKind("api", max=2, duplicates=False)])
    fleet.ready(1, 2)
    for unit in fleet.held(1):
        fleet.tell(Done(1, unit))
    fleet.go(1000.0)
    assert not [give for give in fleet.all(Give) if give.duplicate]


def test_replicas_without_work_go_back_and_idle_time_has_a_price() -> None:
    fleet = Fleet(4, [ReplicaKind("local", max=4, prefetch=0, price_per_hour=36.0)])
    fleet.ready(1, 2, 3, 4)
    for replica in (1, 2, 3):
        fleet.tell(Done(replica, fleet.held(replica)[0]))
    fleet.go(20.0)
    released = [kill for kill in fleet.all(Kill) if kill.error is None]
    assert len(released) == 2, "one stays as a spare for the last unit"
    status = fleet.dispatcher.status(fleet.now)
    assert status.machine_s == pytest.approx(80.0) and status.idle_s == pytest.approx(60.0)
    assert status.idle_cost == pytest.approx(0.6)


@pytest.mark.parametrize("units,starts", [(4, 1), (200, 2)])
def test_no_replica_is_started_that_would_come_too_late(units: int, starts: int) -> None:
    fleet = Fleet(units, [ReplicaKind("local", max=2, prefetch=0)])
    fleet.now = 100.0
    fleet.ready(1)
    fleet.tell(Placed(2))
    for unit in ("u0", "u1"):
        fleet.now += 1.0
        fleet.tell(Done(1, unit))
    before = len(fleet.all(Start))
    fleet.tell(lost(2))
    fleet.go(1.0)
    assert len(fleet.all(Start)) - before == starts - 1, "one second per unit is left, a start takes 100"


@settings(max_examples=60)
@given(seed=st.integers(0, 10_000), units=st.integers(1, 60), replicas=st.integers(1, 6))
def test_every_unit_is_done_exactly_once_whatever_dies(seed: int, units: int, replicas: int) -> None:
    chance = random.Random(seed)
    fleet = Fleet(units, [ReplicaKind("local", max=replicas)], FleetPolicy(max_attempts=1000))
    alive: dict[int, list[str]] = {}
    finished: set[str] = set()
    seen = 0
    steps: list[Callable[[int], None]] = [
        lambda replica: fleet.ready(replica) if replica not in ready else None,
        lambda replica: finish(replica),
        lambda replica: finish(replica),
        lambda replica: fleet.tell(lost(replica)) and None,
    ]
    ready: set[int] = set()

    def finish(replica: int) -> None:
        if alive[replica]:
            unit = alive[replica].pop(0)
            finished.add(unit)
            fleet.tell(Done(replica, unit))

    while not fleet.dispatcher.finished:
        fleet.go(chance.uniform(0.0, 5.0))
        for command in fleet.commands[seen:]:
            if isinstance(command, Start):
                alive[command.replica] = []
            elif isinstance(command, Give):
                ready.add(command.replica)
                assert len(alive[command.replica]) < 2
                alive[command.replica].append(command.unit.unit_id)
            elif isinstance(command, Kill):
                del alive[command.replica]
        seen = len(fleet.commands)
        assert len(alive) <= replicas
        if alive:
            chance.choice(steps)(chance.choice(sorted(alive)))
    assert finished == {f"u{n}" for n in range(units)}
    assert fleet.dispatcher.status(fleet.now).units_done == units
    assert fleet.dispatcher.error is None


def test_nothing_is_kept_of_units_that_are_done() -> None:
    fleet = Fleet(5000, [ReplicaKind("local", max=3)])
    fleet.ready(1, 2, 3)
    given = 0
    while not fleet.dispatcher.finished:
        for give in fleet.all(Give)[given:]:
            given += 1
            fleet.dispatcher.tell(Done(give.replica, give.unit.unit_id), fleet.now)
        fleet.go(1.0)
        held = [value for value in vars(fleet.dispatcher).values() if hasattr(value, "__len__")]
        assert max(len(value) for value in held) <= 16
