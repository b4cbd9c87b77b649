"""`dtype: auto` becomes what the machine computes natively."""

from pathlib import Path

import pytest

from cluster import precision
from cluster.config import RunConfig
from cluster.precision import resolve_precision

X86 = "processor : 0\nflags\t\t: fpu avx2 {more}\n\nprocessor : 1\nflags\t\t: fpu avx2 {more}\n"


def config(**cluster: object) -> RunConfig:
    values = {
        "data": {"sources": [{"name": "general", "path": "embedded:general"}]},
        "cache": {"url": "cache"},
        "student": {"path": "student"},
        "cluster": cluster,
    }
    return RunConfig.model_validate(values)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without bfloat16 and without GPU, described in a folder."""
    monkeypatch.setattr(precision, "_CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(precision, "_DEVICES", tmp_path)
    (tmp_path / "cpuinfo").write_text(X86.format(more="avx512f"))
    return tmp_path


@pytest.mark.parametrize(
    ("cpu", "expected"),
    [
        (X86.format(more="avx512f"), "float32"),
        (X86.format(more="avx512_bf16"), "bfloat16"),
        (X86.format(more="amx_bf16 amx_tile"), "bfloat16"),
        ("Features\t: fp asimd bf16\n", "bfloat16"),
        ("", "float32"),
    ],
)
def test_auto_follows_the_cpu(machine: Path, cpu: str, expected: str) -> None:
    (machine / "cpuinfo").write_text(cpu)
    resolved = resolve_precision(config())
    assert (resolved.teacher.dtype, resolved.train.dtype) == (expected, expected)


@pytest.mark.parametrize(
    ("cluster", "gpu_here", "expected"),
    [
        ({}, True, "bfloat16"),
        ({"device": "cpu"}, True, "float32"),
        ({"device": "gpu"}, False, "bfloat16"),
        ({"address": "auto"}, False, "bfloat16"),
        ({"address": "auto", "device": "cpu"}, False, "float32"),
    ],
)
def test_auto_follows_the_device(machine: Path, cluster: dict[str, object], gpu_here: bool, expected: str) -> None:
    if gpu_here:
        (machine / "nvidia0").touch()
    assert resolve_precision(config(**cluster)).teacher.dtype == expected


def test_a_named_precision_stays(machine: Path) -> None:
    named = config().model_copy(update={"teacher": config().teacher.model_copy(update={"dtype": "float16"})})
    resolved = resolve_precision(named)
    assert (resolved.teacher.dtype, resolved.train.dtype) == ("float16", "float32")
