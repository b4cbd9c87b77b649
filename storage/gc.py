"""Removes what belongs to no dataset: orphans, temporary files, old indexes, manifests that two indexes hold."""

import re
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from storage.backends import TEMPORARY_PREFIX, Stored
from storage.committed import read_generation, read_records, read_uncovered, write_generation
from storage.compaction import COMPACT_UNITS
from storage.index import EMPTY, INDEX_PREFIX, Index, generations, record_key
from storage.info import DatasetInfo, upgrade_info
from storage.manifest import DATA_PREFIX, MANIFEST_PREFIX, each, unit_of
from storage.object_store import PROBE_PREFIX, Store

_INDEX_NAME = re.compile(r"index/(\d{8})(-[0-9a-f]{32}\.parquet|\.json)")


class Reason(StrEnum):
    """Why an object goes."""

    ORPHAN = "data without record"
    LOST = "data of a lost attempt"
    TEMPORARY = "stale temporary file"
    INDEX = "superseded index"
    MANIFEST = "manifest that two indexes hold"
    UPLOAD = "unfinished upload"


@dataclass(frozen=True)
class Garbage:
    """One object to remove."""

    key: str
    bytes: int
    reason: Reason
    upload: str | None = None
    """Id, where it is an unfinished upload to the key."""


@dataclass
class GcReport:
    """What was removed, or would be."""

    removed: list[Garbage] = field(default_factory=list)
    dry_run: bool = False
    num_young: int = 0
    """Objects that would have gone but for their age."""

    @property
    def bytes(self) -> int:
        """Return the bytes of all that was removed; parts of unfinished uploads are not counted."""
        return sum(garbage.bytes for garbage in self.removed)

    def totals(self) -> dict[str, tuple[int, int]]:
        """Return number and bytes of objects by reason."""
        return {
            reason.value: (len(sizes), sum(sizes))
            for reason in Reason
            if (sizes := [garbage.bytes for garbage in self.removed if garbage.reason is reason])
        }

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {**asdict(self), "bytes": self.bytes, "objects": len(self.removed)}


@dataclass(frozen=True)
class Kept:
    """What must stay, whatever its age."""

    data: frozenset[str]
    """Data files that records name."""
    units: frozenset[str]
    """Committed units."""
    held_twice: frozenset[str]
    """Units whose record is in the newest index and in the one before."""
    generation: int
    """The newest index."""
    index_files: frozenset[str]
    """Keys of the newest index and the one before, which takes over should the newest be damaged."""


def plan_gc(objects: Iterable[Stored], kept: Kept, before: float) -> tuple[list[Garbage], int]:
    """Return what to remove of `objects`, and how many of them are too young: written after `before`.

    Pure. Whatever is not known to be ours stays. Records of indexes come before their files, so that at no moment
    a record lacks its file.
    """
    garbage: list[Garbage] = []
    num_young = 0
    for found in objects:
        reason = _reason(found, kept)
        if reason is None:
            continue
        if found.modified is None or found.modified > before:
            num_young += 1
        else:
            garbage.append(Garbage(found.key, found.bytes, reason, found.upload))
    return sorted(garbage, key=lambda item: (not item.key.endswith(".json"), item.key)), num_young


def _reason(found: Stored, kept: Kept) -> Reason | None:
    key = found.key
    if found.upload is not None:
        return Reason.UPLOAD
    if key.rpartition("/")[2].startswith((TEMPORARY_PREFIX, PROBE_PREFIX)):
        return Reason.TEMPORARY
    if key.startswith(DATA_PREFIX) and key.endswith(".parquet") and key not in kept.data:
        name = key.removeprefix(DATA_PREFIX)
        lost = any(name[:at] in kept.units for at, letter in enumerate(name) if letter == "-")
        return Reason.LOST if lost else Reason.ORPHAN
    if _INDEX_NAME.fullmatch(key) and key not in kept.index_files:
        return Reason.INDEX
    if key.startswith(MANIFEST_PREFIX) and key.endswith(".json") and unit_of(key) in kept.held_twice:
        return Reason.MANIFEST
    return None


def collect_garbage(store: Store, info: DatasetInfo, older_than_s: float, dry_run: bool = False) -> GcReport:
    """Remove what is older than `older_than_s` by the store's clock and no longer belongs to the dataset.

    Attempts in progress are safe when they commit within that time. Nothing is removed when a record or index is
    damaged (IntegrityError): what it names would look like garbage.
    """
    before = store.now() - older_than_s
    # Listed before the records are read: what is committed in between is then named by a record.
    objects = store.scan()
    index, previous = _indexes(store, info)
    if not dry_run and _copy_is_worth_it(objects, index, previous, before):
        # Manifests may go only once two indexes hold them, so that no single damaged object loses a record.
        write_generation(store, index, info.fingerprint)
        index, previous = _indexes(store, info)
    kept = _kept(store, info, index, previous)
    garbage, num_young = plan_gc(objects, kept, before)
    if dry_run:
        return GcReport(garbage, True, num_young)
    if any(item.reason is Reason.MANIFEST for item in garbage):
        info = upgrade_info(store, info, least_generation=previous.generation)
    named = {record.data_key for record in read_records(store, info)}
    garbage = [item for item in garbage if item.upload is not None or item.key not in named]
    _remove(store, garbage)
    return GcReport(garbage, False, num_young)


def _indexes(store: Store, info: DatasetInfo) -> tuple[Index, Index]:
    """Return the newest index and the one before it."""
    index, _ = read_uncovered(store, info)
    older = [number for number in generations(store.list(INDEX_PREFIX)) if number < index.generation]
    return index, read_generation(store, older[-1], info.fingerprint) if older else EMPTY


def _copy_is_worth_it(objects: Collection[Stored], index: Index, previous: Index, before: float) -> bool:
    once = {record.key for record in index.records} - {record.key for record in previous.records}
    old = [found for found in objects if found.modified is not None and found.modified <= before]
    return sum(found.key in once for found in old) >= COMPACT_UNITS


def _kept(store: Store, info: DatasetInfo, index: Index, previous: Index) -> Kept:
    records = read_records(store, info)
    before = {record.unit: record for record in previous.records}
    files: set[str] = set()
    for number in {index.generation, previous.generation} - {0}:
        files |= {record_key(number), *store.list(f"{INDEX_PREFIX}{number:08d}-")}
    return Kept(
        data=frozenset(record.data_key for record in records),
        units=frozenset(record.unit for record in records),
        held_twice=frozenset(record.unit for record in index.records if before.get(record.unit) == record),
        generation=index.generation,
        index_files=frozenset(files),
    )


def _remove(store: Store, garbage: list[Garbage]) -> None:
    for item in garbage:
        if item.upload is not None:
            store.abort(item.key, item.upload)
        elif item.reason is Reason.INDEX:
            store.delete(item.key)
    each(store, store.delete, [item.key for item in garbage if item.upload is None and item.reason is not Reason.INDEX])
