"""What `dtype: auto` means: bfloat16 where the machine computes it natively, float32 where it would crawl."""

from pathlib import Path

from cluster.config import ClusterConfig, RunConfig

_CPU_INFO = Path("/proc/cpuinfo")
_DEVICES = Path("/dev")
_NATIVE_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""CPU features that multiply bfloat16 matrices in hardware: x86 with AVX-512 or AMX, Arm. Without any of them the
products are emulated, some 35 times slower than in float32."""


def resolve_precision(config: RunConfig) -> RunConfig:
    """Return the config with every `auto` precision replaced by what this machine, or its cluster, is good at.

    Looks at files of the system only, so that `plan` needs no torch.
    """
    dtype = "bfloat16" if _computes_bfloat16(config.cluster) else "float32"
    sections = {
        name: section.model_copy(update={"dtype": dtype})
        for name, section in (("teacher", config.teacher), ("train", config.train))
        if section.dtype == "auto"
    }
    stages = [
        stage.model_copy(update={"train": stage.train.model_copy(update={"dtype": dtype})})
        if stage.train.dtype == "auto"
        else stage
        for stage in config.stages
    ]
    return config.model_copy(update={**sections, "stages": stages})


def _computes_bfloat16(cluster: ClusterConfig) -> bool:
    if cluster.device == "gpu":
        return True
    if cluster.device == "auto" and (cluster.joins is not None or any(_DEVICES.glob("nvidia[0-9]*"))):
        return True
    return bool(_NATIVE_FLAGS & _cpu_flags())


def _cpu_flags() -> set[str]:
    try:
        lines = _CPU_INFO.read_text().splitlines()
    except OSError:
        return set()
    flags = (line.partition(":")[2].split() for line in lines if line.lower().startswith(("flags", "features")))
    return set(next(flags, []))
