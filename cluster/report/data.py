"""Everything the report shows, read back from a run directory and its dataset."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cluster.config import RunConfig
from cluster.inspect import refused_reasons
from cluster.plan import PLAN_KEY
from cluster.report.outcome import compare, machine_cost, overhead
from cluster.report.seeds import over_seeds
from cluster.report.timeline import Timeline, failures, spending, timeline
from cluster.rundir import EVENTS_KEY, METRICS_KEY, RESOLVED_KEY, RunDir
from cluster.sample_view import SampleView, view_sample
from cluster.stages.ledger import spent_by
from storage.columns import column_bytes
from storage.parts import TargetReader
from storage.reader import Dataset
from storage.tokenizer import Tokenizer
from storage.union import DatasetUnion

STAGES = ("prepare", "teacher", "capture", "student", "baseline", "evaluate")

_MIXTURE_BINS = 60
_CAPTURE_KEYS = (
    "tokens_per_s",
    "forward_tokens_per_s",
    "efficiency",
    "padding",
    "seconds",
    "ranks",
    "replicas_lost",
    "failed_units",
    "fleet",
)


@dataclass(frozen=True)
class StudentToken:
    """What the student said about one supervised token."""

    probability: float
    """Of the token itself."""
    best: str
    """Its own first choice."""
    best_probability: float


@dataclass(frozen=True)
class ReportData:
    """What the HTML is drawn from; `summary` is report.json."""

    summary: dict[str, Any]
    line: Timeline
    """The run over time."""
    spent: list[tuple[float, float]]
    """(hours of work, price of the machines so far); empty where nothing has a price."""
    curves: Mapping[str, list[dict[str, Any]]]
    """Lines of metrics.jsonl by run, in order of their steps."""
    mixture: list[dict[str, Any]]
    """For every step `{step, planned: {source: share}, realised: {source: share}}`."""
    columns: list[tuple[str, int]]
    """Compressed bytes of the dataset's columns, largest first."""
    samples: list[SampleView] = field(default_factory=list)
    student: Mapping[str, list[StudentToken | None]] = field(default_factory=dict)
    """What the student said about the tokens of each of these samples, by sample id."""
    config_text: str = ""


def collect(run: RunDir, config: RunConfig, dataset: Dataset, tokenizer: Tokenizer) -> ReportData:
    """Read what the stages of a run left behind. What has not run yet is left out, never guessed."""
    results = {stage: run.result(stage) or {} for stage in STAGES}
    curves = curves_of(run.lines(METRICS_KEY))
    events = run.lines(EVENTS_KEY)
    line = timeline(events)
    cost = _cost(config, run, line)
    prices = {name: kind.price_per_hour for name, kind in config.cluster.node_types.items()}
    mixture = results["student"].get("mixture") or mixture_of(curves.get("student", []))
    summary = {
        "run": {"url": run.store.shown(), "seconds": stage_seconds(run), "hours": round(line.hours, 4)},
        "teacher": {key: results["teacher"].get(key) for key in ("name", "path", "fingerprint", "parameters")},
        "student": {"path": results["student"].get("path"), "parameters": results["student"].get("parameters")},
        "cache": _cache(dataset, results["capture"]),
        "capture": {key: results["capture"].get("last", {}).get(key) for key in _CAPTURE_KEYS},
        "data": results["prepare"],
        "train": _train(results["student"], mixture) | {"workers": workers_of(curves.get("student", []))},
        "eval": {name: results["evaluate"].get(name) for name in ("teacher", "student", "baseline")},
        "seeds": over_seeds(config.models, results["evaluate"]),
        "cost": {key: cost[key] for key in ("currency", "spent", "reserved", "cap", "machines", "api")},
        "plan": compare(_plan(run), events, line.stage_seconds, cost),
        "overhead": overhead(events),
        "nodes": {name: round(hours, 4) for name, hours in line.node_hours.items()},
        "failures": failures(events),
    }
    spent = spending(line, prices, config.cluster.price_per_hour) if cost["machines"] else []
    raw = run.store.read_if_exists(RESOLVED_KEY) or b""
    shown = results["evaluate"].get("shown", [])
    union = DatasetUnion([dataset, *(Dataset.open(url) for url in config.cache.also)])
    views = sample_views(union, tokenizer, [entry["sample_id"] for entry in shown])
    student = {entry["sample_id"]: student_tokens(entry["tokens"], tokenizer) for entry in shown}
    return ReportData(summary, line, spent, curves, mixture, column_bytes(dataset), views, student, raw.decode())


