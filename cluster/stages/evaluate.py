"""Teacher, student and baseline on held-out text."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import RunConfig
from cluster.progress import Shown
from cluster.rundir import RunDir, stage_key
from cluster.selection import heldout_rows
from cluster.workspace import Workspace
from storage.config import CacheConfig
from storage.errors import InputError, LecternError, WorkerError
from storage.identity import DatasetIdentity
from storage.sample_set import SampleSet
from storage.samples import Int64Array
from storage.shard_source import Reading
from storage.tokenizer import Tokenizer
from storage.union import DatasetUnion, dataset_urls, open_existing
from trainer.config import LmEvalConfig, StudentConfig, TaskConfig
from trainer.harness import run_harness
from trainer.task_file import Example, read_task

if TYPE_CHECKING:
    from trainer.alignment import Aligner

Ids = dict[str, list[bytes]]


def evaluate(work: Workspace, names: list[str]) -> dict[str, Any]:
    """Score the trained models among `names` (`student`, `baseline`) and the teacher on the same held-out samples.

    Skipped when neither the models nor the samples have changed. Returns, for the teacher and each model,
    `{loss: {source: …}, kl_to_teacher, top1_agreement, ece, …}`, and `shown`: what the student said about the samples
    that the report shows. Raises InputError when there is no held-out sample or no trained model.
    """
    settings = work.config.evaluate
    held_out = heldout_rows(work.samples, settings.samples_per_source)
    ids = _scored_ids(work, held_out)
    if not ids:
        raise InputError("there are no held-out samples to evaluate on; raise data.heldout_fraction")
    key = stage_key(
        work.identity.fingerprint,
        {source: [sample_id.hex() for sample_id in chosen] for source, chosen in ids.items()},
        {name: _trained(work.run, name) for name in names},
        settings.shown_samples,
        _start(work.config),
        [task.model_dump(mode="json") for task in settings.tasks],
        *([] if settings.lm_eval is None else [settings.lm_eval.model_dump(mode="json")]),
    )
    with work.stage("evaluate") as outcome, work.progress.task("Evaluating on held-out text", "samples") as task:
        result = work.run.result("evaluate", key)
        outcome.skipped = result is not None
        if result is None:
            result = _scores(work, names, ids, task)
            rows = [row for chosen in held_out.values() for row in chosen]
            outcome.facts["tokens"] = len(names) * int(work.samples.num_tokens[rows].sum())
        task.note(", ".join(f"{name} {_mean(result[name]):.3f}" for name in ("teacher", *names)) + " nats")
    work.run.finish("evaluate", key, result)
    return result


def _scored_ids(work: Workspace, rows: dict[str, Int64Array]) -> Ids:
    """Return the ids of each source's rows, without what the teacher refuses to score."""
    dataset = open_existing(work.config.cache, work.identity)
    found = {}
    for source, chosen in rows.items():
        ids = work.samples.ids(chosen)
        refused = set(dataset.refused(ids).tolist()) if dataset is not None and ids else set()
        if kept := [sample_id for n, sample_id in enumerate(ids) if n not in refused]:
            found[source] = kept
    return found


@dataclass(frozen=True)
class Scoring:
    """What is scored, as it travels to the node that does it."""

    cache: CacheConfig
    identity: DatasetIdentity
    run_url: str
    samples_url: str
    names: list[str]
    ids: Ids
    shown_samples: int
    tasks: list[tuple[TaskConfig, list[Example]]]
    lm_eval: LmEvalConfig | None
    tokenizer: Tokenizer
    """The teacher's, for students that have another one."""
    start: str | StudentConfig | None
    """What the student's last stage started from: the run of the stage before, or a model; none where it was fresh."""


def _scores(work: Workspace, names: list[str], ids: Ids, task: Shown) -> dict[str, Any]:
    """Score in this process, or, where the run has joined a cluster, on one of its nodes."""
    config = work.config
    tasks = [(asked, read_task(asked)) for asked in config.evaluate.tasks]
    what = Scoring(
        config.cache,
        work.identity,
        work.run.url,
        work.samples.url,
        names,
        ids,
        config.evaluate.shown_samples,
        tasks,
        config.evaluate.lm_eval,
        work.tokenizer,
        _start(config),
    )
    if config.cluster.joins is None:
        return score_models(what, config.cluster.device, task.update)
    import ray

    session = work.ray(task)
    task.note("on a node of the cluster")
    gpus = 1 if session.device == "gpu" else 0
    labels = work.labels("evaluate") or None
    # A lost node costs the evaluation, which takes minutes: it is done again elsewhere.
    remote: Any = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=3, label_selector=labels)(score_models)
    try:
        found: dict[str, Any] = ray.get(remote.remote(what, session.device, None))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, LecternError):
            raise error.cause from error
        raise WorkerError(f"the evaluation failed on its node: {error.cause or error}") from error
    return found


