"""Decides which replica gets which unit, how many replicas there are, and what becomes of failures.

`Dispatcher` is told the time and the news and answers with commands; it waits for nothing and touches nothing. An event
costs the same with a thousand replicas as with one, and nothing is kept of units that are done.
"""

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from typing import Generic

from storage.errors import WorkerError
from workers.commands import Beat, Command, Give, Kill, Retry, SetAside, Start
from workers.meter import FleetMeter, FleetStatus
from workers.policy import (
    START_RULES,
    UNIT_RULES,
    FailureDecision,
    FailureKind,
    FleetPolicy,
    ReplicaKind,
    ReplicaState,
    decide,
)
from workers.replica import Done, Failed, Lost, News, Placed, Ready, Seen, UnitT
from workers.views import Flight, ReplicaView, Room, hangs


class Dispatcher(Generic[UnitT]):
    """One piece of work: these units on a fleet of these kinds.

    Call `tell` with each piece of news and `commands` for what is to be done, at least every `policy.check_s` seconds,
    until `finished`; then, if `error` is set, raise it.
    """

    def __init__(
        self, units: Sequence[UnitT], tokens_total: int, kinds: Sequence[ReplicaKind], policy: FleetPolicy
    ) -> None:
        """`units` is read once, in order, as replicas get free; it may make them only then."""
        self.policy = policy
        self.kinds = sorted(kinds, key=lambda kind: kind.cost_per_token)
        self.meter = FleetMeter(len(units), tokens_total)
        self.error: BaseException | None = None
        self._source: Iterator[UnitT] = iter(units)
        self._num_unread = len(units)
        self._first: deque[tuple[UnitT, int]] = deque()
        """Units of lost replicas that are not to blame, and their next attempt."""
        self._last: deque[tuple[UnitT, int]] = deque()
        """Units that failed: tried again when all others have been given out."""
        self._flights: dict[str, Flight[UnitT]] = {}
        self._single: OrderedDict[str, None] = OrderedDict()
        """Flights with one replica that may get a second, oldest first."""
        self._waiting: OrderedDict[str, None] = OrderedDict()
        """Those of them whose replica has not begun with them."""
        self._views: dict[int, ReplicaView] = {}
        self._room = Room(self.kinds)
        self._idle: OrderedDict[int, float] = OrderedDict()
        """Ready replicas without work → since when."""
        self._checks: deque[tuple[float, int]] = deque()
        self._alive = dict.fromkeys((kind.name for kind in self.kinds), 0)
        self._ready = dict(self._alive)
        self._failed_starts = dict(self._alive)
        self._start_after = dict.fromkeys(self._alive, 0.0)
        self._num_asked = 0
        self._commands: list[Command[UnitT]] = []

    @property
    def finished(self) -> bool:
        """Whether all units are done or set aside, or an error ends the work."""
        return self.meter.units_left == 0 or self.error is not None

    @property
    def num_queued(self) -> int:
        """Units that no replica has."""
        return self._num_unread + len(self._first) + len(self._last)

    def status(self, now: float) -> FleetStatus:
        """Return where the fleet stands."""
        return self.meter.status(len(self._flights), now)

    def tell(self, news: News, now: float) -> None:
        """Take one piece of news; from replicas that are gone it is ignored."""
        view = self._views.get(news.replica)
        if view is None:
            return
        self.meter.advance(now)
        match news:
            case Placed():
                view.seen_at = now
                self._move(view, ReplicaState.LOADING)
            case Ready():
                self._made_ready(view, now)
            case Seen():
                if not view.work or news.progress != view.progress:
                    view.seen_at = now
                view.progress = news.progress
            case Done():
                self._unit_done(view, news.unit_id, now)
            case Failed():
                view.seen_at = now
                flight = self._flights.get(news.unit_id)
                self._take_back(view, news.unit_id, now)
                if flight is not None:
                    self._unit_failed(flight, view, news.kind, news.error, to_blame=True)
            case Lost():
                self._lose(view, news.kind, news.error, news.unit_id, now)

    def commands(self, now: float) -> list[Command[UnitT]]:
        """Return what is to be done now, in this order."""
        self.meter.advance(now)
        self._check(now)
        if not self.finished:
            self._add_replicas(now)
            self._give_units(now)
            self._duplicate_late_units(now)
            self._release_idle(now)
        commands, self._commands = self._commands, []
        return commands

    # Replicas.

    def _move(self, view: ReplicaView, state: ReplicaState) -> None:
        self.meter.moved(view.state, state, view.kind.price_per_hour)
        view.state = state

    def _made_ready(self, view: ReplicaView, now: float) -> None:
        view.seen_at = now
        self._move(view, ReplicaState.READY)
        self._ready[view.kind.name] += 1
        self._failed_starts[view.kind.name] = 0
        self.meter.started(view.asked_at, now)
        self._idle[view.number] = now
        self._room.update(view)

    def _lose(
        self, view: ReplicaView, kind: FailureKind, error: BaseException, unit_id: str | None, now: float
    ) -> None:
        """End a replica. The unit to blame, or the one it was working on, has failed; the others only wait again."""
        starting = view.state is not ReplicaState.READY
        given = list(view.work)
        blamed = unit_id if unit_id is not None else next(iter(given), None)
        self._remove(view, now)
        self._commands.append(Kill(view.number, kind, error))
        for name in reversed(given):
            flight = self._flights.get(name)
            if flight is not None:
                self._unit_failed(flight, view, kind, error, to_blame=name == blamed)
        if starting:
            self._start_failed(view.kind, kind, error, now)

    def _remove(self, view: ReplicaView, now: float) -> None:
        if view.work:
            self.meter.set_busy(False, view.kind.price_per_hour)
        self._room.remove(view)
        self._idle.pop(view.number, None)
        self.meter.moved(view.state, None, view.kind.price_per_hour)
        self._alive[view.kind.name] -= 1
        self._ready[view.kind.name] -= view.state is ReplicaState.READY
        del self._views[view.number]

    def _start_failed(self, kind: ReplicaKind, failure: FailureKind, error: BaseException, now: float) -> None:
        self._failed_starts[kind.name] += 1
        self._start_after[kind.name] = now + self.policy.backoff_s(self._failed_starts[kind.name])
        # While others work or may still come up, one node that fails its starts must not end them.
        others = self._alive[kind.name] if failure is not FailureKind.FATAL else self._ready[kind.name]
        if self._gave_up(kind, failure) and not others:
            self.error = error

    def _gave_up(self, kind: ReplicaKind, failure: FailureKind) -> bool:
        failed = self._failed_starts[kind.name]
        return decide(START_RULES, failure, failed, self.policy.max_attempts) is FailureDecision.STOP

    def _add_replicas(self, now: float) -> None:
        left = self.meter.units_left
        for kind in self.kinds:
            wanted = min(kind.max, -(-left // kind.parallel))
            left = max(0, left - wanted * kind.parallel)
            while self._alive[kind.name] < wanted and now >= self._start_after[kind.name] and self._worth_it(kind):
                self._num_asked += 1
                number = self._num_asked
                self._views[number] = ReplicaView(number, kind, asked_at=now, seen_at=now)
                self._alive[kind.name] += 1
                self.meter.moved(None, ReplicaState.PLACING, kind.price_per_hour)
                self._checks.append((now + self.policy.check_s, number))
                self._commands.append(Start(number, kind))

    def _worth_it(self, kind: ReplicaKind) -> bool:
        """Tell whether one more replica would come up, and be ready before the work is over."""
        if not self._ready[kind.name] and self._gave_up(kind, FailureKind.LOST):
            return False  # first see whether those that are on their way come up
        if self._alive[kind.name] < kind.min:
            return True
        left_s = self.meter.seconds_left(sum(self._ready.values()))
        return left_s is None or left_s > self.meter.startup_s

    def _release_idle(self, now: float) -> None:
        """Give back replicas that no unit is left for, but for one that may help a late one out."""
        if self.num_queued:
            return
        spare = self.meter.units_left + 1
        while self._idle and sum(self._alive.values()) > spare:
            number, since = next(iter(self._idle.items()))
            if now - since < self.policy.idle_release_s:
                break
            self._remove(self._views[number], now)
            self._commands.append(Kill(number))
        # Nobody waits for replicas that would come too late.
        if self._alive and sum(self._alive.values()) > spare and self.meter.states[ReplicaState.PLACING]:
            placing = [view for view in self._views.values() if view.state is ReplicaState.PLACING]
            for view in placing[: sum(self._alive.values()) - spare]:
                self._remove(view, now)
                self._commands.append(Kill(view.number))

    # Limits of time.

    def _check(self, now: float) -> None:
        """Look at the replicas whose turn it is: each once in `check_s`, so this is a queue and no search."""
        while self._checks and self._checks[0][0] <= now:
            _, number = self._checks.popleft()
            view = self._views.get(number)
            if view is None:
                continue
            placing = view.state is ReplicaState.PLACING
            late = None if placing else hangs(view, self.policy, now)
            if placing:
                self._check_placing(view, now)
            if late is not None:
                self._lose(view, FailureKind.LOST, late, None, now)
            else:
                self._checks.append((now + self.policy.check_s, number))
                if not placing:
                    self._commands.append(Beat(number))

    def _check_placing(self, view: ReplicaView, now: float) -> None:
        """End the work where a replica that it needs gets no resources."""
        limit = self.policy.startup_timeout_s
        # More than `min` replicas are a wish: it stays open as long as there is work.
        needed = self._ready[view.kind.name] < min(view.kind.min, self.meter.units_left)
        if needed and now - view.asked_at > limit:
            self.error = WorkerError(
                f"a replica was still {view.state} after teacher.startup_timeout_s = {limit:g}; it needs "
                f"{view.kind.needs}: add nodes that have it, or ask for fewer ranks or replicas"
            )

    # Units.

    def _give_units(self, now: float) -> None:
        while self.num_queued and (number := self._room.best()) is not None:
            view = self._views[number]
            unit, attempt = self._next_unit()
            self._flights[unit.unit_id] = Flight(unit, attempt, [])
            self._give(view, unit.unit_id, now)

    def _next_unit(self) -> tuple[UnitT, int]:
        if self._first:
            return self._first.popleft()
        if not self._num_unread:
            return self._last.popleft()
        self._num_unread -= 1
        return next(self._source), 1

    def _give(self, view: ReplicaView, unit_id: str, now: float) -> None:
        flight = self._flights[unit_id]
        duplicate = bool(flight.replicas)
        flight.replicas.append(view.number)
        if not view.work:
            self.meter.set_busy(True, view.kind.price_per_hour)
            self._idle.pop(view.number, None)
            view.turn_at = view.seen_at = now
        if duplicate:
            self._forget(unit_id)
        elif view.kind.duplicates:
            self._single[unit_id] = None
            if len(view.work) >= view.kind.parallel:
                self._waiting[unit_id] = None
        view.work[unit_id] = now
        self._room.update(view)
        self._commands.append(Give(view.number, flight.unit, flight.attempt, duplicate))

    def _duplicate_late_units(self, now: float) -> None:
        """With nothing queued, let idle replicas do what waits behind others' work, or is overdue."""
        while self._idle and self._single and not self.num_queued:
            view = self._views[next(iter(self._idle))]
            unit_id = self._late_unit(now) if view.kind.duplicates else None
            if unit_id is None:
                return
            self._give(view, unit_id, now)

    def _late_unit(self, now: float) -> str | None:
        if self._waiting:
            return next(reversed(self._waiting))
        oldest = next(iter(self._single))
        flight = self._flights[oldest]
        owner = self._views[flight.replicas[0]]
        elapsed = now - max(owner.work[oldest], owner.turn_at)
        expected = self.meter.seconds_per_token * flight.unit.num_tokens
        return oldest if expected and elapsed > self.policy.straggler_factor * expected + 1 else None

    def _take_back(self, view: ReplicaView, unit_id: str, now: float) -> float:
        """Note that a replica is through with a unit; returns how long it took."""
        given_at = view.work.pop(unit_id, None)
        if given_at is None:
            return 0.0
        began, view.turn_at = max(given_at, view.turn_at), now
        if view.work:
            self._waiting.pop(next(iter(view.work)), None)
        else:
            self.meter.set_busy(False, view.kind.price_per_hour)
            self._idle[view.number] = now
        self._room.update(view)
        return now - (given_at if view.kind.parallel > 1 else began)

    def _unit_done(self, view: ReplicaView, unit_id: str, now: float) -> None:
        view.seen_at = now
        seconds = self._take_back(view, unit_id, now)
        flight = self._flights.pop(unit_id, None)
        if flight is None:  # another replica was faster
            return
        self._forget(unit_id)
        self.meter.done(flight.unit.num_tokens, seconds / view.kind.parallel, now)

    def _unit_failed(
        self, flight: Flight[UnitT], view: ReplicaView, kind: FailureKind, error: BaseException, to_blame: bool
    ) -> None:
        """Queue a unit again or set it aside, unless another replica still works on it."""
        unit = flight.unit
        if view.number in flight.replicas:
            flight.replicas.remove(view.number)
        if flight.replicas:
            if self._views[flight.replicas[0]].kind.duplicates:
                self._single[unit.unit_id] = None
            return
        del self._flights[unit.unit_id]
        self._forget(unit.unit_id)
        if not to_blame:
            self._first.appendleft((unit, flight.attempt))
            return
        match decide(UNIT_RULES, kind, flight.attempt, self.policy.max_attempts):
            case FailureDecision.RETRY:
                # A store that stays full is found out by one unit, before each of the others is scored in vain.
                again = self._first.appendleft if kind is FailureKind.STORE else self._last.append
                again((unit, flight.attempt + 1))
                self._commands.append(Retry(unit, flight.attempt + 1, error))
            case FailureDecision.SET_ASIDE:
                self.meter.set_aside(unit.num_tokens)
                self._commands.append(SetAside(unit, flight.attempt, error))
            case FailureDecision.STOP:
                self.error = error

    def _forget(self, unit_id: str) -> None:
        self._single.pop(unit_id, None)
        self._waiting.pop(unit_id, None)
