"""Every divergence against its formula in float64 with torch's own autograd: value and gradient."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from storage.errors import InputError
from storage.heads import Head
from storage.identity import DRAWN_KINDS, HEAD_KINDS, CaptureIdentity
from trainer.loss_config import ACROSS, LossConfig
from trainer.losses import DIVERGENCES, FullTeacher, HeadTerms, SparseTargets, chosen_divergence, head_loss, logits_loss
from trainer.losses import full as full_module
from trainer.losses import head as head_module
from trainer.losses.balance import Balance
from trainer.served import FITS, require_served

P, VOCAB, WIDTH, KEPT = 21, 96, 16, 9
LOSSES = [
    *(LossConfig(divergence=name) for name in DIVERGENCES),
    LossConfig(divergence="jsd", beta=0.0),
    LossConfig(divergence="jsd", beta=0.3),
    LossConfig(divergence="jsd", beta=1.0),
    LossConfig(divergence="skew_kl", skew=0.4),
    LossConfig(divergence="reverse_skew_kl", skew=0.4),
]
IDS = [f"{loss.divergence}-{loss.beta:g}-{loss.skew:g}" for loss in LOSSES]


def kl(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a > 0, a * (a.clamp_min(1e-300).log() - b.clamp_min(1e-300).log()), 0.0).sum(1)


def formula(loss: LossConfig, t: Tensor, s: Tensor) -> Tensor:
    """Return the divergence of each row from its definition."""
    if loss.divergence == "adaptive_kl":
        order = t.argsort(dim=1, descending=True)
        ranked = t.gather(1, order)
        head = torch.zeros_like(t).scatter_(1, order, ((ranked.cumsum(1) - ranked) < 0.5).to(t.dtype))
        gap = (t - s).abs().detach()
        share = (gap * head).sum(1) / gap.sum(1)
        return share * kl(t, s) + (1 - share) * kl(s, t)
    if loss.divergence == "jsd" and 0 < loss.beta < 1:
        m = loss.beta * t + (1 - loss.beta) * s
        return loss.beta * kl(t, m) + (1 - loss.beta) * kl(s, m)
    forward = loss.divergence == "forward_kl" or (loss.divergence == "jsd" and loss.beta == 0)
    if loss.divergence == "tvd":
        return (t - s).abs().sum(1) / 2
    if loss.divergence == "skew_kl":
        return kl(t, loss.skew * t + (1 - loss.skew) * s)
    if loss.divergence == "reverse_skew_kl":
        return kl(s, (1 - loss.skew) * t + loss.skew * s)
    return kl(t, s) if forward else kl(s, t)


def sparse(teacher: Tensor, kind: str, kept: int) -> SparseTargets:
    """Return the `kept` best entries of teacher logits [P, V], in float32 as they are."""
    logprob, ids = teacher.double().log_softmax(1).topk(kept, dim=1)
    tail = (1 - logprob.exp().sum(1)).clamp_min(0).float()
    return SparseTargets(
        kind=kind,
        label=torch.randint(0, VOCAB, (P,), generator=torch.Generator().manual_seed(9)),
        entry_offsets=torch.arange(P + 1) * kept,
        id=ids.flatten(),
        estimate=logprob.exp().flatten().float(),
        logprob=logprob.flatten().float(),
        drawn=torch.zeros(P * kept, dtype=torch.bool),
        tail_mass=tail,
        entropy=torch.special.entr(teacher.double().softmax(1)).sum(1).float(),
    )


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "MIN_CHUNK", 8)
    monkeypatch.setattr(head_module, "CHUNK_BYTES", 1)
    monkeypatch.setattr(full_module, "BLOCK_BYTES", 3 * 4 * VOCAB)


def student(seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (P, WIDTH), (VOCAB, WIDTH), (VOCAB,)
    return [torch.randn(shape, generator=generator) * scale for shape, scale in zip(shapes, (1, 0.5, 1), strict=True)]


def teacher_logits(vocab: int = VOCAB) -> Tensor:
    return torch.randn(P, vocab, generator=torch.Generator().manual_seed(2)) * 2


def relative(found: Tensor | None, expected: Tensor | None) -> float:
    assert found is not None
    assert expected is not None
    return float((found.double() - expected).norm() / expected.norm())


def compare(
    loss: LossConfig, targets: SparseTargets, teacher: FullTeacher | None, log_t: Tensor, T: float, bucket: bool
) -> None:
    """Compare value and gradients, cross-entropy in the same pass, with the formula on the student at T."""
    exact = [x.double().requires_grad_() for x in student()]
    logits = exact[0] @ exact[1].T + exact[2]
    s, t = (logits / T).softmax(1), log_t.exp()
    if bucket:
        ids = targets.id.view(P, -1)
        picked = s.gather(1, ids)
        s = torch.cat([picked, 1 - picked.sum(1, keepdim=True)], 1)
        t = torch.cat([t.gather(1, ids), targets.tail_mass[:, None].double()], 1)
    hard = -logits.log_softmax(1).gather(1, targets.label[:, None]).sum()
    soft = formula(loss, t, s).sum() * T**2
    (0.3 * hard + 0.7 * soft).backward()
    ours = [x.requires_grad_() for x in student()]
    terms = HeadTerms(0.3, [(0.7, chosen_divergence(loss))], T)
    total, each = head_loss(*ours, targets, terms, teacher)
    (total * 2).backward()
    assert each.tolist() == pytest.approx([hard.item(), soft.item()], rel=1e-5)
    assert total.item() == pytest.approx(0.3 * hard.item() + 0.7 * soft.item(), rel=1e-5)
    for found, expected in zip(ours, exact, strict=True):
        assert relative(found.grad / 2, expected.grad) < 1e-5
    plain = (ours[0] @ ours[1].T + ours[2]).detach().requires_grad_()
    logits_loss(plain, targets, terms, teacher)[0].backward()
    assert relative(plain.grad @ ours[1].detach(), exact[0].grad) < 1e-5


@pytest.mark.parametrize("loss", LOSSES, ids=IDS)
def test_full_support_is_the_divergence_itself(loss: LossConfig) -> None:
    logits = teacher_logits()
    for kind in FITS[loss.divergence].accepts:
        if kind != "sampled":
            compare(loss, sparse(logits, kind, VOCAB), None, logits.double().log_softmax(1), 1.0, bucket=False)


@pytest.mark.parametrize("loss", LOSSES, ids=IDS)
def test_what_is_not_kept_is_one_bucket(loss: LossConfig) -> None:
    logits = teacher_logits()
    compare(loss, sparse(logits, "topk", KEPT), None, logits.double().log_softmax(1), 1.0, bucket=True)


@pytest.mark.parametrize("loss", LOSSES, ids=IDS)
@pytest.mark.parametrize("T", [0.5, 1.0, 3.0])
def test_final_states_give_the_exact_divergence_at_any_temperature(loss: LossConfig, T: float) -> None:
    generator = torch.Generator().manual_seed(5)
    states, weight = torch.randn(P, 12, generator=generator), torch.randn(VOCAB + 8, 12, generator=generator)
    head = Head(weight, None, VOCAB, scale=0.5, softcap=4.0)
    log_t = (head.logits(states).double() / T).log_softmax(1)
    targets = replace(sparse(teacher_logits(), "topk", KEPT), kind="text")
    compare(loss, targets, FullTeacher(states, head), log_t, T, bucket=False)


@pytest.mark.parametrize("loss", LOSSES, ids=IDS)
def test_dense_targets_serve_any_temperature(loss: LossConfig) -> None:
    logits = teacher_logits()
    targets = sparse(logits, "dense", VOCAB)
    compare(loss, targets, FullTeacher(dense=targets), (logits.double() / 2).log_softmax(1), 2.0, bucket=False)


@pytest.mark.parametrize("loss", LOSSES, ids=IDS)
def test_padding_of_the_students_vocabulary_and_distant_students_stay_finite(loss: LossConfig) -> None:
    head = Head(torch.randn(VOCAB - 6, 12), None, VOCAB - 6)
    targets = sparse(teacher_logits(), "topk", KEPT)
    for teacher in (None, FullTeacher(torch.randn(P, 12), head)):
        hidden, weight, bias = (x.requires_grad_() for x in student())
        total, _ = head_loss(
            hidden, weight * 60, bias, targets, HeadTerms(0.1, [(1.0, chosen_divergence(loss))]), teacher
        )
        total.backward()
        assert torch.isfinite(total)
        assert torch.isfinite(weight.grad).all()


def test_the_bucket_bounds_every_divergence_from_below() -> None:
    """Lumping categories together cannot raise an f-divergence."""
    logits = teacher_logits()
    dense, some = sparse(logits, "dense", VOCAB), sparse(logits, "topk", KEPT)
    for loss in LOSSES:
        terms = HeadTerms(0.0, [(1.0, chosen_divergence(loss))])
        whole, part = (head_loss(*student(), targets, terms)[1][1].item() for targets in (dense, some))
        if loss.divergence != "adaptive_kl":
            assert 0 < part < whole


def capture(kind: str, **fields: object) -> CaptureIdentity:
    drawn = kind in DRAWN_KINDS
    needed = {"top_k": 4 if kind in HEAD_KINDS else None}
    needed |= {"draws": 4, "seed": 0} if drawn else {}
    return CaptureIdentity.model_validate({"kind": kind, **needed, **fields})


def test_every_divergence_says_what_it_takes() -> None:
    assert set(FITS) == {*DIVERGENCES, *ACROSS}
    for fit in FITS.values():
        assert set(fit.unbiased_on) <= set(fit.accepts)


def test_targets_that_do_not_fit_are_refused_with_what_would() -> None:
    with pytest.raises(InputError, match=r"reverse_kl needs .* topk, hybrid, dense, not sampled; set .*: forward_kl"):
        require_served(LossConfig(divergence="reverse_kl"), capture("sampled"))
    with pytest.raises(InputError, match=r"forward_kl needs .* not text; train on the text alone"):
        require_served(LossConfig(), capture("text"))
    require_served(LossConfig(kl=0.0, ce=1.0), capture("text"))
    with pytest.raises(InputError, match="of targets of kind hybrid the tail is known at temperature 1 alone"):
        require_served(LossConfig(temperature=2.0), capture("hybrid"))
    require_served(LossConfig(temperature=2.0), capture("dense"))
    exact = LossConfig(divergence="tvd", exact=True, temperature=2.0)
    with pytest.raises(InputError, match=r"needs the hidden state 'final', but those of no layer are kept"):
        require_served(exact, capture("text"))
    final = {"hidden": ["final"], "hidden_dtype": "float16"}
    require_served(exact, capture("text", **final))
    with pytest.raises(InputError, match="hidden_every is 2; capture with"):
        require_served(exact, capture("topk", **final, hidden_every=2.0))


def test_learned_weights_begin_as_given_and_come_to_rest_at_half_the_inverse_loss() -> None:
    balance = Balance([0.1, 0.9, 0.0])
    assert balance.weights(balance()) == pytest.approx([0.1, 0.9, 0.0])
    losses, positions = torch.tensor([3.0, 0.5, 7.0]), 10
    for _ in range(200):
        balance.zero_grad()
        s = balance()
        weighted = sum(w * x for w, x in zip(balance.weights(s), (losses * positions).tolist(), strict=True))
        rest = balance.rest(s, losses * positions, positions)
        expected = (torch.exp(-s) / 2 * losses[:2] + s / 2).sum() * positions
        assert weighted + rest.item() == pytest.approx(expected.item(), rel=1e-5)
        rest.backward()
        balance.log_variance.data -= 0.02 * balance.log_variance.grad
    assert balance.weights(balance()) == pytest.approx([1 / 6, 1.0, 0.0], rel=0.02)
