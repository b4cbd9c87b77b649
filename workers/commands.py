"""What the dispatcher answers with: what is to be done, and what is for the record."""

from dataclasses import dataclass
from typing import Generic

from workers.policy import FailureKind, ReplicaKind
from workers.replica import UnitT


@dataclass(frozen=True)
class Start:
    """Make a replica of this kind under this number."""

    replica: int
    kind: ReplicaKind


@dataclass(frozen=True)
class Give(Generic[UnitT]):
    """Give a unit to a replica; `duplicate` when another replica works on it already."""

    replica: int
    unit: UnitT
    attempt: int
    duplicate: bool = False


@dataclass(frozen=True)
class Beat:
    """Ask a replica for a sign of life."""

    replica: int


@dataclass(frozen=True)
class Kill:
    """End a replica; `error` is none when it has merely nothing left to do."""

    replica: int
    kind: FailureKind | None = None
    error: BaseException | None = None


@dataclass(frozen=True)
class Retry(Generic[UnitT]):
    """For the record: a unit failed and is queued again, for this attempt."""

    unit: UnitT
    attempt: int
    error: BaseException


@dataclass(frozen=True)
class SetAside(Generic[UnitT]):
    """For the record: a unit is given up after so many attempts."""

    unit: UnitT
    attempts: int
    error: BaseException


Command = Start | Give[UnitT] | Beat | Kill | Retry[UnitT] | SetAside[UnitT]
