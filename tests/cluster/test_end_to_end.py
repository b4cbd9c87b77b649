"""The real program on real text: a whole run, killed on the way, gone on with, and typed once more."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from cluster.loader import load_config
from cluster.reaper import session_processes
from cluster.selection import capture_rows
from storage.reader import Dataset
from storage.sample_set import SampleSet
from trainer.curriculum import planned_order

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

KILLS = int(os.environ.get("LECTERN_TEST_KILLS", "1"))
"""Random kills in each of capture and training; every one costs a start of Ray."""

CONFIG: dict[str, Any] = {
    "data": {
        "sources": [
            {"name": "general", "path": "embedded:general", "max_documents": 50},
            {"name": "domain", "path": "embedded:domain", "max_documents": 50},
        ],
        "window_tokens": 128,
        "heldout_fraction": 0.2,
    },
    "teacher": {
        "sharding": "zero3",
        "ranks": 2,
        "embedded": {"vocab_size": 512, "hidden_size": 64, "layers": 2, "train_tokens": 5000, "window_tokens": 128},
    },
    "cache": {"unit_tokens": 2048, "top_k": 8, "draws": 6},
    "student": {
        "config": {
            "model_type": "qwen2",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        }
    },
    "curriculum": {"start": {"general": 0.9, "domain": 0.1}, "end": {"general": 0.1, "domain": 0.9}},
    "train": {"steps": 30, "global_batch_size": 8, "micro_batch_size": 4, "warmup_steps": 2, "checkpoint_every": 5},
    "evaluate": {"samples_per_source": 8, "shown_samples": 1},
}


@dataclass(frozen=True)
class Place:
    """Where one run lives, and the command that runs it."""

    folder: Path

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def config_path(self) -> Path:
        return self.folder / "run.yaml"

    def processes(self) -> set[int]:
        """Ids of all processes that the run has started: each inherits this run's own cache folder."""
        return set(session_processes(f"LECTERN_CACHE={self.folder / 'home'}", 0))

    def start(self) -> "subprocess.Popen[str]":
        """Start `lectern run` as a user would."""
        log = (self.folder / "log.txt").open("a")
        command = [sys.executable, "-m", "cluster.cli", "run", str(self.config_path), "--run-dir", str(self.run_dir)]
        environment = {**os.environ, "LECTERN_CACHE": str(self.folder / "home")}
        return subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, stderr=log, text=True, env=environment)

    def finish(self) -> dict[str, Any]:
        """Run to the end and return the JSON of the last line."""
        process = self.start()
        out, _ = process.communicate(timeout=400)
        assert process.returncode == 0, (self.folder / "log.txt").read_text()[-4000:]
        return dict(json.loads(out.splitlines()[-1]))

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The whole lines of a JSON-lines file of the run so far."""
        path = self.run_dir / name
        raw = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in raw]

    def events(self, name: str) -> list[dict[str, Any]]:
        """The events of one name so far."""
        return [event for event in self.lines("events.jsonl") if event["event"] == name]

    def kill_when(self, work_began: str, reached: Callable[[], bool]) -> None:
        """Start the run, kill -9 its driver in the stage that `work_began` opens, as soon as `reached` holds there.

        Waits until its processes are gone. What earlier attempts left in the run directory may satisfy `reached`
        from the start, so this attempt's own event is waited for first.
        """
        before = len(self.events(work_began))
        process = self.start()
        deadline = time.monotonic() + 300
        while len(self.events(work_began)) == before or not reached():
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline, (self.folder / "log.txt").read_text()[-4000:]
            time.sleep(0.02)
        assert len(self.processes()) > 5, "a run in full swing has processes of its own"
        started = set(session_processes("LECTERN_TEST=none", process.pid)) | self.processes()
        process.send_signal(signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + 12
        while left := {pid for pid in started if Path(f"/proc/{pid}/cmdline").exists() and not is_zombie(pid)}:
            assert time.monotonic() < deadline, f"processes outlived their driver: {left}"
            time.sleep(0.2)


def is_zombie(pid: int) -> bool:
    """Tell whether a process has ended and only waits for its parent to notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.fixture
