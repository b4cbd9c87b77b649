"""Random damage to a dataset's files, for the tests and `benchmarks/commit.py`."""

import random
import shutil
from pathlib import Path

from storage.compaction import compact
from storage.errors import LecternError
from storage.gc import collect_garbage
from storage.info import read_info
from storage.object_store import Store
from storage.reader import Dataset
from storage.verify import verify_dataset
from storage.writer import DatasetWriter
from tests.storage.conftest import build_identity, build_unit

KINDS = ["flip", "flip", "flip", "truncate", "extend", "zero", "swap", "rename", "foreign", "missing"]


def build_sound(top: Path) -> Path:
    """Make a dataset with every kind of object, and one of another identity beside it; return the first.

    u0 and u1 are in two indexes and their manifests are swept, u2 is in one, u3 is in none.
    """
    for name, weights in (("dataset", "ab" * 32), ("foreign", "00" * 32)):
        identity = build_identity(vocab_size=60, weights=weights)
        url = top / name
        writer = DatasetWriter.create(str(url), identity)
        info = read_info(Store(url))
        for n in range(4):
            writer.commit(f"u{n}", *build_unit(identity, 2, n), attempt="a")
            if n in {1, 2}:
                compact(Store(url), info)
        collect_garbage(Store(url), info, -60)
    return top / "dataset"


def do_damage(dataset: Path, foreign: Path, rng: random.Random) -> str:
    """Damage one thing at random and say what: `kind key`."""
    files = sorted(path for path in dataset.rglob("*") if path.is_file())
    target = rng.choice(files)
    raw = bytearray(target.read_bytes())
    kind = rng.choice(KINDS)
    if kind == "flip":
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    elif kind == "truncate":
        del raw[rng.randrange(len(raw)) :]
    elif kind == "extend":
        raw += rng.randbytes(rng.randrange(1, 20))
    elif kind == "zero":
        at = rng.randrange(len(raw))
        raw[at : at + 16] = bytes(len(raw[at : at + 16]))
        if raw == target.read_bytes():
            raw[at] ^= 255
    elif kind == "swap":
        twins = [path for path in files if path.parent == target.parent and path != target]
        if twins:
            other = rng.choice(twins)
            swapped = other.read_bytes()
            other.write_bytes(raw)
            raw = bytearray(swapped)
        else:
            raw[0] ^= 1
    elif kind == "foreign":
        folder = foreign / target.relative_to(dataset).parent
        alike = [path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix == target.suffix]
        raw = bytearray(rng.choice(alike).read_bytes())
    if kind not in {"rename", "missing"}:
        target.write_bytes(raw)
    elif target.suffix == ".json" and target.parent != dataset:
        # A record that is gone without a trace makes its units missing, and they are captured again: no damage.
        target.rename(target.with_name(rng.choice(_OTHER_NAMES[target.parent.name])))
    else:
        target.unlink()
    return f"{kind} {target.relative_to(dataset).as_posix()}"


_OTHER_NAMES = {"manifest": ["u7.json", "u3.json.bak", "copy of u3.json"], "index": ["00000007.json", "00000003.json"]}


def found_by_reader(url: Path) -> bool:
    """Tell whether opening and reading everything fails."""
    try:
        dataset = Dataset.open(str(url))
        dataset.read(dataset.catalog.sample_ids)
    except LecternError:
        return True
    return False


def found_by_verify(url: Path) -> bool:
    """Tell whether verify finds a problem."""
    try:
        return not verify_dataset(str(url)).ok
    except LecternError:
        return True


def rows_of(url: Path) -> dict[bytes, bytes]:
    """Return all values of each sample, as bytes."""
    dataset = Dataset.open(str(url))
    rows = {}
    for sample_id in dataset.catalog.sample_ids:
        samples, targets = dataset.read([sample_id.tobytes()])
        values = [samples.tokens, samples.supervised, targets.count, targets.id, targets.logprob, targets.tail_mass]
        rows[sample_id.tobytes()] = b"".join(value.tobytes() for value in values)
    return rows


def damage_trial(sound: Path, copy: Path, truth: dict[bytes, bytes], seed: int) -> tuple[str, str, bool]:
    """Damage a copy; return what was done, what the reader made of it, and whether verify found it.

    The reader's outcome is `found`, `unaffected` (every row is there and right: the damage lies in a spare copy of a
    record) or `wrong`.
    """
    shutil.copytree(sound, copy)
    try:
        what = do_damage(copy, sound.parent / "foreign", random.Random(seed))
        outcome = "found"
        if not found_by_reader(copy):
            outcome = "unaffected" if rows_of(copy) == truth else "wrong"
        return what, outcome, found_by_verify(copy)
    finally:
        shutil.rmtree(copy)
