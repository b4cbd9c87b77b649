"""Sparse losses against dense float64 references: values, gradients, bias, kinds."""

import numpy as np
import pytest
import torch
from torch import Tensor

from storage.identity import COUNTED_KINDS
from storage.samples import SampleBatch
from storage.targets import TargetBatch
from tests.trainer.tiny import targets_from_logits
from tests.workers.tiny import window
from trainer.batches import sparse_targets
from trainer.losses import ForwardKL, HeadTerms, SparseTargets, first_choice, head_loss, logits_loss
from trainer.losses import head as head_module
from trainer.losses.hidden import HiddenTransfer

VOCAB, WIDTH = 64, 16
KINDS = ["topk", "hybrid", "hybrid_counts", "sampled", "dense"]


def problem(kind: str, seed: int = 0, top_k: int = 6, draws: int = 5) -> tuple[SparseTargets, np.ndarray, TargetBatch]:
    """Return targets of random teacher logits at 33 positions, and those logits."""
    samples = SampleBatch.of([window([20, 15], seed)])
    logits = np.random.default_rng(seed).normal(0, 2, (int(samples.supervised.sum()), VOCAB))
    targets = targets_from_logits(samples, logits, kind, top_k=top_k, draws=draws, seed=seed)
    label = samples.tokens[samples.supervised].astype(np.int64)
    return sparse_targets(targets, label, kind), logits, targets


def dense_estimate(targets: SparseTargets) -> Tensor:
    """Return t̂ over the whole vocabulary, float64 [P, V]."""
    row = torch.repeat_interleave(torch.arange(targets.num_positions), targets.entry_offsets.diff())
    estimate = torch.zeros(targets.num_positions, VOCAB, dtype=torch.float64)
    estimate[row, targets.id] = targets.estimate.double()
    return estimate


def reference(student: Tensor, targets: SparseTargets, kl: float, ce: float) -> Tensor:
    """Return the weighted loss in float64 with torch's own autograd, summed over positions."""
    logprob = student.double().log_softmax(-1)
    estimate = dense_estimate(targets)
    row = torch.repeat_interleave(torch.arange(targets.num_positions), targets.entry_offsets.diff())
    known = torch.zeros_like(estimate)
    known[row, targets.id] = targets.logprob.double()
    divergence = (estimate * (known - logprob)).sum()
    if targets.kind in COUNTED_KINDS:
        divergence = -(estimate * logprob).sum() - targets.entropy.double().sum()
    if targets.kind == "topk":
        inside = torch.zeros_like(estimate, dtype=torch.bool)
        inside[row, targets.id] = True
        tail = targets.tail_mass.double()
        outside = (logprob.exp() * ~inside).sum(-1).log()
        divergence = divergence + (tail * (tail.clamp_min(1e-300).log() - outside)).sum()
    hard = -logprob.gather(1, targets.label[:, None]).sum()
    return kl * divergence + ce * hard


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_value_and_gradients_match_the_dense_reference(
    kind: str, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_module, "MIN_CHUNK", 7)
    monkeypatch.setattr(head_module, "CHUNK_BYTES", 1)
    targets, _, _ = problem(kind)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(targets.num_positions, WIDTH, generator=generator)
    weight = torch.randn(VOCAB, WIDTH, generator=generator) * scale / 4
    bias = torch.randn(VOCAB, generator=generator)
    exact = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    expected = reference(exact[0] @ exact[1].T + exact[2], targets, kl=0.7, ce=0.3)
    expected.backward()
    ours = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    total, each = head_loss(*ours, targets, HeadTerms(0.3, [(0.7, ForwardKL())]))
    (total * 2).backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (0.3 * each[0] + 0.7 * each[1]).item() == pytest.approx(expected.item(), rel=1e-5)
    for found, exactly in zip(ours, exact, strict=True):
        assert relative(found.grad / 2, exactly.grad) < 1e-5
    logits = torch.nn.functional.linear(hidden, weight, bias).requires_grad_()
    from_logits, _ = logits_loss(logits, targets, HeadTerms(0.3, [(0.7, ForwardKL())]))
    from_logits.backward()
    assert from_logits.item() == pytest.approx(expected.item(), rel=1e-5)
    assert relative(logits.grad @ weight, exact[0].grad) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_autograd_agrees_on_the_logits_alone(kind: str) -> None:
    targets, _, _ = problem(kind, seed=2)
    logits = torch.randn(targets.num_positions, VOCAB, generator=torch.Generator().manual_seed(3)).requires_grad_()
    total, _ = logits_loss(logits, targets, HeadTerms(0.0, [(1.0, ForwardKL())]))
    total.backward()
    exact = logits.detach().double().requires_grad_()
    reference(exact, targets, kl=1.0, ce=0.0).backward()
    assert relative(logits.grad, exact.grad) < 1e-5


