"""The pass over a chunk of logits that all terms share; on a GPU it is compiled into fused kernels."""

import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

DEVICES = {"cuda"}
"""Where the pass is compiled. On a CPU chunks stay in its caches, and compiling would take longer than it saves."""


def exponentials(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Overwrite logits [C, V] with exp(x − the row's largest); return the largest and the sum of each row, [C].

    Step by step that reads the chunk four times and writes it twice; compiled it is read twice and written once.
    """
    return _compiled(logits) if logits.device.type in DEVICES else _eager(logits)


def _eager(logits: Tensor) -> tuple[Tensor, Tensor]:
    largest = logits.amax(1, keepdim=True)
    norm = logits.sub_(largest).exp_().sum(1)
    return largest[:, 0], norm


@cache
def _fused() -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    # Made at first use: the compiler takes seconds to import.
    return torch.compile(_eager, dynamic=True)


def _compiled(logits: Tensor) -> tuple[Tensor, Tensor]:
    from torch._dynamo.exc import BackendCompilerFailed

    try:
        return _fused()(logits)
    except BackendCompilerFailed as error:  # before anything ran
        DEVICES.discard(logits.device.type)
        warnings.warn(f"the loss runs without fused kernels, which cannot be compiled here: {error}", stacklevel=2)
        return _eager(logits)
