"""One committed data file: read, checked against its manifest record, decoded."""

from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Any

from storage.codecs import plain
from storage.codecs.table import decode
from storage.errors import IntegrityError
from storage.manifest import ManifestRecord, ids_digest
from storage.object_store import Store
from storage.open_shard import Shard
from storage.range_file import RangeFile
from storage.samples import UInt8Array
from storage.schema import ATTENTION_PREFIX, HIDDEN_PREFIX, file_metadata, from_parquet


def read_shard(
    store: Store, record: ManifestRecord, verify_hash: bool = True, layers: Sequence[str] | None = None
) -> Shard:
    """Return the samples and targets of a unit.

    With `layers`, only these layers' hidden states and attention come with it and the others are not fetched; the
    SHA-256 of the file cannot be checked then, its page checksums are.

    Raises IntegrityError, naming the key and the remedy, when the file is missing, truncated, altered, another
    unit's, or out of step with its record. A remote file that arrives damaged is asked for once more.
    """
    raw = (
        _read_checked(store, record, verify_hash) if layers is None else RangeFile(store, record.data_key, record.bytes)
    )
    try:
        # Of a folder as many shards are read at once as there are cores, of a remote store many more.
        hashed, threads = verify_hash and layers is None, not store.is_local
        table = from_parquet(raw, _unwanted(layers), hashed, threads)
        _check_metadata(table, record)
        shard = decode(table, layers)
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
        table = from_parquet(RangeFile(store, record.data_key, record.bytes), unwanted=lambda name: name != "sample_id")
        metadata = _check_metadata(table, record)
        ids = plain.read_ids(table)
        _check_rows(ids, record)
    except IntegrityError as error:
        raise damaged(store, record, str(error)) from error
    return ids, metadata.positions


def _unwanted(layers: Sequence[str] | None) -> Callable[[str], bool]:
    prefixes = (HIDDEN_PREFIX, ATTENTION_PREFIX)
    kept = {prefix + layer for prefix in prefixes for layer in layers or ()}
    return lambda name: layers is not None and name.startswith(prefixes) and name not in kept


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
