"""What is shown and kept of a fleet's events."""

import io
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cluster.progress import Shown, Task
from cluster.rundir import RunDir
from cluster.stages.capture import _Follower, describe_fleet
from workers.commands import Start
from workers.dispatch import Dispatcher
from workers.policy import FleetPolicy, ReplicaKind
from workers.replica import Placed, Ready


def fleet_event(price: float = 0.0) -> dict[str, Any]:
    """The event of a fleet of two replicas, one of them loading, with three units."""
    units = [SimpleNamespace(unit_id=f"u{n}", num_tokens=10) for n in range(3)]
    kind = ReplicaKind("local", max=2, prefetch=0, price_per_hour=price)
    dispatcher: Dispatcher[Any] = Dispatcher(units, 30, [kind], FleetPolicy())
    assert sum(isinstance(command, Start) for command in dispatcher.commands(0.0)) == 2
    for news in (Placed(1), Ready(1), Placed(2)):
        dispatcher.tell(news, 0.0)
    dispatcher.commands(0.0)
    return {"event": "fleet", **dispatcher.status(3600.0).to_json()}


def test_the_line_tells_replicas_units_and_idle_cost() -> None:
    assert describe_fleet(fleet_event(), "USD") == "1 of 1 replicas busy, 1 loading, 1 units in flight, 2 queued"
    assert describe_fleet(fleet_event(2.5), "EUR").endswith("idle 2.50 EUR")


def test_events_are_kept_but_the_fleets_state_only_now_and_then(tmp_path: Path) -> None:
    run, stream = RunDir(tmp_path), io.StringIO()
    config = SimpleNamespace(budget=SimpleNamespace(currency="USD"))
    follower = _Follower(SimpleNamespace(run=run, config=config), Shown(Task("Capturing", "tokens"), stream))  # type: ignore[arg-type]
    follower.on_event({"event": "units_planned", "units": 3, "samples": 3, "tokens": 30, "reused_samples": 0})
    for _ in range(5):
        follower.on_event(fleet_event())
    follower.on_event({"event": "unit_failed", "unit": "u1", "samples": 1, "attempts": 3, "error": "NaN"})
    follower.on_event({"event": "unit_done", "unit": "u0", "tokens": 10})
    follower.on_event({**fleet_event(), "ended": True})
    kept = [line["event"] for line in run.lines("events.jsonl")]
    assert kept == ["units_planned", "fleet", "unit_failed", "unit_done", "fleet"]
    assert "unit failed: NaN" in stream.getvalue()
    assert follower._done == 10 and time.monotonic() >= follower._kept_at
