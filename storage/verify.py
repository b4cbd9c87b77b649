"""Checks a whole dataset against itself: every record, every byte, every row."""

from collections.abc import Callable
from dataclasses import dataclass, field

from storage.contract import check_contract
from storage.errors import IntegrityError
from storage.heads import FINAL, check_heads
from storage.info import DatasetInfo, read_info
from storage.manifest import DATA_PREFIX, ManifestRecord, manifest_keys, read_manifest
from storage.object_store import Store
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
    """One message for each damaged record or data file, with its remedy."""
    orphans: list[str] = field(default_factory=list)
    """Data files without a record, left by interrupted attempts: not part of the dataset, and no problem."""

    @property
    def ok(self) -> bool:
        """Tell whether nothing is wrong."""
        return not self.problems


def verify_dataset(url: str, on_progress: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Re-hash every data file and check records, counts, sample ids and the contract of every row.

    `on_progress(done, total)` is called after each unit. Damage is collected in the report; only a dataset.json that
    cannot be used (InputError, IntegrityError) and a failing store (StorageError) are raised.
    """
    store = Store(url)
    info = read_info(store)
    report = VerifyReport()
    seen: set[bytes] = set()
    keys = manifest_keys(store)
    named: set[str] = set()
    for done, key in enumerate(keys, start=1):
        try:
            record = read_manifest(store, key, info.fingerprint)
            named.add(record.data_key)
            _verify_unit(store, info, record, report, seen)
        except IntegrityError as error:
            report.problems.append(str(error))
        if on_progress is not None:
            on_progress(done, len(keys))
    report.problems += check_heads(store, info.fingerprint, bool(keys) and FINAL in info.identity.capture.hidden)
    report.samples = len(seen)
    report.orphans = [key for key in store.list(DATA_PREFIX) if key not in named]
    return report


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
