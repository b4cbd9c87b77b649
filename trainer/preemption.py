"""A checkpoint while there is still time: notices that a node is about to be taken away."""

import os
import time
from collections.abc import Callable, Iterable

CHECK_EVERY_S = float(os.environ.get("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "5"))
"""Time between two questions: as often as Ray itself looks."""

Ask = Callable[[], Iterable[str]]
"""Returns the ids of the training's nodes that are about to go. Collective: all ranks ask together."""


def nobody_goes() -> Iterable[str]:
    """Stand in for `Ask` where nobody would know."""
    return ()


class PreemptionWatch:
    """Tells of each node once. Ranks' clocks differ, so that one of them is due does not make the others ask: the loop
    exchanges `is_due` with its counts, and then all of them ask at the same step."""

    def __init__(self, ask: Ask, clock: Callable[[], float] = time.monotonic) -> None:
        self._ask, self._clock = ask, clock
        self._asked_at = clock()
        self._known: set[str] = set()

    def is_due(self) -> bool:
        """Tell whether this rank would ask again."""
        return self._clock() - self._asked_at >= CHECK_EVERY_S

    def fresh(self) -> bool:
        """Ask; return whether a node is about to go that was not known of before. Collective."""
        going = set(self._ask())
        self._asked_at = self._clock()
        fresh = bool(going - self._known)
        self._known |= going
        return fresh
