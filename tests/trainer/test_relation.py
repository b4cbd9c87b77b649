"""Relations between positions against float64, one document at a time, and within the whole module."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from storage.errors import InputError
from tests.trainer.tiny import QWEN2, TinyRun
from trainer.anatomy import Anatomy
from trainer.assembly import require_heads
from trainer.batches import make_batch, position_groups
from trainer.config import StudentConfig
from trainer.loss_config import LossConfig
from trainer.losses.relation import relation_distance
from trainer.model import DistilModel
from trainer.student import build_student

LOSS = LossConfig(
    kl=0.5, ce=0.0, relation=2.0, relation_heads=4,
    relation_map={"final": "final", "model.layers.1": "model.layers.0.self_attn.v_proj"},
)  # fmt: skip


def plain(student: torch.Tensor, teacher: torch.Tensor, heads: int) -> torch.Tensor:
    """The distance of one document's states, summed over positions; float64."""
    total = torch.zeros((), dtype=torch.float64)
    for mine, other in zip(student.chunk(heads, -1), teacher.chunk(heads, -1), strict=True):
        s, t = (torch.softmax(a @ a.T / a.shape[-1] ** 0.5, -1) for a in (mine, other))
        total = total + (t * (t / s).log()).sum()
    return total / heads


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("every", [1, 2])
def test_value_and_gradient_are_those_of_single_documents_in_float64(heads: int, every: int) -> None:
    torch.manual_seed(0)
    # Two samples, the second with two documents; of one document a single position is kept.
    group = torch.tensor([[0, 0]] * 5 + [[3, 1]] * 2 + [[3, 2]] * 3)
    rows = None if every == 1 else torch.arange(0, 10, 2)
    student = {"a": torch.randn(10, 8, requires_grad=True), "b": torch.randn(10, 4, requires_grad=True)}
    kept = torch.arange(10) if rows is None else rows
    teacher = {"a": torch.randn(len(kept), 12), "b": torch.randn(len(kept), 4).half()}
    found = relation_distance(student, teacher, heads, group, rows, float(every))
    found.backward()
    double = {name: states.detach().double().requires_grad_() for name, states in student.items()}
    expected = torch.zeros((), dtype=torch.float64)
    for name in student:
        for key in group.unique(dim=0):
            inside = (group[kept] == key).all(1)
            expected = expected + plain(double[name][kept[inside]], teacher[name][inside].double(), heads)
    (expected * every / 2).backward()
    torch.testing.assert_close(found.double(), expected * every / 2, rtol=1e-5, atol=1e-6)
    for name in student:
        torch.testing.assert_close(student[name].grad.double(), double[name].grad, rtol=1e-4, atol=1e-6)


def test_positions_are_grouped_by_sample_and_document(hidden_run: TinyRun) -> None:
    samples, targets = hidden_run.dataset.read(hidden_run.dataset.catalog.sample_ids[:5])
    batch = make_batch(samples, targets, "topk")
    assert batch.position_ids is not None
    sample = np.repeat(np.arange(5), samples.lengths())[samples.supervised]
    document = samples.document[samples.supervised]
    groups = [tuple(pair) for pair in position_groups(batch).tolist()]
    pairs = list(zip(sample.tolist(), document.tolist(), strict=True))
    for n, m in np.random.default_rng(0).integers(0, len(pairs), (200, 2)):
        assert (groups[n] == groups[m]) == (pairs[n] == pairs[m])
    plain = position_groups(replace(batch, position_ids=None))
    assert plain[:, 0].tolist() == sample.tolist() and not plain[:, 1].any()


@pytest.mark.parametrize("path", ["fused", "model"])
def test_a_split_of_the_batch_changes_neither_the_term_nor_its_gradient(hidden_run: TinyRun, path: str) -> None:
    ids, found = hidden_run.dataset.catalog.sample_ids[:4], []
    for size in (4, 1):
        config = StudentConfig(config={**QWEN2, "initializer_range": 0.3})
        module = DistilModel(build_student(config, None, hidden_run.identity), LOSS, path, None)
        sums = torch.zeros(4)
        for first in range(0, 4, size):
            samples, targets = hidden_run.dataset.read(ids[first : first + size])
            total, terms = module(make_batch(samples, targets, "topk", LOSS.layers))
            total.backward()
            sums += terms
        gradient = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
        found.append((sums, gradient))
    assert module.terms == ("ce", "kl", "hidden", "relation") and sums[3] > 0
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)
    assert float((found[0][1] - found[1][1]).norm() / found[0][1].norm()) < 1e-4


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"relation is positive but train\.loss\.relation_map names no layers"):
        LossConfig(relation=0.1)
    assert not {"relation", "relation_map", "relation_heads"} & set(LossConfig().model_dump())
    widths = {"final": 32, "model.layers.0.self_attn.v_proj": 16}
    require_heads(LOSS, Anatomy("fused", widths), {"final": 24, "model.layers.1": 24})
    with pytest.raises(InputError, match=r"relation_heads 4 does not divide .*\(30\) .*\(32\); .* divisor of 2"):
        require_heads(LOSS, Anatomy("fused", widths), {"final": 30, "model.layers.1": 24})
