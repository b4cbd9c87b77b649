"""TensorBoard, Weights & Biases, MLflow: what they are handed."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from storage.errors import InputError
from storage.object_store import Store
from trainer.trackers import open_trackers, require_trackers, scalars

LINE = {"step": 3, "loss": 1.5, "weights": {"kl": 0.9, "ce": 0.1}, "mfu": None, "run": "student"}


def events_of(folder: Path) -> list[tuple[int, str, float]]:
    """Read event files back with the record format's own reader."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in sorted(folder.iterdir()):
        raw, at = file.read_bytes(), 0
        while at < len(raw):
            length = int.from_bytes(raw[at : at + 8], "little")
            event = Event.FromString(raw[at + 12 : at + 12 + length])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            at += 16 + length
    return found


def test_scalars_of_a_line_are_flat() -> None:
    assert dict(scalars(LINE)) == {"loss": 1.5, "weights/kl": 0.9, "weights/ce": 0.1}


@pytest.mark.parametrize("remote", [False, True])
def test_tensorboard_is_always_written(tmp_path: Path, remote: bool) -> None:
    run_dir = f"memory://{tmp_path.name}" if remote else str(tmp_path)
    (tracker,) = open_trackers([], run_dir, "student", 0, {})
    tracker.write(LINE)
    tracker.close()
    store = Store(run_dir)
    keys = store.list("tensorboard/student/")
    (tmp_path / "copy").mkdir()
    for key in keys:
        (tmp_path / "copy" / key.rpartition("/")[2]).write_bytes(store.read(key))
    assert sorted(events_of(tmp_path / "copy")) == [
        (3, "loss", 1.5),
        (3, "weights/ce", pytest.approx(0.1)),
        (3, "weights/kl", pytest.approx(0.9)),
    ]


def test_others_are_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            calls.append(("wandb", step, values["loss"]))

        def finish(self) -> None:
            calls.append(("wandb", "finish"))

    wandb = types.ModuleType("wandb")
    wandb.init = lambda **given: calls.append(("init", given["name"], given["config"])) or Run()  # type: ignore[attr-defined]
    mlflow: Any = types.ModuleType("mlflow")
    mlflow.exceptions = types.SimpleNamespace(MlflowException=RuntimeError)
    mlflow.start_run = lambda run_name: calls.append(("start", run_name))
    mlflow.log_params = lambda params: calls.append(("params", params))
    mlflow.log_metrics = lambda values, step: calls.append(("mlflow", step, values["loss"]))
    mlflow.end_run = lambda: calls.append(("end",))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    trackers = open_trackers(["wandb", "mlflow"], str(tmp_path / "run7"), "student", 0, {"train.seed": 1})
    for tracker in trackers:
        tracker.write(LINE)
        tracker.close()
    assert calls == [
        ("init", "run7/student", {"train.seed": 1}),
        ("start", "run7/student"),
        ("params", {"train.seed": 1}),
        ("wandb", 3, 1.5),
        ("wandb", "finish"),
        ("mlflow", 3, 1.5),
        ("end",),
    ]


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.trackers.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"train.trackers names wandb, which is not installed; `pip install wandb`"):
        require_trackers(["wandb"])
    require_trackers([])
