"""Weights by the size of gradients: measured as autograd finds them, balanced, and kept over interruptions."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tests.trainer.ranks import loop_spec, metrics_of, run_ranks
from tests.trainer.tiny import QWEN2, TinyRun
from trainer.batches import make_batch
from trainer.config import StudentConfig
from trainer.feed import channel_variance
from trainer.loss_config import LossConfig
from trainer.losses import HeadTerms, chosen_divergence, logits_loss
from trainer.losses.balance import MOST_CHANGE, SMOOTHING, GradientBalance
from trainer.losses.hidden import HiddenTransfer
from trainer.model import DistilModel, predictor_states
from trainer.student import build_student

FIELDS = {
    "kl": 0.6, "ce": 0.1, "hidden": 0.2, "hidden_map": {"model.layers.1": "model.layers.0"}, "adaptive": "gradient",
    "relation": 0.1, "relation_map": {"final": "final"}, "adaptive_every": 2,
}  # fmt: skip
LOSS = LossConfig.model_validate(FIELDS)


def module_of(run: TinyRun, path: str) -> DistilModel:
    variance = channel_variance(run.dataset, run.dataset.catalog.sample_ids[:8], ["model.layers.1"])
    torch.manual_seed(0)
    transfer = HiddenTransfer({"model.layers.1": (32, 24)}, variance)
    config = StudentConfig(config={**QWEN2, "initializer_range": 0.3})
    return DistilModel(build_student(config, None, run.identity), LOSS, path, transfer).train()


@pytest.mark.parametrize("path", ["fused", "module"])
def test_gradients_are_those_of_autograd_on_the_states(hidden_run: TinyRun, path: str) -> None:
    module = module_of(hidden_run, path)
    samples, targets = hidden_run.dataset.read(hidden_run.dataset.catalog.sample_ids[:3])
    batch = make_batch(samples, targets, "topk", LOSS.layers)
    total, terms = module(batch)
    told = dict(zip(module.terms, terms.tolist(), strict=True))
    total.backward()
    gradient = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
    states = predictor_states(module.model, batch).detach().double().requires_grad_()
    head = module.model.get_output_embeddings().weight.detach().double()
    for name, each in (("ce", HeadTerms(1.0)), ("kl", HeadTerms(0.0, [(1.0, chosen_divergence(LOSS))]))):
        (found,) = torch.autograd.grad(logits_loss(states @ head.T, batch.targets, each)[0], states)
        assert told[f"{name}_gradient"] == pytest.approx(float(found.square().sum()), rel=1e-3), name
    assert told["hidden_gradient"] > 0 and told["relation_gradient"] > 0
    # Between measurements nothing is measured, and what is trained is the same.
    module.zero_grad()
    module.at_step(1, 10)
    total, terms = module(batch)
    total.backward()
    assert not terms[4:].any()
    assert torch.equal(gradient, torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]))


def test_weighted_gradients_stand_as_the_configured_weights_do() -> None:
    balance = GradientBalance(("ce", "kl", "hidden"), every=5)
    assert balance.weights([0.1, 0.9, 0.0]) == [0.1, 0.9, 0.0]
    told = {"loss": 1.0, "ce_gradient": 4.0, "kl_gradient": 0.25, "hidden_gradient": 0.0}
    assert balance.observe(0, told) == {"loss": 1.0, "ce_gradient": 2.0, "kl_gradient": 0.5}
    ce, kl, hidden = balance.weights([0.1, 0.9, 0.0])
    assert hidden == 0
    assert kl * 0.5 / (ce * 2.0) == pytest.approx(9.0)
    assert ce * 2.0 + kl * 0.5 == pytest.approx(0.1 * 2.0 + 0.9 * 0.5)
    assert balance.observe(4, dict.fromkeys(told, 0.0))["kl_gradient"] == 0.5, "step 4 measures nothing"
    balance.observe(5, told | {"kl_gradient": 1.0})
    assert balance.squares["kl_gradient"] == pytest.approx(SMOOTHING * 0.25 + (1 - SMOOTHING))
    balance.squares["kl_gradient"] = 1e-30
    assert balance.weights([0.5, 0.5, 0.0])[1] == 0.5 * MOST_CHANGE


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ValidationError, match="gradient weighs terms by their gradients on hidden states"):
        LossConfig(adaptive="gradient", attention=0.1, attention_map={"a": "b"})
    LossConfig.model_validate({"adaptive": "gradient", "kl": {"shape": "linear", "start": 1.0, "end": 0.5}})
    assert "adaptive_every" not in LossConfig().model_dump()


@pytest.mark.slow
def test_any_split_balances_alike_and_a_resumed_run_goes_on(hidden_run: TinyRun, tmp_path: Path) -> None:
    def run(name: str, resume: Path | None = None, **train: object) -> list[dict[str, object]]:
        spec = loop_spec(hidden_run, tmp_path / name, steps=7, checkpoint_every=3, loss=FIELDS, **train)
        config = {**spec.student.config, "attention_dropout": 0.0}
        run_ranks(replace(spec, student=spec.student.model_copy(update={"config": config})), resume)
        return metrics_of(tmp_path / name)

    one = run("one", micro_batch_size=8, zero_stage=0)
    two = run("two", workers=2, micro_batch_size=2, zero_stage=3)
    saved = tmp_path / "two" / "checkpoints" / "student" / "checkpoint_000003"
    resumed = run("resumed", saved, workers=2, micro_batch_size=2, zero_stage=3)
    assert one[0]["weights"] == {"ce": 0.1, "kl": 0.6, "hidden": 0.2, "relation": 0.1} != one[1]["weights"]
    for mine, other in zip(one, two, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-4)
        for name, weight in mine["weights"].items():
            assert weight == pytest.approx(other["weights"][name], rel=1e-4), name
    assert [line["weights"] for line in resumed] == [line["weights"] for line in two[3:]]
    np.testing.assert_array_equal([line["loss"] for line in resumed], [line["loss"] for line in two[3:]])
    last = one[-1]
    pulls = {name: last["weights"][name] * last[f"{name}_gradient"] for name in last["weights"]}
    assert pulls["kl"] / pulls["ce"] == pytest.approx(6.0, rel=0.2)
