"""Several datasets read as one by sample id: several teachers, several sources, one tokenizer."""

from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np

from storage.catalog import SampleIds, id_array
from storage.config import CacheConfig
from storage.errors import IdentityError, InputError
from storage.identity import CaptureIdentity, DatasetIdentity
from storage.info import INFO_KEY
from storage.object_store import Store
from storage.parts import Part
from storage.reader import Dataset
from storage.refusals import Refusals
from storage.samples import Int32Array, Int64Array, UInt8Array
from storage.shard_source import DEFAULT_READING, Reading


class DatasetUnion:
    """Datasets in a fixed order; of several that hold a sample the first one serves it. Thread-safe."""

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        """Join open datasets; IdentityError when their tokenizers or tasks differ."""
        if not datasets:
            raise InputError("no datasets to read from; name at least one URL")
        first = datasets[0]
        for other in datasets[1:]:
            _require_same_tokenizer(first, other)
            _require_same_task(first, other)
        self.datasets = list(datasets)
        self.labels: Mapping[bytes, Int32Array] = {}
        """Classes that the samples' source gives them, see `SampleSet.labels`; `parts` hands them over."""

    @classmethod
    def open(
        cls, urls: Sequence[str], expected: DatasetIdentity | None = None, reading: Reading = DEFAULT_READING
    ) -> Self:
        """Open the datasets at `urls`, the first of which must have the identity `expected`.

        The bound on memory is divided between them. Raises what `Dataset.open` raises, and IdentityError when their
        tokenizers differ.
        """
        share = reading.divided(len(urls))
        return cls([Dataset.open(url, expected if n == 0 else None, share) for n, url in enumerate(urls)])

    @property
    def identity(self) -> DatasetIdentity:
        """Return the identity of the first dataset."""
        return self.datasets[0].identity

    @property
    def kinds(self) -> list[str]:
        """Return the kinds of targets there are, in the order of the datasets."""
        return list(dict.fromkeys(dataset.identity.capture.kind for dataset in self.datasets))

    def sample_ids(self) -> UInt8Array:
        """Return all samples, each once, those of the first dataset first; uint8 [N, 16]."""
        found = []
        for n, dataset in enumerate(self.datasets):
            ids = dataset.catalog.sample_ids
            found.append(ids[self.serving(ids) == n])
        return np.concatenate(found)

    def shown(self) -> str:
        """Return the URLs for messages."""
        return ", ".join(dataset.store.shown() for dataset in self.datasets)

    def serving(self, sample_ids: SampleIds) -> Int64Array:
        """Return which dataset serves each sample, [N]; -1 where none holds it."""
        ids = id_array(sample_ids)
        served = np.full(len(ids), -1, dtype=np.int64)
        for n, dataset in enumerate(self.datasets):
            open_ = np.flatnonzero(served < 0)
            served[open_[dataset.catalog.find(ids[open_])[0] >= 0]] = n
        return served

    def missing(self, sample_ids: SampleIds) -> Int64Array:
        """Return the indices of the asked samples that no dataset holds."""
        return np.flatnonzero(self.serving(sample_ids) < 0)

    def refused(self, sample_ids: SampleIds) -> Int64Array:
        """Return the indices of the asked samples that no dataset holds and the first one's teacher has refused."""
        ids, own = id_array(sample_ids), self.datasets[0]
        missing = self.missing(ids)
        if not len(missing):
            return missing
        return missing[Refusals.read(own.store, own.info.fingerprint).mask(ids[missing])]

    def held(self, sample_ids: Sequence[bytes]) -> list[bytes]:
        """Return the asked samples that any dataset holds, in their order."""
        absent = set(self.missing(sample_ids).tolist()) if sample_ids else set()
        return [sample_id for n, sample_id in enumerate(sample_ids) if n not in absent]

    def parts(self, sample_ids: SampleIds) -> list[Part]:
        """Return the asked samples, one part for each dataset that serves some; InputError when one is missing."""
        ids = id_array(sample_ids)
        served = self.serving(ids)
        absent = np.flatnonzero(served < 0)
        if len(absent):
            raise InputError(
                f"{len(absent)} of {len(ids)} samples are in none of {self.shown()}, the first is "
                f"{ids[absent[0]].tobytes().hex()}; run the capture, which scores what is missing"
            )
        parts = []
        for n in np.unique(served).tolist():
            asked = np.flatnonzero(served == n)
            samples, targets = self.datasets[n].read(ids[asked])
            label = [self.labels.get(sample_id) for sample_id in samples.ids()] if self.labels else ()
            parts.append(Part(self.datasets[n].identity.capture, asked, samples, targets, label))
        return parts


def dataset_urls(cache: CacheConfig) -> list[str]:
    """Return the URLs of the config's datasets, the run's own one first."""
    return [cache.url, *cache.also]


def open_existing(cache: CacheConfig, identity: DatasetIdentity | None = None) -> DatasetUnion | None:
    """Open the config's datasets; the run's own one is left out while it does not exist. None where none is left."""
    urls = list(cache.also)
    own = Store(cache.url).exists(INFO_KEY)
    if own:
        urls.insert(0, cache.url)
    return DatasetUnion.open(urls, identity if own else None, Reading.of(cache)) if urls else None


def _require_same_task(first: Dataset, other: Dataset) -> None:
    left, right = first.identity.capture, other.identity.capture
    if (left.task, left.classes) != (right.task, right.classes):
        raise IdentityError(
            f"{other.store.shown()} holds {_entries(right)}, {first.store.shown()} {_entries(left)}; leave it out of "
            "cache.also"
        )


def _entries(capture: CaptureIdentity) -> str:
    return "next tokens" if capture.classes is None else f"{capture.classes} classes ({capture.task})"


def _require_same_tokenizer(first: Dataset, other: Dataset) -> None:
    left, right = first.identity.tokenizer, other.identity.tokenizer
    if left.digest != right.digest:
        raise IdentityError(
            f"{other.store.shown()} was captured with another tokenizer ({right.vocab_size} ids, {right.digest[:12]}…) "
            f"than {first.store.shown()} ({left.vocab_size} ids, {left.digest[:12]}…): its token ids mean other text. "
            "Leave it out of cache.also, or capture its texts with the same tokenizer"
        )
