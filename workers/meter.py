"""Counts what a fleet does: work done, rates, machine time paid and machine time idle. A clock is always passed in."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from workers.policy import ReplicaState

_SMOOTHING = 0.05
"""Weight of the newest unit in the mean time per token, once there are 20."""


@dataclass(frozen=True)
class FleetStatus:
    """A fleet at one moment."""

    replicas: dict[str, int]
    """State → replicas in it; `busy` counts those of the ready ones that have work."""
    units_done: int
    units_failed: int
    units_in_flight: int
    units_queued: int
    tokens_done: int
    tokens_per_s: float
    """Since the first replica was ready."""
    seconds_left: float | None
    """At this rate; none until there is one."""
    machine_s: float
    """Seconds of machines paid for, loading included."""
    idle_s: float
    """Seconds of those in which a replica had no unit: loading, waiting, ending."""
    cost: float
    """Of `machine_s`, in the currency of `ReplicaKind.price_per_hour`."""
    idle_cost: float

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values, times rounded to milliseconds."""
        return {key: round(value, 6) if isinstance(value, float) else value for key, value in asdict(self).items()}


@dataclass
class FleetMeter:
    """Running sums; every method costs the same however much was done before."""

    units_total: int
    tokens_total: int
    units_done: int = 0
    units_failed: int = 0
    tokens_done: int = 0
    tokens_gone: int = 0
    """Of units done or set aside."""
    states: Counter[ReplicaState] = field(default_factory=Counter)
    busy: int = 0
    first_ready: float | None = None
    last_done: float | None = None
    seconds_per_token: float = 0.0
    """Recent mean of one unit's time on one replica over its tokens; 0 until the first unit is done."""
    startup_s: float = 0.0
    """Recent mean from asking for a replica to its being ready; 0 until the first."""
    machine_s: float = 0.0
    idle_s: float = 0.0
    cost: float = 0.0
    idle_cost: float = 0.0
    _price: float = 0.0
    _idle_price: float = 0.0
    _at: float | None = None
    _num_starts: int = 0

    def advance(self, now: float) -> None:
        """Add the time since the last call to the sums; called before anything changes."""
        passed = now - self._at if self._at is not None else 0.0
        self._at = now
        paid = self.states[ReplicaState.LOADING] + self.states[ReplicaState.READY]
        self.machine_s += paid * passed
        self.idle_s += (paid - self.busy) * passed
        self.cost += self._price * passed / 3600
        self.idle_cost += self._idle_price * passed / 3600

    def moved(self, before: ReplicaState | None, after: ReplicaState | None, price_per_hour: float) -> None:
        """Note that an idle replica went from one state to another; none is before its start and after its end."""
        if before is not None:
            self.states[before] -= 1
        if after is not None:
            self.states[after] += 1
        change = _is_paid(after) - _is_paid(before)
        self._price += change * price_per_hour
        self._idle_price += change * price_per_hour

    def started(self, asked_at: float, now: float) -> None:
        """Note that a replica got ready."""
        self.first_ready = now if self.first_ready is None else self.first_ready
        self._num_starts += 1
        self.startup_s += (now - asked_at - self.startup_s) * max(1 / self._num_starts, _SMOOTHING)

    def set_busy(self, busy: bool, price_per_hour: float) -> None:
        """Note that a ready replica got its first unit, or gave back its last."""
        self.busy += 1 if busy else -1
        self._idle_price += -price_per_hour if busy else price_per_hour

    def done(self, num_tokens: int, seconds: float, now: float) -> None:
        """Note a unit that took its replica so many seconds."""
        self.units_done += 1
        self.tokens_done += num_tokens
        self.tokens_gone += num_tokens
        self.last_done = now
        share = max(1 / self.units_done, _SMOOTHING)
        self.seconds_per_token += (seconds / max(num_tokens, 1) - self.seconds_per_token) * share

    def set_aside(self, num_tokens: int) -> None:
        """Note a unit that is given up."""
        self.units_failed += 1
        self.tokens_gone += num_tokens

    @property
    def units_left(self) -> int:
        """Units neither done nor set aside."""
        return self.units_total - self.units_done - self.units_failed

    def seconds_left(self, num_replicas: int) -> float | None:
        """Return how long so many replicas take for what is left, or none while their rate is unknown."""
        if not self.seconds_per_token or not num_replicas:
            return None
        return (self.tokens_total - self.tokens_gone) * self.seconds_per_token / num_replicas

    def status(self, in_flight: int, now: float) -> FleetStatus:
        """Return where the fleet stands."""
        self.advance(now)
        working_s = now - self.first_ready if self.first_ready is not None else 0.0
        return FleetStatus(
            replicas={**{str(state): self.states[state] for state in ReplicaState}, "busy": self.busy},
            units_done=self.units_done,
            units_failed=self.units_failed,
            units_in_flight=in_flight,
            units_queued=self.units_left - in_flight,
            tokens_done=self.tokens_done,
            tokens_per_s=self.tokens_done / working_s if working_s > 0 else 0.0,
            seconds_left=self.seconds_left(self.states[ReplicaState.READY]),
            machine_s=self.machine_s,
            idle_s=self.idle_s,
            cost=self.cost,
            idle_cost=self.idle_cost,
        )


def _is_paid(state: ReplicaState | None) -> int:
    return int(state in (ReplicaState.LOADING, ReplicaState.READY))
