"""Events as lines over time, failures as sentences, and the plan beside what happened."""

from typing import Any

import pytest

from cluster.config import ClusterConfig
from cluster.report.outcome import compare, machine_cost, overhead, shown
from cluster.report.timeline import failures, spending, timeline


def at(minute: float, event: str, **facts: Any) -> dict[str, Any]:
    """An event so many minutes after midnight."""
    seconds = round(minute * 60)
    time = f"2026-01-01T{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}.000+00:00"
    return {"time": time, "event": event, **facts}


RUN = [
    at(0, "command_started", command="run"),
    at(0, "stage_started", stage="capture"),
    at(6, "nodes", counts={"head": 1, "spot": 2}),
    at(12, "fleet", replicas={"busy": 2, "ready": 2}, tokens_per_s=100.0),
    at(18, "nodes", counts={"head": 1, "spot": 1}),
    at(18, "node_lost", node="n", address="10.0.0.7", type="spot", reason="preempted"),
    at(24, "replica_lost", replica=1, error="died"),
    # Killed here, and gone on with a day of pause later.
    at(600, "command_started", command="run"),
    at(600, "stage_started", stage="capture"),
    at(612, "unit_done", unit="u1", samples=10, tokens=1000, bytes=5000),
    at(624, "stage_finished", stage="capture", seconds=1440.0, skipped=False),
    at(624, "stage_started", stage="student"),
    at(630, "stage_finished", stage="student", seconds=0.1, skipped=True),
    at(630, "command_finished", command="run"),
]


def test_the_clock_stands_still_between_commands() -> None:
    line = timeline(RUN)
    assert line.hours == pytest.approx(24 / 60 + 30 / 60)
    assert line.stages == [("capture", 0.0, pytest.approx(0.4)), ("capture", pytest.approx(0.4), pytest.approx(0.8))]
    assert line.stage_seconds == {"capture": pytest.approx(2 * 24 * 60)}


def test_node_hours_are_the_area_below_the_steps() -> None:
    line = timeline(RUN)
    # 2 nodes for 12 minutes, 1 for 6; nothing is known of the time after the kill.
    assert line.node_hours["spot"] == pytest.approx(30 / 60)
    assert line.node_hours["head"] == pytest.approx(18 / 60)
    assert max(value for _, value in line.nodes["spot"]) == 2
    assert line.replicas == [(pytest.approx(0.2), 2.0)] and line.tokens_per_s[0][1] == 100.0


def test_spending_is_node_hours_times_price() -> None:
    line = timeline(RUN)
    prices = {"spot": 4.0, "head": 1.0}
    points = spending(line, prices, 0.0)
    assert points[0] == (0.0, 0.0) and points[-1][1] == pytest.approx(4.0 * 0.5 + 0.3)
    assert [y for _, y in points] == sorted(y for _, y in points)
    cluster = ClusterConfig.model_validate(
        {"node_types": {name: {"price_per_hour": price} for name, price in prices.items()}}
    )
    assert machine_cost(cluster, line) == pytest.approx(points[-1][1])


def test_without_watched_nodes_the_time_at_work_is_priced() -> None:
    local = timeline([event for event in RUN if event["event"] != "nodes"])
    assert machine_cost(ClusterConfig(price_per_hour=10.0), local) == pytest.approx(8.0)
    assert spending(local, {}, 10.0)[-1][1] == pytest.approx(9.0)


def test_failures_say_what_and_what_became_of_it() -> None:
    found = failures(RUN)
    assert [row["what"] for row in found] == [
        "node 10.0.0.7 (spot) was lost: preempted",
        "teacher replica 1: died",
        "the command was ended from outside",
    ]
    assert found[0]["time"] == "2026-01-01 00:18:00" and "done again elsewhere" in found[0]["then"]
    assert failures([at(0, "command_started"), at(1, "command_finished"), at(2, "command_started")]) == []


def test_a_run_without_events() -> None:
    assert timeline([]).hours == 0 and failures([]) == [] and compare(None, [], {}, {}) == []


def plan(**changed: Any) -> dict[str, Any]:
    """What `keep_plan` writes, in miniature."""
    stages = [{"stage": "capture", "hours": 0.5}, {"stage": "train", "hours": None}]
    money = {
        "stages": stages,
        "priced": True,
        "unknown": ["train"],
        "machines": 1.0,
        "api_expected": 0.0,
        "api_worst": 0.0,
    }
    made = "2026-01-01T09:00:00.000+00:00"
    return {
        "made": made,
        "missing_samples": 10,
        "missing_tokens": 800,
        "expected_bytes": 4000,
        "money": money,
        **changed,
    }


def test_plan_and_outcome_side_by_side() -> None:
    before = at(5, "unit_done", unit="u0", samples=99, tokens=9, bytes=9)
    cost = {"machines": 2.5, "api": 0.0, "currency": "EUR"}
    rows = {
        row["what"]: shown(row) for row in compare(plan(), [before, *RUN], {"capture": 2880.0, "student": 60.0}, cost)
    }
    assert rows["samples scored"][1:] == ["10", "10", "+0%"]
    assert rows["tokens scored"][1:] == ["800", "1000", "+25%"]
    assert rows["added to the dataset"][1:] == ["4 kB", "5 kB", "+25%"]
    assert rows["capture"][1:] == ["30 min 00 s", "48 min 00 s", "+60%"]
    assert rows["training"][1:] == ["not known", "60 s", "–"]
    # Some stage had no rate, so the plan's sum would be too small to compare with.
    assert rows["machines"][1:] == ["not known", "2.50 EUR", "–"]
    assert "API" not in rows and "evaluation" not in rows


def test_overhead_is_what_commands_take_beyond_the_work_of_their_stages() -> None:
    ended = [
        at(0 / 60, "command_started"),
        at(10 / 60, "stage_finished", stage="prepare", seconds=10.0, skipped=False),
        at(60 / 60, "stage_finished", stage="capture", seconds=50.0, skipped=False, work_s=40.0),
        at(61 / 60, "stage_started", stage="report"),
        at(65 / 60, "stage_finished", stage="report", seconds=4.0, skipped=False),
        at(66 / 60, "command_finished"),
    ]
    killed = [
        at(100 / 60, "command_started"),
        at(200 / 60, "stage_finished", stage="student", seconds=90.0, skipped=False, work_s=9.0),
    ]
    # Most of this training was done by the command before.
    resumed = [
        at(300 / 60, "command_started"),
        at(301 / 60, "stage_finished", stage="capture", seconds=0.5, skipped=True),
        at(330 / 60, "stage_finished", stage="student", seconds=25.0, skipped=False, work_s=70.0),
        at(331 / 60, "command_finished"),
    ]
    nothing = [at(400 / 60, "command_started"), at(404 / 60, "command_finished")]
    found = overhead([*ended, *killed, *resumed, *nothing])
    assert found == {
        "wall_s": 92.0,
        "work_s": 75.0,
        "share": pytest.approx(92 / 75 - 1, abs=1e-4),
        "around": {"prepare": 0.0, "capture": 10.0, "student": 0.0},
    }
    assert overhead(killed) is None and overhead([]) is None
