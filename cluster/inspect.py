"""What a dataset holds, and what the teacher said about one of its samples."""

from dataclasses import asdict
from typing import Any

from cluster.sample_view import SampleView, view_sample
from storage.columns import column_bytes
from storage.errors import InputError
from storage.reader import Dataset
from storage.samples import ID_BYTES
from storage.tokenizer import Tokenizer


def describe_dataset(dataset: Dataset) -> dict[str, Any]:
    """Return identity, sizes and column bytes of a dataset as JSON values; reads manifests, ids and footers only."""
    totals = dataset.totals()
    return {
        "url": dataset.store.shown(),
        "codec": dataset.info.codec,
        "created_by": dataset.info.created_by,
        "fingerprint": dataset.info.fingerprint,
        "identity": dataset.identity.model_dump(mode="json"),
        "units": len(dataset.manifests),
        "duplicates": dataset.catalog.num_duplicates,
        **asdict(totals),
        "bytes_per_token": round(totals.bytes_per_token, 3),
        "columns": dict(column_bytes(dataset)),
    }


def find_sample(dataset: Dataset, wanted: str) -> bytes:
    """Return the id of sample number `wanted`, or of the one whose hex id begins so.

    Raises InputError when there is none, or several.
    """
    ids = dataset.catalog.sample_ids
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
        f"--sample {wanted}: no such sample in {dataset.store.shown()}; it holds {len(ids)}, give a number from 0 to "
        f"{max(len(ids) - 1, 0)} or the beginning of an id"
    )


def describe_sample(dataset: Dataset, sample_id: bytes, tokenizer: Tokenizer | None) -> SampleView:
    """Return the view of a sample; without a tokenizer tokens are shown as `<id>`."""
    samples, targets = dataset.read([sample_id])
    text_of = tokenizer.token_text if tokenizer is not None else lambda token: f"<{token}>"
    return view_sample(samples, targets, 0, text_of)


def sample_json(view: SampleView) -> dict[str, Any]:
    """Return a sample view as JSON values."""
    return {**asdict(view), "agreement": round(view.agreement, 4)}
