"""Hidden states as they are stored: their number formats, and which positions keep them.

A format is told by the array's own dtype, so that states can be cut and joined without knowing it:

* `float32`, `float16`: as they are, [P, width];
* `bfloat16`: uint16 bit patterns, [P, width], since numpy has no such type;
* `int8`: uint8 [P, 4 + width], each row a little-endian float32 scale and then `width` signed bytes; a state is
  scale · bytes, at most scale/2 = max|state| / 254 away from what it was.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from storage.samples import BoolArray, Int64Array, SampleBatch, UInt8Array, offsets_of

if TYPE_CHECKING:
    from torch import Tensor

_SCALE_BYTES = 4
_INT8_MAX = 127

NUMPY_DTYPES = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "int8": "u1"}


def stored_columns(dtype: str, width: int) -> int:
    """Return how many columns an array of stored states of this width has."""
    return width + _SCALE_BYTES if dtype == "int8" else width


def state_width(states: NDArray[Any]) -> int:
    """Return the width of stored states [P, columns]."""
    return int(states.shape[1]) - (_SCALE_BYTES if states.dtype == np.uint8 else 0)


def store_states(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Return float32 states [P, width] in a stored format; NaN and infinity stay visible to `bad_states`."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        # Round to nearest even; a NaN keeps a bit of its mantissa.
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype("<u2")
    if dtype != "int8":
        with np.errstate(over="ignore"):
            return np.asarray(values, dtype=NUMPY_DTYPES[dtype])
    scale = np.abs(values).max(axis=1, initial=0.0).astype("<f4") / np.float32(_INT8_MAX)
    with np.errstate(invalid="ignore", divide="ignore"):
        steps = np.nan_to_num(np.rint(values / np.where(scale > 0, scale, 1)[:, None]))
    rows = np.empty((len(values), _SCALE_BYTES + values.shape[1]), dtype=np.uint8)
    rows[:, :_SCALE_BYTES] = scale.view(np.uint8).reshape(-1, _SCALE_BYTES)
    rows[:, _SCALE_BYTES:] = np.clip(steps, -_INT8_MAX, _INT8_MAX).astype(np.int8).view(np.uint8)
    return rows


def read_states(states: NDArray[Any]) -> NDArray[np.float32]:
    """Return stored states as float32 [P, width]."""
    if states.dtype == np.uint16:
        return (states.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if states.dtype == np.uint8:
        return _scales(states)[:, None] * states[:, _SCALE_BYTES:].view(np.int8)
    return np.asarray(states, dtype=np.float32)


def states_tensor(states: NDArray[Any]) -> "Tensor":
    """Return stored states as a tensor [P, width]: bfloat16 and floats as they are, int8 as float32."""
    import torch

    array = np.ascontiguousarray(states)
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(read_states(array) if array.dtype == np.uint8 else array)


def bad_states(states: NDArray[Any]) -> BoolArray:
    """Return which rows of stored states hold NaN or infinity, [P]."""
    if states.dtype == np.uint8:
        return ~np.isfinite(_scales(states))
    if states.dtype == np.uint16:
        return np.asarray(((states & np.uint16(0x7F80)) == 0x7F80).any(axis=1))
    return np.asarray(~np.isfinite(states).all(axis=1))


def kept_positions(sample_ids: UInt8Array, num_positions: Int64Array, every: float | None) -> BoolArray:
    """Return which supervised positions keep hidden states and attention, bool [P]: evenly spaced in each sample.

    A pure function of sample id and position: position i is kept where ⌊(i + 1)·r + u⌋ > ⌊i·r + u⌋, with u from the id.

    Args:
        sample_ids: uint8 [N, 16].
        num_positions: supervised positions of each sample, [N].
        every: r = 1/every from 1 on, r = every below 1; None keeps all.
    """
    offsets = offsets_of(num_positions)
    if every is None:
        return np.ones(offsets[-1], dtype=np.bool_)
    rate = 1 / positions_per_state(every)
    start = np.ascontiguousarray(sample_ids[:, 8:]).view(">u8")[:, 0] / 2.0**64
    index = np.arange(offsets[-1]) - np.repeat(offsets[:-1], num_positions)
    shift = np.repeat(start, num_positions)
    return np.asarray(np.floor((index + 1) * rate + shift) > np.floor(index * rate + shift))


def positions_per_state(every: float | None) -> float:
    """Return how many supervised positions each kept state stands for."""
    return 1.0 if every is None else every if every >= 1 else 1 / every


def attention_lengths(samples: SampleBatch) -> Int64Array:
    """Return how many tokens each supervised position's prediction looks back on, int64 [P].

    The token before the position may attend to itself and all before it in the same document.
    """
    index = np.arange(samples.num_tokens)
    starts = np.zeros(samples.num_tokens, dtype=np.bool_)
    starts[samples.offsets[:-1][samples.lengths() > 0]] = True
    starts[1:] |= samples.document[1:] != samples.document[:-1]
    first = np.maximum.accumulate(np.where(starts, index, 0))
    return np.asarray((index - first)[samples.supervised], dtype=np.int64)


def _scales(states: NDArray[Any]) -> NDArray[np.float32]:
    return np.ascontiguousarray(states[:, :_SCALE_BYTES]).view("<f4")[:, 0]
