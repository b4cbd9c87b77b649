"""Results of commands as text for people, drawn with Rich."""

from typing import TYPE_CHECKING, Any

from cluster.figures import count, size
from cluster.report.seeds import plus_minus
from cluster.terminal import Terminal

if TYPE_CHECKING:
    from cluster.plan import Plan
    from cluster.sample_view import SampleView


_TEXT_COLUMNS = {
    *(
        "run",
        "source",
        "split",
        "held-out",
        "benchmark",
        "column",
        "token",
        "teacher's first choices",
        "stage",
        "node type",
    ),
}


def show_plan(out: Terminal, plan: "Plan") -> None:
    """Print a plan."""
    sources = _table("source", "split", "samples", "tokens", "supervised")
    for source, splits in plan.sources.items():
        for split, facts in splits.items():
            numbers = (f"{facts[key]:,}" for key in ("samples", "tokens", "supervised"))
            sources.add_row(source, split, *numbers)
    out.show(sources)
    basis = "as measured in this dataset" if plan.bytes_measured else "estimated"
    facts = _facts()
    facts.add_row(
        "to be captured", f"{plan.samples:,} samples, {plan.tokens:,} tokens, {plan.supervised_tokens:,} supervised"
    )
    facts.add_row("cached already", f"{plan.cached_samples:,} samples")
    facts.add_row(
        "missing", f"{plan.missing_samples:,} samples, {plan.missing_tokens:,} tokens in {plan.units:,} units"
    )
    if plan.refused_samples:
        facts.add_row("left out", f"{plan.refused_samples:,} samples that the teacher refused before")
    facts.add_row(
        "expected size",
        f"{size(plan.expected_bytes)} more ({plan.bytes_per_token:g} bytes per supervised token, {basis})",
    )
    if plan.api is None:
        facts.add_row("teacher-hours", _hours(plan))
    else:
        _add_spending(facts, plan.api)
    passes = ", ".join(f"{times:.2f} × {name}" for name, times in plan.passes.items())
    facts.add_row("training", f"{plan.steps:,} steps, {plan.train_samples:,} samples: {passes}")
    out.show(facts)
    show_money(out, plan.money)
    for check in plan.checks:
        out.say(f"  ✓ {check}")
    for gap in plan.unknown:
        out.say(f"  ? {gap}")


def show_money(out: Terminal, money: dict[str, Any]) -> None:
    """Print what a run costs; see `pricing.RunCost`."""
    if not money["priced"] and not money["hours"]:
        return
    currency = money["currency"]
    table = _table("stage", "tokens", "tokens/s", "hours", "nodes", "node type", "price per hour", currency)
    for stage in money["stages"]:
        hours, cost = (_known(stage[key], ".3g") for key in ("hours", "cost"))
        rate = "–" if stage["tokens_per_s"] is None else count(stage["tokens_per_s"])
        kind = stage["node_type"] or "any"
        price = f"{stage['price_per_hour']:,.4g}"
        table.add_row(stage["stage"], count(stage["tokens"]), rate, hours, str(stage["nodes"]), kind, price, cost)
    out.show(table)
    if money["priced"]:
        span = f"{money['expected']:,.4g} {currency}"
        if money["api_worst"]:
            span += f" expected, {money['worst']:,.4g} at worst"
        facts = _facts()
        facts.add_row("machines", f"{money['machines']:,.4g} {currency}, {money['head']:,.4g} of it for the head node")
        facts.add_row("together", span)
        kept = size(money["dataset_bytes"])
        facts.add_row("storage", f"{money['storage_per_month']:,.4g} {currency} a month for {kept}")
        out.show(facts)
    if money["unknown"]:
        out.say(
            f"  ? hours of {', '.join(money['unknown'])}: no rate is known yet; give --tokens-per-s and "
            "--train-tokens-per-s, name a run with --like, or run a part first"
        )


def show_api_plan(out: Terminal, api: dict[str, Any]) -> None:
    """Print what a generation would cost, where the rest waits for its completions; see `api_plan.api_plan`."""
    facts = _facts()
    _add_spending(facts, api)
    out.show(facts)
    out.say("  ? samples, capture and training: they wait for the completions that `lectern generate` writes")


def show_local_generation(out: Terminal, found: dict[str, Any]) -> None:
    """Print what a teacher that is run here would write; see `api_plan.local_generation`."""
    facts = _facts()
    facts.add_row(
        "generate",
        f"{found['completions']:,} completions for {found['prompts']:,} prompts, at most "
        f"{count(found['most_tokens'])} tokens; what is on disk is not written again",
    )
    out.show(facts)
    out.say("  ? samples, capture and training: they wait for the completions that `lectern generate` writes")


