"""What is committed now: the newest index, and the manifests that it does not cover."""

import json
from datetime import UTC, datetime
from hashlib import sha256

from pydantic import ValidationError

from storage.errors import IntegrityError
from storage.index import (
    EMPTY,
    INDEX_PREFIX,
    Index,
    IndexRecord,
    data_key,
    decode_index,
    encode_index,
    generations,
    record_key,
)
from storage.info import DatasetInfo
from storage.manifest import ManifestRecord, each, manifest_keys, parse_manifest, unit_of
from storage.object_store import Store
from storage.settings import first_problem

_TRIES = 5


def read_index(store: Store, info: DatasetInfo) -> Index:
    """Return the newest generation, checked byte for byte, or an empty index.

    Raises IntegrityError when it is damaged, or older than the one that manifests were already swept for.
    """
    newest = 0
    while True:
        found = max(generations(store.list(INDEX_PREFIX)), default=0)
        if found < info.least_generation:
            raise IntegrityError(
                f"{store.shown(record_key(info.least_generation))} and all later ones are missing: they hold records "
                "whose manifests were swept; restore them from a copy"
            )
        if not found:
            return EMPTY
        try:
            return read_generation(store, found, info.fingerprint)
        except IntegrityError:
            # Superseded and swept while it was read, or damaged: then it is still the newest.
            if found == newest:
                raise
            newest = found


def read_generation(store: Store, generation: int, fingerprint: str) -> Index:
    """Return one generation, checked like `read_index`."""
    key = record_key(generation)
    return _read_data(store, parse_index_record(store.read(key), key, fingerprint, store))


def read_uncovered(store: Store, info: DatasetInfo) -> tuple[Index, list[ManifestRecord]]:
    """Return the newest index and the records that it does not cover, oldest first: all that is committed now.

    Manifests are listed before the index, for one is swept only when an index covers it: nothing falls between.
    """
    for _ in range(_TRIES):
        keys = manifest_keys(store)
        index = read_index(store, info)
        keys = [key for key in keys if unit_of(key) not in index.units]
        raws = each(store, store.read_if_exists, keys)
        records = [
            parse_manifest(raw, key, info.fingerprint, store)
            for key, raw in zip(keys, raws, strict=True)
            if raw is not None
        ]
        if len(records) == len(keys):
            return index, sorted(records, key=lambda record: (record.created_at, record.unit))
    raise IntegrityError(f"{store.shown()} kept changing while it was read; try again")


def read_records(store: Store, info: DatasetInfo) -> list[ManifestRecord]:
    """Return the records of all committed units, checked, in the order in which duplicates are resolved."""
    index, uncovered = read_uncovered(store, info)
    return [*index.records, *uncovered]


def write_generation(store: Store, index: Index, fingerprint: str) -> bool:
    """Commit an index as the generation after its own; False when another process was faster.

    A process that dies in between leaves at most a Parquet file without a record.
    """
    generation = index.generation + 1
    raw = encode_index(index, fingerprint)
    digest = sha256(raw).hexdigest()
    record = IndexRecord(
        generation=generation,
        data_key=data_key(generation, digest),
        bytes=len(raw),
        sha256=digest,
        units=len(index.records),
        samples=len(index.sample_ids),
        fingerprint=fingerprint,
        created_at=datetime.now(UTC).isoformat(timespec="microseconds"),
    ).sealed()
    store.write(record.data_key, raw)
    if store.create(record.key, record.to_json()):
        return True
    # A retried request may have met its own first success, so the record itself tells whose it is.
    winner = parse_index_record(store.read(record.key), record.key, fingerprint, store)
    if winner.data_key != record.data_key:
        store.delete(record.data_key)
    return winner == record


def parse_index_record(raw: bytes, key: str, fingerprint: str, store: Store) -> IndexRecord:
    """Check and return the index record in `raw`, the contents of `key`."""
    try:
        record = IndexRecord.model_validate(json.loads(raw))
    except ValidationError as error:
        raise _damaged(store, key, first_problem(error)) from error
    except ValueError as error:
        raise _damaged(store, key, str(error)) from error
    defect = record.defect(key, raw, fingerprint)
    if defect is not None:
        raise _damaged(store, key, defect)
    return record


def _read_data(store: Store, record: IndexRecord) -> Index:
    why = ""
    for _ in range(1 if store.is_local else 2):
        raw = store.read_if_exists(record.data_key)
        if raw is None:
            raise _damaged(store, record.key, f"its file {record.data_key} is missing")
        if len(raw) == record.bytes and sha256(raw).hexdigest() == record.sha256:
            return decode_index(raw, record.generation, record.fingerprint)
        why = f"its file {record.data_key} has another SHA-256"
    raise _damaged(store, record.key, why)


def _damaged(store: Store, key: str, why: str) -> IntegrityError:
    return IntegrityError(
        f"{store.shown(key)} is damaged or was edited: {why}; delete it: the index before it and the manifests "
        "that are kept for this hold everything that it held"
    )
