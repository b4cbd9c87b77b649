"""Folds the records of many units into one index; any number of processes may try at once, one succeeds."""

from collections.abc import Collection
from dataclasses import dataclass

from storage.catalog import with_units
from storage.committed import read_index, read_uncovered, write_generation
from storage.errors import StorageError
from storage.info import DatasetInfo, upgrade_info
from storage.lease import write_access
from storage.manifest import manifest_keys, unit_of
from storage.object_store import Store

COMPACT_UNITS = 256
"""Uncovered units from which on a capture compacts by itself: about a second of opening on an object store."""
COMPACT_SHARE = 8
"""… and one for so many covered ones, so that all compactions together write a few times what the last one does."""
_TRIES = 8


@dataclass(frozen=True)
class CompactReport:
    """What the index holds now, and what this compaction changed."""

    generation: int
    units: int
    samples: int
    added: int
    """Units that the index before did not cover."""
    dropped: int = 0


def is_due(num_uncovered: int, num_covered: int) -> bool:
    """Tell whether enough units are uncovered to be worth a new index."""
    return num_uncovered >= max(COMPACT_UNITS, num_covered / COMPACT_SHARE)


def compact(store: Store, info: DatasetInfo, drop: Collection[str] = ()) -> CompactReport:
    """Write an index of all committed units but those to drop; nothing when the newest one is that already.

    Manifests stay where they are, so a process that dies at any moment changes nothing that readers see. The dataset
    moves to schema version 2, which older releases refuse. Raises IntegrityError when a record or a shard's ids are
    damaged.
    """
    unwanted = frozenset(drop)
    for _ in range(_TRIES):
        index, uncovered = read_uncovered(store, info)
        dropped = unwanted & index.units
        added = [record for record in uncovered if record.unit not in unwanted]
        if not added and not dropped:
            return CompactReport(index.generation, len(index.records), len(index.sample_ids), 0)
        info = upgrade_info(store, info)
        merged = with_units(store, index.without(dropped), added)
        if write_generation(store, merged, info.fingerprint):
            return CompactReport(
                index.generation + 1, len(merged.records), len(merged.sample_ids), len(added), len(dropped)
            )
    raise StorageError(f"{_TRIES} times another process compacted {store.shown()} at the same moment; run it again")


def compact_if_due(store: Store, info: DatasetInfo) -> CompactReport | None:
    """Compact when enough units are uncovered; costs one listing when the dataset is small."""
    units = {unit_of(key) for key in manifest_keys(store)}
    if len(units) < COMPACT_UNITS:
        return None
    index = read_index(store, info)
    if not is_due(len(units - index.units), len(index.records)):
        return None
    with write_access(store):
        return compact(store, info)


def drop_units(store: Store, info: DatasetInfo, units: Collection[str]) -> None:
    """Take units out of the dataset, damaged ones as a rule; their samples are missing from then on.

    Their data files become orphans.
    """
    for key in manifest_keys(store):
        if unit_of(key) in units:
            store.delete(key)
    if set(units) & read_index(store, info).units:
        compact(store, info, drop=units)
