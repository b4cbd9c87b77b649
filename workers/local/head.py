"""Takes the output head out of a loaded teacher, and proves that it gives the teacher's own logits."""

from typing import Any

import torch
from torch import nn

from storage.errors import InputError
from storage.heads import FINAL, Head
from workers.local.hooks import captured_hidden

_PROBE_TOKENS = 8
_TOLERANCE = 0.02
"""Largest error of a logit, relative to the largest logit; bfloat16 rounds by 0.004."""


def output_head(model: nn.Module, vocab_size: int) -> Head:
    """Return the head of a whole, unsharded model.

    Raises:
        InputError: the model's logits are something else than its head applied to the state `final`.
    """
    module: Any = model.get_output_embeddings()  # type: ignore[operator]
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    bias = getattr(module, "bias", None)
    head = Head(
        weight=module.weight.detach(),
        bias=None if bias is None else bias.detach(),
        vocab_size=vocab_size,
        scale=scale,
        softcap=None if softcap is None else float(softcap),
    )
    error = _error(model, head)
    if not error <= _TOLERANCE:
        raise InputError(
            f"cache.hidden: the logits of {type(model).__name__} are not its output head applied to the state "
            f"{FINAL!r} (relative error {error:.3g}); leave {FINAL!r} out"
        )
    return head


@torch.no_grad()
def _error(model: nn.Module, head: Head) -> float:
    """Return the largest error of the head's logits over a few tokens, relative to the largest logit."""
    tokens = torch.arange(1, _PROBE_TOKENS + 1, device=head.weight.device)[None] % head.vocab_size
    with captured_hidden(model, [FINAL]) as found:
        wanted = model(input_ids=tokens, use_cache=False).logits[0, :, : head.vocab_size].float()
    got = head.logits(found[FINAL][0])
    return float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6))
