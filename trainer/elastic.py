"""Ray Train whose number of ranks follows the machines that there are, where a training is elastic.

Ray's own elastic policy counts the share of the cluster that its autoscaling coordinator has set aside. That is made
without a look at labels, so that teachers' nodes count as trainers', and anew every 20 s only, so that dead nodes
count. A group of ranks that is too large waits in vain, and one that runs is torn down to grow onto nodes that it may
not use. Here the living nodes themselves are counted.
"""

import time
from collections.abc import Iterable, Mapping
from typing import Any

import ray
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy


class LivingNodesPolicy(ElasticScalingPolicy):  # type: ignore[misc]
    """Ray's elastic policy on the nodes that could hold a rank now."""

    def __init__(self, scaling_config: ScalingConfig) -> None:
        super().__init__(scaling_config)
        self._seen: dict[str, dict[str, float]] = {}
        self._seen_at = float("-inf")

    def _get_reserved_resources(self) -> dict[str, dict[str, float]]:
        # Where too few nodes live, the controller asks without a pause.
        if time.monotonic() - self._seen_at >= self.GET_RESERVED_RESOURCES_INTERVAL_S:
            draining = ray._private.state.state.get_draining_nodes() or {}
            self._seen = usable(ray.nodes(), draining, self.scaling_config.label_selector or {})
            self._seen_at = time.monotonic()
        return self._seen


class Trainer(TorchTrainer):  # type: ignore[misc]
    """A TorchTrainer with `LivingNodesPolicy` where its ScalingConfig is elastic."""

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        if self.scaling_config.elasticity_enabled:
            arguments["scaling_policy"] = LivingNodesPolicy(self.scaling_config)
        return super()._initialize_and_run_controller(**arguments)


def usable(
    nodes: Iterable[Mapping[str, Any]], draining: Iterable[str], labels: Mapping[str, str]
) -> dict[str, dict[str, float]]:
    """Return the resources, by node, of those that live, carry the labels, and are not about to go.

    `nodes` are rows of `ray.nodes()`.
    """
    going = set(draining)
    return {
        str(node["NodeID"]): dict(node["Resources"])
        for node in nodes
        if node["Alive"] and node["NodeID"] not in going and labels.items() <= (node.get("Labels") or {}).items()
    }
