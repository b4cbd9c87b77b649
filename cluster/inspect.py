"""What a dataset holds, and what the teacher said about one of its samples."""

from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.sample_view import SampleView, view_sample
from storage.card import CARD_KEY
from storage.columns import column_bytes
from storage.errors import InputError
from storage.heads import HEAD_PREFIX
from storage.hidden import NUMPY_DTYPES, stored_columns
from storage.parts import TargetReader
from storage.projection import load_projection
from storage.range_file import RangeFile
from storage.reader import Dataset
from storage.refusals import Refusals
from storage.samples import ID_BYTES
from storage.schema import file_metadata
from storage.tokenizer import Tokenizer
from storage.union import DatasetUnion

MOST_UNITS = 16
"""Data files whose footers are looked at for the bytes of each column."""


def describe_dataset(dataset: Dataset) -> dict[str, Any]:
    """Return identity, sizes and column bytes of a dataset as JSON values; reads records, ids and footers only."""
    totals = dataset.totals()
    looked_at = int(dataset.catalog.positions[:MOST_UNITS].sum())
    columns = column_bytes(dataset, MOST_UNITS)
    return {
        "url": dataset.store.shown(),
        "codec": dataset.info.codec,
        "schema_version": dataset.info.schema_version,
        "created_by": dataset.info.created_by,
        "fingerprint": dataset.info.fingerprint,
        "identity": dataset.identity.model_dump(mode="json"),
        "units": len(dataset.manifests),
        "duplicates": dataset.catalog.num_duplicates,
        **asdict(totals),
        "bytes_per_token": round(totals.bytes_per_token, 3),
        "columns": dict(columns),
        "column_bytes_per_token": {name: round(size / max(looked_at, 1), 4) for name, size in columns},
        "hidden": _hidden(dataset),
        "attention": dataset.identity.capture.attention,
        "head": len(dataset.store.list(HEAD_PREFIX)) > 0,
        "card": dataset.store.exists(CARD_KEY),
        "refused": refused_reasons(dataset),
    }


def refused_reasons(dataset: Dataset) -> dict[str, int]:
    """Return reason → samples that a teacher refused and the dataset does not hold, most of them first."""
    refusals = Refusals.read(dataset.store, dataset.info.fingerprint)
    ids = refusals.sample_ids()
    return dict(refusals.reasons(ids[dataset.missing(ids)]).most_common())


def describe_others(union: DatasetUnion) -> dict[str, Any]:
    """Return `also`: what each further dataset of a run adds to it; empty where there is none."""
    if len(union.datasets) == 1:
        return {}
    served = union.serving(union.sample_ids())
    return {
        "also": [
            {
                "url": dataset.store.shown(),
                "fingerprint": dataset.info.fingerprint,
                "teacher": dataset.identity.teacher.name,
                "kind": dataset.identity.capture.kind,
                "samples": len(dataset.catalog),
                "served": int((served == n).sum()),
            }
            for n, dataset in enumerate(union.datasets)
            if n
        ]
    }


def _hidden(dataset: Dataset) -> dict[str, Any]:
    """Return, for each layer of hidden states, `{dtype, width, bytes_per_state, projection_loss}`."""
    if not dataset.manifests or not dataset.identity.capture.hidden:
        return {}
    record = dataset.manifests[0]
    source = pa.PythonFile(RangeFile(dataset.store, record.data_key, record.bytes), mode="r")
    layouts = file_metadata(pq.read_schema(source)).hidden
    digest = dataset.identity.capture.projection
    loss = load_projection(dataset.store, digest).loss if digest is not None else {}
    return {
        layer: {
            "dtype": layout.dtype,
            "width": layout.width,
            "bytes_per_state": _state_bytes(layout.dtype, layout.width),
            "projection_loss": loss.get(layer),
        }
        for layer, layout in layouts.items()
    }


def _state_bytes(dtype: str, width: int) -> int:
    return stored_columns(dtype, width) * np.dtype(NUMPY_DTYPES[dtype]).itemsize


def find_sample(dataset: DatasetUnion, wanted: str) -> bytes:
    """Return the id of sample number `wanted`, or of the one whose hex id begins so.

    Raises InputError when there is none, or several.
    """
    ids = dataset.sample_ids()
    if wanted.isdigit() and len(wanted) < 2 * ID_BYTES and int(wanted) < len(ids):
        return bytes(ids[int(wanted)])
    text = wanted.lower()
    if len(ids) and text and all(c in "0123456789abcdef" for c in text):
        found = [bytes(row) for row in ids if bytes(row).hex().startswith(text)]
        if len(found) == 1:
            return found[0]
        if len(found) > 1:
            raise InputError(f"--sample {wanted}: {len(found)} samples have ids that begin so; give more digits")
    raise InputError(
        f"--sample {wanted}: no such sample in {dataset.shown()}; it holds {len(ids)}, give a number from 0 to "
        f"{max(len(ids) - 1, 0)} or the beginning of an id"
    )


def describe_sample(dataset: TargetReader, sample_id: bytes, tokenizer: Tokenizer | None) -> SampleView:
    """Return the view of a sample; without a tokenizer tokens are shown as `<id>`."""
    (part,) = dataset.parts([sample_id])
    text_of = tokenizer.token_text if tokenizer is not None else lambda token: f"<{token}>"
    return view_sample(part.samples, part.targets, 0, text_of)


def sample_json(view: SampleView) -> dict[str, Any]:
    """Return a sample view as JSON values."""
    return {**asdict(view), "agreement": round(view.agreement, 4)}
