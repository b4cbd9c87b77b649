"""One committed data file: read, checked against its manifest record, decoded."""

import io
from hashlib import sha256
from typing import Any

from storage.codecs import plain
from storage.errors import IntegrityError
from storage.manifest import ManifestRecord, ids_digest
from storage.object_store import Store
from storage.samples import SampleBatch, UInt8Array
from storage.schema import file_metadata, from_parquet
from storage.targets import TargetBatch

Shard = tuple[SampleBatch, TargetBatch]


def read_shard(store: Store, record: ManifestRecord, verify_hash: bool = True) -> Shard:
    """Return the samples and targets of a unit.

    Raises IntegrityError, naming the key and the remedy, when the file is missing, truncated, altered, another
    unit's, or out of step with its record. A remote file that arrives damaged is asked for once more.
    """
    raw = _read_checked(store, record, verify_hash)
    try:
        table = from_parquet(raw)
        _check_metadata(table, record)
        shard = plain.decode(table)
        _check_rows(shard[0].sample_id, record)
        if shard[0].num_tokens != record.tokens:
            raise IntegrityError(f"it holds {shard[0].num_tokens} tokens, its manifest says {record.tokens}")
    except IntegrityError as error:
        raise damaged(store, record, str(error)) from error
    return shard


def read_sample_ids(store: Store, record: ManifestRecord) -> tuple[UInt8Array, int]:
    """Return the sample ids [N, 16] and the number of supervised positions, reading the footer and one column.

    The ids are checked against the record's digest; the rest of the file is not looked at.
    """
    try:
        table = from_parquet(_RangeFile(store, record), columns=["sample_id"])
        metadata = _check_metadata(table, record)
        ids = plain.read_ids(table)
        _check_rows(ids, record)
    except IntegrityError as error:
        raise damaged(store, record, str(error)) from error
    return ids, metadata.positions


def damaged(store: Store, record: ManifestRecord, why: str) -> IntegrityError:
    """Return the error for a data file that cannot be used."""
    return IntegrityError(
        f"{store.shown(record.data_key)} cannot be used: {why}; drop unit {record.unit} with `lectern verify "
        "--repair` and run the capture again: only its samples are scored again"
    )


def _read_checked(store: Store, record: ManifestRecord, verify_hash: bool) -> bytes:
    why = ""
    for _ in range(1 if store.is_local else 2):
        raw = store.read_if_exists(record.data_key)
        if raw is None:
            raise damaged(store, record, "it is missing")
        why = _defect(raw, record, verify_hash)
        if not why:
            return raw
    raise damaged(store, record, why)


def _defect(raw: bytes, record: ManifestRecord, verify_hash: bool) -> str:
    if len(raw) != record.bytes:
        return f"it has {len(raw)} bytes, its manifest says {record.bytes}"
    if verify_hash and sha256(raw).hexdigest() != record.sha256:
        return "its SHA-256 is not the one in its manifest"
    return ""


def _check_metadata(table: Any, record: ManifestRecord) -> Any:
    metadata = file_metadata(table.schema)
    if metadata.fingerprint != record.fingerprint:
        raise IntegrityError(f"it belongs to a dataset with fingerprint {metadata.fingerprint}")
    return metadata


def _check_rows(sample_ids: UInt8Array, record: ManifestRecord) -> None:
    if len(sample_ids) != record.rows or ids_digest(sample_ids) != record.sample_ids_digest:
        raise IntegrityError(f"its {len(sample_ids)} sample ids are not the {record.rows} of its manifest")


class _RangeFile(io.RawIOBase):
    """A data file read in ranges, so that one column costs two small requests."""

    def __init__(self, store: Store, record: ManifestRecord) -> None:
        self._store, self._key, self._size, self._at = store, record.data_key, record.bytes, 0

    def readable(self) -> bool:
        """Tell that this can be read."""
        return True

    def seekable(self) -> bool:
        """Tell that this can be sought."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move the position."""
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer with one request."""
        end = min(self._at + len(buffer), self._size)
        if end <= self._at:
            return 0
        data = self._store.read_range(self._key, self._at, end)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
