"""Corpora → samples on disk: reads, cleans, splits, encodes, packs and writes, holding a few megabytes at a time."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from storage.cleaning import clean_document, cleaner_of, document_digest, is_heldout
from storage.config import DataConfig, SourceConfig
from storage.corpus import BadRowError, Document, num_chars, read_documents, refuse_row
from storage.encoding import encode_documents
from storage.errors import InputError
from storage.object_store import Store
from storage.packing import Packer
from storage.sample_file import META_KEY, SPLITS, PartFacts, PartWriter, SetFacts
from storage.samples import Sample
from storage.tokenizer import Tokenizer

Progress = Callable[[dict[str, Any]], None]

PART_PREFIX = "samples-"
PART_BYTES = 8 << 20
GROUP_SAMPLES = 256
GROUP_TOKENS = 1 << 19
BATCH_DOCUMENTS = 256
BATCH_CHARS = 1 << 20


def write_samples(data: DataConfig, tokenizer: Tokenizer, store: Store, key: str, on_progress: Progress | None) -> None:
    """Write all samples of `data` to `store`, and `samples.json` with `key` at the very end.

    What was there before is replaced; until the end there is no `samples.json`, so a half-written set is never read.

    Raises:
        InputError: a source is empty, unreadable, holds a bad row, or leaves a needed split without a sample.
    """
    store.delete(META_KEY)
    writer = _SetWriter(store)
    counters: dict[str, Counter[str]] = {}
    for source in data.sources:
        counters[source.name] = Counter(documents=0, bad_rows=0, duplicates=0, duplicate_windows=0)
        _write_source(source, data, tokenizer, writer, counters[source.name], on_progress)
    parts = writer.finish()
    for stale in set(store.list(PART_PREFIX)) - {part.name for part in parts}:
        store.delete(stale)
    facts = SetFacts(
        key=key,
        window_tokens=data.window_tokens,
        tokenizer={"digest": tokenizer.digest, "vocab_size": tokenizer.vocab_size},
        counters={name: dict(counter) for name, counter in counters.items()},
        parts=parts,
    )
    store.write(META_KEY, facts.model_dump_json(indent=1).encode())


class _SetWriter:
    """Collects samples into row groups, row groups into parts; drops windows that were already written."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._seen: set[bytes] = set()
        self._group: list[Sample] = []
        self._splits: list[str] = []
        self._group_tokens = 0
        self._part: PartWriter | None = None
        self._group_rows: list[int] = []
        self._parts: list[PartFacts] = []

    def add(self, sample: Sample, split: str) -> bool:
        """Take a sample; False when the same window was taken before."""
        if sample.sample_id in self._seen:
            return False
        self._seen.add(sample.sample_id)
        self._group.append(sample)
        self._splits.append(split)
        self._group_tokens += len(sample.tokens)
        if len(self._group) >= GROUP_SAMPLES or self._group_tokens >= GROUP_TOKENS:
            self._end_group()
        return True

    def finish(self) -> list[PartFacts]:
        """Write what is left; return what the set's files hold."""
        self._end_group()
        self._end_part()
        return self._parts

    def _end_group(self) -> None:
        if not self._group:
            return
        self._part = self._part or PartWriter()
        self._part.add(self._group, self._splits)
        self._group_rows.append(len(self._group))
        self._group, self._splits, self._group_tokens = [], [], 0
        if self._part.num_bytes >= PART_BYTES:
            self._end_part()

    def _end_part(self) -> None:
        if self._part is None:
            return
        name = f"{PART_PREFIX}{len(self._parts):05d}.parquet"
        content = self._part.finish()
        self._store.write(name, content)
        self._parts.append(PartFacts(name=name, bytes=len(content), group_rows=self._group_rows))
        self._part, self._group_rows = None, []


def _write_source(
    source: SourceConfig,
    data: DataConfig,
    tokenizer: Tokenizer,
    writer: _SetWriter,
    counters: Counter[str],
    on_progress: Progress | None,
) -> None:
    last_only = data.supervise == "last"
    packers = {split: Packer(source.name, data.window_tokens, data.pack, last_only) for split in SPLITS}
    written: Counter[str] = Counter()

    def put(samples: Iterable[Sample], split: str) -> None:
        for sample in samples:
            kind = split if writer.add(sample, split) else "duplicate_windows"
            written[kind] += 1

    for batch in _batches(_clean_documents(source, data, counters)):
        for document, encoded in encode_documents(batch, tokenizer):
            if isinstance(encoded, BadRowError):
                refuse_row(document.where, str(encoded), data.on_bad_row, counters)
                continue
            counters["documents"] += 1
            split = SPLITS[is_heldout(document_digest(document), data.heldout_fraction)]
            put(packers[split].add(encoded), split)
        if on_progress is not None:
            samples = written["train"] + written["heldout"]
            on_progress(
                {"stage": "prepare", "source": source.name, "documents": counters["documents"], "samples": samples}
            )
    for split in SPLITS:
        put(packers[split].flush(), split)
    counters["duplicate_windows"] = written["duplicate_windows"]
    _require_samples(source, data, counters, written)


def _clean_documents(source: SourceConfig, data: DataConfig, counters: Counter[str]) -> Iterator[Document]:
    clean = cleaner_of(source.clean)
    seen: set[bytes] = set()
    for raw in read_documents(source, data.on_bad_row, counters):
        document = clean_document(raw, clean)
        if source.clean.deduplicate:
            digest = document_digest(document)
            if digest in seen:
                counters["duplicates"] += 1
                continue
            seen.add(digest)
        yield document


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    chars = 0
    for document in documents:
        batch.append(document)
        chars += num_chars(document)
        if len(batch) >= BATCH_DOCUMENTS or chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _require_samples(source: SourceConfig, data: DataConfig, counters: Counter[str], written: Counter[str]) -> None:
    name = f"data.sources[{source.name}]"
    bad, documents = counters["bad_rows"], counters["documents"]
    if not documents:
        found = f"all of its {bad} rows are bad" if bad else "it has no document"
        raise InputError(f"{name}: the corpus {source.path!r} is empty: {found}; give text to learn from")
    repeated = counters["duplicate_windows"]
    aside = f" ({repeated} windows were left out because they occur before)" if repeated else ""
    fraction = data.heldout_fraction
    if not written["train"]:
        raise InputError(
            f"{name}: no training sample: its {documents} documents all fell into the held-out share "
            f"data.heldout_fraction={fraction}{aside}; lower the share or give more documents"
        )
    if fraction > 0 and not written["heldout"]:
        raise InputError(
            f"{name}: no held-out sample: none of its {documents} documents fell into the share "
            f"data.heldout_fraction={fraction}{aside}; raise the share, give more documents, or set it to 0"
        )
