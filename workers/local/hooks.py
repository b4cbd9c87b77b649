"""Takes hidden states and attention out of a running model by forward hooks on named layers."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from storage.errors import InputError, WorkerError
from storage.heads import FINAL

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


def check_layers(model: nn.Module, layers: Sequence[str], split: bool = False) -> None:
    """Raise InputError, listing what there is, unless every layer is `final` or a module of the model.

    Where tensor parallelism will have `split` the model, parts of a block, such as its projections, do not count: each
    rank has its own share of what they put out.
    """
    modules = dict(model.named_modules())
    for layer in layers:
        if layer != FINAL and layer not in modules:
            blocks = [name for name in modules if name.split(".")[-1].isdigit() and name.count(".") <= 2]
            raise InputError(f"cache.hidden: the teacher has no layer {layer!r}; there are {FINAL!r} and {blocks}")
        if split and layer != FINAL and not any(modules[layer].children()):
            raise InputError(
                f"cache.hidden: under tensor_parallel every rank has its own share of what {layer} puts out; set "
                "teacher.sharding to zero3, or to none with one rank, or name a whole block"
            )


def attention_module(model: nn.Module, layer: str) -> nn.Module:
    """Return the attention of a layer: the named module itself, or its own child; InputError where there is none."""
    modules = dict(model.named_modules())
    names = [layer, *(f"{layer}.{child}" for child, _ in modules.get(layer, nn.Module()).named_children())]
    found = [name for name in names if name in modules and _ATTENTION.search(name.rpartition(".")[2])]
    if not found:
        layers = [name.rpartition(".")[0] for name in modules if _ATTENTION.search(name.rpartition(".")[2])]
        raise InputError(f"cache.attention: the teacher has no attention in {layer!r}; there is in {layers}")
    return model.get_submodule(found[0])


@contextmanager
def captured_attention(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the attention of `layers` averaged over the heads, float32 [N, L, L], of the forward pass inside.

    The model must run eager attention. Under tensor parallelism a rank sees its own heads: the ranks' averages are
    averaged in turn, since each has as many.
    """
    found, handles = dict[str, Tensor](), []
    try:
        for layer in layers:
            module = attention_module(model, layer)
            handles.append(module.register_forward_hook(_keep_weights(found, layer)))
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def captured_hidden(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of `layers`, [N, L, width] each, of the forward pass inside the block."""
    modules, found, handles = dict(model.named_modules()), dict[str, Tensor](), []
    try:
        for layer in layers:
            if layer == FINAL:
                handles.append(_output_head(model).register_forward_pre_hook(_keep_input(found)))
            else:
                handles.append(modules[layer].register_forward_hook(_keep_output(found, layer)))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _output_head(model: Any) -> nn.Module:
    head = model.get_output_embeddings()
    if head is None:
        raise InputError(f"{type(model).__name__} has no output head, so it has no hidden state {FINAL!r}")
    return head  # type: ignore[no-any-return]


def _keep_input(found: dict[str, Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
        found[FINAL] = args[0].detach()

    return hook


def _keep_output(found: dict[str, Tensor], layer: str) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        tensor = output if isinstance(output, torch.Tensor) else output[0]
        found[layer] = tensor.detach()

    return hook


def _keep_weights(found: dict[str, Tensor], layer: str) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if weights is None:
            raise WorkerError(f"cache.attention: {layer} gave no attention weights; leave it out")
        found[layer] = weights.detach().float().mean(dim=1)

    return hook
