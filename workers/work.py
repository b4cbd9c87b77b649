"""What a capture has to do: the units that the dataset lacks; and what the teacher refuses to do of it."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Self

import numpy as np

from storage.config import CacheConfig
from storage.errors import WorkerError
from storage.identity import DatasetIdentity
from storage.object_store import Store
from storage.parts import TargetReader
from storage.refusals import Refusals, record_refusals
from storage.sample_set import SampleSet
from storage.samples import Int64Array
from storage.union import DatasetUnion, dataset_urls
from storage.writer import DatasetWriter
from workers.api.generation import endpoint_name
from workers.config import TeacherConfig
from workers.loop import OnEvent
from workers.units import UnitPlan, WorkUnit, plan_units

FLUSH_SAMPLES = 256
"""Refused samples that are recorded together; of those not recorded yet a crash costs another question each."""
SHOWN_SAMPLES = 3


class RefusedLog:
    """Keeps in the dataset what the teacher refuses, and ends a capture that it refuses too much of."""

    def __init__(
        self, store: Store, fingerprint: str, setting: str, cache: CacheConfig, num_asked: int, before: Counter[str]
    ) -> None:
        """`num_asked` samples shall be in the dataset in the end; `before` were refused earlier, by reason."""
        self.reasons = Counter(before)
        """Reason → samples refused, those of earlier captures included."""
        self._store, self._fingerprint, self._setting = store, fingerprint, setting
        self._cache, self._num_asked = cache, num_asked
        self._pending: dict[bytes, str] = {}

    def add(self, refused: Mapping[bytes, str]) -> None:
        """Take sample id → reason; WorkerError when it is more than may be left out."""
        if not refused:
            return
        self._pending.update(refused)
        self.reasons.update(refused.values())
        if len(self._pending) >= FLUSH_SAMPLES:
            self.flush()
        check_refused(self.reasons, self._num_asked, self._cache, [sample_id.hex() for sample_id in refused])

    def flush(self) -> None:
        """Record what came since the last time."""
        pending, self._pending = self._pending, {}
        record_refusals(self._store, self._fingerprint, self._setting, pending)


@dataclass
class Work:
    """What is to be done for a dataset."""

    writer: DatasetWriter
    units: UnitPlan
    reused: int
    """Samples that are in a dataset already."""
    refused: RefusedLog

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Record what is left to record, and let other writers in."""
        try:
            self.refused.flush()
        finally:
            self.writer.close()

    def in_any_order(self) -> Sequence[WorkUnit]:
        """Return the units from a random one on: two captures of a dataset then find each other's units done."""
        return self.units.rotated(random.SystemRandom().randrange(len(self.units)))


@dataclass(frozen=True)
class Lacking:
    """What no dataset of a run holds of the samples that it shall hold."""

    rows: Int64Array
    """To be scored."""
    refused: Counter[str]
    """Reason → samples that the teacher refused before, asked in the same way: left out."""


def lacking(
    teacher: TeacherConfig,
    cache: CacheConfig,
    samples: SampleSet,
    rows: Sequence[int] | Int64Array,
    identity: DatasetIdentity,
    dataset: DatasetUnion,
) -> Lacking:
    """Return what of `rows` is not in the datasets; what the teacher of `identity` has refused is told apart."""
    missing = missing_rows(samples, rows, dataset)
    own, ids = dataset.datasets[0], samples.sample_ids[missing]
    if cache.retry_refused or not len(missing) or own.info.fingerprint != identity.fingerprint:
        return Lacking(missing, Counter())
    known = Refusals.read(own.store, own.info.fingerprint).under(setting_of(teacher))
    return Lacking(missing[~known.mask(ids)], known.reasons(ids))


def missing_rows(samples: SampleSet, rows: Sequence[int] | Int64Array, dataset: TargetReader) -> Int64Array:
    """Return those of `rows` whose samples are not in the dataset."""
    asked = np.asarray(rows, dtype=np.int64)
    return asked[dataset.missing(samples.sample_ids[asked])]


def setting_of(teacher: TeacherConfig) -> str:
    """Return how a teacher is asked, apart from what the dataset's identity says of it."""
    if teacher.kind == "local":
        return f"local, {teacher.sharding} over {teacher.ranks} ranks"
    # Hashed: a URL or extra fields may hold what is nobody's business.
    where = blake2b(endpoint_name(teacher.api).encode(), digest_size=8).hexdigest()
    return f"{teacher.kind}, {teacher.api.model} at endpoint {where}"


def check_refused(reasons: Counter[str], num_asked: int, cache: CacheConfig, names: Sequence[str] = ()) -> None:
    """Raise WorkerError when more of the samples asked for is refused than may be left out; `names`: ids to show."""
    if reasons.total() <= cache.most_refused * num_asked:
        return
    reason, number = reasons.most_common(1)[0]
    shown = f", the last are {', '.join(names[:SHOWN_SAMPLES])}" if names else ""
    raise WorkerError(
        f"the teacher refuses {reasons.total()} of {num_asked} samples ({number} because of: {reason}{shown}), more "
        f"than the share {cache.most_refused:g} that cache.most_refused lets be left out; mend the teacher or the "
        "text, raise cache.most_refused, or ask once more with cache.retry_refused"
    )


def plan_work(
    teacher: TeacherConfig,
    cache: CacheConfig,
    samples: SampleSet,
    rows: Sequence[int] | Int64Array,
    identity: DatasetIdentity,
    notify: OnEvent,
    padded_vocab_size: int | None = None,
) -> Work:
    """Make or join the dataset and plan the samples at `rows` that it lacks and the teacher has not refused.

    Posts `single_writer` and `units_planned`.

    Raises:
        InputError: the dataset is another one, or cannot be written.
    """
    writer = DatasetWriter.create(cache.url, identity, padded_vocab_size, cache.codec)
    if writer.lease is not None:
        notify({"event": "single_writer", "url": writer.store.shown(), "owner": writer.lease.record.owner})
    left = lacking(teacher, cache, samples, rows, identity, DatasetUnion.open(dataset_urls(cache), identity))
    refused = RefusedLog(writer.store, identity.fingerprint, setting_of(teacher), cache, len(rows), left.refused)
    reused = len(rows) - len(left.rows) - left.refused.total()
    units = plan_units(left.rows, samples.num_tokens, samples.sample_ids, identity.fingerprint, cache.unit_tokens, rows)
    notify(
        {
            "event": "units_planned",
            "units": len(units),
            "samples": len(left.rows),
            "tokens": units.tokens,
            "reused_samples": reused,
            "refused_samples": left.refused.total(),
        }
    )
    return Work(writer, units, reused, refused)
