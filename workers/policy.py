"""How a fleet of replicas behaves, as data: states, what a failure means, attempt caps, limits of time. No Ray."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class ReplicaState(StrEnum):
    """What a replica is waiting for."""

    PLACING = "placing"
    """for the cluster to give its resources and start its processes"""
    LOADING = "loading"
    """for the model to be loaded and sharded; from here on its machines are paid for"""
    READY = "ready"
    """for units"""


class FailureKind(StrEnum):
    """Whose fault a failure is, as far as its error tells."""

    LOST = "lost"
    """a process, an object or a node is gone, or does not answer"""
    BROKEN = "broken"
    """an unexpected error"""
    MEMORY = "memory"
    """a batch ran out of memory; the next replica takes smaller ones"""
    UNIT = "unit"
    """the unit's own samples cannot be scored"""
    STORE = "store"
    """the store did not take or give something, retries included"""
    FATAL = "fatal"
    """config or input is wrong: trying again cannot help"""


class FailureDecision(StrEnum):
    """What is done about a failed unit or a failed start."""

    RETRY = "retry"
    """queue the unit again, or start another replica"""
    SET_ASIDE = "set_aside"
    """report the unit as failed and go on with the others"""
    STOP = "stop"
    """end the work with the error"""


@dataclass(frozen=True)
class Rule:
    """Retry while fewer than `cap` times `max_attempts` attempts were made, then decide `then`."""

    cap: float
    then: FailureDecision


UNIT_RULES: Mapping[FailureKind, Rule] = {
    # Nodes come and go: a unit is not to blame for a loss until many replicas have died over it.
    FailureKind.LOST: Rule(3, FailureDecision.SET_ASIDE),
    FailureKind.BROKEN: Rule(1, FailureDecision.SET_ASIDE),
    FailureKind.MEMORY: Rule(4, FailureDecision.SET_ASIDE),
    FailureKind.UNIT: Rule(0, FailureDecision.SET_ASIDE),
    FailureKind.STORE: Rule(1, FailureDecision.STOP),
    FailureKind.FATAL: Rule(0, FailureDecision.STOP),
}
"""What a failure of a unit means."""

START_RULES: Mapping[FailureKind, Rule] = {
    FailureKind.LOST: Rule(1, FailureDecision.STOP),
    FailureKind.BROKEN: Rule(1, FailureDecision.STOP),
    FailureKind.MEMORY: Rule(1, FailureDecision.STOP),
    FailureKind.UNIT: Rule(0, FailureDecision.STOP),
    FailureKind.STORE: Rule(1, FailureDecision.STOP),
    FailureKind.FATAL: Rule(0, FailureDecision.STOP),
}
"""What failed starts in a row mean while no replica of the kind is ready."""


def decide(rules: Mapping[FailureKind, Rule], kind: FailureKind, attempts: int, max_attempts: int) -> FailureDecision:
    """Decide what a failure after so many attempts means."""
    rule = rules[kind]
    return FailureDecision.RETRY if attempts < rule.cap * max_attempts else rule.then


@dataclass(frozen=True)
class ReplicaKind:
    """One sort of replica that a fleet is made of, and how many of it there may be."""

    name: str
    needs: str = "nothing"
    """Resources of one replica in words, for messages."""
    min: int = 1
    """Replicas without which the work does not go on (or as many as there are units)."""
    max: int = 1
    """Most replicas at any time."""
    parallel: int = 1
    """Units that a replica works on at the same time."""
    prefetch: int = 1
    """Units given beyond those, so that the next one starts while the receipt of the last travels."""
    price_per_hour: float = 0.0
    """Of one replica's machines."""
    cost_per_token: float = 0.0
    """What a token costs on it, all included; the cheaper kind is started and filled first."""
    duplicates: bool = True
    """Whether a late unit may be given to a second replica; false where every call is paid for."""

    @property
    def capacity(self) -> int:
        """Units in flight on one replica, at most."""
        return self.parallel + self.prefetch


@dataclass(frozen=True)
class FleetPolicy:
    """Limits of a fleet's work; times in seconds."""

    max_attempts: int = 3
    """Attempts at a unit, and starts in a row; scaled by the rules above."""
    startup_timeout_s: float = 1800.0
    """From being asked for to being ready."""
    unit_timeout_s: float = 3600.0
    """From the moment a unit's turn came on its replica to its receipt."""
    heartbeat_timeout_s: float = 300.0
    """Without an answer, or without progress while there is work."""
    straggler_factor: float = 2.0
    """A unit that takes this many times what it should is given to an idle replica too."""
    idle_release_s: float = 15.0
    """A replica for which no work is left is given back after this time."""
    start_backoff_s: float = 1.0
    """Wait after a failed start; doubles with each one in a row."""
    max_start_backoff_s: float = 60.0

    @property
    def check_s(self) -> float:
        """Seconds between two looks at a replica; its limits of time are kept that exactly."""
        shortest = min(self.heartbeat_timeout_s, self.unit_timeout_s, self.startup_timeout_s)
        return min(max(shortest / 4, 0.1), 30.0)

    def backoff_s(self, failed_starts: int) -> float:
        """Seconds to wait after so many failed starts in a row."""
        return min(self.start_backoff_s * math.ldexp(1.0, min(failed_starts, 32) - 1), self.max_start_backoff_s)
