"""The commands that keep a dataset small and tidy."""

import contextlib
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from cluster.commands import dataset_of
from cluster.figures import count, size
from cluster.terminal import Terminal
from storage import compaction
from storage.card import write_card
from storage.errors import InputError
from storage.gc import collect_garbage
from storage.info import read_info
from storage.lease import write_access
from storage.object_store import Store
from storage.reader import Dataset

_SHOWN = 20


def compact(out: Terminal, target: str, overrides: Sequence[str], run_dir: str | None) -> dict[str, Any]:
    """Fold the records of all units into one index."""
    store = Store(dataset_of(out, target, overrides, run_dir)[0])
    info = read_info(store)
    with write_access(store):
        found = compaction.compact(store, info)
    done = f"{found.added} units added" if found.added else "nothing to add"
    write_card(Dataset.open(store.url))
    out.say(f"index generation {found.generation}: {found.units} units, {count(found.samples)} samples; {done}")
    return asdict(found)


def gc(
    out: Terminal, target: str, overrides: Sequence[str], run_dir: str | None, older_than: str, dry_run: bool
) -> dict[str, Any]:
    """Remove what is older than an age and belongs to no dataset."""
    age_s = seconds(older_than)
    store = Store(dataset_of(out, target, overrides, run_dir)[0])
    info = read_info(store)
    with contextlib.nullcontext() if dry_run else write_access(store):
        found = collect_garbage(store, info, age_s, dry_run)
    for item in found.removed[:_SHOWN]:
        out.say(f"{'would remove' if dry_run else 'removed'} {item.key} ({item.reason}, {size(item.bytes)})")
    if len(found.removed) > _SHOWN:
        out.say(f"… and {len(found.removed) - _SHOWN} more")
    for reason, (number, num_bytes) in found.totals().items():
        out.say(f"{reason}: {number} objects, {size(num_bytes)}")
    done = "would be removed, nothing was" if dry_run else "removed"
    out.say(
        f"{len(found.removed)} objects, {size(found.bytes)}, older than {older_than} {done}; {found.num_young} younger "
        "ones left alone"
    )
    return found.to_json()


def seconds(age: str) -> float:
    """Return the seconds of an age such as 90m, 24h or 7d; InputError when it is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", age.strip())
    if match is None:
        raise InputError(f"--older-than {age!r} is no age; write a number and s, m, h or d, e.g. 24h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86_400}[match[2]]


def drop(out: Terminal, url: str, units: Sequence[str]) -> None:
    """Take damaged units out of a dataset."""
    store = Store(url)
    with write_access(store):
        compaction.drop_units(store, read_info(store), units)
    out.say(f"{len(units)} damaged units dropped; run the capture, which scores their samples again")
