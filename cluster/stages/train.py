"""The student and its baseline, each trained in one stage or in several."""

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from cluster.figures import count
from cluster.progress import Shown
from cluster.rundir import stage_key
from cluster.stages.evaluate import local_model
from cluster.workspace import Workspace
from storage.shard_source import Reading
from storage.union import open_existing
from trainer.result import TrainResult, recorded_result, run_facts
from trainer.spec import Training
from trainer.stages import Model, Stage, consumed

_RESIZED = {"workers_lost": "machines were lost", "workers_joined": "machines have come"}


def train(work: Workspace, model: Model) -> dict[str, Any]:
    """Train a student, or its baseline: the same student, order and steps with hard labels only.

    Stages follow each other, each skipped when it is done; one that the baseline has in common with the student is
    trained once. Starts Ray only for what is not trained yet. Returns the fields of `trainer.result.TrainResult`.
    """
    left_out = refused_ids(work)
    without = frozenset(left_out)
    pools = {source: work.samples.ids(work.samples.rows("train", source)) for source in work.samples.source_names}
    counts = {source: sum(sample_id not in without for sample_id in ids) for source, ids in pools.items()}
    chains = zip(work.config.chain(model), work.config.chain(model.twin), strict=True)
    earlier: dict[str, float] = {}
    before: str | None = None
    after, after_twin = None, None
    result: dict[str, Any] = {}
    for stage, twin in chains:
        training = replace(_training(work, stage, twin, left_out), earlier=earlier, after=after)
        facts = run_facts(training, work.samples.key)
        facts_twin = run_facts(replace(_training(work, twin, twin, left_out), after=after_twin), work.samples.key)
        if facts == facts_twin and stage.run != model.name:
            training = replace(training, name=twin.run)
        result = _one(work, training, facts, before)
        before, after, after_twin = training.name, stage_key(facts), stage_key(facts_twin)
        earlier = consumed(stage, counts, earlier)
    return result


def _training(work: Workspace, stage: Stage, twin: Stage, left_out: list[bytes]) -> Training:
    """Return what is trained in a stage; `twin` is that of the student."""
    config = work.config
    mixing = None
    if stage.run != twin.run and stage.curriculum.adaptive is not None:
        # The baseline trains in the order that the student's losses led to.
        mixing = (work.run.result(twin.run) or {}).get("mixing")
    return Training(
        name=stage.run,
        student=stage.student,
        train=stage.train,
        curriculum=stage.curriculum,
        dataset_url=config.cache.url,
        identity=work.identity,
        samples_url=work.samples.url,
        run_dir=work.run.url,
        device="cpu",
        tokenizer_folder=work.model_folder,
        reading=Reading.of(config.cache),
        also=config.cache.also,
        labels=work.labels("train"),
        left_out=left_out,
        mixing=mixing,
    )


def _one(work: Workspace, training: Training, facts: dict[str, Any], before: str | None) -> dict[str, Any]:
    """Do one stage, which starts from the model of the run `before`."""
    name = training.name
    with work.stage(name) as outcome, work.progress.task(f"Training the {name}", "steps") as task:
        result = recorded_result(work.run.url, name, facts)
        outcome.skipped = result is not None
        if result is None:
            if training.left_out:
                number = count(len(training.left_out))
                task.say(f"  {number} training samples are left out: the teacher refuses to score them")
            result = _fit(work, training, before, task)
        task.note(f"loss {result.losses['loss']:.3f}, {count(result.tokens_per_s)} tokens/s")
        outcome.facts = {"steps": result.steps, "order_digest": result.order_digest, "tokens": result.tokens}
        outcome.facts["work_s"] = round(result.seconds, 3)
    work.run.finish(name, stage_key(facts), result.to_json())
    return result.to_json()


def refused_ids(work: Workspace) -> list[bytes]:
    """Return the training samples that no dataset of the run holds because the teacher refuses them, sorted."""
    dataset = open_existing(work.config.cache, work.identity)
    if dataset is None:
        return []
    rows = work.samples.rows("train")
    return sorted(work.samples.ids(rows[dataset.refused(work.samples.sample_ids[rows])]))


def _fit(work: Workspace, training: Training, before: str | None, task: Shown) -> TrainResult:
    session = work.ray(task)
    from trainer.runner import train_student

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "train_step":
            workers, most = event["world_size"], training.train.workers
            fewer = f", {workers} of {most} workers" if workers < most else ""
            note = f"loss {event['loss']:.3f}, {count(event['tokens_per_s'])} tokens/s{fewer}"
            task.update(event["step"], event["steps"], note)
            return
        if event["event"] == "train_start":
            task.start_from(event["step"], event["steps"])
        if why := _RESIZED.get(event["event"]):
            task.say(f"  {event['before']} → {event['workers']} workers from step {event['step']} on: {why}")
        work.run.event(event["event"], **{key: value for key, value in event.items() if key != "event"})

    with ExitStack() as stack:
        student = training.student
        if before is not None:
            folder = stack.enter_context(local_model(work.run, before))
            student = student.model_copy(update={"path": str(folder), "config": None})
        return train_student(replace(training, student=student, device=session.device), on_event)
