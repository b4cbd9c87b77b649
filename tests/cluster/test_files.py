"""Files that people start from: the example configs, the cluster file, the docs."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.loader import load_config

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_is_a_valid_config(path: Path) -> None:
    load_config(str(path))


def test_the_quickstart_is_what_the_readme_says() -> None:
    config = load_config(str(ROOT / "examples" / "quickstart.yaml"))
    assert config.teacher.name == "embedded" and config.teacher.sharding == "zero3" and config.teacher.ranks == 2
    assert config.cache.kind == "hybrid"
    assert config.train.zero_stage == 2 and config.train.workers == 2
    assert config.curriculum.start["domain"] == 0.1 and config.curriculum.end["domain"] == 0.9
    assert config.evaluate.baseline


def test_the_configuration_page_is_current() -> None:
    script = ROOT / "docs" / "make_configuration.py"
    done = subprocess.run([sys.executable, str(script), "--check"], cwd=ROOT, check=False)
    assert done.returncode == 0, "run python docs/make_configuration.py"


def test_the_configuration_page_knows_every_key() -> None:
    spec = importlib.util.spec_from_file_location("make_configuration", ROOT / "docs" / "make_configuration.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = module.page()
    for key in ("data.sources.N.clean.term_map", "teacher.embedded.seed", "train.loss.hidden_map", "budget.cap"):
        assert f"| `{key}` |" in page
    assert "| none | " in page and "**required**" in page


def test_every_dependency_is_explained() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    page = (ROOT / "docs" / "dependencies.md").read_text()
    named = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    for requirement in named:
        name = requirement.split(">")[0].split("[")[0].split("=")[0].strip()
        assert f"`{name}" in page, f"say in docs/dependencies.md why {name} is there"
