"""How much of the hardware's arithmetic a training uses: model FLOPs utilisation (Chowdhery et al. 2022, appendix B).

A step does 6 floating-point operations for every parameter and token (forward 2, backward 4), and 12 · layers · width ·
context for every token in attention. Recomputed activations do not count. The output head works on supervised positions
alone, and of a mixture of experts only those that a token visits count.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch

from trainer.config import TrainConfig
from trainer.engine import Place

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "V100": 125e12}
"""Dense half-precision operations per second that the makers state, by a part of the device's name."""


@dataclass(frozen=True)
class ModelFlops:
    """Operations of one model in training."""

    body: float
    """Per token."""
    head: float
    """Per supervised position."""
    attention: float
    """Per token and token of context."""

    @classmethod
    def of(cls, model: Any) -> Self:
        """Count those of a transformers model, before it is partitioned."""
        config = model.config.get_text_config()
        # A classifier has no output embeddings: its small head counts with the body.
        tables = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]
        head = tables[1].weight.numel() if len(tables) > 1 else 0
        embedded = {id(p) for m in tables for p in m.parameters()}
        experts = getattr(config, "n_routed_experts", None) or getattr(config, "num_experts", None) or 1
        visited = (getattr(config, "num_experts_per_tok", None) or experts) / experts
        body = sum(
            parameter.numel() * (visited if ".experts." in name else 1.0)
            for name, parameter in model.named_parameters()
            if id(parameter) not in embedded
        )
        return cls(6.0 * body, 6.0 * head, 12.0 * config.num_hidden_layers * config.hidden_size)

    def step(self, num_tokens: int, num_supervised: int, num_samples: int) -> float:
        """Return the operations of a step over `num_samples` windows of even length."""
        context = num_tokens / max(num_samples, 1)
        return num_tokens * (self.body + self.attention * context) + num_supervised * self.head


def peak_flops(train: TrainConfig, place: Place) -> float | None:
    """Return what all ranks together can do at most, operations per second; none where nobody has said."""
    one = train.peak_flops
    if one is None and place.device == "gpu" and train.dtype != "float32":
        name = torch.cuda.get_device_name()
        one = next((value for part, value in PEAK_FLOPS.items() if part in name), None)
    return None if one is None else one * place.world_size
