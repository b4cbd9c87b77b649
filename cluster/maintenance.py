"""The commands that keep a dataset small and tidy."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from cluster.commands import dataset_of
from cluster.figures import count
from cluster.terminal import Terminal
from storage import compaction
from storage.info import read_info
from storage.object_store import Store


def compact(out: Terminal, target: str, overrides: Sequence[str], run_dir: str | None) -> dict[str, Any]:
    """Fold the records of all units into one index."""
    store = Store(dataset_of(out, target, overrides, run_dir)[0])
    found = compaction.compact(store, read_info(store))
    done = f"{found.added} units added" if found.added else "nothing to add"
    out.say(f"index generation {found.generation}: {found.units} units, {count(found.samples)} samples; {done}")
    return asdict(found)


def drop(out: Terminal, url: str, units: Sequence[str]) -> None:
    """Take damaged units out of a dataset."""
    store = Store(url)
    compaction.drop_units(store, read_info(store), units)
    out.say(f"{len(units)} damaged units dropped; run the capture, which scores their samples again")
