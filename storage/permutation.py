"""Permutations that are the same on any machine and with any library version."""

from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from storage.samples import Int64Array

UInt64Array = NDArray[np.uint64]


def permutation(size: int, *key: object) -> Int64Array:
    """Return a permutation of `range(size)` that depends on `key` alone, on any machine and library version."""
    seed = int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "little")
    with np.errstate(over="ignore"):
        return np.argsort(_splitmix64(np.arange(size, dtype=np.uint64) + np.uint64(seed)), kind="stable")


def _splitmix64(values: UInt64Array) -> UInt64Array:
    """Mix 64-bit integers (the finaliser of Steele, Lea and Flood's SplitMix64); a bijection."""
    z = (values + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))
