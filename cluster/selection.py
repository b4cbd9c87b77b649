"""Which samples a run needs targets for: all training samples, and the held-out ones that are evaluated."""

import numpy as np

from storage.sample_set import SampleSet
from storage.samples import Int64Array


def heldout_rows(samples: SampleSet, samples_per_source: int) -> dict[str, Int64Array]:
    """Return for each source the held-out rows that are evaluated, rising: those with the smallest sample ids.

    Ids are hashes, so this is a sample that no order of the text can bias, and it stays the same when others join.
    """
    chosen = {}
    for source in samples.source_names:
        rows = samples.rows("heldout", source)
        ids = samples.ids(rows)
        order = sorted(range(len(ids)), key=ids.__getitem__)
        chosen[source] = np.sort(rows[order[:samples_per_source]])
    return chosen


def capture_rows(samples: SampleSet, samples_per_source: int) -> Int64Array:
    """Return the rows that need targets, rising."""
    return np.unique(np.concatenate([samples.rows("train"), *heldout_rows(samples, samples_per_source).values()]))
