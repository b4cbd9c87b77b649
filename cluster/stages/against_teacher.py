"""Scores samples of a run's dataset again, for `verify --against-teacher`."""

from typing import Any

from cluster.config import RunConfig
from cluster.progress import Progress
from cluster.rundir import RunDir
from cluster.selection import capture_rows
from cluster.stages.capture import open_dataset
from cluster.stages.prepare import prepare, teacher
from cluster.workspace import Workspace
from storage.errors import InputError
from storage.info import INFO_KEY
from storage.object_store import Store

_SCRATCH = "verify"


def against_teacher(
    config: RunConfig, run: RunDir, progress: Progress, number: int, bound: float | None
) -> dict[str, Any]:
    """Score `number` samples twice with the config's teacher; returns `workers.rescoring.Rescoring` as JSON values."""
    if not Store(config.cache.url).exists(INFO_KEY):
        raise InputError(f"no dataset at {Store(config.cache.url).shown()} yet; capture it first")
    with run.locked(), Workspace(config, run, progress) as work:
        prepare(work)
        teacher(work)
        dataset = open_dataset(work)
        with work.progress.task("Scoring again", "tokens") as task:
            from workers.rescoring import BOUND, chosen_rows, rescore

            rows = chosen_rows(
                work.samples, capture_rows(work.samples, config.evaluate.samples_per_source), dataset, number
            )
            done, total = 0, 2 * int(work.samples.num_tokens[rows].sum())

            def on_event(event: dict[str, Any]) -> None:
                nonlocal done
                if event["event"] == "unit_done":
                    done += event["tokens"]
                    task.update(done, total)

            found = rescore(
                config.teacher,
                config.cache,
                work.model_folder,
                work.samples,
                rows,
                dataset,
                run.path(_SCRATCH),
                work.machines(task),
                on_event,
                BOUND if bound is None else bound,
            )
        work.run.event("verified_against_teacher", **found.to_json())
    return found.to_json()
