"""The rooms import one way only, nothing uses pickle, and what must start fast imports nothing heavy."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALLOWED = {
    "storage": {"storage"},
    "workers": {"workers", "storage"},
    "trainer": {"trainer", "storage"},
    "cluster": {"cluster", "workers", "trainer", "storage"},
}
FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
HEAVY = ("torch", "deepspeed", "transformers", "ray")
LIGHT = ["storage.config", "workers.config", "trainer.config", "cluster.config", "storage.reader", "storage.writer"]


def _modules() -> list[Path]:
    return sorted(path for room in ALLOWED for path in (ROOT / room).rglob("*.py"))


def _imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            yield str(node.module), node.lineno


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    for name, line in _imports(ast.parse(path.read_text())):
        top = name.split(".")[0]
        assert top not in ALLOWED or top in ALLOWED[room], f"{path}:{line}: {room} must not import {name}"
        assert top not in FORBIDDEN, f"{path}:{line}: {name} can run foreign code; use JSON, Parquet or safetensors"


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_evaluates_or_loads_foreign_code(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in {"eval", "exec", "torch.load"}, f"{path}:{node.lineno}: {name}"
            for keyword in node.keywords:
                trusted = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                assert keyword.arg != "trust_remote_code" or trusted, f"{path}:{node.lineno}: trust_remote_code"


def test_light_modules_import_nothing_heavy() -> None:
    script = f"import sys, {', '.join(LIGHT)}; print(*(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
