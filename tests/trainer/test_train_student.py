"""`train_student` on a real local Ray: results, skipping, refusals, and kills at any moment."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.config import ClusterConfig
from cluster.ray_session import ray_session
from storage.errors import InputError, WorkerError
from storage.object_store import Store
from storage.tokenizer import Tokenizer
from tests.processes import own_processes
from tests.trainer.ranks import metrics_of
from tests.trainer.tiny import TinyRun
from trainer.checkpoint import newest
from trainer.config import StudentConfig
from trainer.curriculum import planned_order
from trainer.curriculum_config import CurriculumConfig
from trainer.result import TrainResult
from trainer.runner import train_student
from trainer.spec import Training
from trainer.stages import baseline_of

ROOT = Path(__file__).resolve().parents[2]

LONG = {"steps": 90, "workers": 2, "micro_batch_size": 2, "checkpoint_every": 7, "global_batch_size": 16}


def refused(run: TinyRun, run_dir: Path, match: str, **changes: Any) -> None:
    with pytest.raises(InputError, match=match):
        train_student(Training(**{**run.arguments(run_dir), **changes}), print)
    assert not (run_dir / "checkpoints").exists()


def test_what_does_not_fit_is_refused_before_ray_is_touched(
    hybrid_run: TinyRun, hidden_run: TinyRun, tmp_path: Path
) -> None:
    train = hybrid_run.arguments(tmp_path)["train"]
    refused(hybrid_run, tmp_path, "names 'code'; the sources are", curriculum=CurriculumConfig(start={"code": 1}))
    refused(hybrid_run, tmp_path, "more than curriculum.max_epochs", curriculum=CurriculumConfig(max_epochs=0.1))
    refused(hybrid_run, tmp_path, "captured with another identity", identity=hidden_run.identity)
    refused(hybrid_run, tmp_path, "no dataset", dataset_url=str(tmp_path / "nowhere"))
    refused(hybrid_run, tmp_path, "no prepared samples", samples_url=str(tmp_path / "nowhere"))
    small = StudentConfig(config={"model_type": "qwen2", "vocab_size": 9})
    refused(hybrid_run, tmp_path, "vocabulary has 9 entries", student=small)
    hidden = train.loss.model_copy(update={"hidden": 0.1, "hidden_map": {"model.layers.7": "final"}})
    with_hidden = train.model_copy(update={"loss": hidden})
    refused(hidden_run, tmp_path, r"of layer 'model.layers.7'; it holds final, model.layers.1", train=with_hidden)
    hidden = hidden.model_copy(update={"hidden_map": {"final": "model.layers.9"}})
    with_hidden = train.model_copy(update={"loss": hidden})
    refused(hidden_run, tmp_path, r"the student has no layer 'model.layers.9'", train=with_hidden)


def test_attention_that_is_not_kept_or_not_there_is_refused(hidden_run: TinyRun, tmp_path: Path) -> None:
    train = hidden_run.arguments(tmp_path)["train"]
    loss = train.loss.model_copy(update={"attention": 0.1, "attention_map": {"model.layers.1": "model.layers.0"}})
    with_maps = train.model_copy(update={"loss": loss})
    refused(hidden_run, tmp_path, r"holds no attention of layer 'model.layers.1'; it holds none", train=with_maps)


def test_samples_without_targets_are_refused(hybrid_run: TinyRun, tmp_path: Path) -> None:
    copy, source = Store(tmp_path / "dataset"), Store(hybrid_run.dataset_url)
    for key in source.list():
        if "unit2" not in key:
            copy.write(key, source.read(key))
    refused(hybrid_run, tmp_path, r"\d+ of the samples that the curriculum uses are not in", dataset_url=copy.url)


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    with ray_session(ClusterConfig(device="cpu"), 2):
        yield


@pytest.mark.slow
def test_student_and_baseline_end_with_models_metrics_and_the_same_order(
    hybrid_run: TinyRun, local_ray: None, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    arguments = hybrid_run.arguments(tmp_path, workers=2, steps=12, dtype="bfloat16")
    events: list[dict[str, Any]] = []
    student = train_student(Training(**arguments), events.append)
    hard = {**arguments, "name": "baseline", "train": baseline_of(arguments["train"])}
    baseline = train_student(Training(**hard), print)
    order = planned_order(hybrid_run.samples, arguments["curriculum"], arguments["train"])
    assert student.order_digest == baseline.order_digest == order.digest().hex()
    assert (student.steps, student.resumed_from) == (12, 0)
    assert student.tokens == baseline.tokens > 12 * 8 * 10
    assert 0 <= student.data_wait_fraction < 0.5
    assert baseline.losses["kl"] == 0 < student.losses["kl"]
    steps = [event["step"] for event in events if event["event"] == "train_step"]
    assert steps == list(range(1, 13))
    assert [event["event"] for event in (events[0], events[-1])] == ["train_start", "train_done"]
    for name in ("student", "baseline"):
        lines = [line for line in metrics_of(tmp_path) if line["run"] == name]
        assert [line["step"] for line in lines] == steps
        assert lines[0]["loss"] > lines[-1]["loss"]
        assert lines[0]["planned"] == {"general": 0.9, "domain": pytest.approx(0.1)}
        folder = tmp_path / name
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert sum(p.numel() for p in model.parameters()) == student.parameters
        assert Tokenizer.load(folder).digest == hybrid_run.identity.tokenizer.digest
        assert torch.isfinite(model(torch.arange(8)[None]).logits).all()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert train_student(Training(**arguments), pytest.fail) == student
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    other = arguments["train"].model_copy(update={"learning_rate": 1.0})
    with pytest.raises(InputError, match=r"was made with train.learning_rate = 0.003, this run has 1.0"):
        train_student(Training(**{**arguments, "train": other}), print)


@pytest.mark.slow
def test_a_loss_that_is_not_a_number_ends_the_run_at_once_and_keeps_the_checkpoint(
    hybrid_run: TinyRun, local_ray: None, tmp_path: Path
) -> None:
    arguments = hybrid_run.arguments(tmp_path, workers=2, steps=12, checkpoint_every=1, dtype="float32")
    wild = arguments["train"].model_copy(update={"learning_rate": 1e30, "clip_norm": 1e30, "warmup_steps": 0})
    with pytest.raises(WorkerError, match=r"of step \d is not finite; samples [0-9a-f]{32}"):
        train_student(Training(**{**arguments, "train": wild}), print)
    assert newest(Store(tmp_path / "checkpoints" / "student"))[1].step >= 1
    assert not (tmp_path / "student").exists()


@pytest.mark.slow
def test_an_elastic_run_trains_with_the_ranks_that_there_are(
    hybrid_run: TinyRun, local_ray: None, tmp_path: Path
) -> None:
    fields = {"steps": 4, "workers": 4, "micro_batch_size": 2, "global_batch_size": 48, "checkpoint_every": 2}
    result = train_student(Training(**hybrid_run.arguments(tmp_path, **fields, min_workers=1)), print)
    found = newest(Store(tmp_path / "checkpoints" / "student"))
    assert found is not None and found[1].world_size == 2  # this Ray has room for two
    plan = hybrid_run.arguments(tmp_path, **fields)
    order = planned_order(hybrid_run.samples, plan["curriculum"], plan["train"])
    assert result.order_digest == order.digest().hex()


@pytest.fixture(scope="module")
def unbroken(
    hybrid_run: TinyRun, local_ray: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, TrainResult]:
    run_dir = tmp_path_factory.mktemp("unbroken")
    return run_dir, train_student(Training(**hybrid_run.arguments(run_dir, **LONG)), print)


def assert_same_run(run_dir: Path, result: TrainResult, unbroken: tuple[Path, TrainResult]) -> None:
    whole_dir, whole = unbroken
    assert result.order_digest == whole.order_digest
    assert result.tokens == whole.tokens
    lines, expected = metrics_of(run_dir), metrics_of(whole_dir)
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    np.testing.assert_allclose([line["loss"] for line in lines], [line["loss"] for line in expected], rtol=1e-5)


@pytest.mark.slow
def test_a_killed_rank_is_replaced_and_the_run_ends_as_if_unbroken(
    hybrid_run: TinyRun, unbroken: tuple[Path, TrainResult], tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill_once(event: dict[str, Any]) -> None:
        if event["event"] == "train_step" and event["step"] >= 20 and not killed:
            killed.append(own_processes("ray::RayTrainWorker")[-1])
            os.kill(killed[-1], signal.SIGKILL)

    result = train_student(Training(**hybrid_run.arguments(tmp_path, **LONG)), kill_once)
    assert killed
    assert_same_run(tmp_path, result, unbroken)


@pytest.mark.slow
def test_a_killed_driver_is_resumed_by_the_same_call(
    hybrid_run: TinyRun, unbroken: tuple[Path, TrainResult], tmp_path: Path
) -> None:
    at_step = 40
    arguments = hybrid_run.arguments(tmp_path / "run", **LONG)
    (tmp_path / "arguments").write_bytes(pickle.dumps(arguments))
    command = [sys.executable, "-m", "tests.trainer.drive", str(tmp_path / "arguments")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as driver:
        assert driver.stdout is not None
        for line in driver.stdout:
            if line.startswith("{") and json.loads(line).get("step", 0) >= at_step:
                break
        driver.send_signal(signal.SIGKILL)
    snapshot = tmp_path / "run" / "checkpoints" / "student" / "checkpoint_manager_snapshot.json"
    if snapshot.exists():
        os.truncate(snapshot, 20)  # as if the controller had been killed while it wrote
    time.sleep(3)  # the killed run's ranks end by themselves when their driver is gone
    events: list[dict[str, Any]] = []
    result = train_student(Training(**arguments), events.append)
    assert result.resumed_from == events[0]["step"]
    assert result.resumed_from >= at_step - 10
    assert_same_run(tmp_path / "run", result, unbroken)
