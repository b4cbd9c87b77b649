"""Train a student on Ray Train with DeepSpeed; called by the driver, with Ray initialised."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from storage.errors import InputError
from storage.identity import DatasetIdentity
from storage.object_store import Store
from storage.sample_set import SampleSet
from storage.union import DatasetUnion
from trainer import checkpoint
from trainer.alignment import Aligner
from trainer.anatomy import examine
from trainer.curriculum import planned_order
from trainer.ewc import chosen_windows
from trainer.export import copy_tokenizer, name_classes
from trainer.loss_config import LossConfig
from trainer.metrics import Follower
from trainer.mixing import apply, heldout_ids
from trainer.ray_fit import fit
from trainer.result import RESULT_FILE, TrainResult, mixture, recorded_result, require_same_config, run_facts
from trainer.sampler import PlannedOrder
from trainer.served import require_served
from trainer.spec import LoopSpec, Training
from trainer.student import aligner_of, build_student, prepare_student, resolve_student, with_vocabulary
from trainer.trackers import require_trackers

_POLL_S = 0.5

Event = Callable[[dict[str, Any]], None]


def train_student(training: Training, on_event: Event) -> TrainResult:
    """Train a student to the end and export it below `<run_dir>/<name>`.

    Called again after any interruption with the same arguments it resumes from the newest whole checkpoint and
    ends with the same sample order; called after it is done it returns the recorded result. `on_event` is called in
    this process with `{"event": "train_start" | "train_step" | "train_done", "run": name, …}`, and of an elastic
    training with `{"event": "workers_lost" | "workers_joined", …, "before": n, "workers": n}` when its ranks change.

    Raises:
        InputError: something does not fit together; nothing was trained.
        WorkerError: training broke down `train.max_failures` + 1 times, or its loss is not a number.
    """
    training = replace(training, run_dir=Store(training.run_dir).url)
    run_dir, name, steps = training.run_dir, training.name, training.train.steps
    samples = SampleSet.open(training.samples_url)
    facts = run_facts(training, samples.key)
    done = recorded_result(run_dir, name, facts)
    if done is not None:
        return done
    training, folder, order, aligner = _checked(training, samples)
    at = _resume_point(Store(run_dir).child(f"checkpoints/{name}"), facts)
    spec = replace(_spec(training, folder, facts), aligner=aligner)
    on_event({"event": "train_start", "run": name, "step": at, "steps": steps})
    with _followed(training, on_event):
        figures = fit(spec)
    copy_tokenizer(Path(training.tokenizer_folder) if aligner is None else aligner.folder, run_dir, name)
    if training.identity.capture.classes:
        name_classes(Path(training.tokenizer_folder), run_dir, name)
    apply(order, training.mixing or figures["mixing"])
    result = _result(figures, spec, order, resumed_from=max(at, figures["resumed_from"]))
    record = {"config": facts, "result": result.to_json()}
    Store(run_dir).write(f"{name}/{RESULT_FILE}", json.dumps(record, indent=1).encode() + b"\n")
    on_event({"event": "train_done", "run": name, "step": steps, "steps": steps, "path": result.path})
    return result


def _checked(training: Training, samples: SampleSet) -> tuple[Training, str | None, PlannedOrder, Aligner | None]:
    """Check all that can be checked before Ray is touched.

    Returns the training with what is filled in, the student's folder, the planned order, and what lays the teacher's
    tokens over the student's where these are others.
    """
    train = training.train
    require_trackers(train.trackers)
    resolved = resolve_student(training.student, training.identity, train.loss)
    folder = resolved[0]
    aligner = aligner_of(training.student, resolved, training.identity, Path(training.tokenizer_folder), train.loss)
    student = with_vocabulary(training.student, aligner)
    training = replace(training, student=student)
    if aligner is not None and training.curriculum.adaptive is not None:
        raise InputError(
            "curriculum.adaptive compares losses per token, but the student's tokens are others than the teacher's; "
            "give the shares in curriculum.start and curriculum.end"
        )
    dataset = DatasetUnion.open([training.dataset_url, *training.also], training.identity, training.reading)
    order = planned_order(samples, training.curriculum, train, dataset, training.left_out, training.earlier)
    _check_dataset(dataset, order, train.loss)
    _check_labels(samples, training.identity)
    _check_mixing(dataset, samples, training)
    _check_layers(dataset, train.loss)
    _check_ewc(training, samples, dataset)
    classifies = training.identity.capture.task != "next_token"
    if classifies or train.loss.student_layers or train.loss.attends or student.frozen or student.lora:
        model = build_student(student, folder, training.identity)
        prepare_student(model, student, train.loss)
        examine(model, list(train.loss.student_layers), train.zero_stage, training.identity.capture.task)
    return training, folder, order, aligner


def _spec(training: Training, folder: str | None, facts: dict[str, Any]) -> LoopSpec:
    return LoopSpec(
        name=training.name,
        student=training.student,
        student_folder=folder,
        train=training.train,
        curriculum=training.curriculum,
        dataset_urls=tuple(Store(url).url for url in (training.dataset_url, *training.also)),
        identity=training.identity,
        samples_url=Store(training.samples_url).url,
        run_dir=training.run_dir,
        device=training.device,
        reading=replace(training.reading, layers=(*training.train.loss.layers, *training.train.loss.attention_layers)),
        facts=facts,
        labels=dict(training.labels),
        mixing=None if training.mixing is None else tuple(training.mixing),
        earlier=dict(training.earlier),
        left_out=tuple(training.left_out),
    )


def _check_dataset(dataset: DatasetUnion, order: PlannedOrder, loss: LossConfig) -> None:
    for other in dataset.datasets:
        require_served(loss, other.identity.capture)
    missing = len(dataset.missing(order.used_ids()))
    if missing:
        raise InputError(
            f"{missing} of the samples that the curriculum uses are not in {dataset.shown()}; run the capture, which "
            "scores what is missing"
        )


def _check_labels(samples: SampleSet, identity: DatasetIdentity) -> None:
    classes = identity.capture.classes
    if classes is None:
        return
    largest = max((int(label.max()) for label in samples.labels().values() if len(label)), default=0)
    if largest >= classes:
        raise InputError(
            f"the samples hold a label {largest}, but the teacher has {classes} classes, numbered from 0; mend the "
            "field that data.sources.label_field names"
        )


def _check_mixing(dataset: DatasetUnion, samples: SampleSet, training: Training) -> None:
    if training.curriculum.adaptive is None:
        return
    heldout_ids(samples, training.curriculum.adaptive, dataset)
    train = samples.ids(samples.rows("train"))
    missing = len(dataset.missing(sorted({*train} - {*training.left_out})))
    if missing:
        raise InputError(
            f"curriculum.adaptive may use any training sample, but {missing} of them are not in {dataset.shown()}; run "
            "the capture, which scores what is missing"
        )


def _check_ewc(training: Training, samples: SampleSet, dataset: DatasetUnion) -> None:
    ewc = training.train.ewc
    if ewc is None:
        return
    if training.student.lora is not None:
        raise InputError(
            "train.ewc holds on to the student's weights, which student.lora leaves alone; drop one of them"
        )
    chosen_windows(ewc, samples, dataset, training.earlier, training.train.seed)


def _check_layers(dataset: DatasetUnion, loss: LossConfig) -> None:
    if not loss.layers and not loss.attention_layers:
        return
    identity = dataset.identity
    for other in dataset.datasets:
        if other.identity.teacher.weights != identity.teacher.weights:
            raise InputError(
                f"{other.store.shown()} holds another teacher's hidden states, which mean something else; leave it out "
                "of cache.also, or train without train.loss.hidden and train.loss.exact"
            )
        held = other.identity.capture.hidden
        for layer in loss.attention_layers:
            if layer not in other.identity.capture.attention:
                raise InputError(
                    f"{other.store.shown()} holds no attention of layer {layer!r}; it holds "
                    f"{', '.join(other.identity.capture.attention) or 'none'}. Name one of these in "
                    "train.loss.attention_map, or add the layer to cache.attention and capture again"
                )
        for layer in loss.layers:
            if layer not in held:
                raise InputError(
                    f"{other.store.shown()} holds no hidden states of layer {layer!r}; it holds "
                    f"{', '.join(held) or 'none'}. Name one of these in train.loss.hidden_map or relation_map, or add "
                    "the layer to cache.hidden and capture again"
                )
        if loss.relates and other.identity.capture.hidden_projection is not None:
            raise InputError(
                f"train.loss.relation needs whole states, but {other.store.shown()} holds them projected to "
                f"{other.identity.capture.hidden_projection} values; capture without cache.hidden_projection"
            )


def _resume_point(store: Store, facts: dict[str, Any]) -> int:
    """Return the step of the checkpoint to resume from, 0 where there is none, and delete all others.

    Ray Train's own list of checkpoints is set aside: it is not replaced atomically, and lags behind what is whole.
    """
    found = checkpoint.newest(store)
    if found is not None:
        require_same_config(facts, found[1].config, store.shown(found[0]))
    checkpoint.keep_only(store, found[0] if found else None)
    return found[1].step if found else 0


def _result(figures: dict[str, Any], spec: LoopSpec, order: PlannedOrder, resumed_from: int) -> TrainResult:
    seconds = figures["seconds"]
    return TrainResult(
        name=spec.name,
        path=f"{spec.run_dir}/{spec.name}",
        parameters=figures["parameters"],
        steps=figures["step"],
        tokens=figures["tokens"],
        seconds=seconds,
        tokens_per_s=figures["own_tokens"] / seconds if seconds else 0.0,
        data_wait_fraction=figures["waited_s"] / seconds if seconds else 0.0,
        losses=figures["losses"],
        order_digest=figures["digest"],
        mixture=mixture(order),
        mixing=figures["mixing"],
        resumed_from=resumed_from,
    )


@contextlib.contextmanager
def _followed(training: Training, on_event: Event) -> Iterator[None]:
    """Call `on_event` for every new line of metrics.jsonl, and when an elastic number of ranks changes, while open."""
    name, steps, elastic = training.name, training.train.steps, training.train.min_workers is not None
    follower = Follower(training.run_dir, name)
    for _ in follower.new_lines():
        pass  # what an earlier attempt wrote is no news
    stop = threading.Event()

    def pass_on() -> None:
        before = (follower.newest or {}).get("world_size")
        for line in follower.new_lines():
            on_event({"event": "train_step", "steps": steps, **line})
        newest = follower.newest or {}
        workers = newest.get("world_size")
        if elastic and before is not None and workers != before:
            event = "workers_lost" if workers < before else "workers_joined"
            on_event({"event": event, "run": name, "step": newest["step"], "before": before, "workers": workers})

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
