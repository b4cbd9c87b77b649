"""Loads a model and splits it over the ranks of one replica with DeepSpeed."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from storage.classes import CALLED, auto_model
from storage.errors import InputError
from workers.config import OffloadConfig, TeacherConfig

REPLICATE_BELOW = 2048
"""ZeRO-3 keeps parameters of fewer values (norms, biases) whole on each rank: gathering them costs more."""


MOST_WHOLE = 0.95
"""A rank that holds a larger share than this after sharding was not sharded."""


@dataclass(frozen=True)
class ShardReport:
    """What one rank holds after sharding."""

    rank: int
    parameters_held: int
    parameters_total: int
    replicated: list[str]
    """Modules whose parameters every rank holds whole, although there are several ranks."""


def load_model(folder: Path, teacher: TeacherConfig, device: torch.device, attention: str | None = None) -> nn.Module:
    """Load a model folder in the teacher's precision, ready to score; InputError when it cannot be loaded.

    `attention` asks for an implementation, e.g. `eager`, which alone tells its weights. A model that ZeRO-3 will split
    stays in host memory: its safetensors are mapped, so that the ranks of a node share their pages, and each parameter
    visits the accelerator alone.
    """
    how: dict[str, Any] = {}
    if teacher.quantize is not None:
        how = {"quantization_config": _quantization(teacher), "device_map": {"": device}}
    try:
        model, found = auto_model(teacher.task).from_pretrained(
            folder,
            dtype=getattr(torch, teacher.dtype),
            local_files_only=True,
            use_safetensors=True,
            attn_implementation=attention,
            output_loading_info=True,
            **how,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"teacher {teacher.name} at {folder} cannot be loaded as a {CALLED[teacher.task]}: {reason}; "
            "check the folder's config.json and safetensors files"
        ) from error
    _check_complete(found, teacher, folder)
    if teacher.quantize is None and not uses_zero3(teacher):
        model = model.to(device)
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def uses_zero3(teacher: TeacherConfig) -> bool:
    """Tell whether a teacher runs under ZeRO-3: over several ranks, or with its weights elsewhere."""
    return teacher.sharding == "zero3" and (teacher.ranks > 1 or teacher.offload is not None)


def _quantization(teacher: TeacherConfig) -> Any:
    """Return transformers' settings of a rounding; InputError where the packages that do it are not installed."""
    from transformers import BitsAndBytesConfig

    lacking = [name for name in ("accelerate", "bitsandbytes") if find_spec(name) is None]
    if lacking:
        raise InputError(
            f"teacher.quantize {teacher.quantize} needs {' and '.join(lacking)}, not installed on this node: "
            f"`pip install {' '.join(lacking)}`, or leave teacher.quantize out"
        )
    if teacher.quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    dtype = getattr(torch, teacher.dtype)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _check_complete(found: dict[str, Any], teacher: TeacherConfig, folder: Path) -> None:
    """Refuse weights that transformers would replace by random ones with a mere warning."""
    missing = [*found["missing_keys"], *(str(key) for key in found["mismatched_keys"])]
    if missing:
        raise InputError(
            f"teacher {teacher.name} at {folder} lacks {len(missing)} of its weights, or has them in another shape: "
            f"{', '.join(sorted(missing)[:3])}; the safetensors files are damaged, or are not those of its config.json"
        )


def shard_model(
    model: nn.Module, teacher: TeacherConfig, rank: int, device: torch.device | None = None
) -> tuple[nn.Module, ShardReport]:
    """Split a loaded model over `teacher.ranks` ranks; torch.distributed must be running where there are several.

    `device` is what the rank computes on; none means the CPU.
    """
    device = device or torch.device("cpu")
    whole = {name: parameter.numel() for name, parameter in model.named_parameters()}
    if teacher.sharding == "tensor_parallel" and teacher.ranks > 1:
        model = _tensor_parallel(model, teacher)
    elif uses_zero3(teacher):
        model = _zero3(model, teacher, device)
    held = {name: _values_held(parameter) for name, parameter in model.named_parameters()}
    total = sum(whole.values())
    kept_whole = [name for name, values in held.items() if teacher.ranks > 1 and values == whole.get(name)]
    report = ShardReport(rank, sum(held.values()), total, summarize_names(kept_whole))
    check_split(report, teacher, type(model).__name__)
    return model, report


def check_split(report: ShardReport, teacher: TeacherConfig, architecture: str) -> None:
    """Raise InputError when splitting over several ranks has left nearly everything whole on each."""
    if teacher.ranks > 1 and report.parameters_held > MOST_WHOLE * report.parameters_total:
        raise InputError(
            f"teacher.sharding {teacher.sharding} does not split {architecture}: each of {teacher.ranks} ranks holds "
            f"{report.parameters_held / report.parameters_total:.0%} of the parameters, whole on all of them are "
            f"{', '.join(report.replicated[:4])}; use sharding zero3, or none with ranks 1"
        )


def _tensor_parallel(model: nn.Module, teacher: TeacherConfig) -> nn.Module:
    import deepspeed

    engine = deepspeed.init_inference(
        model,
        tensor_parallel={"tp_size": teacher.ranks},
        dtype=getattr(torch, teacher.dtype),
        replace_with_kernel_inject=False,
    )
    return engine.module  # type: ignore[no-any-return]


def _zero3(model: nn.Module, teacher: TeacherConfig, device: torch.device) -> nn.Module:
    import deepspeed

    zero: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": REPLICATE_BELOW}
    if teacher.offload is not None:
        zero["offload_param"] = _offload(teacher.offload)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": teacher.dtype == "bfloat16"},
        "fp16": {"enabled": teacher.dtype == "float16"},
    }
    if teacher.offload is not None:
        # Split first, parameter by parameter: `initialize` would move the whole model to the accelerator.
        deepspeed.zero.Init(module=model, config_dict_or_path=settings, dtype=getattr(torch, teacher.dtype))
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    return engine.module.eval()  # type: ignore[no-any-return]


def _offload(config: OffloadConfig) -> dict[str, Any]:
    """Return DeepSpeed's settings of an offload; InputError where it cannot read files asynchronously."""
    from deepspeed.accelerator import get_accelerator

    on_cpu = get_accelerator().device_name() == "cpu"
    if config.to == "cpu":
        return {"device": "cpu", "pin_memory": not on_cpu}
    builder = None if on_cpu else get_accelerator().create_op_builder("AsyncIOBuilder")
    if builder is None or not builder.is_compatible():
        raise InputError(
            "teacher.offload.to nvme needs an accelerator and DeepSpeed's async_io, which does not build on this node "
            "(`ds_report` says why; Debian's libaio-dev is what it lacks as a rule); use `to: cpu`"
        )
    return {"device": "nvme", "nvme_path": config.folder, "pin_memory": True}


def _values_held(parameter: Any) -> int:
    """Return how many values of a parameter this rank keeps between forwards."""
    if not hasattr(parameter, "ds_tensor"):
        return int(parameter.numel())
    return int(parameter.ds_numel if parameter.ds_persist else parameter.ds_tensor.numel())


def summarize_names(names: list[str]) -> list[str]:
    """Shorten parameter names of numbered layers to patterns, e.g. `model.layers.*.mlp.gate.weight`."""
    patterns = (".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names)
    return sorted(set(patterns))
