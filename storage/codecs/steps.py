"""Log-probabilities as whole numbers, and how far a cell of float16 values may reach so that the error stays bounded.

A cell is as many neighbouring float16 values as lie within LOGPROB_ERROR of the one in its middle, which stands for all
of them. Float16 is coarser the further down: between −8 and −16 a cell spans 3/128 and not 2 · 0.01, since the values
in its corners do not exist. Below −16, where float16 itself rounds by 1/128, cells of three span 3/64; below −32 a cell
is one value.
"""

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.errors import IntegrityError
from storage.samples import Int64Array
from storage.targets import Float16Array

LOGPROB_ERROR = 0.01
"""Bound of what cells change, in nats, for log-probabilities above −16; 1/64 below that."""
UNIFORM_STEP = 5 / 256
"""Tail masses are kept as multiples of this in their logarithm; version 1 kept log-probabilities so too."""
MAX_STEPS = 1 << 22
"""No float16 lies further below 0 than this many uniform steps."""
_SIGN, _INFINITY = 0x8000, 0x7C00


@cache
def _cells() -> tuple[Int64Array, Float16Array]:
    """Return the cell of each float16 from −0 downwards, [31744], and the value that stands for each cell."""
    below = np.arange(_INFINITY, dtype=np.uint16).view(np.float16).astype(np.float64)
    reach = below + np.where(below < 16, LOGPROB_ERROR, 1 / 64)
    lowest = np.searchsorted(below - np.where(below < 16, LOGPROB_ERROR, 1 / 64), below, side="right") - 1
    middles, ends = [0], [int(lowest[0]) + 1]  # certainty stays certain
    while ends[-1] < _INFINITY:
        middles.append(int(np.searchsorted(below, reach[ends[-1]], side="right")) - 1)
        ends.append(int(lowest[middles[-1]]) + 1)
    sizes = np.diff(ends, prepend=0)
    values = (np.asarray(middles, np.uint16) | np.uint16(_SIGN)).view(np.float16)
    return np.repeat(np.arange(len(sizes)), sizes), values + np.float16(0)


def steps_of(logprob: Float16Array) -> Int64Array:
    """Return the cell of each log-probability, none of them above 0."""
    cell: Int64Array = _cells()[0]
    return np.asarray(cell[logprob.view(np.uint16) & np.uint16(_SIGN - 1)])


def logprob_of(steps: Int64Array, version: int) -> Float16Array:
    """Return what stands for each cell in a version of the packed format; IntegrityError where there is no such."""
    values = _cells()[1]
    if len(steps) and not 0 <= steps.min() <= steps.max() < (MAX_STEPS if version == 1 else len(values)):
        raise IntegrityError("a packed stream holds a log-probability that is out of range")
    return (-steps * UNIFORM_STEP).astype(np.float16) + np.float16(0) if version == 1 else values[steps]


def tail_steps_of(mass: NDArray[np.floating[Any]]) -> Int64Array:
    """Return 0 for no mass, else 1 + −log of it in uniform steps."""
    mass = mass.astype(np.float64)
    below = np.maximum(-np.log(np.where(mass > 0, mass, 1)), 0)
    return np.where(mass > 0, 1 + np.rint(below / UNIFORM_STEP).astype(np.int64), 0)


def tail_mass_of(steps: Int64Array) -> NDArray[np.float32]:
    """Undo `tail_steps_of`."""
    return np.where(steps > 0, np.exp(-(steps - 1) * UNIFORM_STEP), 0).astype(np.float32)
