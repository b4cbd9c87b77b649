"""The columns of hidden states and attention: one binary value per sample, the same whatever packs the targets."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from storage.hidden import NUMPY_DTYPES, attention_lengths, kept_positions, state_width, stored_columns
from storage.identity import DatasetIdentity
from storage.samples import Int64Array, SampleBatch, offsets_of
from storage.schema import ATTENTION_PREFIX, HIDDEN_PREFIX, FileMetadata, HiddenLayout
from storage.targets import TargetBatch

_MAX_VALUE_BYTES = 2**31 - 1


def state_layouts(targets: TargetBatch, identity: DatasetIdentity) -> dict[str, HiddenLayout]:
    """Return how each layer's states are laid out, for the file's metadata."""
    dtype = identity.capture.hidden_dtype or "float16"
    return {layer: HiddenLayout(dtype=dtype, width=state_width(states)) for layer, states in targets.hidden.items()}


def state_columns(targets: TargetBatch) -> dict[str, Any]:
    """Return the Arrow columns of hidden states and attention, by name."""
    rows = targets.state_offsets
    columns = {HIDDEN_PREFIX + layer: _binary(states, rows) for layer, states in targets.hidden.items()}
    if targets.attention_count is not None:
        values = offsets_of(targets.attention_count.astype(np.int64))[targets.offsets]
        columns |= {
            ATTENTION_PREFIX + layer: _binary(flat[:, None], values) for layer, flat in targets.attention.items()
        }
    return columns


def read_state_columns(
    table: pa.Table, metadata: FileMetadata, samples: SampleBatch, layers: Sequence[str] | None = None
) -> dict[str, Any]:
    """Return the fields of a `TargetBatch` that these columns give; ValueError where their sizes are wrong.

    With `layers`, only the columns of these layers are looked for.
    """
    kept = kept_positions(samples.sample_id, samples.num_supervised(), metadata.hidden_every)
    found: dict[str, Any] = {"hidden": {}, "hidden_kept": None if metadata.hidden_every is None else kept}
    for layer, layout in metadata.hidden.items():
        if layers is not None and layer not in layers:
            continue
        columns = stored_columns(layout.dtype, layout.width)
        states = _read_binary(table, HIDDEN_PREFIX + layer).view(NUMPY_DTYPES[layout.dtype]).reshape(-1, columns)
        if len(states) != int(kept.sum()):
            raise ValueError(f"`{HIDDEN_PREFIX}{layer}` holds {len(states)} states for {int(kept.sum())} positions")
        found["hidden"][layer] = states
    if metadata.attention:
        count = np.where(kept, attention_lengths(samples), 0).astype(np.int32)
        found["attention_count"], found["attention"] = count, {}
        for layer in metadata.attention if layers is None else set(metadata.attention) & set(layers):
            flat = _read_binary(table, ATTENTION_PREFIX + layer).view("<f2")
            if len(flat) != int(count.sum()):
                raise ValueError(f"`{ATTENTION_PREFIX}{layer}` holds {len(flat)} weights, not {int(count.sum())}")
            found["attention"][layer] = flat
    return found


def _binary(values: NDArray[Any], offsets: Int64Array) -> Any:
    """Return one binary value per sample, its rows of `values` [rows, columns]; chunked where 2 GiB are passed."""
    raw = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
    ends = offsets * values.shape[1] * values.itemsize
    chunks, first = [], 0
    while first < len(offsets) - 1:
        last = max(first + 1, int(np.searchsorted(ends, ends[first] + _MAX_VALUE_BYTES, side="right")) - 1)
        local = (ends[first : last + 1] - ends[first]).astype(np.int32)
        data = pa.py_buffer(raw[ends[first] : ends[last]])
        chunks.append(pa.BinaryArray.from_buffers(pa.binary(), last - first, [None, pa.py_buffer(local), data]))
        first = last
    return pa.chunked_array(chunks, pa.binary())


def _read_binary(table: pa.Table, name: str) -> NDArray[np.uint8]:
    parts = [np.zeros(0, dtype=np.uint8)]
    for chunk in table.column(name).chunks:
        _, offsets, data = chunk.buffers()
        if len(chunk) and data is not None:
            own = np.frombuffer(offsets, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
            parts.append(np.frombuffer(data, np.uint8)[own[0] : own[-1]])
    return parts[1] if len(parts) == 2 else np.concatenate(parts)
