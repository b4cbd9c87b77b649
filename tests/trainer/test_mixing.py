"""Adaptive mixing: the rule, plans that change on the way, and losses on held-out samples."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from storage.errors import InputError
from tests.trainer.test_sampler import POOLS, ramp
from tests.trainer.tiny import QWEN2, TinyRun, train_config
from trainer.config import StudentConfig
from trainer.curriculum import planned_order
from trainer.curriculum_config import AdaptiveConfig, CurriculumConfig
from trainer.engine import Place
from trainer.evaluation import evaluate_model, evaluate_teacher
from trainer.loss_config import LossConfig
from trainer.mixing import Mixer, apply, heldout_ids, next_shares, segments
from trainer.model import DistilModel
from trainer.sampler import PlannedOrder
from trainer.student import build_student


def test_shares_follow_the_ratio_of_perplexities() -> None:
    shares, student, teacher = np.array([0.5, 0.3, 0.2]), np.array([2.0, 3.0, 2.5]), np.array([1.5, 2.0, 2.4])
    psi = shares * np.exp(np.exp(student) / np.exp(teacher))
    expected = 0.7 * psi / psi.sum() + 0.1
    np.testing.assert_allclose(next_shares(shares, student, teacher, 0.7), expected)


def test_a_source_without_a_share_stays_out_and_a_fresh_student_overflows_nothing() -> None:
    found = next_shares(np.array([0.5, 0.0, 0.5]), np.array([200.0, 9.0, 8.0]), np.array([1.0, 1.0, 1.0]), 0.5)
    np.testing.assert_allclose(found, [0.75, 0, 0.25])


def test_segments_end_where_the_mixture_may_change() -> None:
    assert list(segments(3, 12, 5)) == [(3, 5), (5, 10), (10, 12)]
    assert list(segments(5, 10, 5)) == [(5, 10)]
    assert list(segments(0, 12, None)) == [(0, 12)]
    assert list(segments(12, 12, 5)) == []


@given(st.integers(0, 19), st.floats(0, 1))
def test_a_decision_changes_no_step_before_it(step: int, share: float) -> None:
    order, before = PlannedOrder(POOLS, ramp(20), 6, seed=3), PlannedOrder(POOLS, ramp(20), 6, seed=3)
    apply(order, [{"step": step, "shares": {"general": share, "domain": 1 - share}}])
    assert order.digest(step) == before.digest(step)
    rest = order.counts[step:].sum(axis=0) / (6 * (20 - step))
    # What was owed before is given first: within one sample.
    assert abs(rest[0] - share) <= 1 / (6 * (20 - step)) + 1e-9


class FakeEngine(torch.nn.Module):
    """The module without DeepSpeed."""

    def __init__(self, module: DistilModel) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Any) -> Any:
        return self.module(batch)


@pytest.mark.parametrize("world_size", [1, 3])
def test_decisions_rest_on_the_losses_that_evaluation_finds(
    hybrid_run: TinyRun, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    model = build_student(StudentConfig(config={**QWEN2, "attention_dropout": 0.5}), None, hybrid_run.identity)
    model.save_pretrained(tmp_path)
    engine = FakeEngine(DistilModel(model, LossConfig(), "fused", None)).train()
    adaptive = AdaptiveConfig(samples=4)
    order = planned_order(hybrid_run.samples, CurriculumConfig(adaptive=adaptive), train_config())
    parts: list[Any] = []

    def of_rank(rank: int) -> Any:
        place = Place(rank, world_size, rank, world_size, "cpu")
        train = train_config(micro_batch_size=1, global_batch_size=world_size)
        mixer = Mixer(adaptive, hybrid_run.samples, hybrid_run.union, train, place)
        return mixer.decide(engine, order, 2)

    monkeypatch.setattr("trainer.mixing.everyones", lambda mine: parts.append(mine) or parts)
    decision = [of_rank(rank) for rank in range(world_size)][-1]
    assert engine.training
    ids = heldout_ids(hybrid_run.samples, adaptive, hybrid_run.union)
    assert {name: len(own) for name, own in ids.items()} == {"general": 4, "domain": 4}
    assert decision.student == pytest.approx(evaluate_model(tmp_path, hybrid_run.dataset, ids)["loss"], rel=1e-5)
    assert decision.teacher == pytest.approx(evaluate_teacher(hybrid_run.dataset, ids)["loss"], rel=1e-5)
    expected = next_shares(
        order.shares[2],
        *(np.array([losses[name] for name in order.sources]) for losses in (decision.student, decision.teacher)),
        0.5,
    )
    assert list(decision.shares.values()) == pytest.approx(expected.tolist())


def test_what_adaptive_mixing_cannot_have_is_refused(hybrid_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValidationError, match="give no end, table or max_epochs beside it"):
        CurriculumConfig.model_validate({"adaptive": {}, "max_epochs": 2})
    empty = np.arange(0)
    monkeypatch.setattr(hybrid_run.samples, "rows", lambda split, name: empty)
    with pytest.raises(InputError, match=r"compares held-out samples, but .* has none of 'general'"):
        heldout_ids(hybrid_run.samples, AdaptiveConfig(), hybrid_run.union)