def test_topk_gradient_is_that_of_the_full_divergence_inside_and_follows_the_tail_outside() -> None:
    targets, teacher, _ = problem("topk")
    student = torch.randn(targets.num_positions, VOCAB, generator=torch.Generator().manual_seed(4))
    logits = student.clone().requires_grad_()
    total, _ = logits_loss(logits, targets, HeadTerms(0.0, [(1.0, ForwardKL())]))
    total.backward()
    t, p = torch.from_numpy(teacher).softmax(-1), student.double().softmax(-1)
    inside = torch.zeros_like(t, dtype=torch.bool)
    row = torch.repeat_interleave(torch.arange(targets.num_positions), targets.entry_offsets.diff())
    inside[row, targets.id] = True
    tail_t, tail_p = (t * ~inside).sum(-1, keepdim=True), (p * ~inside).sum(-1, keepdim=True)
    expected = torch.where(inside, p - t, p * (1 - tail_t / tail_p))
    torch.testing.assert_close(logits.grad.double(), expected, rtol=0, atol=2e-3)  # float16 targets
    full = (t * (t.log() - p.log())).sum()
    assert 0 < total.item() < full.item()


@pytest.mark.parametrize(("kind", "draws"), [("hybrid", 4), ("hybrid_counts", 4), ("sampled", 12)])
def test_draws_are_unbiased_and_cut_topk_would_not_be(kind: str, draws: int) -> None:
    _, teacher, _ = problem(kind, top_k=3, draws=draws)
    t = torch.from_numpy(teacher).softmax(-1)
    estimates = [dense_estimate(problem(kind, top_k=3, draws=draws)[0])]
    samples = SampleBatch.of([window([20, 15], 0)])
    label = samples.tokens[samples.supervised].astype(np.int64)
    student = torch.randn(t.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    full = (t * (t.log() - student.log_softmax(-1))).sum()
    values = []
    for seed in range(1, 200):
        targets = targets_from_logits(samples, teacher, kind, top_k=3, draws=draws, seed=seed)
        sparse = sparse_targets(targets, label, kind)
        estimates.append(dense_estimate(sparse))
        values.append(logits_loss(student.float(), sparse, HeadTerms(0.0, [(1.0, ForwardKL())]))[0].item())
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values) - full.item()) < 4 * error + 2e-3 * full.item()
    mean = torch.stack(estimates).mean(0)
    torch.testing.assert_close(mean.sum(-1), torch.ones(len(t), dtype=torch.float64), rtol=0, atol=1e-3)
    assert float((mean - t).abs().sum(-1).mean()) < 0.09
    assert float((estimates[0] - t).abs().sum(-1).mean()) > 0.3


def test_the_first_choice_is_of_the_head_whatever_draws_estimate() -> None:
    targets, teacher, _ = problem("hybrid_counts", top_k=1)
    best = teacher.argmax(1)
    head = targets.logprob.numpy()[~targets.drawn.numpy()]
    most = np.full(len(best), -np.inf)
    np.maximum.at(most, targets.rows().numpy(), np.where(targets.drawn, targets.logprob, -np.inf))
    assert (most > head).any()  # as an estimate may be
    found, probability = first_choice(targets)
    np.testing.assert_array_equal(found, best)
    np.testing.assert_allclose(probability, np.exp(head), rtol=1e-6)