def curves_of(lines: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Group metric lines by run and order them by step; of a step logged twice, after a resume, the last one counts."""
    by_run: dict[str, dict[int, dict[str, Any]]] = {}
    for line in lines:
        if isinstance(line.get("step"), int):
            by_run.setdefault(str(line.get("run", "student")), {})[line["step"]] = line
    return {name: [steps[step] for step in sorted(steps)] for name, steps in by_run.items()}


def mixture_of(curve: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return planned and realised shares of each source so far, for a run that has not ended yet."""
    rows = [line for line in curve if line.get("planned") and line.get("realised")]
    run = max(1, -(-len(rows) // _MIXTURE_BINS))
    result = []
    for start in range(0, len(rows), run):
        part = rows[start : start + run]
        entry: dict[str, Any] = {"step": part[-1]["step"]}
        for kind in ("planned", "realised"):
            names = list(part[0][kind])
            entry[kind] = {name: float(np.mean([line[kind].get(name, 0.0) for line in part])) for name in names}
        result.append(entry)
    return result


def workers_of(curve: list[dict[str, Any]]) -> list[dict[str, int]]:
    """Return the ranks that took the steps of a run, `{step, workers}` for the first logged step of each number."""
    rows: list[dict[str, int]] = []
    for line in curve:
        workers = line.get("world_size")
        if workers is not None and (not rows or rows[-1]["workers"] != workers):
            rows.append({"step": line["step"], "workers": workers})
    return rows


def stage_seconds(run: RunDir) -> dict[str, float]:
    """Return how long the last real execution of each stage took, from events.jsonl."""
    seconds: dict[str, float] = {}
    for event in run.lines("events.jsonl"):
        if event.get("event") == "stage_finished" and not event.get("skipped"):
            seconds[str(event.get("stage"))] = float(event.get("seconds", 0.0))
    return seconds


def sample_views(dataset: TargetReader, tokenizer: Tokenizer, sample_ids: list[str]) -> list[SampleView]:
    """Return the views of the named samples (hex ids) that the dataset holds."""
    ids = [bytes.fromhex(sample_id) for sample_id in sample_ids]
    absent = set(dataset.missing(ids).tolist()) if ids else set()
    kept = [sample_id for n, sample_id in enumerate(ids) if n not in absent]
    if not kept:
        return []
    parts = [dataset.parts([sample_id])[0] for sample_id in kept]
    return [view_sample(part.samples, part.targets, 0, tokenizer.token_text) for part in parts]


def student_tokens(tokens: list[dict[str, Any]], tokenizer: Tokenizer) -> list[StudentToken | None]:
    """Return the student's side of `trainer.evaluation.token_views`; None for tokens that are not supervised."""
    return [
        StudentToken(token["student_p"], tokenizer.token_text(token["student_best"][0]), token["student_best"][1])
        if token["supervised"]
        else None
        for token in tokens
    ]


def _cache(dataset: Dataset, capture: dict[str, Any]) -> dict[str, Any]:
    totals = dataset.totals()
    return {
        "url": dataset.store.shown(),
        "samples": totals.samples,
        "tokens": totals.tokens,
        "supervised": totals.supervised,
        "bytes": totals.bytes,
        "bytes_per_token": round(totals.bytes_per_token, 3),
        "scored_samples": capture.get("scored_samples", 0),
        "reused_samples": capture.get("reused_samples", 0),
        "kind": dataset.identity.capture.kind,
        "refused": refused_reasons(dataset),
    }


def _train(student: dict[str, Any], mixture: list[dict[str, Any]]) -> dict[str, Any]:
    kept = {key: student.get(key) for key in ("steps", "tokens_per_s", "data_wait_fraction", "order_digest", "seconds")}
    return {**kept, "mixture": mixture}


def _cost(config: RunConfig, run: RunDir, line: Timeline) -> dict[str, Any]:
    """What machines and API came to: `spent` is both. An API costs what its ledger says."""
    machines = round(machine_cost(config.cluster, line), 6)
    api, reserved = 0.0, 0.0
    if config.teacher.kind != "local":
        totals = spent_by(config, run)
        api, reserved = (totals.settled + totals.unknown).currency, totals.reserved.currency
    return {
        "currency": config.budget.currency,
        "spent": round(machines + api, 6),
        "reserved": reserved,
        "cap": config.budget.cap,
        "machines": machines,
        "api": api,
    }


def _plan(run: RunDir) -> dict[str, Any] | None:
    """The plan that was kept; one that cannot be read, or of another version, is none."""
    raw = run.store.read_if_exists(PLAN_KEY)
    try:
        plan = json.loads(raw) if raw is not None else None
    except ValueError:
        return None
    return plan if isinstance(plan, dict) and "money" in plan else None
