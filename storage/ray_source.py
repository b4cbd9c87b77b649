"""A dataset as a Ray Data source: plain Arrow columns, whatever codec packs them, checked as every reader checks them.

    import ray
    from storage.ray_source import TargetSource

    rows = ray.data.read_datasource(TargetSource("s3://bucket/targets", columns=["sample_id", "tokens", "target_id"]))

`ray.data.read_parquet` on the data files works too where the codec is plain; it checks no hash and takes orphans along.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from storage.codecs import plain
from storage.errors import InputError
from storage.identity import DatasetIdentity
from storage.manifest import ManifestRecord
from storage.object_store import Store
from storage.reader import Dataset
from storage.shard import read_shard

DECODED_PER_BYTE = 8
"""Arrow bytes of a byte of a data file, about: what Ray plans its memory by."""

Piece = tuple[ManifestRecord, list[int]]
"""A unit and which of its rows are read: those that no earlier unit holds."""


class TargetSource(Datasource):  # type: ignore[misc]  # Ray has no types
    """The samples that are committed now, each once."""

    def __init__(self, url: str, columns: Sequence[str] | None = None) -> None:
        """Read what there is; `columns` names those that are wanted, all by default."""
        super().__init__()
        dataset = Dataset.open(url)
        self._url, self._identity = dataset.store.url, dataset.identity
        self._columns = None if columns is None else list(columns)
        units, rows = dataset.catalog.find(dataset.catalog.sample_ids)
        self._pieces: list[Piece] = [
            (dataset.manifests[unit], rows[units == unit].tolist()) for unit in np.unique(units).tolist()
        ]

    def estimate_inmemory_data_size(self) -> int:
        """Return about how many bytes the rows take in memory."""
        return sum(_decoded_bytes(record) for record, _ in self._pieces)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """Return at most `parallelism` tasks, each over some units."""
        pieces = [part for n in range(parallelism) if (part := self._pieces[n::parallelism])]
        return [
            ReadTask(self._reader(part), _metadata(part, self._url), per_task_row_limit=per_task_row_limit)
            for part in pieces
        ]

    def _reader(self, pieces: list[Piece]) -> Callable[[], Iterable[pa.Table]]:
        url, identity, columns = self._url, self._identity, self._columns

        def read() -> Iterable[pa.Table]:
            store = Store(url)
            for record, rows in pieces:
                yield _table(store, identity, record, rows, columns)

        return read


def _table(
    store: Store, identity: DatasetIdentity, record: ManifestRecord, rows: list[int], columns: list[str] | None
) -> pa.Table:
    table = plain.encode(*read_shard(store, record), identity)
    if len(rows) < len(table):
        table = table.take(rows)
    if columns is None:
        return table
    unknown = [name for name in columns if name not in table.column_names]
    if unknown:
        raise InputError(f"{store.shown()} has no column {unknown[0]!r}; it has {', '.join(table.column_names)}")
    return table.select(columns)


def _metadata(pieces: list[Piece], url: str) -> BlockMetadata:
    return BlockMetadata(
        num_rows=sum(len(rows) for _, rows in pieces),
        size_bytes=sum(_decoded_bytes(record) for record, _ in pieces),
        exec_stats=None,
        input_files=tuple(f"{url}/{record.data_key}" for record, _ in pieces),
    )


def _decoded_bytes(record: ManifestRecord) -> int:
    return record.bytes * DECODED_PER_BYTE
