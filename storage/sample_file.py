"""The Parquet form of samples: one row each, and parts of a few megabytes that are written and read in pieces."""

import io
from collections.abc import Sequence
from typing import Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from storage.errors import IntegrityError
from storage.object_store import Store
from storage.samples import ID_BYTES, Int32Array, Sample, SampleBatch, UInt8Array
from storage.settings import Settings, first_problem

_T = TypeVar("_T", bound=np.generic)

META_KEY = "samples.json"
SPLITS = ("train", "heldout")
INDEX_COLUMNS = ["sample_id", "source", "split", "num_tokens", "num_supervised"]
TOKEN_COLUMNS = ["sample_id", "source", "tokens", "supervised", "document"]
LABEL_COLUMN = "label"
"""The class of each token, null where nobody says any; absent in files of older versions."""

_NAME = pa.dictionary(pa.int32(), pa.string())
SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.binary(ID_BYTES), nullable=False),
        pa.field("source", _NAME, nullable=False),
        pa.field("split", _NAME, nullable=False),
        pa.field("tokens", pa.list_(pa.int32()), nullable=False),
        pa.field("supervised", pa.list_(pa.bool_()), nullable=False),
        pa.field("document", pa.list_(pa.int16()), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),
        pa.field("num_supervised", pa.int32(), nullable=False),
        pa.field(LABEL_COLUMN, pa.list_(pa.int32())),
    ]
)


class PartFacts(Settings):
    """One Parquet file of a set."""

    name: str
    """Key below the set's URL."""
    bytes: int = Field(ge=0)
    """Its size."""
    group_rows: list[int]
    """Samples in each row group."""


class SetFacts(Settings):
    """What `samples.json` holds."""

    format: Literal[1] = 1
    """Version of this layout and of how text becomes samples."""
    key: str
    """Fingerprint of the config, the tokenizer and the inputs."""
    window_tokens: int
    """Most tokens of a sample."""
    tokenizer: dict[str, str | int]
    """Digest and vocabulary size."""
    counters: dict[str, dict[str, int]]
    """For each source, in the config's order: documents, bad_rows, duplicates, duplicate_windows."""
    parts: list[PartFacts]
    """The files, in row order."""


def read_facts(store: Store) -> SetFacts | None:
    """Return what `samples.json` says, or None when there is none.

    Raises:
        IntegrityError: it is malformed or of another format.
    """
    content = store.read_if_exists(META_KEY)
    if content is None:
        return None
    try:
        return SetFacts.model_validate_json(content)
    except ValidationError as error:
        raise IntegrityError(
            f"{store.shown(META_KEY)} is malformed or of another format ({first_problem(error)}); delete this "
            "folder and prepare the samples again"
        ) from error


class PartWriter:
    """Builds one Parquet file in memory, row group by row group, compressed as it grows."""

    def __init__(self) -> None:
        """Start an empty file."""
        self._buffer = io.BytesIO()
        self._writer = pq.ParquetWriter(
            self._buffer,
            SCHEMA,
            compression="zstd",
            use_dictionary=["source", "split"],
            write_page_index=True,
            write_page_checksum=True,
        )

    @property
    def num_bytes(self) -> int:
        """Bytes written so far, without the footer."""
        return self._buffer.tell()

    def add(self, samples: Sequence[Sample], splits: Sequence[str]) -> None:
        """Append one row group of samples with the split of each."""
        table = to_table(SampleBatch.of(samples), splits, [sample.label for sample in samples])
        self._writer.write_table(table, row_group_size=len(samples))

    def finish(self) -> bytes:
        """Return the whole file."""
        self._writer.close()
        return self._buffer.getvalue()


def to_table(batch: SampleBatch, splits: Sequence[str], labels: Sequence[Int32Array | None]) -> pa.Table:
    """Return samples as a table of `SCHEMA`, without copying token by token."""
    offsets = pa.array(batch.offsets.astype(np.int32))
    columns = [
        pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(ID_BYTES), len(batch), [None, pa.py_buffer(np.ascontiguousarray(batch.sample_id))]
        ),
        pa.array(batch.source, pa.string()).dictionary_encode(),
        pa.array(splits, pa.string()).dictionary_encode(),
        pa.ListArray.from_arrays(offsets, pa.array(batch.tokens)),
        pa.ListArray.from_arrays(offsets, pa.array(batch.supervised)),
        pa.ListArray.from_arrays(offsets, pa.array(batch.document)),
        pa.array(batch.lengths().astype(np.int32)),
        pa.array(batch.num_supervised().astype(np.int32)),
        pa.array(labels, pa.list_(pa.int32())),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def from_table(table: pa.Table) -> SampleBatch:
    """Return the samples of a table that has `TOKEN_COLUMNS`.

    Raises:
        IntegrityError: the token-wise columns disagree about the lengths.
    """
    tokens, offsets = _flat(table, "tokens", np.int32)
    supervised, offsets_2 = _flat(table, "supervised", np.bool_)
    document, offsets_3 = _flat(table, "document", np.int16)
    if not (np.array_equal(offsets, offsets_2) and np.array_equal(offsets, offsets_3)):
        raise IntegrityError("samples: the columns tokens, supervised and document differ in length")
    return SampleBatch(
        sample_id=ids_of(table),
        source=table.column("source").to_pylist(),
        offsets=offsets.astype(np.int64),
        tokens=tokens,
        supervised=supervised,
        document=document,
    )


def ids_of(table: pa.Table) -> UInt8Array:
    """Return the sample ids of a table, uint8[N, 16]."""
    ids = b"".join(table.column("sample_id").to_pylist())
    return np.frombuffer(ids, dtype=np.uint8).reshape(-1, ID_BYTES)


def labels_of(table: pa.Table) -> dict[bytes, Int32Array]:
    """Return the labels of the supervised tokens of each sample that has any, by its id."""
    labelled = table.filter(pc.field(LABEL_COLUMN).is_valid())
    if not len(labelled):
        return {}
    label, offsets = _flat(labelled, LABEL_COLUMN, np.int32)
    supervised, _ = _flat(labelled, "supervised", np.bool_)
    ends = np.concatenate(([0], np.cumsum(supervised)))[offsets[1:-1]]
    parts = np.split(label[supervised], ends)
    return dict(zip(labelled.column("sample_id").to_pylist(), parts, strict=True))


def _flat(table: pa.Table, name: str, dtype: type[_T]) -> tuple[NDArray[_T], Int32Array]:
    column = table.column(name).combine_chunks()
    array = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    offsets = array.offsets.to_numpy()
    values = array.flatten().to_numpy(zero_copy_only=False).astype(dtype, copy=False)
    return values, offsets - offsets[0]
