"""One source's samples in the order in which they are drawn: draw 0, 1, …, without end, a pure function of the seed.

The pool is passed over again and again, each pass a seeded permutation. Difficulty may leave out its ends, order each
pass from easy to hard or back in shuffled groups, and open the pool by and by, easiest samples first: a *phase* is a
run of draws in which as much of it is open.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from storage.permutation import permutation
from storage.samples import Int64Array, UInt8Array
from storage.targets import Float32Array
from trainer.curriculum_config import DifficultyConfig

GROUPS = 10
"""Shuffled groups of like difficulty in an ordered pass, and steps in which a pool opens."""


@dataclass(frozen=True)
class Phase:
    """Draws from `first` on come from the first `size` samples of the pool."""

    first: int
    size: int
    passes: int = 0
    """Passes that earlier phases began, so that the number of a pass never comes twice."""


class Pool:
    """The samples of one source."""

    def __init__(self, name: str, ids: UInt8Array, seed: int, groups: int = 1) -> None:
        """Take ids [n, 16] in the order of which each pass is a permutation: within each of `groups` equal parts."""
        self.ids = ids
        self._name, self._seed, self._groups = name, seed, groups
        self._phases = [Phase(0, len(ids))]
        self._pass = lru_cache(maxsize=2)(self._permuted)

    def __len__(self) -> int:
        return len(self.ids)

    def open_by(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Let the pool open: `(first draw, samples that are open from there)`, both rising."""
        phases: list[Phase] = []
        for first, size in sizes:
            if phases and phases[-1].first == first:
                phases.pop()  # nothing was drawn in it
            before = phases[-1] if phases else Phase(0, size)
            phases.append(Phase(first, size, before.passes + -(-(first - before.first) // before.size)))
        self._phases = phases
        self._pass.cache_clear()

    def draws(self, first: int, last: int) -> UInt8Array:
        """Return the ids of draws `first` to `last`, uint8 [last − first, 16]."""
        parts = [self.ids[:0]]
        while first < last:
            phase, passed, at = self._where(first)
            part = self._pass(phase, passed)[at : at + min(last, self._end(phase)) - first]
            parts.append(part)
            first += len(part)
        return np.concatenate(parts)

    def passes(self, first: int, last: int) -> Int64Array:
        """Return to which pass over the pool each of draws `first` to `last` belongs, int64 [last − first]."""
        found = [self._where(n) for n in range(first, last)]
        return np.array([self._phases[phase].passes + passed for phase, passed, _ in found], dtype=np.int64)

    def used(self, num_draws: int) -> UInt8Array:
        """Return the samples that the first `num_draws` draws consume, each once."""
        parts = []
        for n, phase in enumerate(self._phases):
            drawn = min(num_draws, self._end(n)) - phase.first
            parts.append(
                self.ids[: phase.size] if drawn >= phase.size else self.draws(phase.first, phase.first + drawn)
            )
        return np.unique(np.concatenate(parts), axis=0)

    def _where(self, draw: int) -> tuple[int, int, int]:
        """Return phase, pass within it and place within that of a draw."""
        n = bisect_right(self._phases, draw, key=lambda phase: phase.first) - 1
        return n, *divmod(draw - self._phases[n].first, self._phases[n].size)

    def _end(self, phase: int) -> int:
        return self._phases[phase + 1].first if phase + 1 < len(self._phases) else np.iinfo(np.int64).max

    def _permuted(self, phase: int, passed: int) -> UInt8Array:
        size = self._phases[phase].size
        key = ("epoch", self._seed, self._name, self._phases[phase].passes + passed)
        if self._groups == 1:
            return self.ids[permutation(size, *key)]
        edges = [round(size * n / self._groups) for n in range(self._groups + 1)]
        parts = [a + permutation(b - a, *key, n) for n, (a, b) in enumerate(pairwise(edges))]
        return self.ids[np.concatenate(parts)]


def by_difficulty(ids: UInt8Array, values: Float32Array, config: DifficultyConfig) -> UInt8Array:
    """Return the samples that are kept, easiest first: [n, 16] → [kept, 16]; ties go by id."""
    order = np.lexsort((*ids.T[::-1], values))
    low, high = (round(len(ids) * share) for share in config.keep)
    return ids[order[low : max(high, low + 1)]]


def open_sizes(config: DifficultyConfig, size: int, drawn: Int64Array) -> list[tuple[int, int]]:
    """Return from which draw on how many samples of a pool are open.

    Competence as in Platanios et al. 2019: the share c(t) = √(c₀² + (1 − c₀²)·t/T), here in GROUPS even steps.

    Args:
        config: c₀ is `open_first`, T `open_until` of the steps.
        size: samples in the pool.
        drawn: draws before each step, [steps + 1].
    """
    steps = len(drawn) - 1
    at = np.minimum(np.arange(steps) / max(config.open_until * steps, 1e-9), 1.0)
    competence = np.sqrt(config.open_first**2 + (1 - config.open_first**2) * at)
    opened = np.ceil(np.ceil(np.round(competence * GROUPS, 9)) / GROUPS * size).astype(np.int64).clip(1, size)
    changes = np.flatnonzero(np.diff(opened, prepend=0))
    return [(int(drawn[step]), int(opened[step])) for step in changes]