def place(tmp_path: Path) -> Place:
    made = Place(tmp_path)
    values = {**CONFIG, "cache": {**CONFIG["cache"], "url": str(tmp_path / "dataset")}}
    made.config_path.write_text(yaml.safe_dump(values))
    return made


def test_a_run_killed_in_capture_and_in_training_ends_as_an_unbroken_one(place: Place) -> None:
    chance = random.Random()
    for units in (chance.randint(1, 3) for _ in range(KILLS)):
        before = len(place.events("unit_done"))
        place.kill_when("replica_started", lambda wanted=before + units: len(place.events("unit_done")) >= wanted)
    for step in sorted(chance.sample(range(9, 27), KILLS)):
        place.kill_when("train_start", lambda wanted=step: last_step(place, "student") >= wanted)

    result = place.finish()

    config = load_config(str(place.config_path))
    samples = SampleSet.open(place.run_dir / "samples")
    dataset = Dataset.open(config.cache.url)
    wanted = capture_rows(samples, config.evaluate.samples_per_source)
    held = sorted(bytes(row) for row in dataset.catalog.sample_ids)
    assert held == sorted(samples.ids(wanted))
    assert dataset.catalog.num_duplicates == 0
    assert sum(record.rows for record in dataset.manifests) == len(wanted)
    assert result["capture"]["reused_samples"] > 0

    unbroken = planned_order(samples, config.curriculum, config.train).digest().hex()
    assert result["student"]["order_digest"] == unbroken
    assert result["baseline"]["order_digest"] == unbroken
    assert result["student"]["resumed_from"] >= 5
    steps = [line["step"] for line in place.lines("metrics.jsonl") if line["run"] == "student"]
    assert steps == list(range(1, config.train.steps + 1))
    check_report(place)

    again(place)


def last_step(place: Place, run: str) -> int:
    """The last step of a run that is in metrics.jsonl."""
    steps = [line["step"] for line in place.lines("metrics.jsonl") if line["run"] == run]
    return max(steps, default=0)


def check_report(place: Place) -> None:
    """The report tells what happened, in finite numbers."""
    report = json.loads((place.run_dir / "report.json").read_text())
    assert report["train"]["steps"] == 30 and report["train"]["tokens_per_s"] > 0
    shares = [row["realised"]["domain"] for row in report["train"]["mixture"]]
    assert shares[0] < 0.3 < 0.7 < shares[-1]
    for model in ("teacher", "student", "baseline"):
        losses = report["eval"][model]["loss"]
        assert set(losses) == {"general", "domain"} and np.isfinite(list(losses.values())).all()
    held = [rank["parameters_held"] / rank["parameters_total"] for rank in report["capture"]["ranks"]]
    assert len(held) == 2 and all(share < 0.75 for share in held)
    assert "<svg" in (place.run_dir / "report.html").read_text()
    assert (place.run_dir / "student" / "model.safetensors").exists()
    assert (place.run_dir / "student" / "tokenizer.json").exists()


def again(place: Place) -> None:
    """The same command once more scores nothing, trains nothing and does not even start Ray."""
    rays, fits = len(place.events("ray_started")), len(place.events("train_start"))
    weights = (place.run_dir / "student" / "model.safetensors").stat().st_mtime_ns
    began = time.monotonic()
    result = place.finish()
    assert time.monotonic() - began < 60
    assert result["capture"]["scored_samples"] == 0 and result["report"]["cache"]["scored_samples"] == 0
    assert (len(place.events("ray_started")), len(place.events("train_start"))) == (rays, fits)
    assert (place.run_dir / "student" / "model.safetensors").stat().st_mtime_ns == weights
    assert not place.processes()
