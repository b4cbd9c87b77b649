"""The student and its baseline."""

from typing import Any

from cluster.figures import count
from cluster.progress import Shown
from cluster.rundir import stage_key
from cluster.workspace import Workspace
from storage.shard_source import Reading
from storage.union import open_existing
from trainer.config import LossConfig, TrainConfig
from trainer.result import TrainResult, recorded_result, run_facts

BASELINE_LOSS = LossConfig(kl=0.0, ce=1.0, hidden=0.0)
"""Hard labels only: what the same student learns without the teacher."""


def train(work: Workspace, name: str) -> dict[str, Any]:
    """Train `student`, or `baseline`: the same student, order and steps with hard labels only.

    Starts Ray only when it is not trained yet. Returns the fields of `trainer.result.TrainResult`.
    """
    config = work.config
    settings = config.train if name == "student" else config.train.model_copy(update={"loss": BASELINE_LOSS})
    # A baseline under an adaptive curriculum trains in the order that the student's losses led to.
    mixing = None
    if name != "student" and config.curriculum.adaptive is not None:
        mixing = (work.run.result("student") or {}).get("mixing")
    left_out = refused_ids(work)
    facts = run_facts(
        config.student,
        settings,
        config.curriculum,
        work.identity,
        work.samples.key,
        config.cache.also,
        mixing,
        left_out,
    )
    with work.stage(name) as outcome, work.progress.task(f"Training the {name}", "steps") as task:
        result = recorded_result(work.run.url, name, facts)
        outcome.skipped = result is not None
        if result is None:
            if left_out:
                task.say(f"  {count(len(left_out))} training samples are left out: the teacher refuses to score them")
            result = _fit(work, name, settings, mixing, left_out, task)
        task.note(f"loss {result.losses['loss']:.3f}, {count(result.tokens_per_s)} tokens/s")
        outcome.facts = {"steps": result.steps, "order_digest": result.order_digest}
    work.run.finish(name, stage_key(facts), result.to_json())
    return result.to_json()


def refused_ids(work: Workspace) -> list[bytes]:
    """Return the training samples that no dataset of the run holds because the teacher refuses them, sorted."""
    dataset = open_existing(work.config.cache, work.identity)
    if dataset is None:
        return []
    rows = work.samples.rows("train")
    return sorted(work.samples.ids(rows[dataset.refused(work.samples.sample_ids[rows])]))


def _fit(
    work: Workspace,
    name: str,
    settings: TrainConfig,
    mixing: list[dict[str, Any]] | None,
    left_out: list[bytes],
    task: Shown,
) -> TrainResult:
    session = work.ray(task)
    from trainer.runner import train_student

    config = work.config

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "train_step":
            note = f"loss {event['loss']:.3f}, {count(event['tokens_per_s'])} tokens/s"
            task.update(event["step"], event["steps"], note)
            return
        if event["event"] == "train_start":
            task.start_from(event["step"], event["steps"])
        work.run.event(event["event"], **{key: value for key, value in event.items() if key != "event"})

    return train_student(
        student=config.student,
        train=settings,
        curriculum=config.curriculum,
        dataset_url=config.cache.url,
        identity=work.identity,
        samples_url=work.samples.url,
        run_dir=work.run.url,
        name=name,
        device=session.device,
        on_event=on_event,
        tokenizer_folder=work.model_folder,
        reading=Reading.of(config.cache),
        also=config.cache.also,
        mixing=mixing,
        labels=work.labels("train"),
        left_out=left_out,
    )
