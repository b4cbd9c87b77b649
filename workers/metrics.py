"""The fleet's state as Prometheus metrics, through Ray: every node's metrics agent serves them with Ray's own."""

from typing import Any

_GAUGES = {
    "units_done": "Units committed by this capture.",
    "units_failed": "Units set aside.",
    "units_in_flight": "Units that a replica has.",
    "units_queued": "Units that no replica has yet.",
    "tokens_done": "Tokens of the committed units.",
    "tokens_per_s": "Tokens per second since the first replica was ready.",
    "machine_s": "Seconds of machines paid for, all replicas together.",
    "idle_s": "Seconds of those without a unit.",
    "cost": "Price of machine_s.",
    "idle_cost": "Price of idle_s.",
}


class FleetMetrics:
    """Gauges `lectern_<name>`, exported as `ray_lectern_<name>`, and `lectern_replicas` with the tag `state`."""

    def __init__(self) -> None:
        from ray.util.metrics import Gauge

        self._replicas = Gauge("lectern_replicas", description="Replicas by state.", tag_keys=("state",))
        self._gauges = {name: Gauge(f"lectern_{name}", description=text) for name, text in _GAUGES.items()}

    def take(self, event: dict[str, Any]) -> None:
        """Set all gauges from a `fleet` event; others are passed over."""
        if event["event"] != "fleet":
            return
        for state, number in event["replicas"].items():
            self._replicas.set(number, tags={"state": state})
        for name, gauge in self._gauges.items():
            gauge.set(event[name])
