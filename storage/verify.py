"""Checks a whole dataset against itself: every record, every byte, every row."""

from collections.abc import Callable
from dataclasses import dataclass, field

from storage.committed import read_generation, read_index
from storage.contract import check_contract
from storage.errors import IntegrityError
from storage.heads import FINAL, check_heads
from storage.index import EMPTY, INDEX_PREFIX, Index, generations
from storage.info import DatasetInfo, read_info
from storage.manifest import DATA_PREFIX, ManifestRecord, manifest_keys, read_manifest, unit_of
from storage.object_store import Store
from storage.projection import load_projection
from storage.refusals import check_refusals
from storage.shard import damaged, read_shard


@dataclass
class VerifyReport:
    """What was found; the dataset is sound when `problems` is empty."""

    units: int = 0
    """Units that are sound."""
    rows: int = 0
    samples: int = 0
    """Distinct samples; rows above that are samples which two units hold."""
    tokens: int = 0
    supervised: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)
    """One message for each damaged record, index or data file, with its remedy."""
    damaged_units: list[str] = field(default_factory=list)
    """Units whose record or data file is among the problems."""
    orphans: list[str] = field(default_factory=list)
    """Data files without a record, left by interrupted attempts: not part of the dataset, and no problem."""

    @property
    def ok(self) -> bool:
        """Tell whether nothing is wrong."""
        return not self.problems


def verify_dataset(url: str, on_progress: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Re-hash every data file and check records, indexes, counts, sample ids and the contract of every row.

    `on_progress(done, total)` is called after each unit. Damage is collected in the report; only a dataset.json that
    cannot be used (InputError, IntegrityError) and a failing store (StorageError) are raised.
    """
    store = Store(url)
    info = read_info(store)
    report = VerifyReport()
    index = _verify_indexes(store, info, report)
    covered = {record.unit: record for record in index.records}
    keys = manifest_keys(store)
    units = [*covered, *(unit_of(key) for key in keys if unit_of(key) not in covered)]
    manifests = {unit_of(key): key for key in keys}
    seen: set[bytes] = set()
    named: set[str] = set()
    for done, unit in enumerate(units, start=1):
        try:
            record = _verify_record(store, info, manifests.get(unit), covered.get(unit))
            named.add(record.data_key)
            _verify_unit(store, info, record, report, seen)
        except IntegrityError as error:
            report.problems.append(str(error))
            report.damaged_units.append(unit)
        if on_progress is not None:
            on_progress(done, len(units))
    report.problems += _check_projection(store, info) + check_refusals(store, info.fingerprint)
    # Version 1 kept the final hidden state without the head.
    has_head = FINAL in info.identity.capture.hidden and (info.upgraded_from or info.schema_version) > 1
    report.problems += check_heads(store, info.fingerprint, bool(units) and has_head)
    report.samples = len(seen)
    report.orphans = [key for key in store.list(DATA_PREFIX) if key not in named]
    return report


def _verify_indexes(store: Store, info: DatasetInfo, report: VerifyReport) -> Index:
    """Check the newest index, and the older ones that are kept in case it is damaged."""
    index = EMPTY
    try:
        index = read_index(store, info)
        for generation in generations(store.list(INDEX_PREFIX)):
            if generation < index.generation:
                read_generation(store, generation, info.fingerprint)
    except IntegrityError as error:
        report.problems.append(str(error))
    return index


def _verify_record(
    store: Store, info: DatasetInfo, manifest: str | None, indexed: ManifestRecord | None
) -> ManifestRecord:
    """Return the record of a unit; where index and manifest both hold it they must agree."""
    if indexed is not None and (defect := indexed.defect()) is not None:
        raise IntegrityError(f"the record of unit {indexed.unit} in the index of {store.shown()} is damaged: {defect}")
    if manifest is None:
        assert indexed is not None
        return indexed
    record = read_manifest(store, manifest, info.fingerprint)
    # An attempt that ended long after the unit was compacted may have made a record of its own: the index counts.
    return indexed or record


def _verify_unit(
    store: Store, info: DatasetInfo, record: ManifestRecord, report: VerifyReport, seen: set[bytes]
) -> None:
    samples, targets = read_shard(store, record)
    try:
        check_contract(samples, targets, info.identity)
    except IntegrityError as error:
        raise damaged(store, record, str(error)) from error
    seen.update(samples.ids())
    report.units += 1
    report.rows += len(samples)
    report.tokens += samples.num_tokens
    report.supervised += targets.num_positions
    report.bytes += record.bytes


def _check_projection(store: Store, info: DatasetInfo) -> list[str]:
    digest = info.identity.capture.projection
    try:
        if digest is not None:
            load_projection(store, digest)
    except IntegrityError as error:
        return [str(error)]
    return []
