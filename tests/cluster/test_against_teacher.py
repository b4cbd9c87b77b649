"""Capture with a projection and `verify --against-teacher` as commands; the teacher runs in this process."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.commands import stages, verify
from cluster.terminal import Terminal
from cluster.workspace import Workspace
from storage.reader import Dataset
from storage.tokenizer import Tokenizer
from storage.verify import verify_dataset
from tests.cluster.conftest import Ended, World
from tests.workers.here import capture_here
from tests.workers.tiny import tiny_model


@pytest.fixture
def here(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """The world with a real, tiny teacher, whose captures run in this process."""
    for module in ("workers.coordinator", "workers.scratch"):
        monkeypatch.setattr(f"{module}.capture", capture_here)
    monkeypatch.setattr(Workspace, "ray", lambda self, task: SimpleNamespace(device="cpu", logs="", local=True))
    vocab_size = Tokenizer.load(world.teacher).vocab_size
    tiny_model("qwen2", vocab_size=vocab_size, spread=0.1).save_pretrained(world.teacher)
    world.values["teacher"]["dtype"] = "float32"
    world.values["cache"] |= {"hidden": ["final"], "hidden_dtype": "int8", "hidden_projection": 6, "hidden_every": 2}
    return world


def run(world: World, capsys: pytest.CaptureFixture[str], command: Any) -> Ended:
    code = Terminal(True, False).run(lambda out: command(out, world.config_path, [], str(world.run_dir)))
    text = capsys.readouterr()
    return Ended(code, text.out, text.err)


def captured(out: Terminal, config: str, overrides: list[str], run_dir: str) -> dict[str, Any]:
    return stages(out, config, overrides, run_dir, "capture")


def test_a_capture_fits_its_projection_once_and_leaves_a_card(here: World, capsys: pytest.CaptureFixture[str]) -> None:
    first = run(here, capsys, captured)
    assert first.code == 0, first.err
    assert first.json["capture"]["scored_samples"] > 0 and "fitting the projection" in first.err
    dataset = Dataset.open(here.config.cache.url)
    capture = dataset.identity.capture
    assert capture.hidden_projection == 6 and capture.projection is not None
    assert (Path(here.config.cache.url) / "README.md").is_file()
    assert verify_dataset(here.config.cache.url).ok
    again = run(here, capsys, captured)
    assert again.code == 0 and again.json["capture"]["scored_samples"] == 0 and "fitting" not in again.err
    assert Dataset.open(here.config.cache.url).info.fingerprint == dataset.info.fingerprint


def test_verify_scores_samples_again_and_ends_with_code_1_beyond_the_limit(
    here: World, capsys: pytest.CaptureFixture[str]
) -> None:
    early = run(here, capsys, lambda *given: verify(*given, against_teacher=3))
    assert early.code == 2 and "no dataset at" in early.err
    run(here, capsys, captured)
    found = run(here, capsys, lambda *given: verify(*given, against_teacher=3))
    assert found.code == 0, found.err
    told = found.json["against_teacher"]
    assert told["samples"] == 3 and told["ok"] and told["difference"]["spread"]["p99"] <= told["limit"]
    for part in ("3 samples scored again", "dataset – teacher", "teacher – itself", "within the limit of 0.0500"):
        assert part in found.err
    assert not [path for path in (here.run_dir / "verify").rglob("*") if path.is_file()]
    strict = run(here, capsys, lambda *given: verify(*given, against_teacher=3, bound=0.0))
    spread = strict.json["against_teacher"]
    assert strict.code == (0 if spread["ok"] else 1)
    assert spread["limit"] == 3 * spread["control"]["spread"]["p99"]
