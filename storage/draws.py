"""Reading draws: the estimate of the teacher's distribution, and one set of draws out of several."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from storage.samples import Int32Array, Int64Array, UInt8Array
from storage.targets import Float16Array, Float32Array, TargetBatch


def estimate(targets: TargetBatch, kind: str) -> Float32Array:
    """Return t̂ of each entry, [E], pooled over the sets of draws; see `storage.targets`."""
    probability: Float32Array = np.exp(targets.logprob.astype(np.float32))
    if targets.draws is None:
        return probability
    row = _rows(targets.count)
    share = _shares(targets.draws, row, len(targets.count))
    if kind == "sampled":
        return share
    drawn = targets.drawn
    mass = targets.tail_mass.astype(np.float32) + _sums(probability * drawn, row, len(targets.count))
    return np.where(drawn, mass[row] * share, probability)


def draw_set(targets: TargetBatch, kind: str, sets: Int64Array) -> TargetBatch:
    """Return the targets with one set of draws: set `sets[n]` of sample n, [N]; entries of other sets are left out.

    What they held of the teacher's mass goes to the tail, so that the estimate over the set is unbiased by itself.
    """
    if targets.draws is None or len(targets.draws) == 1:
        return targets
    row = _rows(targets.count)
    set_of_position = np.repeat(sets, np.diff(targets.offsets))
    draws = np.take_along_axis(targets.draws, set_of_position[row][None], axis=0)  # [1, E]
    kept = (draws[0] > 0) | ~targets.drawn
    size = len(targets.count)
    count = np.bincount(row[kept], minlength=size).astype(np.int32)
    if kind == "sampled":
        logprob, tail = drawn_logprob(draws[:, kept], count), targets.tail_mass
    else:
        lost = _sums(np.exp(targets.logprob.astype(np.float32)) * ~kept, row, size)
        logprob = targets.logprob[kept]
        tail = np.minimum(targets.tail_mass.astype(np.float32) + lost, 1.0).astype(np.float16)
    return replace(targets, count=count, id=targets.id[kept], logprob=logprob, draws=draws[:, kept], tail_mass=tail)


def drawn_logprob(draws: UInt8Array, count: Int32Array, mass: Float32Array | None = None) -> Float16Array:
    """Return log t̂ of drawn entries, [E], over all sets, −∞ where an entry was never drawn.

    Args:
        draws: [R, E].
        count: entries of each position, [P].
        mass: what the draws of each position share, [P]; none: 1.
    """
    row = _rows(count)
    share = _shares(draws, row, len(count))
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(share if mass is None else share * mass[row]), dtype=np.float16)


def mass_drawn_from(targets: TargetBatch) -> Float32Array:
    """Return the teacher's mass outside the head, which the draws share, [P]."""
    probability: Float32Array = np.exp(targets.logprob.astype(np.float32)) * targets.drawn
    return targets.tail_mass.astype(np.float32) + _sums(probability, _rows(targets.count), len(targets.count))


def _shares(draws: UInt8Array, row: Int64Array, size: int) -> Float32Array:
    """Return each entry's share of its position's draws over all sets, [E]; `row` is its position, of `size`."""
    times = draws.sum(axis=0, dtype=np.float32)
    return np.asarray(times / np.maximum(_sums(times, row, size), 1.0)[row], dtype=np.float32)


def _rows(count: Int32Array) -> Int64Array:
    return np.repeat(np.arange(len(count), dtype=np.int64), count)


def _sums(values: NDArray[np.float32], row: Int64Array, size: int) -> Float32Array:
    """Sum values [E] over the entries of each position, [P]."""
    return np.bincount(row, weights=values, minlength=size).astype(np.float32)
