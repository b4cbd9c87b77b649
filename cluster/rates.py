"""What a run measured of itself, for the plan of the next: rates, and the seconds around the work of its stages."""

from dataclasses import dataclass, replace
from typing import Any

from cluster.rundir import EVENTS_KEY, RunDir


@dataclass(frozen=True)
class Rates:
    """Tokens per second of all machines of a stage together, None where not known; seconds to start and to end it."""

    capture: float | None = None
    train: float | None = None
    """Of a training, or the mean of student and baseline."""
    evaluate: float | None = None
    """Of all models one after the other, loading them included."""
    capture_start_s: float = 0.0
    train_start_s: float = 0.0
    """Of one training."""

    def given(self, capture: float | None, train: float | None) -> "Rates":
        """Return these with what was given by hand in place of what was measured."""
        return replace(self, capture=capture or self.capture, train=train or self.train)


def measured_rates(run: RunDir) -> Rates:
    """Return what the stages of a run have measured so far."""
    stages = last_stages(run.lines(EVENTS_KEY))
    capture = (run.result("capture") or {}).get("last", {})
    trained = [stage for stage in stages.values() if "order_digest" in stage and stage.get("work_s")]
    seconds = sum(stage["work_s"] for stage in trained)
    evaluated = stages.get("evaluate", {})
    return Rates(
        capture=capture.get("tokens_per_s") or None,
        train=sum(stage["tokens"] for stage in trained) / seconds if seconds else None,
        evaluate=evaluated["tokens"] / evaluated["seconds"] if evaluated.get("tokens") else None,
        capture_start_s=_around(stages.get("capture", {})),
        train_start_s=sum(map(_around, trained)) / len(trained) if trained else 0.0,
    )


def last_stages(events: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the last `stage_finished` event of each stage that did something."""
    done = (event for event in events if event.get("event") == "stage_finished" and not event.get("skipped"))
    return {str(event["stage"]): event for event in done}


def _around(stage: dict[str, Any]) -> float:
    """Seconds of a stage besides its work; work that an interrupted command did before counts as its own."""
    return max(float(stage.get("seconds", 0.0)) - float(stage.get("work_s") or stage.get("seconds", 0.0)), 0.0)
