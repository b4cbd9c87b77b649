"""The order in which the entries of all positions are coded, the same for both directions.

A position says which list of ids it takes, unless it is the usual one after the token before. It has a head (kept for
its rank) and drawn entries. Each group is a set, coded by rising rank of its ids as gaps in the context of the rank
before and of the number of entries left; where the token that stands in the text is among them, one flag says so, which
saves its id. Log-probabilities are coded in steps above the least of the head, in the context of how far above it the
same id lies on average where the same list is taken. Draws follow in the context of those that are still to be dealt
out.
"""

from dataclasses import dataclass, replace

import numpy as np

from storage.codecs.codebook import Codebook, Ranking
from storage.codecs.integers import Coder, bucket_of
from storage.codecs.steps import UNIFORM_STEP, logprob_of
from storage.errors import IntegrityError
from storage.samples import BoolArray, Int64Array, offsets_of

HEAD, DRAWN = 0, 1
"""The groups; also the fields of their sizes."""
LABEL, GAP, LEVEL, ABOVE, BELOW, DRAWS, TAIL, LIST = range(2, 10)
"""The other fields."""
UNIT = 1 << 24
"""Probability 1 in whole numbers."""


@dataclass(frozen=True, eq=False)
class Places:
    """What is known of P positions before their entries are."""

    lane: Int64Array  # [P], non-decreasing
    label: Int64Array  # [P], the token that stands in the text
    lists: Int64Array  # [P], which list of the codebook applies, −1 for none; until `code_lists` the usual one


@dataclass(frozen=True, eq=False)
class Group:
    """The entries of one group, flat; within a position the label first, if it is there, then by rising rank."""

    count: Int64Array  # [P]
    has_label: BoolArray  # [P]
    id: Int64Array  # [E]
    rank: Int64Array  # [E], 0 for the label

    @classmethod
    def empty(cls, positions: int) -> "Group":
        """Return a group without entries."""
        nothing = np.zeros(0, dtype=np.int64)
        return cls(np.zeros(positions, np.int64), np.zeros(positions, np.bool_), nothing, nothing)

    @property
    def owner(self) -> Int64Array:
        """Return the position of each entry, [E]."""
        return np.repeat(np.arange(len(self.count)), self.count)

    @property
    def label_at(self) -> Int64Array:
        """Return which entries are labels."""
        return offsets_of(self.count)[:-1][self.has_label]


def code_lists(coder: Coder, places: Places, num_lists: int, known: Int64Array | None) -> Places:
    """Code which list each position takes, [P], and return the places with them."""
    if not num_lists:
        return places
    usual = places.lists
    values = None if known is None else np.where(known == usual, 0, known + 2)  # 0 the usual one, 1 none, 2 the first
    values = coder.integers(LIST, (usual >= 0).astype(np.int64), places.lane, values)
    if (values > num_lists + 1).any():
        raise IntegrityError("a packed stream names a list that the codebook does not have")
    return replace(places, lists=np.where(values == 0, usual, values - 2))


def arrange(places: Places, ranking: Ranking, count: Int64Array, ids: Int64Array) -> tuple[Group, Int64Array]:
    """Put the entries of a group, flat [E], in the coded order; returns it and the index of each coded entry."""
    owner = np.repeat(np.arange(len(count)), count)
    rank = ranking.ranks(places.lists[owner], ids)
    is_label = ids == places.label[owner]
    rank[is_label] = 0
    order = np.lexsort((rank, ~is_label, owner))
    has_label = np.bincount(owner[is_label], minlength=len(count)) > 0
    return Group(count, has_label, ids[order], rank[order]), order


def code_group(
    coder: Coder, places: Places, ranking: Ranking, group: Group | None, which: int, may: BoolArray, most: int = 0
) -> Group:
    """Code a group's sizes, labels and ids.

    Args:
        group: none when decoding.
        may: where the label may be in it, [P].
        most: its largest size, or 0, where sizes are coded as they are and not by what they lack.
    """
    zero = np.zeros(len(places.lane), dtype=np.int64)
    lack = coder.integers(which, zero, places.lane, None if group is None else np.abs(most - group.count))
    count = np.abs(most - lack)
    ask = np.flatnonzero(may & (count > 0))
    flags = None if group is None else group.has_label[ask].astype(np.int64)
    has_label = np.zeros(len(count), dtype=np.bool_)
    has_label[ask] = coder.integers(LABEL, np.full(len(ask), which), places.lane[ask], flags) > 0
    rank = _code_ranks(coder, places, count, has_label, None if group is None else group.rank, which)
    if group is not None:
        return group
    owner = np.repeat(np.arange(len(count)), count)
    ids = ranking.ids(places.lists[owner], rank)
    found = Group(count, has_label, ids, rank)
    ids[found.label_at] = places.label[has_label]
    return found


def _code_ranks(
    coder: Coder, places: Places, count: Int64Array, has_label: BoolArray, known: Int64Array | None, which: int
) -> Int64Array:
    offsets = offsets_of(count)
    rank = np.zeros(offsets[-1], dtype=np.int64)
    before = np.zeros(len(count), dtype=np.int64)  # the least rank that is still possible
    kind = 2 * which + (places.lists >= 0)
    for step in range(int(count.max(initial=0))):
        active = np.flatnonzero(count > step + has_label)
        at = offsets[active] + step + has_label[active]
        left = count[active] - step - has_label[active]
        context = (kind[active] * 32 + octave(before[active])) * 32 + few(left)
        gap = coder.integers(GAP, context, places.lane[active], None if known is None else known[at] - before[active])
        rank[at] = before[active] + gap
        if (rank[at] >> 30).any():
            raise IntegrityError("a packed stream holds a rank that is out of range")
        before[active] = rank[at] + 1
    return rank


