"""The plain codec: samples and targets as ordinary list columns, converted without a Python loop over tokens."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from storage.codecs.states import read_state_columns, state_columns, state_layouts
from storage.config import Codec
from storage.contract import check_contract
from storage.draws import drawn_logprob
from storage.errors import InputError, IntegrityError
from storage.identity import DatasetIdentity
from storage.samples import ID_BYTES, Int16Array, Int64Array, SampleBatch, offsets_of, ragged_index
from storage.schema import FileMetadata, draws_column, file_metadata, table_schema
from storage.targets import TargetBatch

_MAX_LIST_VALUES = 2**31 - 1

ReadEntries = Callable[[pa.Table, str, SampleBatch], dict[str, Any]]
"""Reads the fields of a TargetBatch that tell its entries, given the table, the kind and the samples."""


def encode(samples: SampleBatch, targets: TargetBatch, identity: DatasetIdentity) -> pa.Table:
    """Return the table of a data file; refuses rows out of contract with IntegrityError."""
    check_contract(samples, targets, identity)
    return build_table(samples, targets, identity, "plain", _entry_columns(targets))


def build_table(
    samples: SampleBatch, targets: TargetBatch, identity: DatasetIdentity, codec: Codec, entries: dict[str, Any]
) -> pa.Table:
    """Return the table of a data file from its `entries`, the columns that the codec makes of the targets' entries."""
    metadata = FileMetadata(
        schema_version=identity.schema_version,
        fingerprint=identity.fingerprint,
        kind=identity.capture.kind,
        codec=codec,
        positions=targets.num_positions,
        hidden=state_layouts(targets, identity),
        hidden_every=identity.capture.hidden_every,
        attention=identity.capture.attention,
    )
    schema = table_schema(identity, metadata)
    columns = _sample_columns(samples) | entries | _mean_columns(targets) | state_columns(targets)
    arrays = [_column(columns[field.name], field.type) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def decode(
    table: pa.Table, layers: Sequence[str] | None = None, read_entries: ReadEntries | None = None
) -> tuple[SampleBatch, TargetBatch]:
    """Return the samples and targets of a data file; IntegrityError where columns are missing or disagree.

    With `layers`, only these layers' hidden states are looked for. `read_entries` reads the entries of another codec.
    Arrays may be read-only views of the table's memory.
    """
    metadata = file_metadata(table.schema)
    try:
        samples = _read_samples(table)
        targets = _read_targets(table, metadata, samples, layers, read_entries or _read_entries)
    except (KeyError, ValueError, pa.ArrowException) as error:
        raise IntegrityError(f"the columns of a data file cannot be read: {error}") from error
    entries = int(targets.count.sum())
    sizes = (len(targets.id), len(targets.logprob), entries if targets.draws is None else targets.draws.shape[1])
    if set(sizes) != {entries}:
        raise IntegrityError(f"a data file counts {entries} entries but holds {sizes} ids, log-probabilities and draws")
    if (samples.num_supervised() != np.diff(targets.offsets)).any():
        raise IntegrityError("a data file does not hold one target row for each supervised position")
    return samples, targets


def _sample_columns(samples: SampleBatch) -> dict[str, Any]:
    lengths = samples.lengths()
    packed = np.zeros(len(samples), dtype=np.bool_)
    packed[np.repeat(np.arange(len(samples)), lengths)[samples.document != 0]] = True
    raw = np.ascontiguousarray(samples.sample_id)
    return {
        "sample_id": pa.FixedSizeBinaryArray.from_buffers(pa.binary(ID_BYTES), len(samples), [None, pa.py_buffer(raw)]),
        "source": pa.array(samples.source, pa.string()).dictionary_encode(),
        "tokens": (samples.tokens, samples.offsets),
        "supervised": (samples.supervised, samples.offsets),
        "document": _document_column(samples, packed),
    }


def _document_column(samples: SampleBatch, packed: NDArray[np.bool_]) -> Any:
    """Return the document numbers of packed windows, null for windows of one document."""
    values = samples.document[ragged_index(samples.offsets, np.flatnonzero(packed).tolist())]
    offsets = offsets_of(np.where(packed, samples.lengths(), 0)).astype(np.int32)
    kind = pa.list_(pa.field("element", pa.int16(), nullable=False))
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), type=kind, mask=pa.array(~packed))


def _mean_columns(targets: TargetBatch) -> dict[str, Any]:
    return {
        "teacher_nll": pa.array(targets.teacher_nll, pa.float32()),
        "teacher_entropy": pa.array(targets.teacher_entropy, pa.float32()),
    }


def _entry_columns(targets: TargetBatch) -> dict[str, Any]:
    """Return all columns that any kind has; the schema picks those of the dataset's."""
    entries = targets.entry_offsets[targets.offsets]
    columns: dict[str, Any] = {
        "target_count": (targets.count, targets.offsets),
        "target_id": (targets.id, entries),
        "target_logprob": (targets.logprob, entries),
        "tail_mass": (targets.tail_mass, targets.offsets),
    }
    for number, draws in enumerate(targets.draws if targets.draws is not None else []):
        columns[draws_column(number)] = (draws, entries)
    return columns


