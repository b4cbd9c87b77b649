"""Attention transfer against each document by itself, row by row."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from storage.errors import InputError
from storage.samples import SampleBatch
from storage.shard_source import Reading
from storage.targets import TargetBatch
from storage.union import DatasetUnion
from tests.trainer.test_student import fresh
from tests.trainer.tiny import QWEN2, TinyRun, made_up_attention, make_run
from trainer.batches import Batch, join_batches, make_batch
from trainer.config import StudentConfig
from trainer.feed import microbatch
from trainer.loss_config import LossConfig
from trainer.model import DistilModel
from trainer.student import prepare_student

LOSS = LossConfig(kl=0.4, ce=0.1, attention=0.5, attention_map={"a": "model.layers.1", "b": "model.layers.0.self_attn"})


def with_attention(run: TinyRun, rows: slice, every: int = 1) -> tuple[SampleBatch, TargetBatch]:
    """Return samples with made-up teacher attention at one position in `every`."""
    samples, targets = run.dataset.read(run.dataset.catalog.sample_ids[rows])
    kept = np.arange(targets.num_positions) % every == 0
    return samples, replace(targets, hidden_kept=kept, **made_up_attention(samples, ("a", "b"), kept))


def student(run: TinyRun) -> Any:
    model = fresh(run, initializer_range=0.3)
    prepare_student(model, StudentConfig(config=QWEN2), LOSS)
    return model


def batch_of(run: TinyRun, rows: slice, every: int = 1) -> Batch:
    samples, targets = with_attention(run, rows, every)
    return make_batch(samples, targets, "hybrid", maps=("a", "b"))


def by_document(model: Any, samples: SampleBatch, targets: TargetBatch) -> float:
    """Return the distance from attention that the model computes for one document at a time."""
    total, at, p = 0.0, 0, 0
    assert targets.attention_count is not None
    for n in range(len(samples)):
        one = samples.sample(n)
        for document in range(int(one.document.max()) + 1):
            inside = one.document == document
            tokens = torch.from_numpy(one.tokens[inside].astype(np.int64))[None]
            with torch.no_grad():
                maps = model(tokens, output_attentions=True).attentions
            for i in np.flatnonzero(one.supervised[inside]):
                count = int(targets.attention_count[p])
                p += 1
                if not count:
                    continue
                assert count == i
                for layer, index in (("a", 1), ("b", 0)):
                    row = maps[index][0].mean(0)[i - 1, :i].double().numpy()
                    total += float(((row - targets.attention[layer][at : at + count].astype(np.float64)) ** 2).sum())
                at += count
    return total / 2


@pytest.mark.parametrize("every", [1, 3])
def test_rows_are_those_of_each_document_by_itself(hybrid_run: TinyRun, every: int) -> None:
    samples, targets = with_attention(hybrid_run, slice(0, 6), every)
    batch = make_batch(samples, targets, "hybrid", maps=("a", "b"))
    assert batch.attention is not None  # packed
    module = DistilModel(student(hybrid_run), LOSS, "fused", None, hidden_weight=float(every))
    total, terms = module(batch)
    expected = every * by_document(module.model, samples, targets)
    assert module.terms == ("ce", "kl", "hidden", "attention")
    assert float(terms[3]) == pytest.approx(expected, rel=1e-4)
    assert float(total) == pytest.approx(float(0.1 * terms[0] + 0.4 * terms[1] + 0.5 * terms[3]), rel=1e-5)
    assert module.weights() == {"ce": 0.1, "kl": 0.4, "hidden": 0.0, "attention": 0.5}


def test_the_gradient_leads_to_the_teachers_attention(hybrid_run: TinyRun) -> None:
    only = LOSS.model_copy(update={"kl": 0.0, "ce": 0.0})
    module, batch = DistilModel(student(hybrid_run), only, "fused", None), batch_of(hybrid_run, slice(0, 4))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    distances = []
    for _ in range(15):
        total, terms = module(batch)
        optimizer.zero_grad()
        (total / batch.num_supervised).backward()
        optimizer.step()
        distances.append(float(terms[3]))
    assert distances[-1] < 0.7 * distances[0]
    assert module.model.model.layers[1].self_attn.q_proj.weight.grad.abs().sum() > 0
    assert module.model.model.layers[1].mlp.up_proj.weight.grad is None or (
        module.model.model.layers[1].mlp.up_proj.weight.grad.abs().sum() == 0
    )


def test_the_dataset_hands_over_the_attention_that_the_loss_asks_for(tmp_path: Path) -> None:
    run = make_run(tmp_path, kind="topk", hidden=("final",), attention=("a", "b", "c"), documents=12)
    reading = Reading(layers=LOSS.attention_layers)
    dataset = DatasetUnion.open([run.dataset_url], run.identity, reading)
    ids = dataset.sample_ids()[:5]
    batch = microbatch(dataset.parts(ids), range(1, 5), LOSS)
    assert set(batch.maps) == {"a", "b"} and not batch.hidden
    samples, targets = run.dataset.read(ids[1:])
    assert set(targets.attention) == {"a", "b", "c"}
    module = DistilModel(student(run), LOSS, "fused", None)
    assert float(module(batch)[1][3]) == pytest.approx(by_document(module.model, samples, targets), rel=1e-4)


def test_splitting_and_joining_batches_change_nothing(hybrid_run: TinyRun) -> None:
    samples, targets = with_attention(hybrid_run, slice(0, 6))
    whole = make_batch(samples, targets, "hybrid", maps=("a", "b"))
    parts = [
        make_batch(samples.take(list(rows)), targets.take(list(rows)), "hybrid", maps=("a", "b"))
        for rows in (range(1), range(1, 4), range(4, 6))
    ]
    found = []
    for batches in ([whole], [join_batches(parts)], parts):
        module = DistilModel(student(hybrid_run), LOSS, "fused", None)
        terms = torch.zeros(4)
        for batch in batches:
            total, each = module(batch)
            total.backward()
            terms += each
        found.append((terms, torch.cat([parameter.grad.flatten() for parameter in module.parameters()])))
    for terms, gradient in found[1:]:
        torch.testing.assert_close(terms, found[0][0], rtol=1e-5, atol=1e-5)
        assert float((gradient - found[0][1]).norm() / found[0][1].norm()) < 1e-5


def test_what_cannot_be_compared_is_refused(hybrid_run: TinyRun) -> None:
    wrong = LOSS.model_copy(update={"attention_map": {"a": "model.norm"}})
    with pytest.raises(InputError, match=r"the student has no attention in 'model.norm'; .* may name model.layers.0"):
        prepare_student(fresh(hybrid_run), StudentConfig(config=QWEN2), wrong)
    with pytest.raises(ValidationError, match=r"attention is positive but train.loss.attention_map names no layers"):
        LossConfig(attention=0.1)
    # Nothing of it is told where it is not asked for, so that the facts of older runs stay theirs.
    assert not {"attention", "attention_map"} & set(LossConfig().model_dump())
