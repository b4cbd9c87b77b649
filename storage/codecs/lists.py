"""Which positions of a file keep much the same ids: they share a list of these, likeliest first.

A list begins as what follows one frequent token. Then, in rounds like those of k-means, each position takes the list
under which its ids are likeliest, and the lists are counted anew from the positions that took them. The list that most
positions after the same token take is the usual one there, and any other has a price. A list that saves fewer bits than
it takes is given up.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from storage.samples import Int32Array, Int64Array, offsets_of

MIN_POSITIONS = 24
"""Positions that must follow a token for a list to begin with it…"""
MAX_LISTS = 255
"""…and the most lists that begin."""
MIN_KEPT = 6
"""How often an id must have been kept at a list's positions to be listed…"""
MAX_LISTED = 400
"""…and the most ids that a list has."""
MIN_NAMED = 6
"""Positions that must follow a token for the codebook to say which list is usual after it."""
ROUNDS = 3
LISTED_BITS = 9.0
"""What an id in a list takes in the codebook."""
UNUSUAL_BITS = 7.0
"""What it takes to say that a position's list is not the usual one."""
_BLOCK = 1024
_NONE = -1


@dataclass(frozen=True, eq=False)
class Lists:
    """Lists of ids, and the positions that take them."""

    of_position: Int64Array  # [P], −1 for none
    offsets: Int64Array  # [K + 1]
    ids: Int32Array  # [I], of each list, likeliest first
    kept: Int64Array  # [I], at how many of the list's positions

    @classmethod
    def count(cls, of_position: Int64Array, owner: Int64Array, ids: Int32Array, vocab_size: int) -> "Lists":
        """Count what was kept at the positions of each list, and number the lists by falling number of positions."""
        old, size = np.unique(of_position[of_position >= 0], return_counts=True)
        number = np.full(int(of_position.max(initial=0)) + 2, _NONE)  # the last one for none
        number[old[np.argsort(-size, kind="stable")]] = np.arange(len(old))
        of_position = number[of_position]
        list_of_entry = of_position[owner]
        known = list_of_entry >= 0
        keys, kept = np.unique(list_of_entry[known] * vocab_size + ids[known], return_counts=True)
        keys, kept = keys[kept >= MIN_KEPT], kept[kept >= MIN_KEPT]
        order = np.lexsort((keys, -kept, keys // vocab_size))
        keys, kept = keys[order], kept[order]
        place = (
            np.arange(len(keys)) - offsets_of(np.bincount(keys // vocab_size, minlength=len(old)))[keys // vocab_size]
        )
        keys, kept = keys[place < MAX_LISTED], kept[place < MAX_LISTED]
        offsets = offsets_of(np.bincount(keys // vocab_size, minlength=len(old)))
        return cls(of_position, offsets, (keys % vocab_size).astype(np.int32), kept)

    def usual(self, before: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Return the tokens after which most positions take one list, rising, and its number; `before` is [P]."""
        tokens, place, positions = np.unique(before, return_inverse=True, return_counts=True)
        width = len(self.offsets)
        pairs, times = np.unique(place * width + self.of_position + 1, return_counts=True)
        most = np.lexsort((-times, pairs // width))[np.searchsorted(pairs // width, np.arange(len(tokens)))]
        number = pairs[most] % width - 1
        named = (number >= 0) & (positions >= MIN_NAMED)
        return tokens[named], number[named]


def choose_lists(before: Int64Array, owner: Int64Array, ids: Int32Array, vocab_size: int) -> Lists:
    """Return the lists that serve the positions of a file best.

    Args:
        before: the token before each position, [P].
        owner: the position of each entry, [E], rising.
        ids: the entries, [E].
        vocab_size: V.
    """
    tokens, place, positions = np.unique(before, return_inverse=True, return_counts=True)
    seeds = np.argsort(-positions, kind="stable")[:MAX_LISTS]
    seeds = seeds[positions[seeds] >= MIN_POSITIONS]
    number = np.full(len(tokens), _NONE)
    number[seeds] = np.arange(len(seeds))
    lists = Lists.count(number[place], owner, ids, vocab_size)
    for _ in range(ROUNDS):
        if len(lists.offsets) == 1 or not len(ids):
            break
        taken, saved = _take(lists, usual_list(before, *lists.usual(before)), owner, ids, vocab_size)
        pays = np.bincount(taken + 1, saved, minlength=len(lists.offsets))[1:] > LISTED_BITS * np.diff(lists.offsets)
        lists = Lists.count(np.where(np.append(pays, False)[taken], taken, _NONE), owner, ids, vocab_size)
    return lists


def usual_list(before: Int64Array, tokens: Int64Array, numbers: Int64Array) -> Int64Array:
    """Return the list that is usual after each token, −1 for none, given the tokens [T], rising, that have one."""
    if not len(tokens):
        return np.full(len(before), _NONE, dtype=np.int64)
    at = np.minimum(np.searchsorted(tokens, before), len(tokens) - 1)
    return np.where(tokens[at] == before, numbers[at], _NONE)


def _take(
    lists: Lists, usual: Int64Array, owner: Int64Array, ids: Int32Array, vocab_size: int
) -> tuple[Int64Array, NDArray[np.float64]]:
    """Return the best list of each position, −1 for none, and the bits that it saves there, its own price taken off."""
    row, weights, constant = _weights(lists, ids, len(usual), vocab_size)
    taken, saved = np.full(len(usual), _NONE), np.zeros(len(usual))
    starts = offsets_of(np.bincount(owner, minlength=len(usual)))
    for first in range(0, len(usual), _BLOCK):
        edges = starts[first : first + _BLOCK + 1]
        filled = np.flatnonzero(np.diff(edges))
        if not len(filled):
            continue
        entries = weights[row[ids[edges[0] : edges[-1]]]]
        scores = np.add.reduceat(entries, edges[:-1][filled] - edges[0], axis=0) + constant
        at = first + filled
        scores[np.arange(len(at)), usual[at]] += UNUSUAL_BITS  # the last column is that of none, which scores 0
        best = scores.argmax(axis=1)
        taken[at] = np.where(best == scores.shape[1] - 1, _NONE, best)
        saved[at] = scores[np.arange(len(at)), best] - UNUSUAL_BITS
    return taken, saved


def _weights(
    lists: Lists, ids: Int32Array, num_positions: int, vocab_size: int
) -> tuple[Int64Array, NDArray[np.float32], NDArray[np.float32]]:
    """Return by how many bits each list makes an id likelier than the whole file does.

    Each id counts as kept or not on its own. Ids that a list does not have share what it leaves, in proportion to how
    often the file keeps them.

    Returns:
        The row of each id, [V]; the weights of an id that is kept, by row and list, [U + 1, K + 1], 0 in the last
        column, for no list; what the ids that are not kept add, [K + 1].
    """
    num_lists = len(lists.offsets) - 1
    size = np.bincount(lists.of_position + 1, minlength=num_lists + 1)[1:]
    head = np.repeat(np.arange(num_lists), np.diff(lists.offsets))
    everywhere = np.minimum(np.bincount(ids, minlength=vocab_size) / num_positions, 0.98)
    mean = len(ids) / num_positions
    rate, usual = np.minimum(lists.kept / (size[head] + 1), 0.98), everywhere[lists.ids]
    inside, usually = np.bincount(head, rate, minlength=num_lists), np.bincount(head, usual, minlength=num_lists)
    left = np.clip((mean - inside) / np.maximum(mean - usually, 1e-3), 0.01, 1.0)
    listed = np.unique(lists.ids)
    row = np.full(vocab_size, len(listed))
    row[listed] = np.arange(len(listed))
    weights = np.zeros((len(listed) + 1, num_lists + 1), dtype=np.float32)
    weights[:, :-1] = np.log2(left)
    constant = np.append((mean - usually) * (1 - left) / np.log(2), 0)
    np.add.at(constant, head, np.log2((1 - rate) / (1 - usual)))
    weights[row[lists.ids], head] = np.log2(rate / (1 - rate)) - np.log2(usual / (1 - usual))
    return row, weights, constant.astype(np.float32)
