"""Whether a joined cluster has the machines that a config places its stages on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.config import ClusterConfig, PlacementConfig
from storage.errors import InputError


@dataclass(frozen=True)
class Machines:
    """One sort of node that a cluster has or may add."""

    name: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]

    def __str__(self) -> str:
        parts = [f"{name}: {self.resources[name]:g}" for name in ("CPU", "GPU") if self.resources.get(name)]
        parts += [f"{key}={value}" for key, value in sorted(self.labels.items())]
        return f"{self.name} {{{', '.join(parts)}}}"


def require_placed(cluster: ClusterConfig, machines: Sequence[Machines]) -> None:
    """Raise InputError for a stage whose labels or resources no sort of node has; the message names those there are."""
    for stage in PlacementConfig.model_fields:
        node_type = cluster.node_type(stage)
        if node_type is None or stage == "head":
            continue
        asked = {name: amount for name, amount in node_type.resources.items() if amount > 0}
        if any(_offers(found, asked, node_type.labels) for found in machines):
            continue
        wanted = Machines(getattr(cluster.placement, stage), asked, node_type.labels)
        have = "; ".join(sorted({str(found) for found in machines})) or "none"
        raise InputError(
            f"cluster.placement.{stage} asks for {wanted}, and the cluster has no such nodes and may add none. "
            f"There are: {have}. Change cluster.node_types, or add the node type to the cluster's launch file"
        )


def check_placement(cluster: ClusterConfig) -> None:
    """Check a config against the Ray cluster that this process is in; see `require_placed`."""
    import ray

    config: Any = ray._private.state.state.get_cluster_config()
    groups = list(config.node_group_configs) if config is not None else []
    # Not every launcher tells its autoscaler's node types with labels. Then it cannot be judged here what may come;
    # who waits in vain is told when `teacher.startup_timeout_s` is over.
    if not any(_labels(group) for group in groups if group.max_count):
        return
    nodes = [node for node in ray.nodes() if node["Alive"]]
    machines = [Machines("node", node["Resources"], _own(node.get("Labels") or {})) for node in nodes]
    machines += [Machines(group.name, dict(group.resources), _labels(group)) for group in groups if group.max_count]
    require_placed(cluster, machines)


def _offers(found: Machines, resources: Mapping[str, float], labels: Mapping[str, str]) -> bool:
    enough = all(found.resources.get(name, 0.0) >= amount for name, amount in resources.items())
    return enough and labels.items() <= found.labels.items()


def _labels(group: Any) -> dict[str, str]:
    return dict(getattr(group, "labels", None) or {})


def _own(labels: Mapping[str, str]) -> dict[str, str]:
    """Leave out what Ray tells of every single node."""
    return {key: value for key, value in labels.items() if key != "ray.io/node-id"}
