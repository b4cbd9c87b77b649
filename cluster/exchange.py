"""The commands that let other tools in and out: `export` and `import`."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.commands import dataset_of
from cluster.figures import count, size
from cluster.loader import load_config
from cluster.progress import Progress
from cluster.terminal import Terminal
from storage.card import write_card
from storage.errors import InputError
from storage.export import export_dataset
from storage.importers.dataset import FORMATS, ImportResult, ImportSettings, import_dataset
from storage.reader import Dataset
from storage.tokenizer import Tokenizer

_SHOWN = 5


def export(out: Terminal, target: str, overrides: Sequence[str], run_dir: str | None, to: str) -> dict[str, Any]:
    """Copy a dataset into plain Parquet."""
    dataset = Dataset.open(dataset_of(out, target, overrides, run_dir)[0])
    with Progress(out.stream).task(f"Exporting {dataset.store.shown()}", "units") as task:
        found = export_dataset(dataset, to, task.update)
    out.say(
        f"{found.samples:,} samples, {found.tokens:,} tokens, {size(found.bytes)} of plain Parquet in {found.url}/data "
        f"({found.new_units} of {found.units} units written now)"
    )
    return asdict(found)


def import_cache(
    out: Terminal,
    target: str,
    overrides: Sequence[str],
    settings: ImportSettings,
    file_format: str,
    tokenizer: str | None,
) -> dict[str, Any]:
    """Read another tool's cache into a dataset; a config as the target names its place, teacher and tokenizer."""
    if file_format not in FORMATS:
        raise InputError(f"--format {file_format!r} is not known; there is {', '.join(FORMATS)}")
    url, folder = target, tokenizer
    if target.endswith((".yaml", ".yml")):
        config = load_config(target, overrides)
        url = config.cache.url
        folder = tokenizer or (None if config.teacher.name == "embedded" else config.teacher.name)
    if folder is None:
        raise InputError("--tokenizer is missing; name the folder or hub name whose tokenizer the teacher has")
    from workers.model_folder import resolve_model

    own = Tokenizer.load(folder if Path(folder).is_dir() else resolve_model(folder, weights=False))
    with Progress(out.stream).task(f"Importing {settings.url}", "rows") as task:
        found = import_dataset(settings, own, url, lambda rows: task.update(rows))
    write_card(Dataset.open(url))
    _tell(out, found, url)
    return asdict(found)


def _tell(out: Terminal, found: ImportResult, url: str) -> None:
    for line in found.bad_rows[:_SHOWN]:
        out.say(f"  left out: {line}")
    if len(found.bad_rows) > _SHOWN:
        out.say(f"  … and {len(found.bad_rows) - _SHOWN} more")
    left_out = {"out of contract": len(found.bad_rows), "repeated": found.repeated_rows, "empty": found.empty_rows}
    without = ", ".join(f"{number} {why}" for why, number in left_out.items() if number)
    out.say(
        f"{found.rows:,} rows read{f', without {without}' if without else ''}: {found.samples:,} samples, "
        f"{count(found.supervised)} supervised tokens in {url} ({found.new_units} of {found.units} units written now)"
    )
