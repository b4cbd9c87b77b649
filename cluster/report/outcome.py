"""The plan beside what happened, and what the run has cost."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from cluster.config import ClusterConfig
from cluster.figures import count, duration, size
from cluster.report.timeline import Timeline

Event = Mapping[str, Any]


def machine_cost(cluster: ClusterConfig, line: Timeline) -> float:
    """Return the price of the machines: node-hours by type where nodes were watched, else the time of the stages.

    Without prices of node types `cluster.price_per_hour` is that of the machines of one replica, at work or not.
    """
    priced = {name: kind.price_per_hour for name, kind in cluster.node_types.items()}
    if line.node_hours and any(priced.values()):
        return sum(hours * priced.get(name, 0.0) for name, hours in line.node_hours.items())
    return sum(line.stage_seconds.values()) / 3600 * cluster.price_per_hour


def compare(
    plan: Mapping[str, Any] | None, events: Sequence[Event], stage_seconds: Mapping[str, float], cost: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return rows `{what, planned, happened, unit}`; `planned` is None where the plan could not tell.

    Args:
        plan: as `plan.keep_plan` wrote it, or None.
        events: of the whole run; what was scored before the plan was made is left out.
        stage_seconds: time of each stage, all its executions together.
        cost: `{machines, api, currency}`, what was spent.
    """
    if plan is None:
        return []
    made = str(plan.get("made", ""))
    units = [e for e in events if e.get("event") == "unit_done" and e.get("samples") and str(e.get("time")) >= made]
    money = plan["money"]
    hours = {stage["stage"]: stage["hours"] for stage in money["stages"]}
    # Stages of a chain and further seeds are named after what they lead to.
    trained = sum(seconds for name, seconds in stage_seconds.items() if name.startswith(("student", "baseline")))
    rows = [
        _row("samples scored", plan["missing_samples"], sum(e["samples"] for e in units), ""),
        _row("tokens scored", plan["missing_tokens"], sum(e["tokens"] for e in units), "tokens"),
        _row("added to the dataset", plan["expected_bytes"], sum(e.get("bytes", 0) for e in units), "bytes"),
        _row("capture", _seconds(hours.get("capture")), stage_seconds.get("capture"), "s"),
        _row("training", _seconds(hours.get("train")), trained or None, "s"),
        _row("evaluation", _seconds(hours.get("evaluate")), stage_seconds.get("evaluate"), "s"),
    ]
    if money["priced"]:
        machines = None if money["unknown"] else money["machines"]
        rows.append(_row("machines", machines, cost["machines"], cost["currency"]))
        if money["api_worst"] or cost["api"]:
            rows.append(_row("API", money["api_expected"], cost["api"], cost["currency"]))
    return [row for row in rows if row["planned"] is not None or row["happened"]]


def overhead(events: Sequence[Event]) -> dict[str, Any] | None:
    """Return `{wall_s, work_s, share, around}`: the time of the commands, and of their stages' own work.

    Own work is tokens that are scored or trained on, and whole stages that do no more than start with it; `share` is
    what the commands took beyond it, as a share of it, and `around` the seconds of each stage before and after it.
    Commands that did nothing new, or did not get to their end or their report, are left out; None where all are.
    """

    def reports(event: Event) -> bool:
        return event.get("event") == "stage_started" and event.get("stage") == "report"

    wall, work, around = 0.0, 0.0, dict[str, float]()
    began: datetime | None = None
    done: list[Event] = []
    for event in events:
        name = event.get("event")
        if name == "command_started":
            began, done = datetime.fromisoformat(str(event["time"])), []
        elif name == "stage_finished" and not event.get("skipped"):
            done.append(event)
        elif began is not None and done and (name == "command_finished" or reports(event)):
            wall += (datetime.fromisoformat(str(event["time"])) - began).total_seconds()
            for stage in done:
                # What a command that was ended from outside had done before is in `work_s` too.
                own = min(stage.get("work_s", stage["seconds"]), stage["seconds"])
                work += own
                around[stage["stage"]] = round(around.get(stage["stage"], 0.0) + stage["seconds"] - own, 3)
            began = None
    if not work:
        return None
    return {"wall_s": round(wall, 3), "work_s": round(work, 3), "share": round(wall / work - 1, 4), "around": around}


def shown(row: Mapping[str, Any]) -> list[str]:
    """Return a row of `compare` as text: what, planned, happened, difference."""
    planned, happened, unit = row["planned"], row["happened"], row["unit"]
    difference = "–"
    if planned and happened:
        difference = f"{happened / planned - 1:+.0%}".replace("-", "−")
    return [row["what"], _text(planned, unit), _text(happened, unit), difference]


def _row(what: str, planned: float | None, happened: float | None, unit: str) -> dict[str, Any]:
    return {"what": what, "planned": planned, "happened": happened, "unit": unit}


def _seconds(hours: float | None) -> float | None:
    return None if hours is None else hours * 3600


def _text(value: float | None, unit: str) -> str:
    if value is None:
        return "not known"
    if unit == "s":
        return duration(value)
    if unit == "bytes":
        return size(value)
    if unit in {"", "tokens"}:
        return count(value)
    return f"{value:,.2f} {unit}"
