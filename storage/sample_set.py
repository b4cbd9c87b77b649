"""All samples of a run on disk: prepared once, opened by any process, read by row.

The layout below its URL is `samples-NNNNN.parquet` (see `sample_file.SCHEMA`) and `samples.json`, written last.
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.config import DataConfig
from storage.errors import InputError, IntegrityError
from storage.inputs import resolve_inputs
from storage.object_store import Store
from storage.range_file import RangeFile
from storage.sample_file import (
    INDEX_COLUMNS,
    LABEL_COLUMN,
    SPLITS,
    TOKEN_COLUMNS,
    SetFacts,
    from_table,
    ids_of,
    labels_of,
    read_facts,
)
from storage.sample_writer import Progress, write_samples
from storage.samples import ID_BYTES, Int32Array, Int64Array, SampleBatch, UInt8Array, offsets_of
from storage.tokenizer import Tokenizer

CACHE_BYTES = 64 << 20
"""Decoded row groups that one reader keeps."""

_BROKEN = "delete this folder and prepare the samples again"


def prepare_samples(
    data: DataConfig, tokenizer: Tokenizer, url: str | Path, on_progress: Progress | None = None
) -> "SampleSet":
    """Make the samples of `data` below `url`, or open them when they are there already.

    They are made again when the config, the tokenizer, the chat template or an input (its name, size, or
    modification stamp) has changed. `on_progress` gets `{stage: "prepare", source, documents, samples}`.

    Raises:
        InputError: an input is missing, malformed or empty; the message names file and line.
    """
    assert data.chat_template in (None, tokenizer.chat_template), "load the tokenizer with data.chat_template"
    store = Store(url)
    key = samples_key(data, tokenizer)
    if not _is_current(store, key):
        write_samples(data, tokenizer, store, key, on_progress)
    return SampleSet.open(store.url)


def samples_key(data: DataConfig, tokenizer: Tokenizer) -> str:
    """Return the hex fingerprint of what the samples depend on; inputs count by name, size and stamp."""
    inputs = [[file.url, file.size, file.stamp] for source in data.sources for file in resolve_inputs(source)]
    depends = {
        "format": 1,
        "data": data.model_dump(mode="json"),
        "tokenizer": tokenizer.digest,
        "chat_template": tokenizer.chat_template,
        "special_tokens": [tokenizer.special_tokens, tokenizer.bos_id, tokenizer.eos_id],
        "inputs": inputs,
    }
    return blake2b(json.dumps(depends, sort_keys=True).encode(), digest_size=32).hexdigest()


class SampleSet:
    """The index of N samples, in memory, and access to their tokens, on disk.

    Pickles as its URL, so that other processes open it by themselves. Not safe for several threads.

    Attributes:
        url: where it lies.
        key: fingerprint of config, tokenizer and inputs.
        window_tokens: most tokens of a sample.
        sample_ids: uint8[N, 16].
        source_names: the sources, in the config's order; `source_codes` int16[N] indexes them.
        split_codes: int8[N], 0 = train, 1 = heldout.
        num_tokens, num_supervised: int64[N].
        counters: for each source `documents`, `bad_rows`, `duplicates` (documents), `duplicate_windows`.
    """

    def __init__(self, store: Store, facts: SetFacts) -> None:
        """Read the index; use `open`."""
        self.url = store.url
        self.key = facts.key
        self.window_tokens = facts.window_tokens
        self.counters = facts.counters
        self.source_names = list(self.counters)
        self._store = store
        self._parts = facts.parts
        self._group_part = [(p, g) for p, part in enumerate(self._parts) for g in range(len(part.group_rows))]
        self._group_starts = offsets_of([rows for part in self._parts for rows in part.group_rows])
        self._footers: dict[int, Any] = {}
        self._cache: OrderedDict[int, SampleBatch] = OrderedDict()
        self._read_index()

    @classmethod
    def open(cls, url: str | Path) -> Self:
        """Open prepared samples.

        Raises:
            InputError: there are none at `url`.
            IntegrityError: a file is missing or altered.
        """
        store = Store(url)
        facts = read_facts(store)
        if facts is None:
            raise InputError(f"no prepared samples at {store.shown()}; run the stage that prepares them first")
        return cls(store, facts)

    def __reduce__(self) -> tuple[Callable[[str], "SampleSet"], tuple[str]]:
        return type(self).open, (self.url,)

    def __len__(self) -> int:
        return self.num_samples

    @property
    def num_samples(self) -> int:
        """Samples of all sources and splits."""
        return len(self.num_tokens)

    @property
    def source(self) -> list[str]:
        """The source of each sample, [N]."""
        return [self.source_names[code] for code in self.source_codes]

    @property
    def split(self) -> list[str]:
        """`train` or `heldout` for each sample, [N]."""
        return [SPLITS[code] for code in self.split_codes]

    def rows(self, split: str | None = None, source: str | None = None) -> Int64Array:
        """Return the rows of a split, a source, or both, in order; all rows without arguments.

        Raises:
            InputError: there is no such split or source.
        """
        chosen = np.ones(self.num_samples, dtype=np.bool_)
        if split is not None:
            chosen &= self.split_codes == _code(split, SPLITS, "split")
        if source is not None:
            chosen &= self.source_codes == _code(source, self.source_names, "source")
        return np.flatnonzero(chosen)

    def ids(self, rows: Sequence[int] | Int64Array) -> list[bytes]:
        """Return the sample ids of `rows` as bytes, in their order."""
        raw = self.sample_ids[np.asarray(rows, dtype=np.int64)].tobytes()
        return [raw[i : i + ID_BYTES] for i in range(0, len(raw), ID_BYTES)]

    def summary(self) -> dict[str, dict[str, dict[str, int]]]:
        """Return `{source: {split: {samples, tokens, supervised}}}`."""
        found: dict[str, dict[str, dict[str, int]]] = {}
        for source in self.source_names:
            for split in SPLITS:
                rows = self.rows(split, source)
                found.setdefault(source, {})[split] = {
                    "samples": len(rows),
                    "tokens": int(self.num_tokens[rows].sum()),
                    "supervised": int(self.num_supervised[rows].sum()),
                }
        return found

    def read(self, rows: Sequence[int] | Int64Array) -> SampleBatch:
        """Return the samples at `rows`, in that order; only the row groups that hold them are read.

        Raises:
            InputError: a row is out of range.
            IntegrityError: a file is missing or altered.
        """
        wanted = np.asarray(rows, dtype=np.int64)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= self.num_samples):
            raise InputError(f"rows must lie in [0, {self.num_samples}), found {wanted.min()}..{wanted.max()}")
        if not len(wanted):
            return SampleBatch.of([])
        groups = np.searchsorted(self._group_starts, wanted, side="right") - 1
        order = np.argsort(groups, kind="stable")
        pieces = []
        for group in np.unique(groups):
            inside = wanted[order[groups[order] == group]] - self._group_starts[group]
            pieces.append(self._group(int(group)).take(inside.tolist()))
        batch = pieces[0] if len(pieces) == 1 else SampleBatch.concat(pieces)
        return batch if np.array_equal(order, np.arange(len(order))) else batch.take(np.argsort(order).tolist())

    def labels(self) -> dict[bytes, Int32Array]:
        """Return the classes of the supervised tokens of each sample whose source says any, by sample id."""
        found: dict[bytes, Int32Array] = {}
        for part in range(len(self._parts)):
            if LABEL_COLUMN in self._footers[part].schema.to_arrow_schema().names:
                found |= labels_of(self._read_part(part, ["sample_id", "supervised", LABEL_COLUMN], None))
        return found

    def _group(self, group: int) -> SampleBatch:
        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group]
        part, index = self._group_part[group]
        batch = from_table(self._read_part(part, TOKEN_COLUMNS, [index]))
        expected = self.sample_ids[self._group_starts[group] : self._group_starts[group + 1]]
        if not np.array_equal(batch.sample_id, expected):
            raise IntegrityError(f"{self._store.shown(self._parts[part].name)} was altered while open; {_BROKEN}")
        self._cache[group] = batch
        while len(self._cache) > 1 and sum(_num_bytes(kept) for kept in self._cache.values()) > CACHE_BYTES:
            self._cache.popitem(last=False)
        return batch

    def _read_index(self) -> None:
        tables = [self._read_part(part, INDEX_COLUMNS, None) for part in range(len(self._parts))]
        for table, part in zip(tables, self._parts, strict=True):
            if len(table) != sum(part.group_rows):
                raise IntegrityError(f"{self._store.shown(part.name)} holds {len(table)} rows; {_BROKEN}")
        table = pa.concat_tables(tables)
        codes = {name: code for code, name in enumerate(self.source_names)}
        self.sample_ids: UInt8Array = ids_of(table)
        self.source_codes = np.array([codes[name] for name in table.column("source").to_pylist()], dtype=np.int16)
        self.split_codes = np.array([SPLITS.index(s) for s in table.column("split").to_pylist()], dtype=np.int8)
        self.num_tokens: Int64Array = table.column("num_tokens").to_numpy().astype(np.int64)
        self.num_supervised: Int64Array = table.column("num_supervised").to_numpy().astype(np.int64)

    def _read_part(self, part: int, columns: list[str], groups: list[int] | None) -> pa.Table:
        facts = self._parts[part]
        try:
            source = pa.PythonFile(RangeFile(self._store, facts.name, facts.bytes), mode="r")
            parquet = pq.ParquetFile(source, metadata=self._footers.get(part), page_checksum_verification=True)
            self._footers[part] = parquet.metadata
            return parquet.read(columns) if groups is None else parquet.read_row_groups(groups, columns)
        except (pa.ArrowException, OSError) as error:
            raise IntegrityError(
                f"{self._store.shown(facts.name)} is truncated or altered ({error}); {_BROKEN}"
            ) from error


def _is_current(store: Store, key: str) -> bool:
    """Tell whether a whole set with this key is there; a broken one is simply made again."""
    try:
        facts = read_facts(store)
    except IntegrityError:
        return False
    if facts is None or facts.key != key:
        return False
    return all(store.exists(part.name) and store.size(part.name) == part.bytes for part in facts.parts)


def _code(name: str, names: Sequence[str], what: str) -> int:
    if name not in names:
        raise InputError(f"no {what} is called {name!r}; there are {list(names)}")
    return names.index(name)


def _num_bytes(batch: SampleBatch) -> int:
    return batch.tokens.nbytes + batch.supervised.nbytes + batch.document.nbytes
