"""Copies a dataset into plain Parquet, whatever codec packs it: the columns that any reader of Parquet understands.

The copy is a dataset by itself, of the same identity: it can be verified, trained from and added to. Each sample is in
it once. Output head, projection, card and what the teacher refused come along.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from storage.card import write_card
from storage.errors import InputError
from storage.heads import HEAD_PREFIX
from storage.projection import PROJECTION_PREFIX
from storage.reader import Dataset
from storage.refusals import REFUSED_PREFIX
from storage.writer import DatasetWriter

_ASIDE = (HEAD_PREFIX, PROJECTION_PREFIX, REFUSED_PREFIX)


@dataclass
class ExportResult:
    """What an export wrote."""

    url: str
    samples: int = 0
    tokens: int = 0
    units: int = 0
    new_units: int = 0
    """Of these, written by this call: an export that was cut off goes on when repeated."""
    bytes: int = 0
    """Of the data files."""


def export_dataset(dataset: Dataset, url: str, on_progress: Callable[[int, int], None] | None = None) -> ExportResult:
    """Copy a dataset to `url` in the plain codec, unit by unit; `on_progress(done, total)` is called after each.

    Raises:
        InputError: `url` is the dataset itself, or cannot be written.
        IdentityError: another dataset lies there.
        IntegrityError: a unit is damaged.
    """
    info = dataset.info
    writer = DatasetWriter.create(url, info.identity, info.tokenizer.padded_vocab_size)
    if writer.store.url == dataset.store.url:
        raise InputError(f"--to {writer.store.shown()} is the dataset itself; name another URL")
    if writer.info.codec != "plain":
        raise InputError(f"--to {writer.store.shown()} holds a dataset of codec {writer.info.codec}; name another URL")
    for key in (key for prefix in _ASIDE for key in dataset.store.list(prefix)):
        writer.store.create(key, dataset.store.read(key))
    result = ExportResult(writer.store.shown())
    unit_of = dataset.catalog.find(dataset.catalog.sample_ids)[0]
    for number, record in enumerate(dataset.manifests):
        ids = dataset.catalog.sample_ids[np.flatnonzero(unit_of == number)]
        if len(ids):
            receipt = writer.commit(record.unit, *dataset.read(ids), attempt="export")
            result.units += 1
            result.new_units += receipt.committed
            result.samples += receipt.rows
            result.tokens += receipt.tokens
            result.bytes += receipt.bytes
        if on_progress is not None:
            on_progress(number + 1, len(dataset.manifests))
    write_card(Dataset.open(url, info.identity))
    return result
