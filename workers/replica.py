"""What the coordinator and any sort of replica say to each other: the protocol and the news. No Ray."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from workers.policy import FailureKind


class Unit(Protocol):
    """What is given to a replica and committed as a whole."""

    @property
    def unit_id(self) -> str:
        """Name of the unit, and of what is committed for it."""
        ...

    @property
    def num_tokens(self) -> int:
        """Size of the unit."""
        ...


UnitT = TypeVar("UnitT", bound=Unit)
GivenT = TypeVar("GivenT", bound=Unit, contravariant=True)


@dataclass(frozen=True)
class Placed:
    """The replica has its resources and its processes run: it costs money now."""

    replica: int


@dataclass(frozen=True)
class Ready:
    """The replica takes units; `report` is its own description of itself, JSON values."""

    replica: int
    report: Any = None


@dataclass(frozen=True)
class Seen:
    """The replica is alive; `progress` rises with all that it gets done."""

    replica: int
    progress: int = 0


@dataclass(frozen=True)
class Done:
    """A unit is committed; `receipt` is what the replica says about it."""

    replica: int
    unit_id: str
    receipt: Any = None


@dataclass(frozen=True)
class Failed:
    """A unit failed and its replica is sound."""

    replica: int
    unit_id: str
    kind: FailureKind
    error: BaseException


@dataclass(frozen=True)
class Lost:
    """The replica is of no more use; `unit_id` is the unit to blame, where one is known."""

    replica: int
    kind: FailureKind
    error: BaseException
    unit_id: str | None = None


News = Placed | Ready | Seen | Done | Failed | Lost
Post = Callable[[News], None]
"""Takes news from any thread."""


class Replica(Protocol[GivenT]):
    """One whole copy of a teacher. No method waits: what comes of it is posted as news.

    A replica gets its number and a `Post` when it is made. After `kill`, news from it are ignored.
    """

    def start(self) -> None:
        """Ask for resources and get ready: posts `Placed`, then `Ready`, or `Lost`."""
        ...

    def give(self, unit: GivenT, attempt: int) -> None:
        """Work on a unit and commit it: posts `Done`, `Failed` or `Lost`."""
        ...

    def beat(self) -> None:
        """Ask for a sign of life: posts `Seen`, if it still can."""
        ...

    def kill(self) -> None:
        """End its processes and give all its resources back, now."""
        ...
