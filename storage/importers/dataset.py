"""Imports a cache of another tool as a dataset: everything is checked before the first row is stored."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b

from storage.errors import InputError, LecternError
from storage.identity import CaptureIdentity, DatasetIdentity, TeacherIdentity, TokenizerIdentity, canonical_json
from storage.importers import distillkit
from storage.importers.rows import SourceRow, to_unit
from storage.manifest import ids_digest
from storage.object_store import Store
from storage.samples import SampleBatch
from storage.targets import TargetBatch
from storage.tokenizer import Tokenizer
from storage.writer import DatasetWriter

FORMATS = ("distillkit",)
UNIT_TOKENS = 65_536
"""Tokens of one data file."""
_NAMED = 5
_HASH_BYTES = 16 << 20

Unit = tuple[SampleBatch, TargetBatch]


@dataclass(frozen=True)
class ImportSettings:
    """What is imported, and what its rows do not say themselves."""

    url: str
    """Folder or fsspec URL of the cache."""
    teacher: str
    """Name of the model that spoke."""
    source: str = "imported"
    """Name of the corpus, for curriculum and reports."""
    config: str | None = None
    """URL of the compression config; none takes the one beside the rows."""
    precision: str = "unknown"
    """Precision of the teacher's forward pass."""
    skip_bad_rows: bool = False
    """Leave rows out of contract out, instead of refusing the import."""


@dataclass
class ImportResult:
    """What an import did."""

    rows: int = 0
    """Rows read."""
    samples: int = 0
    """Samples in the dataset that come from them."""
    tokens: int = 0
    supervised: int = 0
    units: int = 0
    new_units: int = 0
    """Of these, stored by this call."""
    repeated_rows: int = 0
    """Rows equal to an earlier one in tokens, documents and mask: the earlier one counts."""
    empty_rows: int = 0
    """Rows without any position to predict."""
    bad_rows: list[str] = field(default_factory=list)
    """File, row and reason of each row that was left out."""


def import_dataset(
    settings: ImportSettings, tokenizer: Tokenizer, url: str, on_progress: Callable[[int], None] | None = None
) -> ImportResult:
    """Read the cache twice: once to check every row, once to store them. A call that was cut off goes on when repeated.

    Args:
        settings: the cache.
        tokenizer: the teacher's.
        url: where the dataset is made.
        on_progress: called with the number of rows read so far, over both passes.

    Raises:
        InputError: there is no such cache, its config does not fit, or rows are out of contract; nothing is stored.
        IdentityError: another dataset lies at `url`.
    """
    store = Store(settings.url)
    keys = [key for key in store.list() if key.endswith(".parquet")]
    if not keys:
        raise InputError(f"{store.shown()} holds no *.parquet file; --from names the folder of the cache")
    config, raw_config = _compression(store, settings.config)
    size = config.d if isinstance(config, distillkit.Compression) else config.vocab_size
    if size < tokenizer.vocab_size - 1:
        raise InputError(
            f"the cache was made for {size} token ids, the tokenizer has {tokenizer.vocab_size}: name the teacher's own"
        )
    identity = _identity(settings, tokenizer, config.k, _digest(store, keys, raw_config))
    result, bad = ImportResult(), list[str]()
    passes = _Pass(store, keys, config, identity, settings, on_progress or (lambda rows: None))
    for _ in passes.units(result, bad):
        pass
    if bad and not settings.skip_bad_rows:
        more = f"\n  and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        listed = "".join(f"\n  - {line}" for line in bad[:_NAMED])
        raise InputError(
            f"{len(bad)} of {result.rows} rows are out of contract; nothing was imported:{listed}{more}\nMend the "
            "cache or its config, or leave these rows out with --skip-bad-rows"
        )
    if not result.samples:
        raise InputError(f"{store.shown()} holds no row that could be imported, of {result.rows}")
    writer = DatasetWriter.create(url, identity, max(size, tokenizer.vocab_size))
    for samples, targets in _joined(passes.units(ImportResult(), [])):
        receipt = writer.commit(f"import-{ids_digest(samples.sample_id)}", samples, targets, "a1")
        result.units += 1
        result.new_units += receipt.committed
    result.bad_rows = bad
    return result


@dataclass
class _Pass:
    """One reading of the cache."""

    store: Store
    keys: list[str]
    config: distillkit.Compression | distillkit.LegacyCompression
    identity: DatasetIdentity
    settings: ImportSettings
    on_progress: Callable[[int], None]
    read: int = 0

    def units(self, result: ImportResult, bad: list[str]) -> Iterator[Unit]:
        """Yield each good row as a unit of its own, counting into `result` and naming the others in `bad`."""
        seen: set[bytes] = set()
        for row in distillkit.read_rows(self.store, self.keys, self.config):
            result.rows += 1
            self.read += 1
            self.on_progress(self.read)
            unit = self._unit(row, result, bad)
            if unit is None:
                continue
            [sample_id] = unit[0].ids()
            if sample_id in seen:
                result.repeated_rows += 1
                continue
            seen.add(sample_id)
            result.samples += 1
            result.tokens += unit[0].num_tokens
            result.supervised += unit[1].num_positions
            yield unit

    def _unit(self, row: SourceRow, result: ImportResult, bad: list[str]) -> Unit | None:
        try:
            unit = to_unit(row, self.identity, self.settings.source)
        except LecternError as error:
            bad.append(f"{row.where}: {error}")
            return None
        result.empty_rows += unit is None
        return unit


def _joined(units: Iterable[Unit]) -> Iterator[Unit]:
    """Join single rows to units of about `UNIT_TOKENS` tokens."""
    held: list[Unit] = []
    for unit in units:
        held.append(unit)
        if sum(samples.num_tokens for samples, _ in held) >= UNIT_TOKENS:
            yield _concat(held)
            held = []
    if held:
        yield _concat(held)


def _concat(units: list[Unit]) -> Unit:
    return SampleBatch.concat([unit[0] for unit in units]), TargetBatch.concat([unit[1] for unit in units])


def _compression(store: Store, url: str | None) -> tuple[distillkit.Compression | distillkit.LegacyCompression, bytes]:
    folder, _, name = url.rpartition("/") if url is not None else ("", "", distillkit.CONFIG_KEY)
    place = store if url is None else Store(folder or ".")
    raw = place.read_if_exists(name)
    if raw is None:
        raise InputError(
            f"{place.shown(name)} does not exist; DistillKit writes its compression config there when it captures: for "
            "a published dataset put `logprob_compressor` of its training config into a file and name it with "
            "--format-config"
        )
    return distillkit.read_compression(raw, place.shown(name)), raw


def _digest(store: Store, keys: list[str], config: bytes) -> str:
    """Return a digest over the cache's files and its config: what stands in for the unknown weights."""
    digest = blake2b(config, digest_size=16, person=b"lectern.import")
    for key in keys:
        size = store.size(key)
        digest.update(canonical_json([key, size]))
        for start in range(0, size, _HASH_BYTES):
            digest.update(store.read_range(key, start, min(start + _HASH_BYTES, size)))
    return digest.hexdigest()


def _identity(settings: ImportSettings, tokenizer: Tokenizer, k: int, digest: str) -> DatasetIdentity:
    return DatasetIdentity(
        teacher=TeacherIdentity(
            name=settings.teacher, architecture="unknown", weights=f"imported:{digest}", parameters=0
        ),
        tokenizer=TokenizerIdentity.of(tokenizer),
        precision=settings.precision,
        capture=CaptureIdentity(kind="topk", top_k=k),
    )
