"""A dataset against its teacher, run twice; the teacher runs in this process."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from storage.errors import InputError
from storage.identity import DatasetIdentity
from storage.object_store import Store
from storage.reader import Dataset
from storage.targets import TargetBatch
from storage.writer import DatasetWriter
from tests.workers.conftest import TinyRun
from tests.workers.here import capture_here
from workers import rescoring
from workers.config import TeacherConfig
from workers.model_folder import teacher_identity
from workers.rescoring import Rescoring, chosen_rows, rescore


def captured(run: TinyRun, name: str, dtype: str, shift: float = 0.0) -> tuple[TeacherConfig, DatasetIdentity, Dataset]:
    """Capture all samples; `shift` moves log-probability from the drawn tail entries to the best one."""
    folder = run.model("qwen2", 64, spread=0.1)
    teacher = TeacherConfig(name=str(folder), dtype=dtype, sharding="none", batch_tokens=1024)
    cache = run.cache(f"{name}-true", kind="topk")
    identity = teacher_identity(folder, teacher, cache, run.tokenizer, uses_chat_template=False)
    if not Store(cache.url).list():
        capture_here(teacher, cache, folder, run.samples, run.samples.rows(), identity)
    dataset = Dataset.open(cache.url, identity)
    if shift:
        samples, targets = dataset.read(run.samples.ids(run.samples.rows()))
        writer = DatasetWriter.create(run.cache(f"{name}-moved").url, identity)
        writer.commit("u", samples, moved(targets, shift), "a1")
        dataset = Dataset.open(writer.store.url, identity)
    return teacher, identity, dataset


def moved(targets: TargetBatch, shift: float) -> TargetBatch:
    lowered = targets.logprob.astype(np.float32) - shift
    kept = np.add.reduceat(np.exp(lowered), targets.entry_offsets[:-1])
    return replace(targets, logprob=lowered.astype(np.float16), tail_mass=(1 - kept).astype(np.float16))


def scored_again(run: TinyRun, name: str, dtype: str, shift: float = 0.0) -> Rescoring:
    teacher, _, dataset = captured(run, name, dtype, shift)
    rows = chosen_rows(run.samples, run.samples.rows(), dataset, 12)
    assert len(rows) == 12
    scratch = run.folder / "scratch"
    folder = Path(teacher.name)
    found = rescore(teacher, run.cache("unused", kind="topk"), folder, run.samples, rows, dataset, str(scratch))
    assert Store(scratch).list() == []
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dataset_is_within_the_teachers_own_arithmetic(
    tiny_run: TinyRun, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.scratch.capture", capture_here)
    found = scored_again(tiny_run, dtype, dtype)
    assert found.ok and found.samples == 12 and found.difference.compared > 1000
    assert found.limit >= found.bound == rescoring.BOUND
    if dtype == "float32":
        assert found.difference.spread.p99 < 5e-3 and found.control.spread.p99 < 5e-3
        assert found.difference.top1_agreement is not None and found.difference.top1_agreement > 0.99
    assert set(found.to_json()) == {"samples", "difference", "control", "bound", "limit", "ok"}


def test_targets_that_are_not_the_teachers_are_found(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.scratch.capture", capture_here)
    found = scored_again(tiny_run, "float32", "float32", shift=0.3)
    assert not found.ok
    assert found.difference.spread.p50 == pytest.approx(0.3, abs=0.02) and found.control.spread.p99 < 5e-3


def test_a_dataset_without_these_samples_is_refused(tiny_run: TinyRun) -> None:
    _, identity, _ = captured(tiny_run, "float32", "float32")
    empty = DatasetWriter.create(tiny_run.cache("empty").url, identity)
    with pytest.raises(InputError, match="holds no sample of this config"):
        chosen_rows(tiny_run.samples, tiny_run.samples.rows(), Dataset.open(empty.store.url), 3)
