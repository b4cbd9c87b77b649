"""A projection fitted to a real teacher's states, and a capture with it; the teacher runs in this process."""

import numpy as np
import pytest

from storage.errors import InputError
from storage.hidden import read_states
from storage.object_store import Store
from storage.projection import load_projection
from storage.reader import Dataset
from storage.verify import verify_dataset
from tests.workers.conftest import TinyRun
from tests.workers.here import capture_here
from workers.config import TeacherConfig
from workers.model_folder import teacher_identity
from workers.projection import fit_teacher_projection, fitting_rows


def test_states_are_stored_in_the_fitted_dimensions(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.scratch.capture", capture_here)
    folder = tiny_run.model("qwen2", 64)
    teacher = TeacherConfig(name=str(folder), dtype="float32", sharding="none")
    kept = {"hidden": ["final"], "hidden_dtype": "float32"}
    cache = tiny_run.cache("projected-here", hidden_projection=24, hidden_every=2, **kept)
    asked = teacher_identity(folder, teacher, cache, tiny_run.tokenizer, uses_chat_template=False)
    assert asked.capture.projection is None
    rows = tiny_run.samples.rows()
    fitted = fit_teacher_projection(teacher, cache, folder, tiny_run.samples, rows, asked)
    again = fit_teacher_projection(teacher, cache, folder, tiny_run.samples, rows[::-1], asked)
    assert fitted.fingerprint == again.fingerprint != asked.fingerprint
    store = Store(cache.url)
    assert store.list() == [f"projections/{fitted.capture.projection}.safetensors"]
    capture_here(teacher, cache, folder, tiny_run.samples, rows, fitted)
    assert teacher_identity(folder, teacher, cache, tiny_run.tokenizer, False).fingerprint == fitted.fingerprint
    whole = tiny_run.cache("whole-here", **kept)
    identity = teacher_identity(folder, teacher, whole, tiny_run.tokenizer, uses_chat_template=False)
    capture_here(teacher, whole, folder, tiny_run.samples, rows, identity)
    ids = tiny_run.samples.ids(rows)
    states = read_states(Dataset.open(whole.url, identity).read(ids)[1].hidden["final"])
    targets = Dataset.open(cache.url, fitted).read(ids)[1]
    assert fitted.capture.projection is not None and targets.hidden_kept is not None
    found = load_projection(store, fitted.capture.projection)
    restored = found.restore("final", read_states(targets.hidden["final"]))
    states = states[targets.hidden_kept]
    lost = float(((restored - states) ** 2).sum() / ((states - found.mean["final"]) ** 2).sum())
    assert 0 < lost < 0.8 and lost == pytest.approx(found.loss["final"], rel=0.2)
    store.delete(store.list("projections/")[0])
    assert any("without it the hidden states cannot be read" in line for line in verify_dataset(cache.url).problems)


def test_rows_to_fit_to_are_the_same_for_any_order_and_enough(tiny_run: TinyRun) -> None:
    rows, samples = tiny_run.samples.rows(), tiny_run.samples
    chosen = fitting_rows(samples, rows, 500)
    np.testing.assert_array_equal(fitting_rows(samples, rows[::-1], 500), chosen)
    assert 500 <= samples.num_supervised[chosen].sum() < 500 + samples.num_supervised.max()
    np.testing.assert_array_equal(fitting_rows(samples, rows, 10**9), rows)


def test_a_width_beyond_the_teachers_is_refused_and_leaves_nothing(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.scratch.capture", capture_here)
    folder = tiny_run.model("qwen2", 64)
    teacher = TeacherConfig(name=str(folder), dtype="float32", sharding="none")
    cache = tiny_run.cache("too-wide", hidden=["final"], hidden_projection=64)
    asked = teacher_identity(folder, teacher, cache, tiny_run.tokenizer, uses_chat_template=False)
    with pytest.raises(InputError, match="hidden_projection 64: the layer final is 64 wide"):
        fit_teacher_projection(teacher, cache, folder, tiny_run.samples, tiny_run.samples.rows(), asked)
    assert Store(cache.url).list() == []