def _add_spending(facts: Any, api: dict[str, Any]) -> None:
    for name, part in api["parts"].items():
        facts.add_row(name, _requests(part, api))
    facts.add_row("caps", _caps(api))


def _requests(part: dict[str, Any], api: dict[str, Any]) -> str:
    asked = (
        f"{part['requests']:,} requests ({part['reused']:,} more are on disk), {count(part['expected_tokens'])} tokens"
    )
    if not api["priced"]:
        return f"{asked}, at most {count(part['worst_tokens'])}; no prices are set"
    return (
        f"{asked}: {part['expected']:,.4g} {api['currency']} expected, {part['worst']:,.4g} at worst "
        f"({count(part['worst_tokens'])} tokens); repeated attempts come on top, within the cap"
    )


def _caps(api: dict[str, Any]) -> str:
    if api["cap"] is None:
        return "no cap in money for this run"
    share = api["worst"] / api["cap"]
    return f"{api['cap']:,.6g} {api['currency']} for this run, {share:.0%} of it at worst without repeated attempts"


def _hours(plan: "Plan") -> str:
    if plan.teacher_hours is None:
        return "unknown until a capture ran here; give a rate with --tokens-per-s, or a run with --like"
    return f"{plan.teacher_hours:.3g} at {count(plan.tokens_per_s or 0)} tokens/s"


def show_result(out: Terminal, figures: dict[str, Any]) -> None:
    """Print what a run, or some of its stages, came to."""
    if "eval" in figures:
        out.show(_evaluation(figures["eval"]))
        _show_beside(out, figures["eval"])
    if figures.get("seeds"):
        out.show(_seeds(figures["seeds"]))
    facts = _facts()
    if "capture" in figures:
        found = figures["capture"]
        facts.add_row("captured", f"{found['scored_samples']:,} samples scored, {found['reused_samples']:,} reused")
    for name, found in figures.items():
        if name.startswith(("student", "baseline")):
            facts.add_row(name, f"{found['steps']:,} steps, {count(found['parameters'])} parameters, {found['path']}")
    if "report" in figures:
        facts.add_row("report", f"{figures['run_dir']}/report.html")
    out.show(facts)


SPECIAL = {"accuracy": ("accuracy", ".1%"), "chunk_gap": ("gap of a chunk", ".3f")}
"""Figures that students of some sort alone have: column and format."""


def _evaluation(evaluation: dict[str, Any]) -> Any:
    models = {name: evaluation[name] for name in ("teacher", "student", "baseline") if evaluation.get(name)}
    sources = list(next(iter(models.values()))["loss"])
    special = [key for key in SPECIAL if any(entry.get(key) is not None for entry in models.values())]
    per = " per byte" if next(iter(models.values())).get("unit") == "byte" else ""
    columns = (
        *(f"loss {source}{per}" for source in sources),
        "KL to teacher",
        "top-1 agrees",
        "ECE",
        *(SPECIAL[key][0] for key in special),
    )
    table = _table("held-out", *columns)
    for name, entry in models.items():
        losses = (f"{entry['loss'][source]:.4f}" for source in sources)
        table.add_row(
            name,
            *losses,
            _known(entry["kl_to_teacher"], ".4f"),
            _known(entry["top1_agreement"], ".1%"),
            _known(entry["ece"], ".4f"),
            *(_known(entry.get(key), SPECIAL[key][1]) for key in special),
        )
    return table


def _seeds(found: dict[str, Any]) -> Any:
    """The table of several seeds; see `report.seeds.over_seeds`."""
    table = _table(f"{len(found['seeds'])} seeds", *(f"loss {source}" for source in found["student"]["loss"]))
    for kind in ("student", "baseline"):
        if kind in found:
            table.add_row(kind, *map(plus_minus, found[kind]["loss"].values()))
    if "gap" in found:
        table.add_row("baseline − student", *map(plus_minus, found["gap"].values()))
    return table


