"""Text to samples, and the teacher: what must be known before anything is scored or trained."""

from typing import Any

from cluster.budget import check_api
from cluster.checks import (
    check_curriculum,
    check_dataset,
    check_future_teacher,
    check_places,
    check_student,
    check_tasks,
    check_teacher_fits,
    uses_chat_template,
)
from cluster.figures import count
from cluster.workspace import Workspace
from storage.errors import InputError
from storage.sample_set import prepare_samples
from storage.tokenizer import Tokenizer
from trainer.harness import require_tasks
from workers.api.identity import api_identity
from workers.embedded import ensure_teacher, ensure_tokenizer
from workers.model_folder import resolve_model, teacher_identity


def prepare(work: Workspace) -> None:
    """Turn text into samples below the run directory; checks all that can be checked before a model is loaded."""
    config = work.config
    if config.teacher.kind != "local":
        check_api(config)
        if config.teacher.name == "embedded":
            raise InputError(
                f"teacher.name is embedded, teacher.kind {config.teacher.kind}; name the folder or hub name of the "
                "model behind the endpoint: its tokenizer and config are needed to score text"
            )
    check_places(config, work.run)
    check_tasks(config)
    require_tasks(config.evaluate.lm_eval)
    work.run.write_config(config)
    with work.stage("prepare") as outcome, work.progress.task("Preparing samples", "samples") as task:
        embedded = config.teacher.name == "embedded"
        if embedded:
            folder = ensure_tokenizer(config.teacher.embedded, config.data)
        else:
            folder = resolve_model(config.teacher.name, config.teacher.revision, weights=False)
        work.tokenizer = Tokenizer.load(folder, config.data.chat_template)
        check_student(config, work.tokenizer)
        if embedded:
            check_future_teacher(config, work.tokenizer)
        else:
            check_teacher_fits(config, folder, work.tokenizer)
        check_dataset(config, work.tokenizer, None)
        done: dict[str, int] = {}

        def on_progress(facts: dict[str, Any]) -> None:
            done[facts["source"]] = facts["samples"]
            task.update(sum(done.values()), note=facts["source"])

        work.samples = prepare_samples(config.data, work.tokenizer, work.run.path("samples"), on_progress)
        check_curriculum(config, work.samples)
        outcome.skipped = not done
        task.update(work.samples.num_samples, note=f"{count(work.samples.num_tokens.sum())} tokens")
    facts = {"sources": work.samples.summary(), "counters": work.samples.counters}
    work.run.finish("prepare", work.samples.key, facts)


def teacher(work: Workspace) -> None:
    """Find the teacher, train the embedded one where it is not there yet, and fix the dataset's identity."""
    config = work.config
    with work.stage("teacher") as outcome, work.progress.task("Teacher", "steps") as task:
        outcome.skipped = True

        def on_progress(facts: dict[str, Any]) -> None:
            outcome.skipped = False
            if "step" in facts:
                note = f"loss {facts['loss']:.2f}, {count(facts['tokens_per_s'])} tokens/s"
                task.update(facts["step"], facts["steps"], note)

        by_api = config.teacher.kind == "api"
        if config.teacher.name == "embedded":
            work.model_folder = ensure_teacher(config.teacher.embedded, config.data, on_progress)
        else:
            work.model_folder = resolve_model(config.teacher.name, config.teacher.revision, weights=not by_api)
        check_teacher_fits(config, work.model_folder, work.tokenizer)
        work.identity = (api_identity if by_api else teacher_identity)(
            work.model_folder, config.teacher, config.cache, work.tokenizer, uses_chat_template(config.data)
        )
        check_dataset(config, work.tokenizer, work.identity)
        known = work.identity.teacher
        task.note(f"{known.name}, {known.architecture}, {count(known.parameters)} parameters")
    facts = {
        "name": known.name,
        "path": str(work.model_folder),
        "fingerprint": work.identity.fingerprint,
        "parameters": known.parameters,
        "architecture": known.architecture,
    }
    work.run.finish("teacher", work.identity.fingerprint, facts)
