"""Curves of a run in TensorBoard, always, and in Weights & Biases or MLflow where they are asked for."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, Self

from storage.errors import InputError
from storage.object_store import Store
from trainer.metrics import Line, MetricsLog

TENSORBOARD_PREFIX = "tensorboard/"
"""Event files lie below `<run_dir>/tensorboard/<run>/`."""


class Tracker(Protocol):
    """Takes the lines of metrics.jsonl."""

    def write(self, line: Line) -> None:
        """Take one line."""

    def close(self) -> None:
        """Hand over what is left."""


def require_trackers(names: Sequence[str]) -> None:
    """Raise InputError when a tracker that is asked for is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise InputError(f"train.trackers names {name}, which is not installed; `pip install {name}`, or drop it")


def open_trackers(
    names: Sequence[str], run_dir: str, run: str, resumed_from: int, facts: dict[str, Any]
) -> list[Tracker]:
    """Return TensorBoard and the trackers of these names for a run that starts after step `resumed_from`."""
    others: dict[str, type[WandB | MLflow]] = {"wandb": WandB, "mlflow": MLflow}
    trackers: list[Tracker] = [TensorBoard(run_dir, run, resumed_from)]
    return trackers + [others[name](run_dir, run, facts) for name in names]


class RunLog:
    """metrics.jsonl and all trackers of one run; use as a context manager, on one rank alone."""

    def __init__(self, names: Sequence[str], run_dir: str, run: str, resumed_from: int, facts: dict[str, Any]) -> None:
        """Open them for a run that starts after step `resumed_from`; see `open_trackers`."""
        self._metrics = MetricsLog(run_dir, run, resumed_from)
        self._trackers = open_trackers(names, run_dir, run, resumed_from, facts)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for each in (self._metrics, *self._trackers):
            each.close()

    def write(self, line: Line) -> None:
        """Hand a line to all of them."""
        for each in (self._metrics, *self._trackers):
            each.write(line)


def scalars(line: Line) -> Iterator[tuple[str, float]]:
    """Yield the numbers of a line by name; those of a nested mapping as `mapping/name`."""
    for name, value in line.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{key}", float(item)) for key, item in value.items())
        elif isinstance(value, (int, float)) and name != "step":
            yield name, float(value)


class TensorBoard:
    """Event files; in a folder that is uploaded at the end where the run directory is an object store."""

    def __init__(self, run_dir: str, run: str, resumed_from: int) -> None:
        from tensorboardX import SummaryWriter

        store = Store(run_dir).child(f"{TENSORBOARD_PREFIX}{run}")
        self._upload = None if store.is_local else store
        self._folder = Path(store.url) if store.is_local else Path(tempfile.mkdtemp(prefix="lectern-tensorboard-"))
        self._folder.mkdir(parents=True, exist_ok=True)
        # Steps that a resumed run takes again are dropped from what was shown before.
        purge = resumed_from + 1 if resumed_from else None
        self._writer = SummaryWriter(str(self._folder), purge_step=purge)

    def write(self, line: Line) -> None:
        """Add the numbers of a line at its step."""
        for name, value in scalars(line):
            self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        """Flush, and upload."""
        self._writer.close()
        if self._upload is not None:
            for file in self._folder.iterdir():
                self._upload.write(file.name, file.read_bytes())
            shutil.rmtree(self._folder, ignore_errors=True)


class WandB:
    """Weights & Biases; where and as whom is said by its own environment (`WANDB_PROJECT`, `WANDB_API_KEY`, …)."""

    def __init__(self, run_dir: str, run: str, facts: dict[str, Any]) -> None:
        name = f"{run_dir.rstrip('/').rpartition('/')[2]}/{run}"
        self._run = import_module("wandb").init(name=name, config=facts, resume="allow", reinit="create_new")

    def write(self, line: Line) -> None:
        """Log a line at its step."""
        self._run.log(dict(scalars(line)), step=line["step"])

    def close(self) -> None:
        """End the run there."""
        self._run.finish()


class MLflow:
    """MLflow; where to is said by its own environment (`MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME`, …)."""

    def __init__(self, run_dir: str, run: str, facts: dict[str, Any]) -> None:
        self._mlflow = import_module("mlflow")
        name = f"{run_dir.rstrip('/').rpartition('/')[2]}/{run}"
        self._mlflow.start_run(run_name=name)
        with suppress(self._mlflow.exceptions.MlflowException):  # a resumed run may not say them anew
            self._mlflow.log_params(facts)

    def write(self, line: Line) -> None:
        """Log a line at its step."""
        self._mlflow.log_metrics(dict(scalars(line)), step=line["step"])

    def close(self) -> None:
        """End the run there."""
        self._mlflow.end_run()