def _show_beside(out: Terminal, evaluation: dict[str, Any]) -> None:
    """Print tasks, and what the student's last stage changed, where they were asked for."""
    models = {name: evaluation[name] for name in ("student", "baseline") if evaluation.get(name)}
    tasks = list(models.get("student", {}).get("tasks", {}))
    if tasks:
        table = _table("tasks, 95% interval", *tasks)
        for name, entry in models.items():
            found = [entry["tasks"][task] for task in tasks]
            table.add_row(name, *(f"{one['score']:.3f} ({one['low']:.3f} to {one['high']:.3f})" for one in found))
        out.show(table)
    scored = {name: entry["lm_eval"] for name, entry in models.items() if entry.get("lm_eval")}
    if scored:
        table = _table("benchmark", *scored)
        for task, metrics in next(iter(scored.values())).items():
            for metric in metrics:
                table.add_row(f"{task} {metric}", *(f"{found[task][metric]['score']:.4f}" for found in scored.values()))
        out.show(table)
    forgotten = models.get("student", {}).get("forgetting")
    if forgotten:
        table = _table(f"since {forgotten['from']}", "loss before", "loss after", "KL(before ‖ after)")
        for source, row in forgotten["sources"].items():
            table.add_row(source, *(f"{row[key]:.4f}" for key in ("before", "after", "kl")))
        out.show(table)


def show_account(out: Terminal, account: dict[str, Any]) -> None:
    """Print what was spent; see `stages.ledger.account`."""
    out.say(f"ledger {account['url']}, in {account['currency']}")
    table = _table("run", "attempts", "tokens", "settled", "unknown", "reserved", "used")
    rows = account["runs"] if len(account["runs"]) == 1 else {**account["runs"], "total": account["total"]}
    for name, part in rows.items():
        money = (f"{part[key]:,.6g}" for key in ("settled", "unknown", "reserved", "used"))
        table.add_row(name, f"{part['attempts']:,}", f"{part['tokens']:,}", *money)
    out.show(table)
    for scope, limits in account["caps"].items():
        for name, limit in limits.items():
            unit = account["currency"] if name == "money" else name
            out.say(f"{scope}'s cap: {limit['cap']:,.6g} {unit}, {limit['left']:,.6g} left")


