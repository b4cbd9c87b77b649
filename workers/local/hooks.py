"""Takes hidden states out of a running model by forward hooks on named layers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from storage.errors import InputError
from storage.heads import FINAL


def check_layers(model: nn.Module, layers: Sequence[str]) -> None:
    """Raise InputError, listing what there is, unless every layer is `final` or a module of the model."""
    modules = dict(model.named_modules())
    for layer in layers:
        if layer != FINAL and layer not in modules:
            blocks = [name for name in modules if name.split(".")[-1].isdigit() and name.count(".") <= 2]
            raise InputError(f"cache.hidden: the teacher has no layer {layer!r}; there are {FINAL!r} and {blocks}")


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
