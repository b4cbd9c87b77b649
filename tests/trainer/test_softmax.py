"""The pass that a GPU runs compiled, compiled for this machine: the same numbers; and what a missing compiler does."""

import pytest
import torch

from tests.trainer.test_divergences import sparse, student, teacher_logits
from trainer.losses import ForwardKL, HeadTerms, head_loss, softmax


def losses() -> list[torch.Tensor]:
    ours = [x.requires_grad_() for x in student()]
    terms = HeadTerms(0.3, [(0.7, ForwardKL())])
    total, each = head_loss(*ours, sparse(teacher_logits(), "topk", 9), terms)
    total.backward()
    return [each, *(x.grad for x in ours)]


@pytest.mark.slow
def test_compiled_it_gives_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = losses()
    calls = []
    fused = softmax._fused()

    def counted(logits: torch.Tensor) -> object:
        calls.append(len(logits))
        return fused(logits)

    monkeypatch.setattr(softmax, "_fused", lambda: counted)
    monkeypatch.setattr(softmax, "DEVICES", {"cpu"})
    for found, value in zip(losses(), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6)
    assert calls and {"cpu"} == softmax.DEVICES


def test_without_a_compiler_it_says_so_once_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(logits: torch.Tensor) -> object:
        raise torch._dynamo.exc.BackendCompilerFailed("inductor", RuntimeError("no Triton here"), None)

    expected = losses()
    monkeypatch.setattr(softmax, "_fused", lambda: fails)
    monkeypatch.setattr(softmax, "DEVICES", {"cpu"})
    with pytest.warns(UserWarning, match=r"(?s)without fused kernels.*no Triton here"):
        found = losses()
    for one, value in zip(found, expected, strict=True):
        torch.testing.assert_close(one, value, rtol=0, atol=0)
    assert not softmax.DEVICES
