"""How hard the teacher found each sample: one number per sample, read without the rest of its row."""

from typing import Literal

import numpy as np

from storage.catalog import SampleIds, id_array
from storage.errors import InputError, IntegrityError
from storage.manifest import ManifestRecord, each
from storage.range_file import RangeFile
from storage.reader import Dataset
from storage.schema import from_parquet
from storage.shard import damaged
from storage.targets import Float32Array
from storage.union import DatasetUnion

Difficulty = Literal["teacher_nll", "teacher_entropy"]
"""Columns that tell it, means over the supervised positions in nats."""


def difficulty(union: DatasetUnion, sample_ids: SampleIds, column: Difficulty) -> Float32Array:
    """Return a column's value for each sample, float32 [N]; one small read per data file that holds any of them.

    Raises:
        InputError: a sample is in no dataset, or its teacher told no such value.
        IntegrityError: a data file is damaged.
    """
    ids = id_array(sample_ids)
    values = np.full(len(ids), np.nan, dtype=np.float32)
    served = union.serving(ids)
    for n, dataset in enumerate(union.datasets):
        asked = np.flatnonzero(served == n)
        values[asked] = _of(dataset, ids[asked], column)
    unknown = int(np.isnan(values).sum())
    if unknown:
        raise InputError(
            f"{column} is not known of {unknown} of {len(ids)} samples in {union.shown()}; run the capture, which "
            "scores what is missing, or leave curriculum.difficulty out"
        )
    return values


def _of(dataset: Dataset, sample_ids: SampleIds, column: Difficulty) -> Float32Array:
    units, rows = dataset.catalog.find(sample_ids)
    wanted = np.unique(units).tolist()
    columns = each(dataset.store, lambda unit: _column(dataset, dataset.manifests[unit], column), wanted)
    values = np.empty(len(units), dtype=np.float32)
    for unit, read in zip(wanted, columns, strict=True):
        own = units == unit
        values[own] = read[rows[own]]
    return values


def _column(dataset: Dataset, record: ManifestRecord, column: Difficulty) -> Float32Array:
    try:
        table = from_parquet(
            RangeFile(dataset.store, record.data_key, record.bytes), unwanted=lambda name: name != column
        )
        if len(table) != record.rows:
            raise IntegrityError(f"it holds {len(table)} rows, its manifest says {record.rows}")
    except IntegrityError as error:
        raise damaged(dataset.store, record, str(error)) from error
    return np.asarray(table.column(column).to_numpy(), dtype=np.float32)
