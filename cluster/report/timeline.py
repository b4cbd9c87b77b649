"""A run's events as lines over time: nodes, replicas, throughput, spending, and what went wrong on the way."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from typing import Any

Event = Mapping[str, Any]
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Timeline:
    """Points are (hours of work since the run's first event, value); pauses between commands take no time."""

    hours: float = 0.0
    nodes: dict[str, Points] = field(default_factory=dict)
    """Node type → number of nodes, as steps."""
    node_hours: dict[str, float] = field(default_factory=dict)
    replicas: Points = field(default_factory=list)
    """Replicas of the teacher that have work."""
    tokens_per_s: Points = field(default_factory=list)
    """Of the capture, all replicas together."""
    stages: list[tuple[str, float, float]] = field(default_factory=list)
    """`(name, begin, end)` of each execution of a stage that did something, in hours."""

    @property
    def stage_seconds(self) -> dict[str, float]:
        """Time of each stage, all its executions together, interrupted ones too."""
        seconds: dict[str, float] = {}
        for name, begin, end in self.stages:
            seconds[name] = seconds.get(name, 0.0) + (end - begin) * 3600
        return seconds


def spending(line: Timeline, prices: Mapping[str, float], per_hour: float) -> Points:
    """Return the price of the machines so far: of the nodes where they were watched, else per hour of work."""
    moments = sorted({hour for points in line.nodes.values() for hour, _ in points} | {0.0, line.hours})
    watched = bool(line.nodes) and any(prices.get(name) for name in line.nodes)
    total, before, points = 0.0, 0.0, [(0.0, 0.0)]
    for hour in moments:
        if watched:
            rate = sum(prices.get(name, 0.0) * _value(line.nodes[name], before) for name in line.nodes)
        else:
            rate = per_hour if any(begin <= before < end for _, begin, end in line.stages) else 0.0
        total += rate * (hour - before)
        before = hour
        points.append((hour, total))
    return points


def _value(points: Points, hour: float) -> float:
    """The value of a step line right after a moment."""
    return next((value for at, value in reversed(points) if at <= hour), 0.0)


def timeline(events: Sequence[Event]) -> Timeline:
    """Return the lines of the events of a run, which may have been interrupted and gone on with."""
    rows = _on_work_clock(events)
    if not rows:
        return Timeline()
    nodes = _nodes(rows)
    fleet = [(hour, event) for hour, event in rows if event["event"] == "fleet"]
    return Timeline(
        hours=rows[-1][0],
        nodes=nodes,
        node_hours={name: _area(points) for name, points in nodes.items()},
        replicas=[(hour, float(event["replicas"].get("busy", 0))) for hour, event in fleet],
        tokens_per_s=[(hour, float(event["tokens_per_s"])) for hour, event in fleet if event.get("tokens_per_s")],
        stages=_stages(rows),
    )


def failures(events: Sequence[Event]) -> list[dict[str, str]]:
    """Return what went wrong and what became of it, oldest first: `{time, what, then}`."""
    found = []
    running = False
    for event in events:
        name = event.get("event")
        if name == "command_started":
            if running:
                found.append(
                    _failure(event, "the command was ended from outside", "the same command went on from storage")
                )
            running = True
        elif name in {"command_finished", "stage_failed"}:
            running = False
        told = _TOLD.get(str(name))
        if told is not None:
            what, then = told
            found.append(_failure(event, what(event), then))
    return found


def _failure(event: Event, what: str, then: str) -> dict[str, str]:
    return {"time": str(event.get("time", ""))[:19].replace("T", " "), "what": what, "then": then}


def _node(event: Event) -> str:
    return f"node {event.get('address') or event.get('node')} ({event.get('type')})"


def _unit(event: Event) -> str:
    return f"unit {str(event.get('unit'))[:12]}: {event.get('error')}"


_TOLD: dict[str, tuple[Callable[[Event], str], str]] = {
    "node_lost": (
        lambda e: f"{_node(e)} was lost: {e.get('reason')}",
        "what it worked on was done again elsewhere; what it had committed is kept",
    ),
    "node_warned": (
        lambda e: f"{_node(e)} was about to be taken away",
        "a training that ran there wrote a checkpoint",
    ),
    "workers_lost": (
        lambda e: f"training {e.get('run')} lost machines: {e.get('before')} → {e.get('workers')} workers",
        "it went on from its newest checkpoint with those that were left, the same samples in the same order",
    ),
    "replica_lost": (
        lambda e: f"teacher replica {e.get('replica')}: {e.get('error')}",
        "replaced, its unit queued again",
    ),
    "unit_retried": (_unit, "tried again"),
    "unit_failed": (_unit, "set aside; the next run tries it again"),
    "stage_failed": (
        lambda e: f"stage {e.get('stage')}: {e.get('error')}",
        "the command ended; the same one goes on from there",
    ),
}


def _on_work_clock(events: Iterable[Event]) -> list[tuple[float, Event]]:
    """Pair events with hours of work: the time from a command's last event to the next command's start is left out."""
    rows: list[tuple[float, Event]] = []
    clock, before = 0.0, None
    for event in events:
        moment = _moment(event)
        if moment is None or "event" not in event:
            continue
        if before is not None and event["event"] != "command_started":
            clock += max(moment - before, 0.0) / 3600
        before = moment
        rows.append((clock, event))
    return rows


def _moment(event: Event) -> float | None:
    try:
        return datetime.fromisoformat(str(event.get("time"))).timestamp()
    except ValueError:
        return None


def _nodes(rows: Sequence[tuple[float, Event]]) -> dict[str, Points]:
    """Numbers of nodes as steps: each change has a point before and one after it."""
    counts = [(hour, event) for hour, event in rows if event["event"] in {"nodes", "command_started"}]
    names = sorted({name for _, event in counts for name in event.get("counts", {})})
    lines: dict[str, Points] = {}
    for name in names:
        points: Points = []
        value = 0.0
        for hour, event in counts:
            new = float(event.get("counts", {}).get(name, 0))
            if new != value or not points:
                points += [(hour, value), (hour, new)]
            value = new
        lines[name] = [*points, (rows[-1][0], value)]
    return lines


def _area(points: Points) -> float:
    return sum((after[0] - before[0]) * before[1] for before, after in pairwise(points))


def _stages(rows: Sequence[tuple[float, Event]]) -> list[tuple[str, float, float]]:
    """Stages that did something, interrupted ones until the last event of their command."""
    done: list[tuple[str, float, float]] = []
    begun: dict[str, float] = {}
    for hour, event in rows:
        name, stage = event["event"], str(event.get("stage"))
        if name == "command_started":
            # The clock stood still since the last event of the command that was ended.
            done += [(left, begin, hour) for left, begin in begun.items()]
            begun = {}
        elif name == "stage_started":
            begun[stage] = hour
        elif name in {"stage_finished", "stage_failed"}:
            begin = begun.pop(stage, hour - float(event.get("seconds", 0.0)) / 3600)
            if not event.get("skipped"):
                done.append((stage, max(begin, 0.0), hour))
    return done