def _column(column: Any, kind: Any) -> Any:
    """Return an Arrow column: as it is, or a list column from (values, offsets)."""
    if not isinstance(column, tuple):
        return column
    values, offsets = column
    if offsets[-1] > _MAX_LIST_VALUES:
        raise InputError(
            f"one data file would hold {offsets[-1]} entries, more than {_MAX_LIST_VALUES}; lower cache.unit_tokens"
        )
    flat = pa.array(np.ascontiguousarray(values, dtype=kind.value_type.to_pandas_dtype()))
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), flat, type=kind)


def _read_samples(table: pa.Table) -> SampleBatch:
    tokens, offsets = _flat(table, "tokens", np.int32)
    supervised, mask_offsets = _flat(table, "supervised", np.bool_)
    if not np.array_equal(offsets, mask_offsets):
        raise ValueError("`tokens` and `supervised` differ in length")
    source: list[str] = []
    for chunk in table.column("source").chunks:
        names = chunk.dictionary.to_pylist()
        source += [names[i] for i in chunk.indices.to_numpy().tolist()]
    return SampleBatch(
        sample_id=read_ids(table),
        source=source,
        offsets=offsets,
        tokens=tokens,
        supervised=supervised,
        document=_read_document(table, offsets),
    )


def read_ids(table: pa.Table) -> NDArray[np.uint8]:
    """Return the `sample_id` column as uint8 [N, 16]."""
    parts = [
        np.frombuffer(chunk.buffers()[1], np.uint8, len(chunk) * ID_BYTES, chunk.offset * ID_BYTES)
        for chunk in table.column("sample_id").chunks
        if len(chunk)
    ]
    return _joined(parts, np.uint8).reshape(-1, ID_BYTES)


def _read_document(table: pa.Table, offsets: Int64Array) -> Int16Array:
    document = np.zeros(offsets[-1], dtype=np.int16)
    if "document" not in table.column_names:
        return document
    column = table.column("document")
    rows = np.flatnonzero(np.asarray(column.is_valid()))
    if len(rows):
        values, own = _flat(table, "document", np.int16)
        if not np.array_equal(np.diff(own)[rows], np.diff(offsets)[rows]) or own[-1] != np.diff(own)[rows].sum():
            raise ValueError("`tokens` and `document` differ in length")
        document[ragged_index(offsets, rows.tolist())] = values
    return document


def _read_targets(
    table: pa.Table,
    metadata: FileMetadata,
    samples: SampleBatch,
    layers: Sequence[str] | None,
    read_entries: ReadEntries,
) -> TargetBatch:
    entries = _no_entries(samples) if metadata.kind == "text" else read_entries(table, metadata.kind, samples)
    return TargetBatch(
        **entries,
        teacher_nll=_scalars(table, "teacher_nll"),
        teacher_entropy=_scalars(table, "teacher_entropy"),
        **read_state_columns(table, metadata, samples, layers),
    )


def _no_entries(samples: SampleBatch) -> dict[str, Any]:
    offsets = offsets_of(samples.num_supervised())
    return {
        "offsets": offsets,
        "count": np.zeros(offsets[-1], dtype=np.int32),
        "id": np.zeros(0, dtype=np.int32),
        "logprob": np.zeros(0, dtype=np.float16),
        "draws": None,
        "tail_mass": np.ones(offsets[-1], dtype=np.float16),
    }


def _read_entries(table: pa.Table, kind: str, _: SampleBatch) -> dict[str, Any]:
    counts, offsets = _flat(table, "target_count", None)
    count = counts.astype(np.int32)
    names = [name for name in table.column_names if name.startswith(draws_column(0))]
    sets = [_flat(table, name, np.uint8)[0][None] for name in names]
    draws = _joined(sets, np.uint8) if sets else None
    if kind == "sampled":
        if draws is None:
            raise ValueError("there are no draws")
        if draws.shape[1] != int(count.sum()):
            raise ValueError(f"{draws.shape[1]} draws for {int(count.sum())} entries")
        logprob, tail_mass, tail_offsets = drawn_logprob(draws, count), np.zeros(len(count), np.float16), offsets
    else:
        logprob = _flat(table, "target_logprob", np.float16)[0]
        tail_mass, tail_offsets = _flat(table, "tail_mass", np.float16)
    if not np.array_equal(offsets, tail_offsets):
        raise ValueError("`target_count` and `tail_mass` differ in length")
    return {
        "offsets": offsets,
        "count": count,
        "id": _flat(table, "target_id", np.int32)[0],
        "logprob": logprob,
        "draws": draws,
        "tail_mass": tail_mass,
    }


def _flat(table: pa.Table, name: str, dtype: Any) -> tuple[NDArray[Any], Int64Array]:
    """Return a list column's values, flat, and the offsets [N + 1] of its rows; null rows are empty."""
    parts, lengths = [], []
    for chunk in table.column(name).chunks:
        values = chunk.flatten()
        if values.null_count:
            raise ValueError(f"`{name}` holds nulls")
        parts.append(values.to_numpy(zero_copy_only=False))
        lengths.append(np.asarray(chunk.value_lengths().fill_null(0), dtype=np.int64))
    flat = _joined(parts, dtype or np.uint8)
    if dtype is not None and flat.dtype != dtype:
        raise ValueError(f"`{name}` holds {flat.dtype}, not {np.dtype(dtype)}")
    return flat, offsets_of(_joined(lengths, np.int64))


def _scalars(table: pa.Table, name: str) -> NDArray[np.float32]:
    return np.asarray(table.column(name).to_numpy(), dtype=np.float32)


def _joined(parts: list[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=dtype)
