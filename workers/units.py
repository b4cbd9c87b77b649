"""Work units: the samples that are scored together and committed together. Planning is a pure function."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from storage.samples import ID_BYTES, Int64Array, UInt8Array


@dataclass(frozen=True)
class WorkUnit:
    """Some rows of the sample set and how many tokens they hold."""

    unit_id: str
    """Hex hash of the dataset's fingerprint and of the sample ids in order."""
    rows: tuple[int, ...]
    """Rows of the sample set, rising."""
    num_tokens: int


def plan_units(
    rows: Sequence[int] | Int64Array,
    num_tokens: Int64Array,
    sample_ids: UInt8Array,
    fingerprint: str,
    unit_tokens: int,
) -> list[WorkUnit]:
    """Cut rows, in rising order, into units of about `unit_tokens` tokens; a sample is never split.

    Args:
        rows: rows of the sample set still to be scored, each once, in any order.
        num_tokens: tokens of every row of the sample set, [N].
        sample_ids: ids of every row of the sample set, uint8 [N, 16].
        fingerprint: identity of the dataset; part of each unit's id.
        unit_tokens: a unit closes with the sample that reaches this many tokens.
    """
    ordered = np.unique(np.asarray(rows, dtype=np.int64))
    if not len(ordered):
        return []
    ends = np.cumsum(num_tokens[ordered])
    # Balanced: as many units as needed, each with its share of the tokens.
    num_units = max(1, int(np.ceil(ends[-1] / unit_tokens)))
    unit_of_row = np.minimum((ends - 1) * num_units // ends[-1], num_units - 1)
    groups = np.split(ordered, np.flatnonzero(np.diff(unit_of_row)) + 1)
    return [_unit(group, num_tokens, sample_ids, fingerprint) for group in groups]


def _unit(rows: Int64Array, num_tokens: Int64Array, sample_ids: UInt8Array, fingerprint: str) -> WorkUnit:
    digest = blake2b(fingerprint.encode(), digest_size=16, person=b"lectern.unit")
    digest.update(np.ascontiguousarray(sample_ids[rows]).reshape(-1, ID_BYTES).tobytes())
    return WorkUnit(digest.hexdigest(), tuple(rows.tolist()), int(num_tokens[rows].sum()))
