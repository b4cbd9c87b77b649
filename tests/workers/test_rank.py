"""A rank in this process: batches that run out of memory, and units that are there already."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from storage.errors import WorkerError
from storage.reader import Dataset
from storage.writer import DatasetWriter
from tests.workers.conftest import TinyRun
from tests.workers.tiny import tiny_model
from workers.config import TeacherConfig
from workers.local.base_rank import BatchTooLargeError, RankPlace
from workers.local.rank import CaptureJob, Rank, scoring_settings
from workers.model_folder import teacher_identity
from workers.units import WorkUnit, plan_units


class SmallMemory(nn.Module):
    """A model on a device that holds so many tokens at once."""

    def __init__(self, model: nn.Module, most_tokens: int) -> None:
        super().__init__()
        self.model, self.most_tokens, self.calls = model, most_tokens, 0

    def forward(self, input_ids: torch.Tensor, **rest: Any) -> Any:
        self.calls += 1
        if input_ids.numel() > self.most_tokens:
            raise torch.OutOfMemoryError(f"tried to allocate {input_ids.numel()} tokens")
        return self.model(input_ids=input_ids, **rest)


def small_rank(run: TinyRun, name: str, most_tokens: int) -> tuple[Rank, list[WorkUnit]]:
    """Return a loaded rank that writes into a dataset of its own, and its units."""
    folder = run.model("qwen2", 64)
    teacher = TeacherConfig(name=str(folder), dtype="float32", sharding="none", batch_tokens=800)
    cache = run.cache(name)
    identity = teacher_identity(folder, teacher, cache, run.tokenizer, uses_chat_template=False)
    rank = Rank()
    rank.job = CaptureJob(teacher, folder, run.samples.url, cache.url, identity)
    rank.place = RankPlace(0, 1, 0, 1, "", 0, "cpu", 1)
    rank.device = torch.device("cpu")
    vocab_size = run.tokenizer.vocab_size + 8
    rank.model = SmallMemory(tiny_model("qwen2", width=64, vocab_size=vocab_size), most_tokens)
    rank.settings = scoring_settings(rank.job)
    rank.samples = run.samples
    rank.writer = DatasetWriter.create(cache.url, identity)
    rows = run.samples.rows()
    units = plan_units(rows, run.samples.num_tokens, run.samples.sample_ids, identity.fingerprint, 1600)
    return rank, list(units)


def test_batches_are_halved_until_they_fit_and_stay_so(tiny_run: TinyRun) -> None:
    rank, units = small_rank(tiny_run, "oom", most_tokens=250)
    receipts = []
    for unit in units[:2]:
        assert rank.score(unit) == []
        receipts.append(rank.commit(unit, "a1"))
    assert [receipt.batch_tokens for receipt in receipts] == [200, 200], "800, 400 ran out of memory"
    calls = rank.model.calls
    rank.score(units[2])
    assert rank.settings.batch_tokens == 200
    assert rank.model.calls - calls >= 7, "no batch was tried that failed before"
    assert all(receipt.padded_tokens >= unit.num_tokens for receipt, unit in zip(receipts, units, strict=False))
    assert rank.beat() > 10
    dataset = Dataset.open(rank.job.dataset_url)
    assert sorted(record.unit for record in dataset.manifests) == sorted(unit.unit_id for unit in units[:2])


def test_a_window_that_does_not_fit_alone_is_a_clear_error(tiny_run: TinyRun) -> None:
    rank, units = small_rank(tiny_run, "too-long", most_tokens=50)
    with pytest.raises(WorkerError, match=r"one window of 96 tokens runs out of memory.*shorten data\.window_tokens"):
        rank.score(units[0])


def test_several_ranks_leave_it_to_a_new_replica(tiny_run: TinyRun) -> None:
    rank, units = small_rank(tiny_run, "several", most_tokens=250)
    rank.place = replace(rank.place, num_ranks=2)
    rank._is_committed = lambda unit: False  # type: ignore[method-assign]
    with pytest.raises(BatchTooLargeError, match="a batch of 800 tokens"):
        rank.score(units[0])


def test_other_errors_pass(tiny_run: TinyRun) -> None:
    rank, units = small_rank(tiny_run, "other", most_tokens=10_000)
    rank.settings = replace(rank.settings, batch_tokens="many")
    with pytest.raises(TypeError):
        rank.score(units[0])


def test_a_unit_that_another_capture_committed_is_not_scored(tiny_run: TinyRun) -> None:
    rank, units = small_rank(tiny_run, "twice", most_tokens=10_000)
    rank.score(units[0])
    assert rank.commit(units[0], "a1").scored
    calls = rank.model.calls
    asked: list[str] = []
    committed = rank.writer.committed
    rank.writer.committed = lambda unit_id: asked.append(unit_id) or committed(unit_id)  # type: ignore[method-assign,func-returns-value]
    rank.score(units[0])
    receipt = rank.commit(units[0], "a2")
    assert asked == [units[0].unit_id], "the store is asked once"
    assert not receipt.scored and receipt.receipt.rows == len(units[0].rows)
    assert rank.model.calls == calls
