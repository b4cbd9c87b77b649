"""Scores samples into a dataset of their own that is read once and deleted."""

from collections.abc import Sequence
from pathlib import Path

from storage.config import CacheConfig
from storage.errors import WorkerError
from storage.identity import DatasetIdentity
from storage.object_store import Store
from storage.reader import Dataset
from storage.sample_set import SampleSet
from storage.samples import Int64Array
from storage.targets import TargetBatch
from workers.config import TeacherConfig
from workers.coordinator import capture
from workers.loop import OnEvent
from workers.resources import Machines


def score_aside(
    teacher: TeacherConfig,
    cache: CacheConfig,
    model_folder: Path,
    samples: SampleSet,
    rows: Sequence[int] | Int64Array,
    identity: DatasetIdentity,
    url: str,
    machines: Machines,
    on_event: OnEvent | None,
) -> TargetBatch:
    """Return the targets of `rows` under `identity`, scored into a dataset at `url`. Ray must be running.

    What an interrupted call left there is used; `clear` it first where it must not be. The last two arguments
    are those of `capture`.

    Raises:
        WorkerError: the samples could not be scored.
    """
    store = Store(url)
    # Other datasets of the run may hold these samples: they are asked of this teacher all the same.
    own = cache.model_copy(update={"url": store.url, "also": [], "most_refused": 0.0})
    try:
        result = capture(teacher, own, model_folder, samples, rows, identity, machines, on_event)
        if result.failed_units:
            raise WorkerError(f"the samples could not be scored: {result.failed_units[0]['error']}")
        return Dataset.open(store.url, identity).read(samples.ids(rows))[1]
    finally:
        clear(store)


def clear(store: Store) -> None:
    """Delete all that lies in a store."""
    for key in store.list():
        store.delete(key)