@pytest.mark.parametrize("kind", ["hybrid", "hybrid_counts"])
@pytest.mark.parametrize("weight", [0.25, 0.5, 1.0])
def test_the_tail_follows_draws_and_students_own_tail_as_weighted(kind: str, weight: float) -> None:
    targets, _, _ = problem(kind, top_k=3)
    student = torch.randn(targets.num_positions, VOCAB, generator=torch.Generator().manual_seed(4))
    logits = student.clone().requires_grad_()
    total, _ = logits_loss(logits, targets, HeadTerms(0.0, [(1.0, ForwardKL(weight))]))
    total.backward()
    p, estimate = student.double().softmax(-1), dense_estimate(targets)
    row = targets.rows()
    head = torch.zeros_like(p, dtype=torch.bool)
    head[row[~targets.drawn], targets.id[~targets.drawn]] = True
    mass, own = (estimate * ~head).sum(-1, keepdim=True), p * ~head
    tail = weight * estimate * ~head + (1 - weight) * mass * own / own.sum(-1, keepdim=True)
    assert relative(logits.grad, p * estimate.sum(-1, keepdim=True) - estimate * head - tail) < 1e-5
    if weight == 1:
        assert total.item() == logits_loss(student, targets, HeadTerms(0.0, [(1.0, ForwardKL())]))[0].item()


@pytest.mark.parametrize("kind", ["hybrid", "hybrid_counts"])
def test_draws_of_any_weight_pull_no_student_away_from_the_teacher(kind: str) -> None:
    _, teacher, _ = problem(kind, top_k=3)
    samples = SampleBatch.of([window([20, 15], 0)])
    label = samples.tokens[samples.supervised].astype(np.int64)
    means = []
    for weight in (0.3, 1.0):
        gradients = []
        for seed in range(100):
            targets = targets_from_logits(samples, teacher, kind, top_k=3, draws=4, seed=seed)
            sparse = sparse_targets(targets, label, kind)
            logits = torch.from_numpy(teacher).float().requires_grad_()
            logits_loss(logits, sparse, HeadTerms(0.0, [(1.0, ForwardKL(weight))]))[0].backward()
            gradients.append(logits.grad)
        noise = torch.stack(gradients).std(0).norm() / 100**0.5
        assert torch.stack(gradients).mean(0).norm() < 1.5 * noise + 5e-3
        means.append(noise)
    assert means[0] < 0.4 * means[1]


def test_a_student_equal_to_the_teacher_has_no_loss_and_no_gradient() -> None:
    for kind in ("topk", "dense"):
        targets, teacher, _ = problem(kind)
        logits = torch.from_numpy(teacher).float().requires_grad_()
        total, _ = logits_loss(logits, targets, HeadTerms(0.0, [(1.0, ForwardKL())]))
        total.backward()
        assert abs(total.item()) / targets.num_positions < 2e-3
        assert float(logits.grad.abs().max()) < 2e-3


def test_a_student_whose_tail_vanishes_stays_finite() -> None:
    targets, teacher, _ = problem("topk")
    logits = torch.from_numpy(teacher).float() * 40
    logits.requires_grad_()
    total, _ = logits_loss(logits, targets, HeadTerms(0.1, [(0.9, ForwardKL())]))
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(logits.grad).all()


def test_bfloat16_heads_are_summed_in_float32() -> None:
    targets, _, _ = problem("hybrid")
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(targets.num_positions, WIDTH, generator=generator).bfloat16()
    weight = torch.randn(VOCAB, WIDTH, generator=generator).bfloat16()
    terms = HeadTerms(0.1, [(0.9, ForwardKL())])
    low = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    high = [hidden.float().requires_grad_(), weight.float().requires_grad_()]
    for pair in (low, high):
        head_loss(pair[0], pair[1], None, targets, terms)[0].backward()
    assert low[1].grad.dtype == torch.bfloat16
    for found, expected in zip(low, high, strict=True):
        assert relative(found.grad, expected.grad.double()) < 0.02


def test_hidden_states_of_some_positions_stand_for_all() -> None:
    generator = torch.Generator().manual_seed(2)
    student, teacher = (torch.randn(12, width, generator=generator) for width in (6, 4))
    transfer = HiddenTransfer({"final": (6, 4)}, {"final": teacher.var(dim=0)})
    whole = transfer({"final": student}, {"final": teacher})
    parts = [torch.arange(first, 12, 3) for first in range(3)]
    sums = [transfer({"final": student}, {"final": teacher[rows]}, rows, 3.0) for rows in parts]
    assert sum(sums).item() / 3 == pytest.approx(whole.item(), rel=1e-5)
