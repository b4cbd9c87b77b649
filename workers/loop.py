"""The thin loop around the dispatcher: it waits for news, does what it is told, and says what happened."""

import contextlib
import time
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Any, Generic

from storage.errors import InputError
from workers.commands import Beat, Command, Give, Kill, Retry, SetAside, Start
from workers.dispatch import Dispatcher
from workers.meter import FleetStatus
from workers.policy import FailureKind, FleetPolicy, ReplicaKind
from workers.replica import Done, News, Placed, Post, Ready, Replica, UnitT

POLL_S = 0.5
"""Longest wait for news: limits of time are looked at that often."""
STATUS_S = 1.0
"""Time between two `fleet` events."""
HOPE_S = 5.0
"""A replica waits this long before it is asked whether it waits in vain: the autoscaler needs a moment to tell."""
WAITING_NOTICE_S = 15.0
"""A replica that waits longer for resources is reported."""
MOST_NEWS = 1000
"""News taken before commands are asked for again."""

OnEvent = Callable[[dict[str, Any]], None]
Make = Callable[[int, ReplicaKind, Post], Replica[UnitT]]


class FleetLoop(Generic[UnitT]):
    """Works units off with a fleet of replicas, until all are done or set aside.

    Events, each a dict with the key `event`: `replica_asked {replica, kind}`, `waiting_for_resources {replica, needed,
    why}`, `replica_placed`, `replica_started {replica, ranks}`, `unit_done {unit, replica, attempt, …}`,
    `unit_duplicated {unit, replica}`, `unit_retried {unit, attempt, error}`, `unit_failed {unit, samples, attempts,
    error}`, `replica_lost {replica, error}`, `replica_released {replica}`, and `fleet` with the fields of
    `meter.FleetStatus` about once a second.
    """

    def __init__(
        self,
        units: Sequence[UnitT],
        tokens_total: int,
        kinds: Sequence[ReplicaKind],
        make: Make[UnitT],
        policy: FleetPolicy,
        notify: OnEvent,
        on_done: Callable[[UnitT, Any], dict[str, Any]],
        why_waiting: Callable[[], str] = lambda: "",
        hopeless: Callable[[ReplicaKind], bool] = lambda kind: False,
    ) -> None:
        """Prepare; `run` works.

        Args:
            units: read once, in order.
            tokens_total: tokens of all of them.
            kinds: what the fleet is made of.
            make: makes a replica of a kind, given its number and where it posts its news; it is not started yet.
            policy: limits.
            notify: takes the events.
            on_done: takes each unit and its receipt once; returns facts for its event.
            why_waiting: says what the cluster has, for replicas that wait long for resources.
            hopeless: tells whether replicas of a kind can never be placed; asked while not one is.
        """
        self.dispatcher = Dispatcher(units, tokens_total, kinds, policy)
        self.failed_units: list[dict[str, Any]] = []
        self.replicas_lost = 0
        self.first_report: Any = None
        self._make, self._notify, self._on_done = make, notify, on_done
        self._why_waiting, self._hopeless = why_waiting, hopeless
        self._replicas: dict[int, Replica[UnitT]] = {}
        self._given: dict[str, tuple[UnitT, int]] = {}
        self._placing: dict[int, tuple[ReplicaKind, float]] = {}
        self._inbox: SimpleQueue[News] = SimpleQueue()
        self._noticed: set[int] = set()
        """Replicas whose waiting has been reported."""
        self._status_at = 0.0

    @property
    def seconds(self) -> float:
        """Wall-clock time from the first ready replica to the last receipt."""
        meter = self.dispatcher.meter
        return meter.last_done - meter.first_ready if meter.last_done and meter.first_ready else 0.0

    def status(self) -> FleetStatus:
        """Return where the fleet stands."""
        return self.dispatcher.status(time.monotonic())

    def run(self) -> None:
        """Work until the end; no replica is left then. Raises what ended the work early."""
        try:
            while True:
                for command in self.dispatcher.commands(time.monotonic()):
                    self._obey(command)
                if self.dispatcher.finished:
                    break
                self._listen()
                self._report()
            if self.dispatcher.error is not None:
                raise self.dispatcher.error
        finally:
            self._notify({"event": "fleet", "ended": True, **self.status().to_json()})
            for number in list(self._replicas):
                # One that cannot be ended must not keep the others.
                with contextlib.suppress(Exception):
                    self._end(number)

    def _listen(self) -> None:
        with contextlib.suppress(Empty):
            self._tell(self._inbox.get(timeout=POLL_S))
            for _ in range(MOST_NEWS):
                self._tell(self._inbox.get_nowait())

    def _tell(self, news: News) -> None:
        number = news.replica
        if number not in self._replicas:
            return
        self.dispatcher.tell(news, time.monotonic())
        match news:
            case Placed():
                self._placing.pop(number, None)
                self._notify({"event": "replica_placed", "replica": number})
            case Ready():
                self._placing.pop(number, None)
                self.first_report = self.first_report or news.report
                self._notify({"event": "replica_started", "replica": number, "ranks": news.report or []})
            case Done():
                unit, attempt = self._given.pop(news.unit_id, (None, 0))
                if unit is not None:
                    facts = {"unit": unit.unit_id, "replica": number, "attempt": attempt}
                    self._notify({"event": "unit_done", **facts, **self._on_done(unit, news.receipt)})

    def _obey(self, command: Command[UnitT]) -> None:
        match command:
            case Start():
                replica = self._make(command.replica, command.kind, self._inbox.put)
                self._replicas[command.replica] = replica
                self._placing[command.replica] = (command.kind, time.monotonic())
                self._notify({"event": "replica_asked", "replica": command.replica, "kind": command.kind.name})
                replica.start()
            case Give():
                self._given[command.unit.unit_id] = (command.unit, command.attempt)
                if command.duplicate:
                    facts = {"unit": command.unit.unit_id, "replica": command.replica}
                    self._notify({"event": "unit_duplicated", **facts})
                self._replicas[command.replica].give(command.unit, command.attempt)
            case Beat():
                self._replicas[command.replica].beat()
            case Kill():
                self._lost_or_released(command)
            case Retry():
                facts = {"unit": command.unit.unit_id, "attempt": command.attempt, "error": brief(command.error)}
                self._notify({"event": "unit_retried", **facts})
            case SetAside():
                self._set_aside(command)

    def _lost_or_released(self, command: Kill) -> None:
        number = command.replica
        self._end(number)
        if command.error is None:
            self._notify({"event": "replica_released", "replica": number})
            return
        self.replicas_lost += command.kind is FailureKind.LOST
        self._notify({"event": "replica_lost", "replica": number, "error": brief(command.error)})

    def _set_aside(self, command: SetAside[UnitT]) -> None:
        unit = command.unit
        self._given.pop(unit.unit_id, None)
        failure = {
            "unit": unit.unit_id,
            "samples": len(getattr(unit, "rows", ())),
            "attempts": command.attempts,
            "error": brief(command.error),
        }
        self.failed_units.append(failure)
        self._notify({"event": "unit_failed", **failure})

    def _end(self, number: int) -> None:
        self._placing.pop(number, None)
        self._noticed.discard(number)
        self._replicas.pop(number).kill()

    def _report(self) -> None:
        now = time.monotonic()
        if now - self._status_at < STATUS_S:
            return
        self._status_at = now
        self._notify({"event": "fleet", **self.dispatcher.status(now).to_json()})
        if self._placing and len(self._placing) == len(self._replicas):
            self._check_hope(now)
        for number, (kind, asked_at) in self._placing.items():
            if number in self._noticed or now - asked_at < WAITING_NOTICE_S:
                continue
            self._noticed.add(number)
            facts = {"replica": number, "needed": kind.needs, "why": self._why_waiting()}
            self._notify({"event": "waiting_for_resources", **facts})

    def _check_hope(self, now: float) -> None:
        """End the work when what waits for resources waits in vain, and there is nothing else."""
        kind, asked_at = next(iter(self._placing.values()))
        if now - asked_at > HOPE_S and self._hopeless(kind):
            self.dispatcher.error = InputError(
                f"a replica needs {kind.needs}, and no node type of the cluster can give that ({self._why_waiting()}); "
                "add a node type that has it, raise the cluster's limit of nodes, or change teacher.ranks"
            )


def brief(error: BaseException) -> str:
    """Return the first line of an error's message, or its class."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
