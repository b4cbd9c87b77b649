"""One optimizer step: forward and backward over the micro-batches of all ranks, normalised and checked together."""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from trainer.collective import not_finite
from trainer.config import TrainConfig
from trainer.engine import Place, gradient_norm
from trainer.feed import StepData


def optimize(
    engine: Any, train: TrainConfig, place: Place, step: int, data: StepData, num_supervised: int
) -> dict[str, float]:
    """Run one optimizer step. Collective.

    The loss is normalised by `num_supervised`, the supervised tokens of all ranks and micro-batches, so that the split
    changes nothing.

    Returns:
        `loss` and the terms (`ce`, `kl`, `hidden`, …) per supervised token over all ranks, and `grad_norm` before
        clipping.

    Raises:
        StoppedError: loss or gradient is not finite; before the weights change, where that can be known.
    """
    # DeepSpeed averages gradients over ranks; undo it, so that the sum over all of them remains.
    factor = place.world_size / max(num_supervised, 1)
    names = ("loss", *engine.module.terms)
    sums = torch.zeros(len(names), dtype=torch.float64)
    bad: list[bytes] = []
    losses: dict[str, float] = {}
    norm: float | None = None
    for n, batch in enumerate(data.batches):
        loss, terms = engine(batch.to(place.torch_device))
        engine.backward(loss * factor, scale_wrt_gas=False)
        values = torch.cat([loss.detach()[None], terms]).double().cpu()
        sums += values
        bad += batch.ids if not torch.isfinite(values).all() else []
        if n + 1 == len(data.batches):
            total = _reduced(step, sums.to(place.torch_device), bad)
            losses = dict(zip(names, (total / max(num_supervised, 1)).tolist(), strict=True))
            norm = gradient_norm(engine)
        engine.step()
    losses["grad_norm"] = _checked_norm(engine, train, step, data, norm)
    return losses


def _reduced(step: int, sums: Tensor, bad: list[bytes]) -> Tensor:
    dist.all_reduce(sums)
    if not torch.isfinite(sums).all():
        raise not_finite("the loss", step, bad)
    return sums


def _checked_norm(engine: Any, train: TrainConfig, step: int, data: StepData, before_step: float | None) -> float:
    value = float(engine.get_global_grad_norm() if before_step is None else before_step)
    # float16 meets overflows while its loss scale settles, and skips those steps by itself.
    if not np.isfinite(value) or value < 0:
        if train.dtype == "float16":
            return 0.0
        raise not_finite("the gradient norm", step, [sample for batch in data.batches for sample in batch.ids])
    return value
