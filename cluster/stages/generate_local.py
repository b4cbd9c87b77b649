"""A teacher that is run here writes completions for prompts: written, filtered, kept as Parquet."""

import time
from pathlib import Path
from typing import Any

from cluster.config import RunConfig
from cluster.figures import count
from cluster.progress import Progress, Shown
from cluster.rundir import RunDir
from cluster.workspace import Workspace
from storage.errors import InputError, WorkerError
from storage.identity import weights_digest
from storage.object_store import Store
from storage.tokenizer import Tokenizer
from workers.api.answers import AnswerStore
from workers.api.completions import write_completions
from workers.api.filters import make_checker
from workers.api.generation import Author
from workers.api.prompts import read_prompts
from workers.embedded import ensure_teacher
from workers.local.writing import WritingPlan, WritingResult, write_missing
from workers.model_folder import check_teacher, model_facts, resolve_model


def generate_local(config: RunConfig, run: RunDir, progress: Progress) -> dict[str, Any]:
    """Write every completion that is not on disk, then the files with all that are.

    Starts Ray only when something is missing. Returns the summary of `write_completions` with `{url, answered, reused,
    tokens, tokens_per_s}`.

    Raises:
        InputError: teacher, prompts or a filter are wrong; nothing was written.
        WorkerError: the teacher broke down, or some units failed; all others are on disk, and the same command goes on.
    """
    own = config.generate
    if own.url is None:
        raise InputError("generate.url is not set; name the folder or URL that the completions go to")
    if own.logprobs is not None:
        raise InputError("generate.logprobs asks an endpoint; what is written here, `lectern capture` scores here")
    make_checker(own.filters.checker)
    out, kept = Store(own.url), Store(config.cache.url)
    out.probe()
    kept.probe()
    began = time.monotonic()
    run.event("stage_started", stage="generate")
    with Workspace(config, run, progress) as work, progress.task("Generating", "completions") as task:
        folder = _teacher_folder(config, task)
        tokenizer = Tokenizer.load(folder, config.data.chat_template)
        check_teacher(model_facts(folder), config.teacher, tokenizer, window_tokens=1)
        author = Author.of_local(config.teacher.name, weights_digest(folder), config.teacher.dtype)
        plan = WritingPlan(lambda: read_prompts(own), own, author, tokenizer, AnswerStore(kept))
        result = _write(work, plan, folder, kept, task) if len(plan) else WritingResult()
        task.update(plan.wanted, plan.wanted, f"{count(result.tokens)} tokens written")
    summary = write_completions(out, read_prompts(own), own, author, AnswerStore(kept))
    rate = result.tokens / result.seconds if result.seconds else 0.0
    facts = {**summary, "answered": result.answers, "reused": plan.wanted - plan.missing}
    facts |= {"tokens": result.tokens, "tokens_per_s": round(rate, 2), "ranks": result.ranks}
    run.event("stage_finished", stage="generate", seconds=round(time.monotonic() - began, 3), skipped=False, **facts)
    run.finish("generate", "", {**facts, "url": out.shown()})
    if result.failed_units:
        first = result.failed_units[0]
        raise WorkerError(
            f"{len(result.failed_units)} units of completions failed, the first after {first['attempts']} attempts: "
            f"{first['error']}. All others are written; the same command tries only these again"
        )
    return {**facts, "url": out.shown()}


def _teacher_folder(config: RunConfig, task: Shown) -> Path:
    if config.teacher.name != "embedded":
        return resolve_model(config.teacher.name, config.teacher.revision)
    task.note("looking for the embedded teacher, which is trained where it is not there yet")
    return ensure_teacher(config.teacher.embedded, config.data)


def _write(work: Workspace, plan: WritingPlan, folder: Path, kept: Store, task: Shown) -> WritingResult:
    work.model_folder = folder
    config, done = work.config, plan.wanted - plan.missing
    task.start_from(done, plan.wanted)

    def on_event(event: dict[str, Any]) -> None:
        nonlocal done
        if event["event"] == "fleet" and not event.get("ended"):
            return
        work.run.event(event["event"], **{key: value for key, value in event.items() if key != "event"})
        if event["event"] == "unit_done":
            done += event["answers"]
            task.update(done, plan.wanted)
        elif event["event"] in {"unit_failed", "replica_lost", "unit_retried"}:
            task.say(f"  {event['event'].replace('_', ' ')}: {event['error']}")

    return write_missing(
        plan,
        config.teacher,
        config.generate,
        folder,
        kept.url,
        work.machines(task),
        on_event,
    )
