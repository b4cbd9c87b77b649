"""Train a student on Ray Train with DeepSpeed; called by the driver, with Ray initialised."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from storage.errors import InputError
from storage.identity import DatasetIdentity
from storage.object_store import Store
from storage.sample_set import SampleSet
from storage.shard_source import DEFAULT_READING, Reading
from storage.union import DatasetUnion
from trainer import checkpoint
from trainer.anatomy import examine
from trainer.config import CurriculumConfig, LossConfig, StudentConfig, TrainConfig
from trainer.curriculum import planned_order
from trainer.engine import Device
from trainer.export import copy_tokenizer
from trainer.metrics import Follower
from trainer.mixing import apply, heldout_ids
from trainer.ray_fit import fit
from trainer.result import RESULT_FILE, TrainResult, mixture, recorded_result, require_same_config, run_facts
from trainer.sampler import PlannedOrder
from trainer.served import require_served
from trainer.spec import LoopSpec
from trainer.student import build_student, freeze, resolve_student

_POLL_S = 0.5

Event = Callable[[dict[str, Any]], None]


def baseline_of(train: TrainConfig) -> TrainConfig:
    """Return the same training with hard labels only."""
    return train.model_copy(update={"loss": LossConfig(kl=0.0, ce=1.0)})


def train_student(
    student: StudentConfig,
    train: TrainConfig,
    curriculum: CurriculumConfig,
    dataset_url: str,
    identity: DatasetIdentity,
    samples_url: str,
    run_dir: str,
    name: str,
    device: Device,
    on_event: Event,
    tokenizer_folder: str | Path,
    reading: Reading = DEFAULT_READING,
    also: Sequence[str] = (),
    mixing: Sequence[dict[str, Any]] | None = None,
    labels: Mapping[str, str] | None = None,
    left_out: Sequence[bytes] = (),
) -> TrainResult:
    """Train a student to the end and export it below `<run_dir>/<name>`.

    Called again after any interruption with the same arguments it resumes from the newest whole checkpoint and
    ends with the same sample order; called after it is done it returns the recorded result. `on_event` is called in
    this process with `{"event": "train_start" | "train_step" | "train_done", "run": name, …}`.

    Args:
        student: where the student comes from.
        train: the loop; `train.loss` decides between student and baseline (see `baseline_of`).
        curriculum: mixture of the sources over the steps.
        dataset_url: captured targets of the training samples.
        identity: what the dataset at `dataset_url` must have been captured from.
        samples_url: the prepared samples.
        run_dir: any fsspec URL; checkpoints, metrics and the exported model lie below it.
        name: `student`, `baseline`, …: folder of the export and `run` in metrics.jsonl.
        device: what the ranks run on.
        on_event: progress.
        tokenizer_folder: local folder whose tokenizer files are put beside the exported model.
        reading: checks and memory of the ranks' readers; layers that the loss does not use are left unread.
        also: further datasets, for samples that the first one does not hold.
        mixing: decisions of another run with an adaptive curriculum (`TrainResult.mixing`), to train in its order.
        labels: what the nodes of the ranks must carry.
        left_out: ids of training samples that no dataset holds and the run does without, sorted.

    Raises:
        InputError: something does not fit together; nothing was trained.
        WorkerError: training broke down `train.max_failures` + 1 times, or its loss is not a number.
    """
    run_dir = Store(run_dir).url
    samples = SampleSet.open(samples_url)
    facts = run_facts(student, train, curriculum, identity, samples.key, also, mixing, left_out)
    done = recorded_result(run_dir, name, facts)
    if done is not None:
        return done
    folder = resolve_student(student, identity)
    dataset = DatasetUnion.open([dataset_url, *also], identity, reading)
    order = planned_order(samples, curriculum, train, dataset, left_out)
    _check_dataset(dataset, order, train.loss)
    _check_mixing(dataset, samples, curriculum)
    _check_layers(dataset, train.loss)
    if train.loss.transfers or student.frozen:
        model = build_student(student, folder, identity)
        freeze(model, student.frozen)
        examine(model, list(train.loss.hidden_map.values()), train.zero_stage)
    store = Store(run_dir).child(f"checkpoints/{name}")
    resume, at = _resume_point(store, facts)
    spec = LoopSpec(
        name=name,
        student=student,
        student_folder=folder,
        train=train,
        curriculum=curriculum,
        dataset_urls=tuple(Store(url).url for url in (dataset_url, *also)),
        identity=identity,
        samples_url=Store(samples_url).url,
        run_dir=run_dir,
        device=device,
        reading=replace(reading, layers=train.loss.layers),
        facts=facts,
        labels=dict(labels or {}),
        resume=resume,
        mixing=None if mixing is None else tuple(mixing),
        left_out=tuple(left_out),
    )
    on_event({"event": "train_start", "run": name, "step": at, "steps": train.steps})
    with _followed(run_dir, name, train.steps, on_event):
        figures = fit(spec)
    apply(order, mixing or figures["mixing"])
    copy_tokenizer(Path(tokenizer_folder), run_dir, name)
    result = _result(figures, spec, order, resumed_from=max(at, figures["resumed_from"]))
    record = {"config": facts, "result": result.to_json()}
    Store(run_dir).write(f"{name}/{RESULT_FILE}", json.dumps(record, indent=1).encode() + b"\n")
    on_event({"event": "train_done", "run": name, "step": train.steps, "steps": train.steps, "path": result.path})
    return result


def _check_dataset(dataset: DatasetUnion, order: PlannedOrder, loss: LossConfig) -> None:
    for other in dataset.datasets:
        require_served(loss, other.identity.capture)
    missing = len(dataset.missing(order.used_ids()))
    if missing:
        raise InputError(
            f"{missing} of the samples that the curriculum uses are not in {dataset.shown()}; run the capture, which "
            "scores what is missing"
        )


def _check_mixing(dataset: DatasetUnion, samples: SampleSet, curriculum: CurriculumConfig) -> None:
    if curriculum.adaptive is None:
        return
    train = samples.sample_ids[samples.rows("train")]
    heldout = [sample_id for ids in heldout_ids(samples, curriculum.adaptive).values() for sample_id in ids]
    missing = len(dataset.missing(train)) + len(dataset.missing(heldout))
    if missing:
        raise InputError(
            f"curriculum.adaptive may use any training sample and compares {len(heldout)} held-out ones, but {missing} "
            f"of them are not in {dataset.shown()}; run the capture, which scores what is missing, with "
            f"evaluate.samples_per_source of at least {curriculum.adaptive.samples}"
        )


def _check_layers(dataset: DatasetUnion, loss: LossConfig) -> None:
    if not loss.layers:
        return
    identity = dataset.identity
    for other in dataset.datasets:
        if other.identity.teacher.weights != identity.teacher.weights:
            raise InputError(
                f"{other.store.shown()} holds another teacher's hidden states, which mean something else; leave it out "
                "of cache.also, or train without train.loss.hidden and train.loss.exact"
            )
        held = other.identity.capture.hidden
        for layer in loss.layers:
            if layer not in held:
                raise InputError(
                    f"{other.store.shown()} holds no hidden states of layer {layer!r}; it holds "
                    f"{', '.join(held) or 'none'}. Name one of these in train.loss.hidden_map, or add the layer to "
                    "cache.hidden and capture again"
                )


def _resume_point(store: Store, facts: dict[str, Any]) -> tuple[str | None, int]:
    """Return name and step of the checkpoint to resume from, and delete all others.

    Ray Train's own list of checkpoints is set aside: it is not replaced atomically, and lags behind what is whole.
    """
    found = checkpoint.newest(store)
    if found is not None:
        require_same_config(facts, found[1].config, store.shown(found[0]))
    checkpoint.keep_only(store, found[0] if found else None)
    return (found[0], found[1].step) if found else (None, 0)


def _result(figures: dict[str, Any], spec: LoopSpec, order: PlannedOrder, resumed_from: int) -> TrainResult:
    seconds = figures["seconds"]
    return TrainResult(
        name=spec.name,
        path=f"{spec.run_dir}/{spec.name}",
        parameters=figures["parameters"],
        steps=figures["step"],
        tokens=figures["tokens"],
        seconds=seconds,
        tokens_per_s=figures["tokens"] / seconds if seconds else 0.0,
        data_wait_fraction=figures["waited_s"] / seconds if seconds else 0.0,
        losses=figures["losses"],
        order_digest=figures["digest"],
        mixture=mixture(order),
        mixing=figures["mixing"],
        resumed_from=resumed_from,
    )


@contextlib.contextmanager
def _followed(run_dir: str, name: str, steps: int, on_event: Event) -> Iterator[None]:
    """Call `on_event` for every new line of metrics.jsonl while the context is open."""
    follower = Follower(run_dir, name)
    for _ in follower.new_lines():
        pass  # what an earlier attempt wrote is no news
    stop = threading.Event()

    def pass_on() -> None:
        for line in follower.new_lines():
            on_event({"event": "train_step", "steps": steps, **line})

    def follow() -> None:
        while not stop.wait(_POLL_S):
            pass_on()

    thread = threading.Thread(target=follow, name="lectern-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        pass_on()
