"""What each command does, between the command line and the stages. Heavy imports happen inside the functions."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.config import RunConfig
from cluster.loader import check_config, load_config, parse_yaml
from cluster.progress import Progress
from cluster.rundir import RESOLVED_KEY, RunDir
from cluster.terminal import Terminal
from storage.errors import InputError, StorageError


def print_schema() -> None:
    """Print the JSON schema of the config."""
    sys.stdout.write(json.dumps(RunConfig.model_json_schema(), indent=1) + "\n")


def plan(
    out: Terminal,
    path: str,
    overrides: Sequence[str],
    run_dir: str | None,
    capture_rate: float | None = None,
    train_rate: float | None = None,
    like: str | None = None,
) -> dict[str, Any]:
    """Show what a run would do and cost, and keep it for the run's report.

    Rates are those given, else those that the run `like` measured, else this run itself.
    """
    config = load_config(path, overrides)
    from cluster.api_plan import api_plan, awaits_completions, local_generation
    from cluster.plan import keep_plan, make_plan
    from cluster.rates import measured_rates
    from cluster.tables import show_api_plan, show_local_generation, show_plan

    if awaits_completions(config) and config.teacher.kind == "local":
        writing = local_generation(config)
        show_local_generation(out, writing)
        return {"generate": writing}
    if awaits_completions(config):
        spending = api_plan(config, 0, 0)
        show_api_plan(out, spending)
        return {"api": spending}
    run = _run_dir(out, path, run_dir)
    rates = measured_rates(run if like is None else _finished(like)).given(capture_rate, train_rate)
    found = make_plan(config, run, rates)
    keep_plan(run, found)
    show_plan(out, found)
    return found.to_json()


def stages(out: Terminal, path: str, overrides: Sequence[str], run_dir: str | None, until: str) -> dict[str, Any]:
    """Run the stages of `capture`, `train`, `evaluate` or `run`."""
    config = load_config(path, overrides)
    from cluster.pipeline import run_pipeline
    from cluster.tables import show_result

    run = _run_dir(out, path, run_dir)
    out.hint = lambda: _log_hint(run)
    figures = run_pipeline(config, run, Progress(out.stream), until)
    show_result(out, figures)
    return figures


def inspect(
    out: Terminal,
    target: str,
    overrides: Sequence[str],
    run_dir: str | None,
    sample: str | None,
    card: bool = False,
) -> dict[str, Any]:
    """Show a dataset, one of its samples, or its card, which is written anew."""
    from cluster.inspect import describe_dataset, describe_others, describe_sample, find_sample, sample_json
    from cluster.tables import show_dataset, show_sample
    from storage.union import DatasetUnion

    urls, run = datasets_of(out, target, overrides, run_dir)
    union = DatasetUnion.open(urls)
    dataset = union.datasets[0]
    if card:
        from storage.card import render_card, write_card

        key = write_card(dataset)
        out.say(render_card(dataset))
        return {"card": dataset.store.shown(key)}
    if sample is None:
        facts = describe_dataset(dataset) | describe_others(union)
        show_dataset(out, facts)
        return facts
    view = describe_sample(union, find_sample(union, sample), _tokenizer(run))
    show_sample(out, view)
    return sample_json(view)


def verify(
    out: Terminal,
    target: str,
    overrides: Sequence[str],
    run_dir: str | None,
    repair: bool = False,
    against_teacher: int | None = None,
    bound: float | None = None,
) -> dict[str, Any]:
    """Check a dataset; exit code 2 when something is wrong with it. `repair` takes damaged units out.

    With `against_teacher` a sound dataset's samples are scored again, so many: exit code 1 beyond the bound.
    """
    from dataclasses import asdict

    from cluster.figures import size
    from storage.verify import verify_dataset

    url, _ = dataset_of(out, target, overrides, run_dir)
    with Progress(out.stream).task(f"Verifying {url}", "units") as task:
        found = verify_dataset(url, task.update)
    for problem in found.problems:
        sys.stderr.write(f"error: {problem}\n")
    if found.orphans:
        out.say(
            f"{len(found.orphans)} data files without a manifest, left by interrupted attempts: not part of the dataset"
        )
    if repair and found.damaged_units:
        from cluster.maintenance import drop

        drop(out, url, found.damaged_units)
    state = "sound" if found.ok else f"{len(found.problems)} problems"
    out.say(f"{found.units} units, {found.samples:,} samples, {found.tokens:,} tokens, {size(found.bytes)}: {state}")
    facts = {**asdict(found), "ok": found.ok, "exit_code": 0 if found.ok else InputError.exit_code}
    if against_teacher is None or not found.ok:
        return facts
    return {**facts, **_rescore(out, target, overrides, run_dir, against_teacher, bound)}


def _rescore(
    out: Terminal, target: str, overrides: Sequence[str], run_dir: str | None, number: int, bound: float | None
) -> dict[str, Any]:
    from cluster.stages.against_teacher import against_teacher
    from cluster.tables import show_rescoring

    config, run = _run_of(out, target, overrides, run_dir)
    out.hint = lambda: _log_hint(run)
    found = against_teacher(config, run, Progress(out.stream), number, bound)
    show_rescoring(out, found)
    return {"against_teacher": found, "ok": found["ok"], "exit_code": 0 if found["ok"] else 1}


def report(out: Terminal, target: str, overrides: Sequence[str], run_dir: str | None) -> dict[str, Any]:
    """Write the report of a run again."""
    from cluster.stages.report import HTML_KEY, write_report
    from storage.reader import Dataset

    config, run = _run_of(out, target, overrides, run_dir)
    tokenizer = _tokenizer(run)
    if tokenizer is None:
        raise InputError(f"nothing was run in {run.url} yet; `lectern run` makes what a report shows")
    summary = write_report(run, config, Dataset.open(config.cache.url), tokenizer)
    out.say(f"wrote {run.path(HTML_KEY)}")
    return summary


def generate(out: Terminal, path: str, overrides: Sequence[str], run_dir: str | None) -> dict[str, Any]:
    """Have the teacher write completions."""
    config = load_config(path, overrides)
    from cluster.stages.generate import generate as write
    from cluster.tables import show_generated

    run = _run_dir(out, path, run_dir)
    with run.locked():
        run.write_config(config)
        try:
            found = write(config, run, Progress(out.stream))
        finally:
            run.flush()
    show_generated(out, found)
    return found


def ledger(
    out: Terminal,
    target: str,
    overrides: Sequence[str],
    run_dir: str | None,
    invoice: float | None,
    tokens: int | None,
) -> dict[str, Any]:
    """Show what was spent; with an invoice, correct what is unknown first."""
    from cluster.stages.ledger import account, settle
    from cluster.tables import show_account

    config, run = _run_of(out, target, overrides, run_dir)
    found = account(config, run) if invoice is None else settle(config, run, invoice, tokens)
    show_account(out, found)
    return found


def _run_dir(out: Terminal, config_path: str, run_dir: str | None) -> RunDir:
    run = RunDir(run_dir or f"runs/{Path(config_path).stem}")
    out.log_folder = run.url if run.is_local else None
    return run


def _run_of(out: Terminal, target: str, overrides: Sequence[str], run_dir: str | None) -> tuple[RunConfig, RunDir]:
    """The config and run directory that a config or a run directory names."""
    if _is_config(target):
        return load_config(target, overrides), _run_dir(out, target, run_dir)
    run = RunDir(run_dir or target)
    raw = run.store.read_if_exists(RESOLVED_KEY)
    if raw is None:
        raise InputError(f"{target} is no config (.yaml) and holds no {RESOLVED_KEY}; name a config or a run directory")
    if overrides:
        raise InputError("--set works on a config, not on a run directory; name the config itself")
    where = run.store.shown(RESOLVED_KEY)
    return check_config(parse_yaml(raw.decode(), where), where), run


def dataset_of(out: Terminal, target: str, overrides: Sequence[str], run_dir: str | None) -> tuple[str, RunDir | None]:
    """Return the dataset that a config, a run directory or its own URL names; the run directory where one is known."""
    urls, run = datasets_of(out, target, overrides, run_dir)
    return urls[0], run


def datasets_of(
    out: Terminal, target: str, overrides: Sequence[str], run_dir: str | None
) -> tuple[list[str], RunDir | None]:
    """Return `dataset_of` and after it the further datasets of the config."""
    from storage.info import INFO_KEY
    from storage.object_store import Store

    try:
        # Reading tells more than looking up: an answer to the latter has no room for the store's reason.
        if not _is_config(target) and Store(target).read_if_exists(INFO_KEY) is not None:
            return [target], RunDir(run_dir) if run_dir else None
    except StorageError as error:
        raise InputError(str(error)) from error
    config, run = _run_of(out, target, overrides, run_dir)
    return [config.cache.url, *config.cache.also], run


def _finished(like: str) -> RunDir:
    """The run directory that rates are taken from."""
    run = RunDir(like)
    if run.store.read_if_exists(RESOLVED_KEY) is None:
        raise InputError(f"--like {like} is no run directory: it holds no {RESOLVED_KEY}")
    return run


def _is_config(target: str) -> bool:
    return target.endswith((".yaml", ".yml"))


def _tokenizer(run: RunDir | None) -> Any:
    """The teacher's tokenizer of a run, where it is known and still there."""
    from storage.tokenizer import Tokenizer

    folder = ((run.result("teacher") if run is not None else None) or {}).get("path")
    return Tokenizer.load(folder) if folder and (Path(folder) / "tokenizer.json").is_file() else None


def _log_hint(run: RunDir) -> str | None:
    started = [event for event in run.lines("events.jsonl") if event.get("event") == "ray_started"]
    return f"worker logs: {started[-1]['logs']}" if started else None
