"""What a model is made of: where its logits come from, how wide its layers are, and what they put out."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from storage.errors import InputError
from storage.identity import Task

HeadPath = Literal["fused", "module", "model"]
"""How logits come about: the head's weight chunk by chunk, the head's own forward, or the whole model's."""

Recording = AbstractContextManager[dict[str, Tensor]]
"""Gives layer → tensor; filled by each forward pass while it is open."""

_PROBE_TOKENS = 4
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


@dataclass(frozen=True)
class Anatomy:
    """What a short forward pass tells of a model."""

    head_path: HeadPath
    widths: Mapping[str, int]  # asked student layer → width of its output


def examine(model: Any, layers: list[str], zero_stage: int, task: Task = "next_token") -> Anatomy:
    """Run a few tokens through a model to learn its layers' widths and whether its logits are head(last state).

    The logits of a classifier are always the whole model's.

    Raises:
        InputError: the student has no module of an asked name.
    """
    if task != "next_token":
        return Anatomy("model", {})
    names = dict(model.named_modules())
    missing = [layer for layer in layers if layer != "final" and layer not in names]
    if missing:
        shown = [name for name in names if name and name.count(".") <= 2][:24]
        raise InputError(
            f"the student has no layer {missing[0]!r}; train.loss.hidden_map and relation_map may name `final` or a "
            f"module such as {', '.join(shown)}"
        )
    ids = torch.arange(_PROBE_TOKENS)[None]
    was_training = model.training
    model.eval()
    head = model.get_output_embeddings()
    with torch.no_grad(), record_layers(model, ["final", *layers]) as seen:
        state = model.base_model(input_ids=ids, use_cache=False)[0]
        logits = model(input_ids=ids, use_cache=False).logits
        plain = isinstance(head, nn.Linear) and torch.allclose(head(state), logits, rtol=1e-4, atol=1e-4)
    model.train(was_training)
    path: HeadPath = "model" if not plain else "module" if zero_stage == 3 else "fused"
    return Anatomy(path, {layer: int(seen[layer].shape[-1]) for layer in layers})


def attention_module(model: nn.Module, layer: str) -> nn.Module:
    """Return the attention of a student layer: the named module itself, or its own child; InputError without one."""
    modules = dict(model.named_modules())
    names = [layer, *(f"{layer}.{child}" for child, _ in modules.get(layer, nn.Module()).named_children())]
    found = [name for name in names if name in modules and _ATTENTION.search(name.rpartition(".")[2])]
    if not found:
        layers = [name.rpartition(".")[0] for name in modules if _ATTENTION.search(name.rpartition(".")[2])]
        raise InputError(
            f"the student has no attention in {layer!r}; train.loss.attention_map may name {', '.join(layers[:24])}"
        )
    return model.get_submodule(found[0])


def record_attention(model: nn.Module, layers: Sequence[str]) -> Recording:
    """Collect the attention weights of layers, [N, heads, L, L], while the context is open; needs eager attention."""
    modules = {layer: attention_module(model, layer) for layer in layers}
    return _record(modules, lambda _layer, _inputs, output: output[1])


def record_layers(model: Any, layers: Sequence[str]) -> Recording:
    """Collect the outputs of named modules while the context is open; `final` is the input of the output head."""

    def state(layer: str, inputs: tuple[Tensor, ...], output: Any) -> Tensor:
        value: Any = inputs[0] if layer == "final" else output
        picked: Tensor = value[0] if isinstance(value, tuple) else value
        return picked

    def module(layer: str) -> nn.Module:
        found: nn.Module = model.get_output_embeddings() if layer == "final" else model.get_submodule(layer)
        return found

    return _record({layer: module(layer) for layer in layers}, state)


@contextmanager
def _record(
    modules: Mapping[str, nn.Module], pick: Callable[[str, tuple[Tensor, ...], Any], Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Collect what `pick` takes of each module's inputs and output while the context is open."""
    seen: dict[str, Tensor] = {}

    def watch(layer: str, module: nn.Module) -> Any:
        def keep(_module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            seen[layer] = pick(layer, inputs, output)

        return module.register_forward_hook(keep)

    handles = [watch(layer, module) for layer, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
