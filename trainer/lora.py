"""Low-rank adapters (Hu et al. 2021) by peft: put into a student, and merged into its weights for the export.

The adapters stand inside the student's own modules, so that everything else sees the same model. peft is the optional
extra `lora`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from storage.errors import InputError
from trainer.config import LoraConfig

_BASE, _ADAPTER = ".base_layer.", "default"


def add_lora(model: Any, lora: LoraConfig, seed: int, whole: Sequence[str] = ()) -> int:
    """Put adapters into a model and freeze all else but the modules `whole`; returns how many values are trained.

    Every B begins at 0, so that the model computes what it did; A depends on the seed alone.

    Raises:
        InputError: peft is not installed, or no layer bears a name of `lora.targets`.
    """
    try:
        import peft
    except ImportError as error:
        raise InputError(
            "student.lora needs the package peft; install it with `pip install 'lectern[lora]'`, or leave lora out"
        ) from error
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets or "all-linear",
        exclude_modules=list(whole) or None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            peft.inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
        except ValueError as error:
            raise InputError(
                f"student.lora.targets {', '.join(lora.targets)} fits no linear layer of the student: "
                f"{str(error).splitlines()[0]}"
            ) from error
    trained = 0
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name) or name.partition(".")[0] in whole)
        trained += parameter.numel() if parameter.requires_grad else 0
    return trained


def is_adapter(name: str) -> bool:
    """Tell whether a parameter of this name belongs to an adapter."""
    return ".lora_" in name


def merged(state: Mapping[str, Tensor], lora: LoraConfig) -> dict[str, Tensor]:
    """Return a model's weights with its adapters added in, under the names that they had without.

    W + alpha / rank · B·A is computed in float32 and rounded once.
    """
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        if is_adapter(name):
            continue
        out[name.replace(_BASE, ".")] = value
        down = state.get(name.replace(_BASE + "weight", f".lora_A.{_ADAPTER}.weight"))
        if _BASE in name and name.endswith("weight") and down is not None:
            up = state[name.replace(_BASE + "weight", f".lora_B.{_ADAPTER}.weight")]
            added = (lora.alpha / lora.rank) * (up.float() @ down.float())
            out[name.replace(_BASE, ".")] = (value.float() + added).to(value.dtype)
    return out
