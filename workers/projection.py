"""Fits the projection of hidden states before a capture: the teacher scores a few samples whole, the rest is algebra.

The states of these samples go through a dataset of their own inside the real one, which is deleted afterwards. The
teacher is loaded for it once more than the capture needs.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from storage.config import CacheConfig
from storage.errors import InputError
from storage.hidden import read_states
from storage.identity import CaptureIdentity, DatasetIdentity
from storage.object_store import Store
from storage.projection import fit_projection, save_projection
from storage.sample_set import SampleSet
from storage.samples import Int64Array
from workers.config import TeacherConfig
from workers.loop import OnEvent
from workers.resources import ANY_CPU, Machines
from workers.scratch import score_aside

FIT_POSITIONS = 16_384
"""Supervised positions that a projection is fitted to and measured on, at least four for each of its dimensions."""
_SCRATCH = "projections/fit"


def fitting_rows(samples: SampleSet, rows: Sequence[int] | Int64Array, positions: int) -> Int64Array:
    """Return the rows with the smallest sample ids that hold so many positions: random, and the same for any order."""
    picked = np.asarray(rows, dtype=np.int64)
    ordered = picked[np.lexsort(samples.sample_ids[picked].T[::-1])]
    reached = np.cumsum(samples.num_supervised[ordered])
    return np.sort(ordered[: int(np.searchsorted(reached, positions)) + 1])


def fit_teacher_projection(
    teacher: TeacherConfig,
    cache: CacheConfig,
    model_folder: Path,
    samples: SampleSet,
    rows: Sequence[int] | Int64Array,
    identity: DatasetIdentity,
    machines: Machines = ANY_CPU,
    on_event: OnEvent | None = None,
) -> DatasetIdentity:
    """Fit and keep the projection that `identity` asks for; returns the identity with its digest. Ray must be running.

    Raises:
        InputError: the width does not fit the teacher, or the samples are too few.
        WorkerError: the samples could not be scored.
    """
    width = identity.capture.hidden_projection
    if width is None:
        raise InputError("the identity asks for no projection; set cache.hidden_projection")
    store = Store(cache.url)
    scratch = Store(store.url).child(_SCRATCH)
    whole = CaptureIdentity(kind="text", hidden=identity.capture.hidden, hidden_dtype="float32")
    chosen = fitting_rows(samples, rows, max(FIT_POSITIONS, 4 * width))
    own = identity.model_copy(update={"capture": whole})
    targets = score_aside(teacher, cache, model_folder, samples, chosen, own, scratch.url, machines, on_event)
    projection = fit_projection({name: read_states(states) for name, states in targets.hidden.items()}, width)
    digest = save_projection(store, projection)
    return identity.model_copy(update={"capture": identity.capture.model_copy(update={"projection": digest})})
