"""The columns of a data file: one row per sample, plain Parquet.

Which columns there are follows from the dataset's identity; those that do not apply to its kind are absent.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from storage.config import Codec, HiddenDtype
from storage.errors import InputError, IntegrityError
from storage.identity import DatasetIdentity, canonical_json
from storage.samples import ID_BYTES
from storage.settings import Settings, added

METADATA_KEY = b"lectern"
HIDDEN_PREFIX = "hidden_"
ATTENTION_PREFIX = "attention_"
MAX_ENTRIES = 65_535
_PIECE_BYTES = 2 << 20
"""Of a data file's decompressed pages, decoded at once."""


class HiddenLayout(Settings):
    """How a `hidden_<layer>` value is read: a row-major [positions, width] matrix, little-endian.

    Rows of `int8` begin with a float32 scale: a state is scale · value.
    """

    dtype: HiddenDtype
    width: int = Field(ge=1)


class FileMetadata(Settings):
    """What a data file says of itself, as JSON under the schema metadata key `lectern`."""

    schema_version: int
    fingerprint: str
    kind: str
    codec: Codec = added("plain")
    positions: int = Field(ge=0)
    """Supervised positions of all rows."""
    hidden: dict[str, HiddenLayout] = Field(default_factory=dict)
    """Layer name → layout."""
    hidden_every: float | None = added(None)
    """Which positions keep hidden states and attention, see `storage.hidden.kept_positions`; null: all."""
    attention: list[str] = added([])
    """Layers whose attention is kept."""


def max_entries(identity: DatasetIdentity) -> int:
    """Return the most entries that a position can have under this identity, at most 65,535."""
    capture, vocab_size = identity.capture, identity.num_targets
    if capture.kind == "dense":
        limit = vocab_size
    else:
        limit = min(vocab_size, (capture.top_k or 0) + (capture.draws or 0) * capture.draw_sets)
    if limit > MAX_ENTRIES:
        raise InputError(
            f"kind {capture.kind} would keep {limit} entries for each position, more than {MAX_ENTRIES}; use `topk` or "
            "`hybrid`, or keep the hidden state `final`, which gives the full distribution back"
        )
    return limit


def table_schema(identity: DatasetIdentity, metadata: FileMetadata) -> pa.Schema:
    """Return the Arrow schema of a data file; `target_count` is as narrow as the identity's limit allows."""
    fields = [
        _field("sample_id", pa.binary(ID_BYTES)),
        _field("source", pa.dictionary(pa.int32(), pa.string())),
        _field("tokens", _list(pa.int32())),
        _field("supervised", _list(pa.bool_())),
        pa.field("document", _list(pa.int16()), nullable=True),
        *(_target_fields(identity) if metadata.codec == "plain" else _packed_fields()),
        _field("teacher_nll", pa.float32()),
        _field("teacher_entropy", pa.float32()),
    ]
    fields += [_field(HIDDEN_PREFIX + layer, pa.binary()) for layer in identity.capture.hidden]
    fields += [_field(ATTENTION_PREFIX + layer, pa.binary()) for layer in identity.capture.attention]
    return pa.schema(fields, metadata={METADATA_KEY: canonical_json(metadata.model_dump(mode="json"))})


def draws_column(number: int) -> str:
    """Return the name of the column of a set of draws: the first, 0, is `target_draws`, the others are numbered."""
    return "target_draws" if number == 0 else f"target_draws_{number}"


def _packed_fields() -> list[Any]:
    return [
        _field("target_packed", pa.binary()),
        _field("target_codebook", pa.dictionary(pa.int32(), pa.binary())),
    ]


def _target_fields(identity: DatasetIdentity) -> list[Any]:
    capture = identity.capture
    if capture.kind == "text":
        return []
    count = pa.uint8() if max_entries(identity) <= 255 else pa.uint16()
    fields = [_field("target_count", _list(count)), _field("target_id", _list(pa.int32()))]
    if capture.kind != "sampled":
        fields.append(_field("target_logprob", _list(pa.float16())))
    if capture.draws is not None:
        fields += [_field(draws_column(n), _list(pa.uint8())) for n in range(capture.draw_sets)]
    if capture.kind != "sampled":
        fields.append(_field("tail_mass", _list(pa.float16())))
    return fields