def _known(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def show_generated(out: Terminal, found: dict[str, Any]) -> None:
    """Print what a generation came to; see `stages.generate.generate`."""
    facts = _facts()
    facts.add_row("completions", f"{found['kept']:,} kept in {found['url']}")
    for name in ("filtered", "set_aside"):
        if found[name]:
            parts = ", ".join(f"{number:,} {reason}" for reason, number in found[name].items())
            facts.add_row(name.replace("_", " "), parts)
    facts.add_row("requests", f"{found['answered']:,} answered, {found['reused']:,} on disk before")
    if "cost" in found:
        cost = found["cost"]
        facts.add_row("spent", f"{cost['spent']:,.6g} {cost['currency']}, {cost['reserved']:,.6g} reserved")
    else:
        facts.add_row("written", f"{count(found['tokens'])} tokens, {found['tokens_per_s']:,.1f} tokens/s")
    out.show(facts)


def show_dataset(out: Terminal, facts: dict[str, Any]) -> None:
    """Print what a dataset holds; see `inspect.describe_dataset`."""
    identity = facts["identity"]
    teacher, capture = identity["teacher"], identity["capture"]
    rows = _facts()
    rows.add_row("dataset", facts["url"])
    rows.add_row("identity", facts["fingerprint"])
    revision = f" at {teacher['revision']}" if teacher["revision"] else ""
    rows.add_row(
        "teacher",
        f"{teacher['name']}{revision}: {teacher['architecture']}, {count(teacher['parameters'])} parameters, "
        f"{identity['precision']}",
    )
    rows.add_row("tokenizer", f"{identity['tokenizer']['vocab_size']:,} ids, {identity['tokenizer']['digest'][:16]}…")
    aside = {"kind", "hidden", "hidden_dtype", "hidden_projection", "projection", "attention"}
    kept = [f"{key} {value}" for key, value in capture.items() if key not in aside and value not in (None, [], "")]
    rows.add_row("targets", ", ".join([capture["kind"], *kept]))
    for layer, found in facts["hidden"].items():
        rows.add_row("hidden state", _hidden_line(layer, found, capture, facts["head"]))
    if facts["attention"]:
        rows.add_row("attention", ", ".join(facts["attention"]))
    rows.add_row("codec", f"{facts['codec']}, schema version {facts['schema_version']}, {facts['created_by']}")
    again = f", {facts['duplicates']:,} of them held twice" if facts["duplicates"] else ", none held twice"
    rows.add_row("holds", f"{facts['samples']:,} samples{again}")
    rows.add_row("", f"{facts['tokens']:,} tokens, {facts['supervised']:,} supervised, in {facts['units']:,} units")
    rows.add_row("size", f"{size(facts['bytes'])}, {facts['bytes_per_token']:.2f} bytes per supervised token")
    for other in facts.get("also", ()):
        rows.add_row("also", f"{other['url']}: {other['teacher']}, {other['kind']}, {other['served']:,} samples more")
    for reason, number in facts["refused"].items():
        rows.add_row("refused", f"{number:,} samples: {reason}")
    rows.add_row("card", "README.md" if facts["card"] else "none; `lectern inspect --card` writes it")
    out.show(rows)
    columns = _table("column", "bytes per token", "compressed", "share")
    total = max(sum(facts["columns"].values()), 1)
    for name, value in facts["columns"].items():
        columns.add_row(name, f"{facts['column_bytes_per_token'][name]:.2f}", size(value), f"{value / total:.1%}")
    out.show(columns)


def _hidden_line(layer: str, found: dict[str, Any], capture: dict[str, Any], has_head: bool) -> str:
    parts = [f"{layer}: {found['dtype']} × {found['width']:,}, {found['bytes_per_state']:,} bytes a state"]
    if capture.get("hidden_every"):
        parts.append(f"at one position in {1 / min(1 / capture['hidden_every'], capture['hidden_every']):g}")
    if found["projection_loss"] is not None:
        parts.append(f"projected, {found['projection_loss']:.2%} of the variance lost")
    if layer == "final":
        parts.append("with its output head" if has_head else "without its output head")
    return ", ".join(parts)


def show_rescoring(out: Terminal, found: dict[str, Any]) -> None:
    """Print how far a dataset is from its teacher; see `workers.rescoring.Rescoring`."""
    what = {"logprob": "log-probabilities", "nll": "mean losses of samples"}[found["difference"]["of"]]
    table = _table("", "compared", "mean", "median", "90%", "99%", "largest", "same first choice")
    for name, key in (("dataset – teacher", "difference"), ("teacher – itself", "control")):
        row, spread = found[key], found[key]["spread"]
        agreement = "" if row["top1_agreement"] is None else f"{row['top1_agreement']:.1%}"
        numbers = [f"{spread[part]:.4f}" for part in ("mean", "p50", "p90", "p99", "max")]
        table.add_row(name, f"{row['compared']:,}", *numbers, agreement)
    out.say(f"{found['samples']} samples scored again: differences of {what}, nats")
    out.show(table)
    verdict = "within" if found["ok"] else "BEYOND"
    out.say(
        f"99% of the differences are at most {found['difference']['spread']['p99']:.4f} nats, {verdict} the limit of "
        f"{found['limit']:.4f}: the larger of --bound {found['bound']:g} and 3 times the teacher's own"
    )


def show_sample(out: Terminal, view: "SampleView") -> None:
    """Print a sample, one token a line, with the teacher's first choices."""
    from rich.text import Text

    from cluster.sample_view import visible

    out.say(f"sample {view.sample_id} · {view.source} · {len(view.tokens)} tokens")
    out.say(
        f"teacher: loss {view.teacher_nll:.3f} nats, entropy {view.teacher_entropy:.3f} nats, "
        f"first choice right {view.agreement:.0%}"
    )
    table = _table("#", "token", "p(token)", "teacher's first choices", "tail", "entropy")
    # One line a token: on a narrow screen the last choices are cut, not wrapped.
    for column in table.columns:
        column.no_wrap = column.header != "teacher's first choices"
    for token in view.tokens:
        shown = Text(visible(token.text), style="bold green" if token.agrees else "")
        if not token.supervised:
            table.add_row(str(token.position), Text(visible(token.text), style="dim"), "", "", "", "")
            continue
        own = f"{token.probability:.3f}" if token.probability is not None else "in tail"
        choices = "  ".join(f"{visible(choice.text)} {choice.probability:.3f}" for choice in token.choices)
        bound = "≥ " if token.tail > 0 else ""
        table.add_row(
            str(token.position),
            shown,
            own,
            Text(choices, no_wrap=True, overflow="ellipsis"),
            f"{token.tail:.3f}",
            f"{bound}{token.entropy:.2f}",
        )
    out.show(table)


def _table(*columns: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim")
    for name in columns:
        table.add_column(name, justify="left" if name in _TEXT_COLUMNS else "right")
    return table


def _facts() -> Any:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table