def octave(values: Int64Array) -> Int64Array:
    """Return the number of bits of each value: 0 for 0, 1 for 1, 2 for 2 and 3, ….."""
    return np.frexp(values.astype(np.float64))[1].astype(np.int64)


def few(counts: Int64Array) -> Int64Array:
    """Return counts on a coarse scale: up to 4 as they are, then two steps to the octave, at most 31."""
    bits = octave(counts)
    half = (counts >> np.maximum(bits - 2, 0)) & 1
    return np.minimum(np.where(counts <= 4, counts, 2 * bits + half - 1), 31)


def code_head_logprobs(
    coder: Coder, places: Places, ranking: Ranking, group: Group, codebook: Codebook, below: Int64Array | None
) -> tuple[Int64Array, Int64Array]:
    """Code −log p of the head's entries in steps: each position's largest, then how far the others lie above it.

    Returns the largest of each position, [P], and all of them, [E].
    """
    owner = group.owner
    filled = np.flatnonzero(group.count)
    largest = None if below is None else least_of(group, below)[filled]
    level = np.zeros(len(group.count), dtype=np.int64)
    level[filled] = coder.integers(LEVEL, np.zeros(len(filled), np.int64), places.lane[filled], largest)
    above = None if below is None else level[owner] - below
    if codebook.version == 1:
        context = _logprob_context(group, level)
    else:
        expected = codebook.shares[kinds_of(places, ranking, group)] * level[owner] >> 8
        context = 2 * bucket_of(expected)[0] + _is_label(group)
    return level, level[owner] - coder.integers(ABOVE, context, places.lane[owner], above)


def least_of(group: Group, below: Int64Array) -> Int64Array:
    """Return the largest −log p of each position's entries, [P], 0 where it has none."""
    filled = np.flatnonzero(group.count)
    level = np.zeros(len(group.count), dtype=np.int64)
    level[filled] = np.maximum.reduceat(below, offsets_of(group.count)[:-1][filled])
    return level


def kinds_of(places: Places, ranking: Ranking, group: Group) -> Int64Array:
    """Return what each entry is known to be, see `Ranking.kinds`, [E]."""
    rank = group.rank.copy()
    rank[group.label_at] = ranking.ranks(places.lists[group.has_label], places.label[group.has_label])
    return ranking.kinds(places.lists[group.owner], rank)


def code_drawn_logprobs(
    coder: Coder, places: Places, group: Group, level: Int64Array, below: Int64Array | None
) -> Int64Array:
    """Code −log p of the drawn entries in steps, [E], by how far they lie below the head's least, `level` [P]."""
    # Rounding in the teacher's own precision may put a drawn entry a step above the head's least: hence the sign.
    owner = group.owner
    values = None if below is None else signed(below - level[owner])
    context = _logprob_context(group, level)
    return level[owner] + unsigned(coder.integers(BELOW, context, places.lane[owner], values))


def code_tail(
    coder: Coder, places: Places, owner: Int64Array, steps: Int64Array, version: int, known: Int64Array | None
) -> Int64Array:
    """Code the tail's −log in steps, plus 1, or 0 for none, [P], against what the entries leave of 1."""
    known_steps = np.arange(1024)
    masses = np.rint(UNIT * np.exp(logprob_of(known_steps, version).astype(np.float64))).astype(np.int64)
    tails = np.rint(UNIT * np.exp(-known_steps * UNIFORM_STEP)).astype(np.int64)
    kept = np.bincount(owner, weights=masses[np.minimum(steps, 1023)], minlength=len(places.lane)).astype(np.int64)
    expected = 1 + np.searchsorted(-tails, -np.maximum(UNIT - kept, 1))
    values = None if known is None else signed(known - expected)
    return expected + unsigned(coder.integers(TAIL, few(expected >> 2), places.lane, values))


def code_draws(
    coder: Coder, places: Places, group: Group, deal: tuple[int, int], known: Int64Array | None
) -> Int64Array:
    """Code how often each entry was drawn in each set, [R, E]; `deal` is how many draws a set deals out, and R."""
    draws, sets = deal
    least = 1 if sets == 1 else 0
    offsets = offsets_of(group.count)
    out = np.zeros((sets, offsets[-1]), dtype=np.int64)
    spare = np.full((sets, len(group.count)), draws, dtype=np.int64) - least * group.count
    for step in range(int(group.count.max(initial=0))):
        active = np.flatnonzero(group.count > step)
        at, left = offsets[active] + step, group.count[active] - step
        label = group.has_label[active] & (step == 0)
        for number in range(sets):
            room = spare[number, active]
            if (room < 0).any():
                raise IntegrityError("a packed stream deals out more draws than there are")
            context = (np.minimum(room, 63) * 4 + np.minimum(left - 1, 3)) * 2 + label
            values = None if known is None else known[number, at] - least
            more = coder.integers(DRAWS, context, places.lane[active], values)
            out[number, at] = more + least
            spare[number, active] -= more
    return out


def _logprob_context(group: Group, level: Int64Array) -> Int64Array:
    return (few(level[group.owner] >> 4) * 32 + octave(group.rank)) * 2 + _is_label(group)


def _is_label(group: Group) -> Int64Array:
    label = np.zeros(len(group.id), dtype=np.int64)
    label[group.label_at] = 1
    return label


def signed(values: Int64Array) -> Int64Array:
    """Return 0, −1, 1, −2, … as 0, 1, 2, 3, …."""
    return np.where(values < 0, -2 * values - 1, 2 * values)


def unsigned(values: Int64Array) -> Int64Array:
    """Undo `signed`."""
    return np.where(values & 1, -(values + 1) // 2, values // 2)
