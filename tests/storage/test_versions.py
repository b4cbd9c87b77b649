"""Schema versions: what the first release wrote is read and continued as it is, and new fields change nothing old.

`golden/version1` was written by release 0.1.0: units u0 and u1 of `build_unit(identity, 3, seed)` for seeds 0 and 1.
"""

import shutil
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest

from storage.errors import IdentityError
from storage.identity import DatasetIdentity, require_same
from storage.info import INFO_KEY, SCHEMA_VERSION, DatasetInfo, read_info
from storage.manifest import ManifestRecord
from storage.object_store import Store
from storage.reader import Dataset
from storage.schema import FileMetadata
from storage.settings import added
from storage.verify import verify_dataset
from storage.writer import DatasetWriter

GOLDEN = Path(__file__).parent / "golden" / "version1"
FINGERPRINT = "087ea1321a590954ea8bb52d0feb8631"
ROWS = "30a321381831ef808fd7dbad1a497428"


class WiderIdentity(DatasetIdentity):
    """What a later release may make of the identity."""

    rank: int | None = added(None)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Return a copy of the dataset that release 0.1.0 wrote."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "dataset"))


@pytest.fixture
def identity(make_identity: Callable[..., DatasetIdentity]) -> DatasetIdentity:
    """Return its identity as this release makes it from the same settings."""
    return make_identity(vocab_size=60, hidden=["final"])


def _digest(url: Path) -> str:
    """Return a hash over every value of every row that version 1 knows."""
    dataset = Dataset.open(str(url))
    samples, targets = dataset.read(dataset.catalog.sample_ids)
    values = [samples.sample_id, samples.offsets, samples.tokens, samples.supervised, samples.document]
    values += [targets.offsets, targets.count, targets.id, targets.logprob, targets.draws, targets.tail_mass]
    values += [targets.teacher_nll, targets.teacher_entropy, targets.hidden["final"]]
    digest = blake2b(repr(list(samples.source)).encode(), digest_size=16)
    for value in values:
        digest.update(str(value.dtype).encode() + value.tobytes())
    return digest.hexdigest()


def test_version_1_is_read_value_for_value(identity: DatasetIdentity) -> None:
    dataset = Dataset.open(str(GOLDEN), identity)
    assert (dataset.info.schema_version, dataset.info.created_by) == (1, "lectern 0.1.0")
    assert dataset.info.fingerprint == identity.fingerprint == FINGERPRINT
    assert verify_dataset(str(GOLDEN)).ok
    assert _digest(GOLDEN) == ROWS


def test_version_1_is_continued_and_stays_readable_by_its_release(
    dataset: Path, identity: DatasetIdentity, make_unit: Callable[..., Any]
) -> None:
    before = {path: path.read_bytes() for path in dataset.rglob("*") if path.is_file()}
    writer = DatasetWriter.create(str(dataset), identity)
    assert not writer.commit("u0", *make_unit(identity, 3, 0), attempt=2).committed
    assert writer.commit("u2", *make_unit(identity, 3, 2), attempt=1).committed
    assert len(Dataset.open(str(dataset), identity).manifests) == 3
    assert all(path.read_bytes() == raw for path, raw in before.items())


def test_new_datasets_state_the_new_version(tmp_path: Path, identity: DatasetIdentity) -> None:
    DatasetWriter.create(str(tmp_path), identity)
    info = read_info(Store(tmp_path))
    assert (info.schema_version, info.fingerprint) == (SCHEMA_VERSION, FINGERPRINT)


def test_stored_models_write_what_version_1_wrote() -> None:
    assert (
        DatasetInfo.model_validate_json((GOLDEN / INFO_KEY).read_bytes()).to_json() == (GOLDEN / INFO_KEY).read_bytes()
    )
    raw = (GOLDEN / "manifest" / "u0.json").read_bytes()
    assert ManifestRecord.model_validate_json(raw).to_json() == raw
    metadata = FileMetadata(schema_version=1, fingerprint="f", kind="topk", positions=1)
    assert set(metadata.model_dump()) == {"schema_version", "fingerprint", "kind", "positions", "hidden"}


def test_an_added_field_counts_only_where_it_is_used(identity: DatasetIdentity) -> None:
    neutral, used = (WiderIdentity.model_validate({**identity.model_dump(), "rank": rank}) for rank in (None, 4))
    assert neutral.fingerprint == identity.fingerprint
    assert used.fingerprint != identity.fingerprint
    with pytest.raises(IdentityError, match="rank is 4 there, None here"):
        require_same(neutral, used, "x")
