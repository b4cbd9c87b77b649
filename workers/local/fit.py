"""Whether a teacher fits where it is to be loaded: reckoned from its folder before anything is loaded. No torch."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.errors import InputError
from storage.identity import parameter_count, weight_files
from workers.config import TeacherConfig
from workers.model_folder import model_facts

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_QUANTIZED_BYTES = {"int8": 1.0, "int4": 0.5}
_SAFETENSORS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that one rank needs at least; activations come on top."""

    weights: int
    """Its share of the weights on the device while scoring; all of them where nothing is sharded."""
    logits: int
    """Of one batch, in the teacher's precision."""
    loading: int
    """In host memory while loading, before the weights are split."""
    offloaded: int = 0
    """In host memory while scoring: its share of weights that are kept off the device."""
    loading_is_shared: bool = False
    """Whether the ranks of a node load the same pages: weights in the files' own precision are mapped, not copied."""

    @property
    def scoring(self) -> int:
        """Bytes on the device while scoring."""
        return self.weights + self.logits


def memory_need(folder: Path, teacher: TeacherConfig) -> MemoryNeed:
    """Return what a rank of this teacher needs; reads config.json and the headers of the weight files."""
    size = DTYPE_BYTES[teacher.dtype]
    weights = parameter_count(folder) * size
    if teacher.quantize is not None:
        # Embeddings and output head keep their precision.
        whole = sum(math.prod(entry["shape"]) for entry in _entries(folder) if _is_of_tokens(entry, folder))
        weights = int((parameter_count(folder) - whole) * _QUANTIZED_BYTES[teacher.quantize]) + whole * size
    held = weights if teacher.sharding == "none" else -(-weights // teacher.ranks)
    offloaded = held if teacher.offload is not None and teacher.offload.to == "cpu" else 0
    # ZeRO-3 gathers one layer at a time for all ranks' own batches; the logits of a batch are whole on each rank.
    logits = teacher.batch_tokens * model_facts(folder).num_outputs(teacher.task) * size
    return MemoryNeed(
        weights=0 if teacher.offload is not None else held,
        logits=logits,
        loading=weights,
        offloaded=offloaded,
        loading_is_shared=stored_dtypes(folder) == {teacher.dtype},
    )


def stored_dtypes(folder: Path) -> set[str]:
    """Return the precisions of a folder's safetensors, e.g. `bfloat16`."""
    return {_SAFETENSORS.get(entry["dtype"], entry["dtype"]) for entry in _entries(folder)}


def _entries(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield `{dtype, shape, …}` of each tensor, from the headers of the files alone."""
    for path in weight_files(folder):
        with path.open("rb") as file:
            head = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        yield from (entry for name, entry in head.items() if name != "__metadata__")


def _is_of_tokens(entry: dict[str, Any], folder: Path) -> bool:
    return bool(entry["shape"]) and entry["shape"][0] == model_facts(folder).vocab_size


def check_fit(
    need: MemoryNeed, teacher: TeacherConfig, host_free: int, device_free: int | None, ranks_here: int
) -> None:
    """Raise InputError, with what is needed and what there is, when a rank cannot work where it is.

    Args:
        need: what the rank needs.
        teacher: for the message.
        host_free: bytes of host memory free on this node, shared by the ranks on it.
        device_free: bytes free on the rank's own accelerator; none where it computes on the CPU.
        ranks_here: ranks of this replica on this node.
    """
    share = host_free // ranks_here
    # A rank that splits mapped weights holds its own share beside the pages that all ranks of the node map.
    loading = need.loading // ranks_here if need.loading_is_shared else need.loading
    asked = max(loading, need.offloaded) if device_free is not None else max(loading, need.scoring + need.offloaded)
    if asked > share:
        raise InputError(
            f"teacher {teacher.name} does not fit: each of the {ranks_here} ranks on this node needs {_gib(asked)} of "
            f"host memory ({_gib(loading)} to load the weights; {_gib(need.weights + need.offloaded)} of weights and "
            f"{_gib(need.logits)} of logits to score), {_gib(share)} is there for each; use larger nodes or a smaller "
            "teacher.batch_tokens"
        )
    if device_free is not None and need.scoring > device_free:
        raise InputError(
            f"teacher {teacher.name} does not fit: each rank needs {_gib(need.weights)} for its share of the weights "
            f"and {_gib(need.logits)} for the logits of {teacher.batch_tokens} tokens, its accelerator has "
            f"{_gib(device_free)} free; raise teacher.ranks (now {teacher.ranks}, sharding {teacher.sharding}), "
            "lower teacher.batch_tokens, or keep the weights elsewhere with teacher.offload"
        )


def host_free_bytes(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = _CGROUP) -> int:
    """Return the host memory that this process may still take: free on the machine, and within its cgroup's limit."""
    fields = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines() if ":" in line)
    free = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        limit = (cgroup / "memory.max").read_text(encoding="ascii").strip()
        used = int((cgroup / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return free
    return free if limit == "max" else min(free, int(limit) - used)


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**27 else f"{count / 2**20:.1f} MiB"
