"""The report's sections: which figure shows what, with one sentence on how to read it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from cluster.figures import count, duration, size
from cluster.report.bars import bar_plot, row_plot
from cluster.report.data import ReportData
from cluster.report.outcome import shown
from cluster.report.plots import line_plot
from cluster.report.seeds import MEASURES, plus_minus
from cluster.report.svg import Bar, Format, Plot, Series, percent, short, smooth

Section = dict[str, Any]
Figure = dict[str, Any]
_Drawn = tuple[str, str, list[Series], Format]
"""Title, caption, lines and the format of their values."""

_COLOURS = {"teacher": "var(--teacher)", "student": "var(--student)", "baseline": "var(--baseline)"}
_PALETTE = [f"var(--{name})" for name in ("one", "two", "three", "four", "six", "five")]
_SMOOTHING_SHARE = 0.04
_SHOWN_COLUMNS = 7
_SHOWN_NAMES = 4
_SHOWN_FAILURES = 50
_LONG_H = 2.0
"""From so many hours on the time axis counts hours, below it minutes."""


def sections(data: ReportData) -> list[Section]:
    """Return the sections that have something to show, in reading order."""
    made = [_results(data), _training(data), _dataset(data), _run(data), _machines(data), _failures(data)]
    return [section for section in made if section["figures"]]


def _section(name: str, title: str, lead: str, figures: Sequence[Figure | None]) -> Section:
    return {"id": name, "title": title, "lead": lead, "figures": [figure for figure in figures if figure is not None]}


def _figure(title: str, caption: str, plot: Plot) -> Figure:
    return {"title": title, "caption": caption, "plot": plot, "wide": False, "rows": None, "prose": False}


def _table(title: str, head: list[str], rows: list[list[str]], caption: str = "", wide: bool = False) -> Figure | None:
    if not rows:
        return None
    return {"title": title, "caption": caption, "wide": wide, "head": head, "rows": rows, "prose": False}


def _results(data: ReportData) -> Section:
    evaluation = {name: entry for name, entry in data.summary["eval"].items() if entry}
    sources = list(dict.fromkeys(source for entry in evaluation.values() for source in entry["loss"]))
    losses = [
        (source, [Bar(name, _COLOURS[name], entry["loss"][source]) for name, entry in evaluation.items()])
        for source in sources
    ]
    unit = next((entry["unit"] for entry in evaluation.values() if "unit" in entry), "token")
    sorts = (("accuracy", "accuracy", _share), ("chunk_gap", "gap of a chunk", _number))
    special = [sort for sort in sorts if any(entry.get(sort[0]) is not None for entry in evaluation.values())]
    measures = ["KL to teacher", "first choice agrees", "ECE", *(name for _, name, _ in special)]
    head = ["", *(f"loss, {source}" for source in sources), *measures]
    rows = [
        [
            name,
            *(_number(entry["loss"].get(source)) for source in sources),
            _number(entry.get("kl_to_teacher")),
            _share(entry.get("top1_agreement")),
            _number(entry.get("ece")),
            *(shown_as(entry.get(key)) for key, _, shown_as in special),
        ]
        for name, entry in evaluation.items()
    ]
    lead = (
        "The baseline is the same student with the same data order and steps, trained on hard labels only: what lies "
        "between the two is what the teacher's probabilities gave."
    )
    caption = "KL, disagreement of first choices, calibration error: smaller is better."
    figures = [
        _figure("Held-out loss", f"Nats per {unit}; smaller is better.", bar_plot(losses, _three, "Held-out loss")),
        _figure("Fidelity to the teacher", caption, _fidelity(evaluation)),
        _table("Figures", head, rows, wide=True),
        _seeds(data.summary["seeds"]),
        _tasks(evaluation),
        _benchmarks(evaluation),
        _forgetting(evaluation.get("student", {}).get("forgetting")),
    ]
    return _section("results", "Results on held-out text", lead, figures if evaluation else [])


def _seeds(found: dict[str, Any] | None) -> Figure | None:
    if found is None:
        return None
    kinds = [kind for kind in ("student", "baseline") if kind in found]
    sources = list(found["student"]["loss"])
    head = ["", *(f"loss, {source}" for source in sources), "KL to teacher", "first choice agrees", "ECE"]
    rows = [
        [
            kind,
            *(plus_minus(found[kind]["loss"][source]) for source in sources),
            *(plus_minus(found[kind][key]) if key in found[kind] else "–" for key in MEASURES[:3]),
        ]
        for kind in kinds
    ]
    number = len(found["seeds"])
    if "gap" in found:
        gaps = [f"{plus_minus(gap)}, {gap['won']} of {number} seeds" for gap in found["gap"].values()]
        rows.append(["baseline − student", *gaps, "", "", ""])
    names = ", ".join(str(row["seed"]) for row in found["seeds"])
    caption = f"Mean ± standard deviation; each seed has its own fresh weights and order of samples: {names}."
    return _table(f"{number} seeds", head, rows, caption, wide=True)


def _tasks(evaluation: dict[str, Any]) -> Figure | None:
    rows = [
        [name, task, found["metric"], _number(found["score"]), f"{found['low']:.3f} to {found['high']:.3f}"]
        for name, entry in evaluation.items()
        for task, found in entry.get("tasks", {}).items()
    ]
    caption = "The interval holds the score of 95 in 100 samples of as many examples (bootstrap)."
    return _table("Tasks", ["", "task", "metric", "score", "95% interval"], rows, caption)


def _benchmarks(evaluation: dict[str, Any]) -> Figure | None:
    rows = [
        [name, task, metric, _number(score["score"]), _number(score["stderr"])]
        for name, entry in evaluation.items()
        for task, metrics in entry.get("lm_eval", {}).items()
        for metric, score in metrics.items()
    ]
    caption = "Scored by lm-eval; the standard error is its own."
    return _table("Benchmarks", ["", "task", "metric", "score", "standard error"], rows, caption)


def _forgetting(found: dict[str, Any] | None) -> Figure | None:
    sources = found["sources"] if found else {}
    rows = [[source, *(_number(row[key]) for key in ("before", "after", "kl"))] for source, row in sources.items()]
    caption = f"The student against {found['from']}, from which its last stage started." if found else ""
    return _table("What the last stage changed", ["", "loss before", "loss after", "KL(before ‖ after)"], rows, caption)


def _fidelity(evaluation: dict[str, Any]) -> Plot:
    measures = (
        ("KL to the teacher, nats", False, lambda e: e.get("kl_to_teacher")),
        ("First choice differs, share", False, lambda e: _complement(e.get("top1_agreement"))),
        ("Expected calibration error", True, lambda e: e.get("ece")),
    )
    groups = []
    for title, of_teacher, measure in measures:
        names = [name for name in evaluation if of_teacher or name != "teacher"]
        values = [(name, measure(evaluation[name])) for name in names]
        bars = [Bar(name, _COLOURS[name], value) for name, value in values if value is not None]
        groups += [(title, bars)] if bars else []
    return bar_plot(groups, _three, "Fidelity")


def _training(data: ReportData) -> Section:
    learning = (
        ("loss", "Training loss", "The weighted sum that is minimised; the two runs weigh differently.", None, short),
        ("ce", "Cross-entropy", "Hard labels of the training batches, nats per token.", None, short),
        ("kl", "KL from the teacher", "On the training batches, nats per token.", 0.0, short),
        ("hidden", "Hidden states", "Error of the projected hidden states.", 0.0, short),
        ("attention", "Attention", "Squared distance of the attention rows.", 0.0, short),
        ("relation", "Relations", "KL of the positions' relations from the teacher's, nats per token.", 0.0, short),
    )
    running = (
        ("tokens_per_s", "Throughput", "Tokens per second, all ranks together.", 0.0, short),
        ("data_wait_fraction", "Waiting for data", "Share of a step that ranks wait for the dataset.", 0.0, percent),
        ("grad_norm", "Gradient norm", "Before clipping.", 0.0, short),
    )
    figures = [_curve(data, *plan) for plan in learning] + [_mixture(data)] + [_curve(data, *plan) for plan in running]
    figures.append(_learning_rate(data))
    return _section("training", "Training", "Thin lines are single steps, bold ones their running mean.", figures)


def _curve(
    data: ReportData, key: str, title: str, caption: str, low: float | None, shown: Callable[[float], str]
) -> Figure | None:
    """One figure of metrics.jsonl for all runs; none where a key was never recorded or is always zero."""
    lines = [line for line in _lines(data, key) if any(y for _, y in line.points)]
    return _figure(title, caption, line_plot(lines, "step", shown, low=low, label=title)) if lines else None


def _lines(data: ReportData, key: str) -> list[Series]:
    lines = []
    for name, curve in data.curves.items():
        colour = _COLOURS.get(name.partition("-seed")[0], "var(--one)")
        points = [(float(line["step"]), float(line[key])) for line in curve if line.get(key) is not None]
        window = 2 * round(len(points) * _SMOOTHING_SHARE / 2) + 1
        if window > 1:
            lines.append(Series(name, colour, points, faint=True))
        lines.append(Series(name, colour, smooth(points, window)))
    return lines


def _mixture(data: ReportData) -> Figure | None:
    lines = []
    for kind, dashed in (("realised", False), ("planned", True)):
        for n, source in enumerate(data.mixture[0]["planned"] if data.mixture else []):
            colour = "var(--ink)" if dashed else _PALETTE[n % len(_PALETTE)]
            points = [(float(row["step"]), row[kind].get(source, 0.0)) for row in data.mixture]
            lines.append(Series(f"{source}, {kind}", colour, points, dashed=dashed))
    plot = line_plot(lines, "step", percent, low=0.0, high=1.0, label="Mixture of sources")
    return _figure("Mixture of sources", "Share of each source in the batches.", plot) if lines else None


def _learning_rate(data: ReportData) -> Figure | None:
    curve = [line for line in data.curves.get("student", []) if line.get("lr") is not None]
    points = [(float(line["step"]), float(line["lr"])) for line in curve]
    plot = line_plot([Series("learning rate", "var(--student)", points)], "step", low=0.0, label="Learning rate")
    return _figure("Learning rate", "Warm-up, then cosine.", plot) if points else None


def _dataset(data: ReportData) -> Section:
    cache = data.summary["cache"]
    columns = data.columns[:_SHOWN_COLUMNS]
    if rest := sum(value for _, value in data.columns[_SHOWN_COLUMNS:]):
        columns = [*columns, ("all others", rest)]
    bars = [Bar(name, "var(--one)", float(value)) for name, value in columns]
    rows = [
        [source, split, f"{facts['samples']:,}", f"{facts['tokens']:,}", f"{facts['supervised']:,}"]
        for source, splits in (data.summary["data"].get("sources") or {}).items()
        for split, facts in splits.items()
    ]
    facts = [
        ["place", str(cache["url"])],
        ["kind of targets", cache["kind"]],
        ["samples", f"{cache['samples']:,}"],
        ["tokens", f"{cache['tokens']:,}"],
        ["bytes", f"{cache['bytes']:,}"],
        ["bytes per supervised token", f"{cache['bytes_per_token']:.2f}"],
        *([f"refused: {reason}", f"{number:,} samples, left out"] for reason, number in cache["refused"].items()),
        ["identity", str(data.summary["teacher"].get("fingerprint") or "unknown")],
    ]
    figures = [
        _figure(
            "Where the bytes go", "Compressed bytes of each Parquet column.", row_plot(bars, size, "Bytes by column")
        )
        if bars
        else None,
        _table("The soft-target dataset", [], facts),
        _table("Samples", ["source", "split", "samples", "tokens", "supervised"], rows, wide=True),
    ]
    lead = "What the teacher knows about these samples, kept once for any student that uses the same tokenizer."
    return _section("dataset", "Dataset", lead, figures)


def _run(data: ReportData) -> Section:
    summary = data.summary
    seconds = summary["run"]["seconds"]
    bars = [Bar(name, "var(--one)", value) for name, value in seconds.items()]
    capture, cost = summary["capture"], summary["cost"]
    rows = _capture_rows(capture, cost["currency"])
    if summary["train"].get("order_digest"):
        rows.append(["order of samples", str(summary["train"]["order_digest"])])
    if workers := summary["train"].get("workers"):
        changes = [f"{row['workers']} from step {row['step']} on" for row in workers[1:]]
        rows.append(["workers of the student", ", ".join([str(workers[0]["workers"]), *changes])])
    if spent := summary["overhead"]:
        rows.append(["overhead", f"{spent['share']:.0%} of {duration(spent['work_s'])} of the stages' own work"])
    cap = f" of at most {cost['cap']:,.2f}" if cost["cap"] else ""
    rows.append(["cost", f"{cost['spent']:,.2f} {cost['currency']}{cap}"])
    planned = [shown(row) for row in summary["plan"]]
    figures = [
        _table(
            "Plan and outcome",
            ["", "planned", "happened", "difference"],
            planned,
            "What `lectern plan` said before, where it could, and what came of it.",
            wide=True,
        ),
        _figure("Time by stage", "The last time each stage really ran.", row_plot(bars, duration, "Time by stage"))
        if bars
        else None,
        _table("Facts", [], rows),
    ]
    return _section("run", "The run", "Where the time went, and how the teacher was split over its ranks.", figures)


def _machines(data: ReportData) -> Section:
    line, currency = data.line, data.summary["cost"]["currency"]
    nodes = [
        Series(f"{name}", _PALETTE[n % len(_PALETTE)], points, area=True)
        for n, (name, points) in enumerate(line.nodes.items())
    ]
    hours = [[name, f"{value:.2f}"] for name, value in line.node_hours.items()]
    rate = [Series("tokens/s", "var(--teacher)", line.tokens_per_s)] if line.tokens_per_s else []
    busy = [Series("busy replicas", "var(--teacher)", line.replicas, area=True)] if line.replicas else []
    spent = [Series("machines", "var(--one)", data.spent, area=True)] if data.spent else []
    by_time: list[_Drawn] = [
        ("Nodes", "Alive at each moment, by node type.", nodes, short),
        ("Teacher's replicas at work", "Those that had a unit to score.", busy, short),
        ("Capture", "Tokens per second of all replicas, since the first was ready.", rate, short),
        (f"Spent on machines, {currency}", "Nodes times their price, summed up.", spent, short),
    ]
    unit = "h" if line.hours >= _LONG_H else "min"
    figures = [
        _figure(title, caption, line_plot(lines, unit, form, low=0.0, label=title)) if lines else None
        for title, caption, lines, form in _in_unit(by_time, line.hours)
    ]
    figures.append(_table("Node-hours", [], hours, "By node type, over the whole run."))
    lead = "The run over its hours of work; the pause after an interrupted command takes no time here."
    return _section("machines", "Machines", lead, figures)


def _in_unit(figures: list[_Drawn], hours: float) -> list[_Drawn]:
    """Give short runs their time axis in minutes."""
    factor = 1.0 if hours >= _LONG_H else 60.0
    return [
        (title, caption, [replace(line, points=[(x * factor, y) for x, y in line.points]) for line in lines], form)
        for title, caption, lines, form in figures
    ]


def _failures(data: ReportData) -> Section:
    rows = [[row["time"], row["what"], row["then"]] for row in data.summary["failures"]]
    kept = rows[:_SHOWN_FAILURES]
    more = f" The first {_SHOWN_FAILURES} of {len(rows)}." if len(rows) > _SHOWN_FAILURES else ""
    table = _table("What went wrong, and what became of it", ["time (UTC)", "what", "then"], kept, wide=True)
    if table is not None:
        # Sentences, not figures: they wrap, and stand to the left.
        table["prose"] = True
    return _section(
        "failures", "Failures survived", f"Nodes, replicas and units that were lost on the way.{more}", [table]
    )


def _capture_rows(capture: dict[str, Any], currency: str) -> list[list[str]]:
    rows = []
    if capture.get("forward_tokens_per_s"):
        rows.append(["capture, tokens/s", f"{capture['tokens_per_s']:,.0f}"])
        rows.append(["forward pass, tokens/s", f"{capture['forward_tokens_per_s']:,.0f}"])
    # An actor that asks an endpoint is in the same list, and holds no part of a model.
    ranks = [rank for rank in capture.get("ranks") or [] if "rank" in rank]
    for rank in ranks:
        share = rank["parameters_held"] / max(rank["parameters_total"], 1)
        rows.append([f"teacher rank {rank['rank']}", f"{count(rank['parameters_held'])} parameters, {share:.0%}"])
    replicated = sorted({name for rank in ranks for name in rank.get("replicated") or []})
    if replicated:
        more = f" and {len(replicated) - _SHOWN_NAMES} more" if len(replicated) > _SHOWN_NAMES else ""
        rows.append(["whole on every rank", ", ".join(replicated[:_SHOWN_NAMES]) + more])
    if capture.get("padding"):
        rows.append(["padding in the forward passes", _share(capture["padding"])])
    fleet = capture.get("fleet") or {}
    if fleet.get("machine_s"):
        price = f", {fleet['idle_cost']:,.2f} {currency}" if fleet["idle_cost"] else ""
        rows.append(["idle time of the replicas", _share(fleet["idle_s"] / fleet["machine_s"]) + price])
    if capture.get("replicas_lost"):
        rows.append(["replicas lost and replaced", str(capture["replicas_lost"])])
    failed = capture.get("failed_units") or []
    rows += [[f"unit {unit['unit']} failed", f"{unit['samples']} samples: {unit['error']}"] for unit in failed]
    return rows


def _three(value: float) -> str:
    return f"{value:.3f}" if value < 10 else short(value)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


def _complement(value: float | None) -> float | None:
    return None if value is None else 1.0 - value
