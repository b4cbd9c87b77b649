"""Checkpoints: what is in one, when one is whole, and which one a run resumes from.

A checkpoint is a folder that all ranks write into: DeepSpeed's own files below `state/`, one `rank-N.json` each with
the sizes of what that rank wrote, its random state, and `lectern.json` with the position of the run. DeepSpeed's
files are pickled tensors: they are read back only from the run's own folder, and nothing else is.
"""

import json
import shutil
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file

from storage.errors import IntegrityError
from storage.object_store import Store
from trainer.engine import Place
from trainer.reshard import group_settings, is_partitioned, mend_optimizer, universal_folder

STATE_TAG = "state"
POSITION_FILE = "lectern.json"
SNAPSHOT_FILE = "checkpoint_manager_snapshot.json"
"""Ray Train's own list of checkpoints; not replaced atomically, so a killed controller can leave half of it."""


@dataclass(frozen=True)
class Position:
    """Where a run stands after `step` optimizer steps."""

    step: int
    digest: str
    """Hex running digest of the sample ids consumed so far."""
    tokens: int
    seconds: float
    waited_s: float
    world_size: int
    config: dict[str, Any]
    """What the run depends on; see `result.run_facts`."""
    mixing: list[dict[str, Any]] = field(default_factory=list)
    """What an adaptive curriculum has decided so far; see `mixing.Decision`."""
    own_tokens: int = 0
    """`tokens` as the student's own tokenizer counts them."""
    gradients: dict[str, float] = field(default_factory=dict)
    """Measured gradients of the terms; see `losses.balance.GradientBalance.squares`."""

    def to_json(self) -> str:
        """Return the file's text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read the file's text; raises IntegrityError when it is damaged."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise IntegrityError(
                f"a checkpoint's {POSITION_FILE} is damaged ({error}); delete that checkpoint and run again"
            ) from error


def save(engine: Any, folder: Path, rank: int, position: Position) -> None:
    """Write this rank's part of a checkpoint into an empty folder. Collective."""
    (folder / STATE_TAG).mkdir(parents=True, exist_ok=True)
    engine.save_checkpoint(str(folder), tag=STATE_TAG, save_latest=False)
    save_file(_random_state(), folder / f"random-{rank}.safetensors")
    if rank == 0:
        (folder / POSITION_FILE).write_text(position.to_json())
    files = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    (folder / f"rank-{rank}.json").write_text(json.dumps(files))


def read_position(folder: Path) -> Position:
    """Return where the run stood that wrote a checkpoint."""
    return Position.from_json((folder / POSITION_FILE).read_bytes())


def needs_universal(folder: Path, world_size: int) -> bool:
    """Tell whether a checkpoint was written by another number of ranks, in parts of which this one has none."""
    return read_position(folder).world_size != world_size and is_partitioned(folder / STATE_TAG)


def load(engine: Any, folder: Path, place: Place, seed: int) -> Position:
    """Put an engine and the random generators back to a checkpoint. Collective.

    Other numbers of ranks than wrote it go on with the same weights, optimizer states and samples; what is drawn at
    random, such as dropout, then comes from `seed` and the step. The engine must have been started accordingly, see
    `needs_universal`.
    """
    position = read_position(folder)
    if needs_universal(folder, place.world_size):
        settings = group_settings(engine)
        with universal_folder(folder, STATE_TAG, place) as converted:
            _load_state(engine, converted)
        mend_optimizer(engine, settings)
    else:
        _load_state(engine, folder)
    if position.world_size == place.world_size:
        state = load_file(folder / f"random-{place.rank}.safetensors")
        torch.set_rng_state(state["cpu"])
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"])
    else:
        torch.manual_seed(random_seed(seed, position.step, place.world_size, place.rank))
    return replace(position, world_size=place.world_size)


def _load_state(engine: Any, folder: Path) -> None:
    path, _ = engine.load_checkpoint(str(folder), tag=STATE_TAG)
    if path is None:
        raise IntegrityError(f"DeepSpeed found no state in checkpoint {folder}; delete it and run again")


def random_seed(*key: int) -> int:
    """Return a seed that depends on `key` alone."""
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=7).digest(), "little")


def newest(store: Store) -> tuple[str, Position] | None:
    """Return name and position of the furthest whole checkpoint below `store`, or none.

    A checkpoint whose ranks' files are missing or short was cut off by a crash and does not count.
    """
    folders: dict[str, list[str]] = {}
    for key in store.list("checkpoint_"):
        folders.setdefault(key.split("/", 1)[0], []).append(key)
    found = [(name, position) for name, keys in folders.items() if (position := _whole(store, name, keys)) is not None]
    return max(found, key=lambda pair: (pair[1].step, pair[0]), default=None)


def keep_only(store: Store, name: str | None) -> None:
    """Delete all checkpoints but `name`, and Ray Train's list of them."""
    store.delete(SNAPSHOT_FILE)
    for key in store.list("checkpoint_"):
        if key.split("/", 1)[0] != name:
            store.delete(key)
    if store.is_local:
        for folder in Path(store.url).glob("checkpoint_*"):
            if folder.name != name:
                shutil.rmtree(folder, ignore_errors=True)


def _whole(store: Store, name: str, keys: list[str]) -> Position | None:
    have = set(keys)
    if f"{name}/{POSITION_FILE}" not in have:
        return None
    try:
        position = Position.from_json(store.read(f"{name}/{POSITION_FILE}"))
    except IntegrityError:
        return None
    for rank in range(position.world_size):
        if f"{name}/rank-{rank}.json" not in have:
            return None
        try:
            files = json.loads(store.read(f"{name}/rank-{rank}.json"))
        except ValueError:
            return None
        if any(f"{name}/{file}" not in have or store.size(f"{name}/{file}") != size for file, size in files.items()):
            return None
    return position


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state
