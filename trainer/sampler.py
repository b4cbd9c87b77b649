"""The planned order: which samples every step consumes, a pure function of (seed, step, mixture).

Nothing here knows the world size, the micro-batch or the past: step t can be asked for by itself, so a resumed
run sees byte for byte the order of an unbroken one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from storage.errors import InputError
from storage.permutation import permutation
from storage.samples import ID_BYTES, Int64Array, UInt8Array
from storage.targets import Float32Array
from trainer.curriculum_config import DifficultyConfig
from trainer.pools import GROUPS, Pool, by_difficulty, open_sizes

EMPTY_DIGEST = bytes(ID_BYTES)

Measure = Callable[[UInt8Array], Float32Array]
"""Returns the difficulty of samples, [n, 16] → [n]."""


def planned_counts(shares: NDArray[np.float64], batch_size: int) -> Int64Array:
    """Return how many samples each source gives to each step, [steps, sources]; rows sum to `batch_size`.

    Error diffusion: what a source is owed so far (its cumulative share less what it gave) is rounded down, and the
    samples left over go to the largest remainders. Two sources stay within half a sample of the plan at every
    step, so within one in any window of steps.
    """
    owed_until = np.cumsum(shares, axis=0, dtype=np.float64) * batch_size
    given = np.zeros(shares.shape[1], dtype=np.int64)
    counts = np.zeros(shares.shape, dtype=np.int64)
    for step, owed in enumerate(owed_until):
        counts[step] = _largest_remainder(owed - given, shares[step] > 0, batch_size)
        given += counts[step]
    return counts


def _largest_remainder(owed: NDArray[np.float64], open_: NDArray[np.bool_], total: int) -> Int64Array:
    """Split `total` in proportion to what is owed; only `open_` sources may round up."""
    # Rounding noise of the cumulative sums must not move a sample from one source to another.
    owed = np.round(owed, 9)
    counts = np.floor(np.maximum(owed, 0.0)).astype(np.int64)
    while (missing := total - int(counts.sum())) != 0:
        remainder = owed - counts
        if missing > 0:
            ranked = np.argsort(np.where(open_, -remainder, np.inf), kind="stable")[: int(open_.sum())]
            counts[ranked[:missing]] += 1
        else:
            ranked = np.argsort(np.where(counts > 0, remainder, np.inf), kind="stable")[: int((counts > 0).sum())]
            counts[ranked[:-missing]] -= 1
    return counts


def chain_digest(before: bytes, ids: Sequence[bytes] | UInt8Array) -> bytes:
    """Return the running digest after consuming `ids`: BLAKE2b over the digest before and the ids in order."""
    raw = ids.tobytes() if isinstance(ids, np.ndarray) else b"".join(ids)
    return blake2b(before + raw, digest_size=ID_BYTES, person=b"lectern.order").digest()


class PlannedOrder:
    """The sample ids of every step.

    Each source's pool is passed over again and again (see `trainer.pools`); a step takes the next
    `counts[step, source]` of each and shuffles them.
    """

    def __init__(
        self,
        ids_by_source: Mapping[str, Sequence[bytes]],
        shares: NDArray[np.float64],
        batch_size: int,
        seed: int,
        difficulty: DifficultyConfig | None = None,
        measure: Measure | None = None,
    ) -> None:
        """Plan the steps.

        Args:
            ids_by_source: training samples of each source; the order of the sources is that of the columns of `shares`.
            shares: planned share of each source at each step, [steps, sources]; rows sum to 1.
            batch_size: samples per step.
            seed: of all permutations.
            difficulty: how the samples' difficulty, which `measure` tells, decides which come when; none: not at all.
        """
        self.sources = list(ids_by_source)
        self.batch_size = batch_size
        self._seed = seed
        self._difficulty = difficulty
        self._pools = [self._pool(name, ids, measure) for name, ids in ids_by_source.items()]
        self.replan(shares)

    def replan(self, shares: NDArray[np.float64]) -> None:
        """Plan for other shares, [steps, sources]; steps before the first that differs stay as they were."""
        self.shares = shares
        self.counts = planned_counts(shares, self.batch_size)  # [steps, sources]
        self._given = np.zeros((len(shares) + 1, len(self.sources)), dtype=np.int64)
        np.cumsum(self.counts, axis=0, out=self._given[1:])
        if self._difficulty is not None and self._difficulty.open_first < 1:
            for pool, drawn in zip(self._pools, self._given.T, strict=True):
                pool.open_by(open_sizes(self._difficulty, len(pool), drawn))

    def _pool(self, name: str, ids: Sequence[bytes], measure: Measure | None) -> Pool:
        # Sorted, so that the order does not depend on how the samples happen to be stored.
        rows = _as_rows(sorted(ids))
        if self._difficulty is None or measure is None or not len(rows):
            return Pool(name, rows, self._seed)
        rows = by_difficulty(rows, measure(rows), self._difficulty)
        if self._difficulty.order == "falling":
            rows = rows[::-1]
        return Pool(name, rows, self._seed, 1 if self._difficulty.order == "shuffled" else GROUPS)

    def __len__(self) -> int:
        return len(self.shares)

    def epochs(self) -> dict[str, float]:
        """Return how many passes over each source the whole plan makes."""
        return {
            name: float(given) / len(pool) if len(pool) else 0.0
            for name, given, pool in zip(self.sources, self._given[-1], self._pools, strict=True)
        }

    def check_epochs(self, most: float | None) -> None:
        """Raise InputError when the plan passes over a source more than `most` times."""
        for (name, passes), pool in zip(self.epochs().items(), self._pools, strict=True):
            if most is not None and passes > most:
                raise InputError(
                    f"the plan passes {passes:.2f} times over {name!r} ({len(pool)} training samples), more than "
                    f"curriculum.max_epochs {most:g}; lower its share or train.steps, or add text"
                )

    def used_ids(self) -> UInt8Array:
        """Return the ids that the whole plan consumes, each once, uint8 [n, 16]."""
        return np.concatenate([pool.used(int(n)) for pool, n in zip(self._pools, self._given[-1], strict=True)])

    def step(self, step: int) -> UInt8Array:
        """Return the ids of a step's global batch in order, uint8 [batch_size, 16]."""
        return np.concatenate([pool.draws(a, b) for pool, a, b in self._taken(step)])[self._shuffle(step)]

    def step_sources(self, step: int) -> list[str]:
        """Return the source of each sample of a step, in the order of `step`."""
        names = np.repeat(np.arange(len(self.sources)), self.counts[step])
        return [self.sources[n] for n in names[self._shuffle(step)]]

    def step_epochs(self, step: int) -> Int64Array:
        """Return which pass over its source each sample of a step belongs to, in the order of `step`, [batch_size]."""
        return np.concatenate([pool.passes(a, b) for pool, a, b in self._taken(step)])[self._shuffle(step)]

    def pool_start(self, num_samples: int) -> UInt8Array:
        """Return the first `num_samples` ids of all sources in sorted order, uint8 [n, 16]."""
        ids = np.concatenate([pool.ids for pool in self._pools])
        return ids[np.lexsort(ids.T[::-1])[:num_samples]]

    def digest(self, until: int | None = None) -> bytes:
        """Return the running digest of the first `until` steps (all of them by default)."""
        running = EMPTY_DIGEST
        for step in range(len(self) if until is None else until):
            running = chain_digest(running, self.step(step))
        return running

    def _taken(self, step: int) -> Iterator[tuple[Pool, int, int]]:
        """Yield each source's pool and the draws that a step takes from it."""
        for pool, first, last in zip(self._pools, self._given[step], self._given[step + 1], strict=True):
            yield pool, int(first), int(last)

    def _shuffle(self, step: int) -> Int64Array:
        return permutation(self.batch_size, "step", self._seed, step)


def rank_slice(batch_size: int, rank: int, world_size: int) -> slice:
    """Return which positions of a global batch rank `rank` takes: rank, rank + world_size, …."""
    return slice(rank, batch_size, world_size)


def _as_rows(ids: Sequence[bytes]) -> UInt8Array:
    return np.frombuffer(b"".join(ids), dtype=np.uint8).reshape(len(ids), ID_BYTES)
