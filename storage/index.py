"""The index: the records and sample ids of many units in one object, so that opening a dataset takes a few requests.

A generation is committed as a unit is: its Parquet file under a key made of its hash, then `index/<generation>.json` on
condition that there is none. A generation holds all that the one before held, in the same order, so the newest one
together with the manifests that it does not cover is the whole dataset at any moment.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from storage.identity import canonical_json
from storage.manifest import DATA_PREFIX, ManifestRecord
from storage.samples import ID_BYTES, Int64Array, UInt8Array, offsets_of
from storage.schema import METADATA_KEY, from_parquet
from storage.settings import Settings

INDEX_PREFIX = "index/"
_RECORD_NAME = re.compile(r"index/(\d{8})\.json")
_Bytes = bytes


class IndexRecord(Settings):
    """What `index/<generation>.json` says about one complete index."""

    generation: int = Field(ge=1)
    data_key: str
    bytes: int = Field(ge=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    units: int = Field(ge=0)
    samples: int = Field(ge=0)
    """Rows of all units; a sample in two units counts twice."""
    fingerprint: str
    created_at: str
    checksum: str = ""
    """Hex BLAKE2b over the other fields."""

    @property
    def key(self) -> str:
        """Return where this record lies."""
        return record_key(self.generation)

    def sealed(self) -> Self:
        """Return the record with its checksum."""
        return self.model_copy(update={"checksum": self._computed()})

    def to_json(self) -> _Bytes:
        """Return the file's bytes."""
        return canonical_json(self.model_dump(mode="json")) + b"\n"

    def defect(self, key: str, raw: _Bytes, fingerprint: str) -> str | None:
        """Return what is wrong with the record read as `raw` from `key`, or None."""
        if self.key != key:
            return f"it is the record of generation {self.generation}, which is not its name"
        if self.checksum != self._computed() or self.to_json() != raw:
            return "its checksum does not match"
        if self.data_key != data_key(self.generation, self.sha256):
            return f"its data_key {self.data_key!r} is not the key of its generation and hash"
        return None if self.fingerprint == fingerprint else f"its fingerprint is not that of the dataset, {fingerprint}"

    def _computed(self) -> str:
        return blake2b(canonical_json(self.model_dump(mode="json", exclude={"checksum"})), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Index:
    """Units in the order in which duplicates are resolved: the first unit that holds a sample counts."""

    records: list[ManifestRecord]
    positions: Int64Array
    """Supervised positions of each unit."""
    sample_ids: UInt8Array
    """All units' sample ids, one after the other; uint8 [N, 16]."""
    generation: int = 0

    @cached_property
    def units(self) -> frozenset[str]:
        """Return the ids of the units."""
        return frozenset(record.unit for record in self.records)

    def extended(
        self, records: Sequence[ManifestRecord], ids: Sequence[UInt8Array], positions: Sequence[int]
    ) -> "Index":
        """Return this index with more units at its end."""
        return Index(
            [*self.records, *records],
            np.concatenate([self.positions, np.asarray(positions, dtype=np.int64)]),
            np.concatenate([self.sample_ids, *ids]),
            self.generation,
        )

    def without(self, units: frozenset[str]) -> "Index":
        """Return this index less some units."""
        kept = np.asarray([record.unit not in units for record in self.records], dtype=np.bool_)
        rows = np.repeat(kept, [record.rows for record in self.records])
        records = [record for record in self.records if record.unit not in units]
        return Index(records, self.positions[kept], self.sample_ids[rows], self.generation)


EMPTY = Index([], np.zeros(0, dtype=np.int64), np.zeros((0, ID_BYTES), dtype=np.uint8))


def record_key(generation: int) -> str:
    """Return the key of a generation's record."""
    return f"{INDEX_PREFIX}{generation:08d}.json"


def data_key(generation: int, digest: str) -> str:
    """Return the key of a generation's file with this SHA-256."""
    return f"{INDEX_PREFIX}{generation:08d}-{digest[:32]}.parquet"


def generations(keys: Sequence[str]) -> list[int]:
    """Return the generations whose records are among some keys, oldest first."""
    found = (_RECORD_NAME.fullmatch(key) for key in keys)
    return sorted(int(match[1]) for match in found if match)


def encode_index(index: Index, fingerprint: str) -> bytes:
    """Return an index as one Parquet file, one row per unit."""
    records = index.records
    offsets = offsets_of(np.asarray([record.rows for record in records], dtype=np.int64))
    flat = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(ID_BYTES), len(index.sample_ids), [None, pa.py_buffer(np.ascontiguousarray(index.sample_ids))]
    )
    columns = {
        "unit": pa.array([record.unit for record in records], pa.string()),
        "attempt": pa.array([record.attempt for record in records], pa.string()),
        "bytes": pa.array([record.bytes for record in records], pa.int64()),
        "sha256": pa.array([bytes.fromhex(record.sha256) for record in records], pa.binary(32)),
        "rows": pa.array([record.rows for record in records], pa.int32()),
        "tokens": pa.array([record.tokens for record in records], pa.int64()),
        "sample_ids_digest": pa.array([bytes.fromhex(record.sample_ids_digest) for record in records], pa.binary(16)),
        "created_at": pa.array([record.created_at for record in records], pa.string()),
        "positions": pa.array(index.positions, pa.int64()),
        "sample_ids": pa.LargeListArray.from_arrays(pa.array(offsets), flat),
    }
    schema = pa.schema(
        [pa.field(name, column.type, nullable=False) for name, column in columns.items()],
        metadata={METADATA_KEY: canonical_json({"fingerprint": fingerprint})},
    )
    # Hashes do not shrink; compressing them would only cost time.
    plain = {"sha256", "sample_ids_digest", "sample_ids.list.element"}
    names = [*(set(columns) - {"sample_ids"}), "sample_ids.list.element"]
    compression = {name: "NONE" if name in plain else "ZSTD" for name in names}
    sink = pa.BufferOutputStream()
    table = pa.Table.from_arrays(list(columns.values()), schema=schema)
    pq.write_table(table, sink, compression=compression, use_dictionary=False, write_page_checksum=True)
    return bytes(sink.getvalue().to_pybytes())


def decode_index(raw: bytes, generation: int, fingerprint: str) -> Index:
    """Return the index in a Parquet file whose hash was checked; the records were checked when they went in."""
    table = from_parquet(raw).combine_chunks()
    values: dict[str, Any] = {
        name: table.column(name).to_pylist() for name in table.column_names if name not in {"positions", "sample_ids"}
    }
    records = [
        ManifestRecord.model_construct(
            unit=unit,
            data_key=f"{DATA_PREFIX}{unit}-{attempt}.parquet",
            bytes=size,
            sha256=digest.hex(),
            rows=rows,
            tokens=tokens,
            sample_ids_digest=ids_digest.hex(),
            fingerprint=fingerprint,
            attempt=attempt,
            created_at=created_at,
        )
        for unit, attempt, size, digest, rows, tokens, ids_digest, created_at in zip(*values.values(), strict=True)
    ]
    ids = [
        np.frombuffer(chunk.buffers()[1], np.uint8, len(chunk) * ID_BYTES, chunk.offset * ID_BYTES)
        for chunk in (part.flatten() for part in table.column("sample_ids").chunks)
        if len(chunk)
    ]
    flat = np.concatenate([*ids, np.zeros(0, dtype=np.uint8)]).reshape(-1, ID_BYTES)
    return Index(records, table.column("positions").to_numpy().astype(np.int64), flat, generation)
