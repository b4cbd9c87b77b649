"""What all rank actors have in common: their place in a replica, their part of the model, signs of life."""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.errors import WorkerError
from workers.config import TeacherConfig
from workers.model_folder import resolve_model


@dataclass(frozen=True)
class RankPlace:
    """Where a rank stands in its replica."""

    rank: int
    num_ranks: int
    local_rank: int
    """Number of the rank among those of its node."""
    num_local_ranks: int
    master_address: str
    master_port: int
    device: str
    """`cpu` or `cuda`."""
    threads: int
    """CPU threads for this rank."""


class BatchTooLargeError(WorkerError):
    """A batch ran out of memory on a replica of several ranks, which cannot go on; a new one takes smaller batches."""


class BaseRank:
    """One rank of a replica, made a Ray actor by `workers.fleet`.

    `load` and `score` of the classes derived from it run one at a time; `commit` runs beside them, so that a unit is
    encoded and uploaded while the next one is worked on; `beat` answers at any time.
    """

    def __init__(self) -> None:
        self._progress = 0

    def beat(self) -> int:
        """Return a number that rises with every batch and every commit."""
        return self._progress

    def address(self) -> tuple[str, str, int, int]:
        """Return this node's id, its address, a port that is free on it now, and its number of CPUs."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            port = int(probe.getsockname()[1])
        node = ray.get_runtime_context().get_node_id()
        return node, ray.util.get_node_ip_address(), port, len(os.sched_getaffinity(0))

    def _advance(self) -> None:
        self._progress += 1

    def _load_model(
        self,
        teacher: TeacherConfig,
        folder: Path,
        place: RankPlace,
        attention: str | None = None,
        inspect: Callable[[Any], None] = lambda model: None,
    ) -> Any:
        """Load and split the model; returns a `sharding.ShardReport`. `inspect` sees the whole model before.

        Raises:
            InputError: the model does not fit, cannot be loaded, or `inspect` refuses it.
        """
        _set_environment(place)
        import torch

        torch.set_num_threads(place.threads)
        from workers.local.fit import check_fit, host_free_bytes, memory_need
        from workers.local.memory import keep_freed_memory
        from workers.local.sharding import load_model, shard_model

        keep_freed_memory()
        self.place = place
        self.device = torch.device(place.device)
        if place.num_ranks > 1 or teacher.offload is not None:
            import deepspeed

            if teacher.sharding != "tensor_parallel":
                # A shared-memory collective that only tensor parallelism uses; compiling it takes most of a minute.
                deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            deepspeed.init_distributed(dist_backend="nccl" if place.device == "cuda" else "gloo", verbose=False)
        device_free = torch.cuda.mem_get_info()[0] if self.device.type == "cuda" else None
        check_fit(memory_need(folder, teacher), teacher, host_free_bytes(), device_free, place.num_local_ranks)
        model = load_model(folder, teacher, self.device, attention)
        inspect(model)
        self.model, report = shard_model(model, teacher, place.rank, self.device)
        return report

    def _same_everywhere(self, found: bool) -> bool:
        """Return rank 0's answer on every rank, since all must do the same."""
        import torch

        if self.place.num_ranks == 1:
            return found
        answer = torch.tensor([found], dtype=torch.int32, device=self.device)
        torch.distributed.broadcast(answer, 0)
        return bool(answer.item())

    def _smaller(self, error: Exception, limit: int, least: int, what: str, remedy: str) -> int:
        """Return half of the limit of a batch's tokens when memory ran out; `what` names the least batch, in words.

        Raises the error itself when it is another one, WorkerError when the limit cannot be halved, and
        BatchTooLargeError on a replica of several ranks, which cannot go on.
        """
        import gc

        import torch

        from workers.local.memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise error
        if limit <= least:
            raise WorkerError(
                f"{what} runs out of memory on rank {self.place.rank} ({_first_line(error)}); {remedy}"
            ) from error
        if self.place.num_ranks > 1:
            raise BatchTooLargeError(f"a batch of {limit} tokens runs out of memory: {_first_line(error)}") from error
        error.__traceback__ = None  # it holds the tensors of the failed batch
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return limit // 2


def folder_here(folder: Path, teacher: TeacherConfig, revision: str | None) -> Path:
    """Return a model's folder on this node: the driver's, or where the hub puts the same commit."""
    return folder if folder.is_dir() else resolve_model(teacher.name, revision)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _set_environment(place: RankPlace) -> None:
    """Tell torch.distributed and DeepSpeed where this rank stands, before either is imported."""
    on_cpu = place.device == "cpu"
    os.environ.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.num_ranks),
        # Ray shows each actor its own GPU alone, which therefore is number 0.
        LOCAL_RANK=str(place.local_rank if on_cpu else 0),
        # DeepSpeed's CPU collectives crash without LOCAL_SIZE.
        LOCAL_SIZE=str(place.num_local_ranks),
        LOCAL_WORLD_SIZE=str(place.num_local_ranks),
        MASTER_ADDR=place.master_address,
        MASTER_PORT=str(place.master_port),
    )
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