def file_metadata(schema: pa.Schema) -> FileMetadata:
    """Read back what a data file says of itself; IntegrityError when it says nothing that we know."""
    try:
        return FileMetadata.model_validate(json.loads((schema.metadata or {})[METADATA_KEY]))
    except (KeyError, ValueError) as error:
        raise IntegrityError(f"not a data file of a Lectern dataset: schema metadata `lectern`: {error}") from error


def to_parquet(table: pa.Table) -> bytes:
    """Return a table as one Parquet file in memory.

    Byte-stream split takes the token ids from 37 to 28 bytes for 22 entries; float16 columns go without it, since
    DuckDB 2.0 cannot read that encoding of them. Draws are few small numbers: a dictionary halves them.
    """
    sink = pa.BufferOutputStream()
    names = table.column_names
    pq.write_table(
        table,
        sink,
        compression="zstd",
        compression_level=3,
        use_dictionary=[name for name in names if name in {"source", "target_codebook"}]
        + [f"{name}.list.element" for name in names if name.startswith("target_draws")],
        use_byte_stream_split=[path for name, path in _BYTE_STREAM_SPLIT.items() if name in names],
        # A codebook must stay in its dictionary, which would else be given up once it is larger than this.
        dictionary_pagesize_limit=1 << 30,
        # The least and the largest packed row tell nothing, and would be written five times over.
        write_statistics=[
            _leaf(field) for field in table.schema if field.name not in {"target_packed", "target_codebook"}
        ],
        write_page_index=True,
        write_page_checksum=True,
        row_group_size=max(1, len(table)),
    )
    return bytes(sink.getvalue().to_pybytes())


def _leaf(field: Any) -> str:
    return f"{field.name}.list.element" if pa.types.is_list(field.type) else str(field.name)


def from_parquet(
    source: Any, unwanted: Callable[[str], bool] | None = None, hashed: bool = False, threads: bool = True
) -> pa.Table:
    """Read a table, in chunks of some rows, from bytes or a seekable file; IntegrityError where it is damaged.

    Page checksums are checked unless the whole file's hash was: that costs a sixth of the time. Columns that are
    `unwanted` are not read; those that are lie side by side and are asked for together. `threads`: decode in those
    that Arrow has, one for each core. Every thread that decodes takes fresh memory: too many cost more than they give.
    For the same reason a file is decoded piece by piece: what a large one needs besides its columns would be fresh too.
    """
    try:
        with pq.ParquetFile(
            pa.BufferReader(source) if isinstance(source, bytes) else source,
            page_checksum_verification=not hashed,
            pre_buffer=unwanted is not None,
        ) as file:
            schema, sizes = file.schema_arrow, file.metadata
            fields = [field for field in schema if unwanted is None or not unwanted(field.name)]
            size = sum(sizes.row_group(n).total_byte_size for n in range(sizes.num_row_groups))
            rows = max(1, sizes.num_rows * _PIECE_BYTES // max(1, size))
            pieces = file.iter_batches(rows, columns=[field.name for field in fields], use_threads=threads)
            return pa.Table.from_batches(pieces, pa.schema(fields, metadata=schema.metadata))
    except (pa.ArrowException, OSError) as error:
        raise IntegrityError(f"not a readable Parquet file: {error}") from error


_BYTE_STREAM_SPLIT: Mapping[str, str] = {
    "tokens": "tokens.list.element",
    "target_id": "target_id.list.element",
    "teacher_nll": "teacher_nll",
    "teacher_entropy": "teacher_entropy",
}


def _field(name: str, kind: Any) -> Any:
    return pa.field(name, kind, nullable=False)


def _list(kind: Any) -> Any:
    return pa.list_(pa.field("element", kind, nullable=False))
