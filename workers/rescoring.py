"""Scores samples of a dataset again with its teacher: how far is what is stored from what the teacher says now?"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from storage.compare import Difference, compare
from storage.config import CacheConfig
from storage.errors import InputError
from storage.identity import CaptureIdentity, DatasetIdentity
from storage.object_store import Store
from storage.reader import Dataset
from storage.sample_set import SampleSet
from storage.samples import Int64Array
from storage.targets import TargetBatch
from workers.config import TeacherConfig
from workers.loop import OnEvent
from workers.resources import ANY_CPU, Machines
from workers.scratch import clear, score_aside

BOUND = 0.05
"""Nats that the 99th percentile of the differences may always have: float16 and other batches cost a part of it."""
CONTROL_FACTOR = 3.0
"""…and how many times that of the teacher against itself."""


@dataclass(frozen=True)
class Rescoring:
    """What scoring again found."""

    samples: int
    difference: Difference
    """The dataset against the teacher."""
    control: Difference
    """The teacher against itself, in batches of half the size: what its own arithmetic is worth."""
    bound: float

    @property
    def limit(self) -> float:
        """Return the largest 99th percentile that counts as the same teacher, nats."""
        return max(self.bound, CONTROL_FACTOR * self.control.spread.p99)

    @property
    def ok(self) -> bool:
        """Tell whether the dataset is this teacher's."""
        return self.difference.spread.p99 <= self.limit

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {**asdict(self), "limit": self.limit, "ok": self.ok}


def chosen_rows(samples: SampleSet, rows: Sequence[int] | Int64Array, dataset: Dataset, number: int) -> Int64Array:
    """Return `number` of the rows that the dataset holds, those with the smallest sample ids: random, yet fixed.

    Raises:
        InputError: the dataset holds none of them.
    """
    picked = np.asarray(rows, dtype=np.int64)
    held = np.setdiff1d(picked, picked[dataset.missing(samples.sample_ids[picked])])
    if not len(held):
        raise InputError(f"{dataset.store.shown()} holds no sample of this config; name the config that it is from")
    order = np.lexsort(samples.sample_ids[held].T[::-1])
    return np.sort(held[order[:number]])


def rescore(
    teacher: TeacherConfig,
    cache: CacheConfig,
    model_folder: Path,
    samples: SampleSet,
    rows: Int64Array,
    dataset: Dataset,
    scratch_url: str,
    machines: Machines = ANY_CPU,
    on_event: OnEvent | None = None,
    bound: float = BOUND,
) -> Rescoring:
    """Score `rows` twice into datasets below `scratch_url`, which are deleted, and compare. Ray must be running.

    Raises:
        WorkerError: the samples could not be scored.
    """
    stored = dataset.read(samples.ids(rows))[1]
    halved = teacher.model_copy(update={"batch_tokens": max(1, teacher.batch_tokens // 2)})
    batches = []
    for name, how in (("again", teacher), ("control", halved)):
        url = f"{scratch_url.rstrip('/')}/{name}"
        batches.append(_score(how, cache, model_folder, samples, rows, dataset.identity, url, machines, on_event))
    kind = dataset.identity.capture.kind
    difference, control = compare(stored, batches[0], kind), compare(batches[0], batches[1], kind)
    return Rescoring(len(rows), difference, control, bound)


def _score(
    teacher: TeacherConfig,
    cache: CacheConfig,
    model_folder: Path,
    samples: SampleSet,
    rows: Int64Array,
    identity: DatasetIdentity,
    url: str,
    machines: Machines,
    on_event: OnEvent | None,
) -> TargetBatch:
    """Score rows into a dataset of their own, without hidden states, and read them back."""
    kept = identity.capture
    entries = CaptureIdentity(
        kind=kept.kind, top_k=kept.top_k, draws=kept.draws, draw_sets=kept.draw_sets, seed=kept.seed
    )
    own = identity.model_copy(update={"capture": entries})
    clear(Store(url))
    return score_aside(teacher, cache, model_folder, samples, rows, own, url, machines, on_event)
