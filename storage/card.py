"""The dataset's card: a README.md that says what it holds, where it comes from and how to load it.

Its YAML front matter is that of dataset cards on the Hugging Face hub, by which `datasets.load_dataset(FOLDER)` finds
the data files. It holds what dataset.json and the records say and nothing of the machine: no URL, no folder, no
credentials. The same dataset has the same card.
"""

from pathlib import PurePath
from typing import Any

import yaml

from storage.columns import column_bytes, column_note
from storage.info import INFO_KEY
from storage.reader import Dataset

CARD_KEY = "README.md"
_SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "n>1B")


def write_card(dataset: Dataset) -> str:
    """Write README.md into the dataset, where it is not there as it should be; returns its key."""
    text = render_card(dataset).encode()
    if dataset.store.read_if_exists(CARD_KEY) != text:
        dataset.store.write(CARD_KEY, text)
    return CARD_KEY


def render_card(dataset: Dataset) -> str:
    """Return the card of a dataset as Markdown; reads records and a few footers."""
    teacher = teacher_name(dataset)
    front = yaml.safe_dump(_front_matter(dataset, teacher), sort_keys=False, allow_unicode=True, width=1000)
    facts = "\n".join(f"| {name} | {value} |" for name, value in _facts(dataset, teacher).items())
    columns = "\n".join(
        f"| `{name}` | {share:.1%} | {column_note(name)} |" for name, share in _shares(column_bytes(dataset))
    )
    return (
        f"---\n{front}---\n\n# Soft targets of {teacher}\n\n"
        "What a teacher model said about every supervised token of a text: made once, to train students from. Written "
        "by Lectern.\n\n"
        f"| | |\n|---|---|\n{facts}\n\n"
        f"## Columns\n\nOne row per context window.\n\n| column | of the bytes | holds |\n|---|---|---|\n{columns}\n\n"
        f"## Loading\n\n{_LOADING.get(dataset.info.codec, _PACKED)}"
    )


def teacher_name(dataset: Dataset) -> str:
    """Return the teacher's name; of a folder its last part alone."""
    name = dataset.identity.teacher.name
    is_folder = name.startswith(("/", ".", "~")) or "\\" in name or "://" in name
    return PurePath(name.replace("\\", "/").partition("?")[0]).name if is_folder else name


def _front_matter(dataset: Dataset, teacher: str) -> dict[str, Any]:
    samples = len(dataset.catalog)
    size = next((n for n in range(len(_SIZES) - 1) if samples < 10 ** (n + 3)), len(_SIZES) - 1)
    return {
        "pretty_name": f"Soft targets of {teacher}",
        "tags": ["knowledge-distillation", "soft-targets", "lectern", dataset.identity.capture.kind],
        "size_categories": [_SIZES[size]],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}],
    }


def _facts(dataset: Dataset, teacher: str) -> dict[str, str]:
    identity, totals, capture = dataset.identity, dataset.totals(), dataset.identity.capture
    kept = capture.model_dump(exclude={"kind"}, exclude_defaults=True)
    revision = f" at revision {identity.teacher.revision}" if identity.teacher.revision else ""
    return {
        "teacher": f"{teacher}{revision}: {identity.teacher.architecture}, {identity.teacher.parameters:,} parameters",
        "weights": f"`{identity.teacher.weights}`",
        "precision": identity.precision,
        "tokenizer": f"{identity.tokenizer.vocab_size:,} ids, `{identity.tokenizer.digest}`",
        "targets": ", ".join([capture.kind, *(f"{name} {_shown(value)}" for name, value in kept.items())]),
        "codec": dataset.info.codec,
        "samples": f"{totals.samples:,}",
        "tokens": f"{totals.tokens:,}, {totals.supervised:,} of them supervised",
        "size": f"{totals.bytes:,} bytes, {totals.bytes_per_token:.2f} per supervised token",
        "fingerprint": f"`{dataset.info.fingerprint}`",
        "created by": dataset.info.created_by,
    }


def _shown(value: Any) -> str:
    return " + ".join(map(str, value)) if isinstance(value, list) else str(value)


def _shares(columns: list[tuple[str, int]]) -> list[tuple[str, float]]:
    total = max(sum(size for _, size in columns), 1)
    return [(name, size / total) for name, size in columns]


_LIBRARY = f"""
```python
from storage.reader import Dataset  # Lectern: checks every byte, finds samples by id

dataset = Dataset.open("THIS FOLDER")
samples, targets = dataset.read(dataset.catalog.sample_ids[:8])
```

`{INFO_KEY}` says in full what the targets were made with; `lectern verify` checks all of it.
"""
_LOADING = {
    "plain": f"""The data files are plain Parquet.

```python
from datasets import load_dataset

rows = load_dataset("THIS FOLDER", split="train")
```
{_LIBRARY}"""
}
_PACKED = f"""The `target_*` columns are packed; `lectern export` gives a copy in plain Parquet.
{_LIBRARY}"""
