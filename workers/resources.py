"""What a cluster can give: by its nodes now, and by the node types that its autoscaler may add."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from storage.errors import InputError

_SHOWN = ("CPU", "GPU")


@dataclass(frozen=True)
class Machines:
    """Where the ranks of local replicas run."""

    device: str = "cpu"
    """`cpu` or `gpu`, what each rank runs on."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """What the nodes must carry."""
    may_grow: bool = False
    """Whether Ray is a cluster that an autoscaler may add nodes to."""
    price_per_hour: float = 0.0
    """Of one replica, for the cost of idle time."""

    @property
    def torch_device(self) -> str:
        """What torch calls the device."""
        return "cuda" if self.device == "gpu" else "cpu"


ANY_CPU = Machines()
"""CPUs of any node that is there."""


@dataclass(frozen=True)
class NodeShape:
    """One sort of node: its resources, and how many of it there can be."""

    resources: Mapping[str, float]
    count: int

    def holds(self, bundle: Mapping[str, float]) -> int:
        """Return how many bundles one such node holds."""
        asked = {name: amount for name, amount in bundle.items() if amount > 0}
        return min((int(self.resources.get(name, 0.0) / amount) for name, amount in asked.items()), default=0)


def cluster_shapes() -> list[NodeShape]:
    """Return the shapes of the nodes of the Ray cluster that this process is in, and of those it can grow by."""
    import ray

    nodes = [NodeShape(node["Resources"], 1) for node in ray.nodes() if node["Alive"]]
    config: Any = ray._private.state.state.get_cluster_config()
    groups = config.node_group_configs if config is not None else []
    return nodes + [NodeShape(dict(group.resources), max(0, group.max_count)) for group in groups]


def placement_strategy(
    bundle: Mapping[str, float], count: int, shapes: Sequence[NodeShape] | None = None, may_grow: bool = False
) -> str:
    """Return STRICT_PACK where one node can hold all bundles of a replica, else PACK.

    `may_grow` tells that an autoscaler may add nodes of types unknown here: then only it can say what is impossible,
    see `autoscaler_refuses`. Raises InputError when the cluster can never hold them: waiting would be for nothing.
    """
    shapes = cluster_shapes() if shapes is None else shapes
    if any(shape.count and shape.holds(bundle) >= count for shape in shapes):
        return "STRICT_PACK"
    if may_grow or sum(shape.count * shape.holds(bundle) for shape in shapes) >= count:
        return "PACK"
    have = "; ".join(sorted({f"{shape.count} × {_readable(shape.resources)}" for shape in shapes})) or "no node"
    raise InputError(
        f"a replica needs {describe(bundle, count)}, and the cluster can never give that: its nodes and node types are "
        f"{have}; add a node type that has it, or change teacher.ranks or cluster.device"
    )


def autoscaler_refuses(bundle: Mapping[str, float]) -> bool:
    """Tell whether Ray's autoscaler (v2) has found that it can add no node for bundles like this one.

    It also says so while others fill the cluster up to its limit: then waiting is right, and this is false.
    """
    import ray

    raylet: Any = ray._raylet
    free, total = ray.available_resources(), ray.cluster_resources()
    if any(free.get(name, 0.0) < total.get(name, 0.0) for name in bundle):
        return False
    store = raylet.GcsClient(ray.get_runtime_context().gcs_address)
    return names_infeasible(store.get_cluster_status(timeout_s=5), bundle)


def names_infeasible(reply: bytes, bundle: Mapping[str, float]) -> bool:
    """Tell whether a serialised `GetClusterStatusReply` calls a placement group of such bundles infeasible."""
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    status = GetClusterStatusReply.FromString(reply)
    wanted = {name: amount for name, amount in bundle.items() if amount > 0}
    for gang in status.autoscaling_state.infeasible_gang_resource_requests:
        # Bundles lie in `bundle_selectors`; Rays before 2.50 put them into `requests`.
        requests = [
            *gang.requests,
            *(request for choice in gang.bundle_selectors for request in choice.resource_requests),
        ]
        if any(dict(request.resources_bundle) == wanted for request in requests):
            return True
    return False


def free_resources() -> str:
    """Return in words what the cluster has free now."""
    import ray

    return f"the cluster has {_readable(ray.available_resources())} of {_readable(ray.cluster_resources())} free"


def describe(bundle: Mapping[str, float], count: int) -> str:
    """Return the resources of a replica in words, e.g. `2 × {CPU: 1, GPU: 1}`."""
    return f"{count} × {_readable(bundle)}"


def _readable(resources: Mapping[str, float]) -> str:
    shown = {name: value for name, value in resources.items() if name in _SHOWN}
    return "{" + ", ".join(f"{name}: {value:g}" for name, value in sorted(shown.items())) + "}"
