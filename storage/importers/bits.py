"""Unsigned integers packed into a few bits each, as other tools lay them out."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.errors import InputError
from storage.samples import Int64Array, UInt8Array


def unpack_big_endian(packed: UInt8Array, bits: int, count: int) -> Int64Array:
    """Return int64 [T, count] from rows of bytes [T, B], each number of `bits` bits with its highest bit first.

    Raises:
        InputError: B is not the number of bytes that `count` numbers take.
    """
    needed = -(-count * bits // 8)
    if packed.shape[1] != needed:
        raise InputError(f"{packed.shape[1]} bytes came where {count} numbers of {bits} bits take {needed}")
    stream = np.unpackbits(packed, axis=1, count=count * bits).reshape(len(packed), count, bits)
    weight = np.int64(1) << np.arange(bits - 1, -1, -1, dtype=np.int64)
    return np.asarray(stream.astype(np.int64) @ weight)


def unpack_words(words: NDArray[Any], bits: int, count: int) -> Int64Array:
    """Return int64 [T, count] from rows of 64-bit words, ⌊64/bits⌋ numbers in each, the first in the lowest bits.

    Raises:
        InputError: the rows are not as long as `count` numbers need.
    """
    per_word = 64 // bits
    needed = -(-count // per_word)
    if words.shape[1] != needed:
        raise InputError(f"{words.shape[1]} words came where {count} numbers of {bits} bits take {needed}")
    shift = np.arange(per_word, dtype=np.uint64) * np.uint64(bits)
    numbers = (words.astype(np.uint64)[:, :, None] >> shift) & np.uint64((1 << bits) - 1)
    return numbers.reshape(len(words), -1)[:, :count].astype(np.int64)
