"""How hard each sample was for the teacher, read by itself."""

from pathlib import Path

import numpy as np
import pytest

from storage.difficulty import difficulty
from storage.errors import InputError, IntegrityError
from storage.object_store import Store
from storage.union import DatasetUnion
from tests.trainer.tiny import TinyRun, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_run(tmp_path_factory.mktemp("difficulty"), documents=20)


def test_it_is_what_the_rows_hold_in_any_order(run: TinyRun) -> None:
    union = DatasetUnion([run.dataset])
    ids = np.random.default_rng(0).permutation(run.dataset.catalog.sample_ids)
    for column in ("teacher_nll", "teacher_entropy"):
        _, targets = run.dataset.read(ids)
        np.testing.assert_array_equal(difficulty(union, ids, column), getattr(targets, column))
    assert len(set(difficulty(union, ids, "teacher_entropy").tolist())) > len(ids) // 2


def test_what_is_missing_or_damaged_is_told(run: TinyRun, tmp_path: Path) -> None:
    union = DatasetUnion([run.dataset])
    with pytest.raises(InputError, match=r"teacher_nll is not known of 1 of 2 samples in .*; run the capture"):
        difficulty(union, [bytes(16), run.dataset.catalog.sample_ids[0].tobytes()], "teacher_nll")
    copy, source = Store(tmp_path), Store(run.dataset_url)
    for key in source.list():
        copy.write(key, source.read(key))
    damaged = DatasetUnion.open([copy.url])
    for key in copy.list("data/"):
        copy.write(key, copy.read(key)[:-9] + bytes(9))
    with pytest.raises(IntegrityError, match=r"data/unit\d.* cannot be used"):
        difficulty(damaged, damaged.sample_ids(), "teacher_nll")