def score_models(what: Scoring, device: str, update: Callable[[float, float, str], None] | None) -> dict[str, Any]:
    """Return what `evaluate` keeps; `device` is `cpu`, `gpu`, or `auto` for a GPU where there is one.

    `update` takes how many samples are done, of how many, and the model.
    """
    import torch

    from trainer.evaluation import evaluate_model, evaluate_teacher, token_views
    from trainer.student import aligner_of_model
    from trainer.tasks import run_tasks

    run, ids = RunDir(what.run_url), what.ids
    dataset = DatasetUnion.open(dataset_urls(what.cache), what.identity, Reading.of(what.cache))
    classifies = what.identity.capture.classes is not None
    if classifies:
        dataset.labels = SampleSet.open(what.samples_url).labels()
    on = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    per_model = sum(len(chosen) for chosen in ids.values())
    result: dict[str, Any] = {}
    for n, name in enumerate(what.names):

        def on_progress(event: dict[str, Any], before: int = n * per_model, model: str = name) -> None:
            if update is not None:
                update(before + event["done"], len(what.names) * per_model, model)

        with local_model(run, name) as folder:
            aligner = aligner_of_model(folder, what.tokenizer)
            # What is compared by tokens: that of other tokens, or of classes, is told by its figures alone.
            most_shown = 0 if classifies or aligner is not None else what.shown_samples
            shown = [sample_id for chosen in ids.values() for sample_id in chosen[:most_shown]]
            result.setdefault("teacher", evaluate_teacher(dataset, ids, aligner))
            result[name] = evaluate_model(folder, dataset, ids, on, on_progress, aligner)
            if what.tasks:
                result[name]["tasks"] = run_tasks(folder, what.tasks, on)
            if what.lm_eval is not None:
                result[name]["lm_eval"] = run_harness(folder, what.lm_eval, on)
            if name == "student" and shown:
                result["shown"] = token_views(folder, dataset, shown, on)
            if name == "student" and what.start is not None:
                result[name]["forgetting"] = _forgetting(what, folder, dataset, on, aligner)
    return result


def _start(config: RunConfig) -> str | StudentConfig | None:
    stages = config.chain()
    if len(stages) > 1:
        return stages[-2].run
    # A classifier's head may be new: of what a model knew before it, there is nothing to compare.
    starts = config.student.path is not None and config.teacher.task == "next_token"
    return config.student if starts else None


def _forgetting(
    what: Scoring, folder: Path, dataset: DatasetUnion, device: str, aligner: "Aligner | None"
) -> dict[str, Any]:
    from trainer.forgetting import forgetting
    from trainer.student import resolve_student

    with contextlib.ExitStack() as stack:
        if isinstance(what.start, StudentConfig):
            name, start = what.start.path, Path(str(resolve_student(what.start, what.identity)[0]))
        else:
            name, start = what.start, stack.enter_context(local_model(RunDir(what.run_url), str(what.start)))
        return {"from": name, "sources": forgetting(folder, start, dataset, what.ids, device, aligner=aligner)}


def _trained(run: RunDir, name: str) -> list[Any]:
    """What tells one trained model from another; InputError when it is not trained yet."""
    result = run.result(name)
    if result is None or not run.store.exists(f"{name}/config.json"):
        raise InputError(f"no trained {name} in {run.store.shown()}; run `lectern train` first")
    return [result["order_digest"], result["losses"], result["steps"]]


@contextlib.contextmanager
def local_model(run: RunDir, name: str) -> Iterator[Path]:
    """Give the folder of an exported model; from an object store it is copied to a temporary one."""
    if run.is_local:
        yield Path(run.path(name))
        return
    with tempfile.TemporaryDirectory(prefix="lectern-model-") as folder:
        for key in run.store.list(f"{name}/"):
            (Path(folder) / key.rpartition("/")[2]).write_bytes(run.store.read(key))
        yield Path(folder)


def _mean(entry: dict[str, Any]) -> float:
    losses = entry["loss"].values()
    return float(sum(losses) / len(losses))
