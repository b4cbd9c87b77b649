"""DeepSpeed: its configuration, the optimizer, and the engine around a student."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trainer.config import TrainConfig
from trainer.schedules import learning_rate
from trainer.spec import Device

_PRECISION = {"bfloat16": {"bf16": {"enabled": True}}, "float16": {"fp16": {"enabled": True}}, "float32": {}}


@dataclass(frozen=True)
class Place:
    """Where a rank stands."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: Device

    @property
    def torch_device(self) -> torch.device:
        """The device that this rank's tensors live on."""
        return torch.device("cpu") if self.device == "cpu" else torch.device("cuda", torch.cuda.current_device())


def prepare_process(place: Place) -> None:
    """Set what DeepSpeed reads from the environment, before it is imported, and share the cores between ranks."""
    os.environ["DS_ACCELERATOR"] = "cpu" if place.device == "cpu" else "cuda"
    os.environ["LOCAL_SIZE"] = str(place.local_world_size)
    os.environ["LOCAL_RANK"] = str(place.local_rank)
    os.environ["RANK"] = str(place.rank)
    os.environ["WORLD_SIZE"] = str(place.world_size)
    if place.device == "cpu":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // place.local_world_size))


def deepspeed_config(train: TrainConfig, world_size: int, universal: bool = False) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a run; `universal`: it resumes from a universal checkpoint.

    Master weights, moments and sums of gradients are float32 whatever the precision of the forward pass: small
    updates are lost when they are added to bfloat16 weights.
    """
    return {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps(train, world_size),
        "gradient_clipping": train.clip_norm,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": train.zero_stage,
            "overlap_comm": False,
            "contiguous_gradients": True,
            **({"offload_optimizer": {"device": "cpu"}} if train.offload else {}),
            **({"offload_param": {"device": "cpu"}} if train.offload == "parameters" else {}),
        },
        # torch's AdamW steps in host memory just as well, without a compiler.
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "steps_per_print": 1 << 60,
        "checkpoint": {"load_universal": universal},
        **_PRECISION[train.dtype],
        # Stage 0 has no float32 sums of half-precision gradients; its master weights are float32 all the same.
        **({} if train.zero_stage == 0 else {"data_types": {"grad_accum_dtype": "fp32"}}),
    }


def accumulation_steps(train: TrainConfig, world_size: int) -> int:
    """Return the micro-batches of one rank in one step."""
    return train.global_batch_size // (world_size * train.micro_batch_size)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return optimizer groups: matrices decay, vectors (norms, biases) do not."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def start_engine(module: nn.Module, train: TrainConfig, place: Place, universal: bool = False) -> Any:
    """Wrap a module into a DeepSpeed engine. Collective: every rank calls it with the same weights.

    `universal`: it is to load a universal checkpoint, see `trainer.reshard`.
    """
    import deepspeed

    quiet_deepspeed()
    # A shared-memory collective for inference alone; compiling it takes most of a minute on a fresh machine.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "gloo" if place.device == "cpu" else "nccl"
    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    optimizer = torch.optim.AdamW(
        parameter_groups(module, train.weight_decay), lr=learning_rate(train, 0), betas=train.adam_betas, eps=1e-8
    )
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=deepspeed_config(train, place.world_size, universal)
    )
    return engine


def quiet_deepspeed() -> None:
    """Keep DeepSpeed's progress lines out of the logs; its warnings stay."""
    import logging

    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)


@contextmanager
def whole_weights(module: nn.Module | None, partitioned: bool) -> Iterator[None]:
    """Put the parameters of a module that ZeRO 3 takes apart together while the context is open. Collective."""
    if module is None or not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        yield


def gradient_norm(engine: Any) -> float | None:
    """Return the norm of the gradients before clipping; call after the last backward pass of a step, before `step`.

    None where the engine computes it within the step; then `engine.get_global_grad_norm` has it afterwards.
    """
    if engine.zero_optimization() or engine.fp16_enabled() or engine.bfloat16_enabled():
        return None
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def set_learning_rate(engine: Any, value: float) -> None:
    """Set the learning rate of the next optimizer step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = value


def peak_memory_bytes(place: Place) -> int:
    """Return the most memory that this rank has held: of its GPU's allocator, or of the process on a CPU."""
    if place.device == "gpu":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
