"""Elastic weight consolidation: the Fisher information, the penalty, and what is refused."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from storage.errors import InputError
from tests.trainer.test_student import batch_of, fresh
from tests.trainer.tiny import TinyRun, train_config
from trainer.batches import Batch
from trainer.config import EwcConfig
from trainer.ewc import Anchor, chosen_windows, fisher_information
from trainer.loss_config import LossConfig
from trainer.model import DistilModel

VOCABULARY, WIDTH = 5, 3


class Bigram(nn.Module):
    """Logits of the next token from this one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.head(torch.tanh(self.embedding(input_ids))))


def window(tokens: list[int]) -> Batch:
    return Batch(
        ids=[bytes(16)],
        sources=["general"],
        input_ids=torch.tensor([tokens]),
        position_ids=None,
        attention=None,
        predictor=torch.arange(len(tokens) - 1),
        targets=None,  # type: ignore[arg-type]
        hidden={},
        hidden_rows=None,
    )


def exact(model: nn.Module, windows: list[Batch]) -> list[torch.Tensor]:
    """Return Σ_t Σ_y p(y)·(∇ log p(y))², label by label."""
    total = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for one in windows:
        for position in one.predictor.tolist():
            for label in range(VOCABULARY):
                logprob = model(one.input_ids, False).logits[0, position].log_softmax(-1)[label]
                for sums, gradient in zip(total, torch.autograd.grad(logprob, list(model.parameters())), strict=True):
                    sums += logprob.exp().detach() * gradient.square()
    return total


def test_the_fisher_information_is_that_of_each_example_with_drawn_labels() -> None:
    model, windows = Bigram(), [window([0, 1, 2, 1]), window([3, 4, 0])]
    draws = 500
    mean = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for n in range(draws):
        squares, tokens = fisher_information(model, windows, [2 * n, 2 * n + 1])
        assert tokens == 5
        for sums, square in zip(mean, squares.values(), strict=True):
            sums += square / draws
    right = torch.cat([square.flatten() for square in exact(model, windows)])
    found = torch.cat([square.flatten() for square in mean])
    assert (found - right).norm() < 0.1 * right.norm()
    again, _ = fisher_information(model, windows, [4, 5])
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.values(), fisher_information(model, windows, [4, 5])[0].values(), strict=True)
    )
    # The classic error, squaring the gradient of all examples at once with the text's own labels, is far from it.
    loss = sum(
        torch.nn.functional.cross_entropy(
            model(one.input_ids, False).logits[0, :-1], one.input_ids[0, 1:], reduction="sum"
        )
        for one in windows
    )
    wrong = torch.cat([g.square().flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    assert (wrong - right).norm() > 0.5 * right.norm()


def test_the_penalty_pulls_each_weight_back_by_its_information() -> None:
    model = Bigram()
    model.embedding.weight.requires_grad_(False)
    start = {
        name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    fisher = {name: torch.rand_like(value) for name, value in start.items()}
    anchor = Anchor(4.0, start, fisher)
    assert anchor.penalty(model).item() == 0
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter += torch.randn_like(parameter)
    now = {f"head.{name}": parameter.detach() for name, parameter in model.head.named_parameters()}
    moved = {name: now[name] - start[name] for name in start}
    expected = sum(2.0 * (fisher[name] * value.square()).sum() for name, value in moved.items())
    penalty = anchor.penalty(model)
    torch.testing.assert_close(penalty, expected)
    penalty.backward()
    for name, parameter in model.head.named_parameters():
        torch.testing.assert_close(parameter.grad, 4.0 * fisher[f"head.{name}"] * moved[f"head.{name}"])


def test_a_step_adds_the_penalty_once_however_it_is_split(hybrid_run: TinyRun) -> None:
    gradients, terms = [], []
    for size in (6, 2):
        model = fresh(hybrid_run)
        start = {name: parameter.detach() + 0.01 for name, parameter in model.named_parameters()}
        anchor = Anchor(7.0, start, {name: torch.ones_like(value) for name, value in start.items()})
        module = DistilModel(model, LossConfig(), "fused", None, anchor=anchor)
        assert module.terms == ("ce", "kl", "hidden", "ewc")
        whole = batch_of(hybrid_run, slice(0, 6)).num_supervised
        total = torch.zeros(5)
        for first in range(0, 6, size):
            loss, each = module(batch_of(hybrid_run, slice(first, first + size)))
            (loss / whole).backward()
            total += torch.cat([loss.detach()[None], each]) / whole
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
        terms.append(total)
        assert float(total[4]) == pytest.approx(3.5 * 1e-4 * sum(p.numel() for p in model.parameters()), rel=1e-3)
        assert float(total[0]) == pytest.approx(float(0.1 * total[1] + 0.9 * total[2] + total[4]), rel=1e-5)
    torch.testing.assert_close(terms[0], terms[1], rtol=1e-5, atol=1e-6)
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) < 1e-5


def test_windows_follow_what_was_used_or_named(hybrid_run: TinyRun) -> None:
    samples = hybrid_run.samples
    source = dict(zip(samples.ids(range(len(samples))), samples.source, strict=True))

    def sources(ewc: EwcConfig, earlier: dict[str, float]) -> list[str]:
        return sorted(
            source[sample_id] for sample_id in chosen_windows(ewc, samples, hybrid_run.union, earlier, seed=0)
        )

    ewc = EwcConfig(weight=1, samples=8)
    assert sources(ewc, {"general": 30, "domain": 10}) == ["domain"] * 2 + ["general"] * 6
    assert sources(ewc, {"general": 5, "domain": 0}) == ["general"] * 8
    assert sources(EwcConfig(weight=1, samples=4, sources=["domain"]), {}) == ["domain"] * 4
    with pytest.raises(InputError, match=r"but this is the first; name sources"):
        chosen_windows(ewc, samples, hybrid_run.union, {}, seed=0)
    with pytest.raises(InputError, match=r"train.ewc.sources names 'code'; the sources are general, domain"):
        chosen_windows(EwcConfig(weight=1, sources=["code"]), samples, hybrid_run.union, {}, seed=0)
    with pytest.raises(ValidationError, match="which ZeRO 3 takes apart"):
        train_config(zero_stage=3, ewc={"weight": 1})
