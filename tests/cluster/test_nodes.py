"""What is told of a cluster's nodes, played without one."""

from typing import Any

from cluster.config import ClusterConfig
from cluster.nodes import NodeLog

CLUSTER = ClusterConfig.model_validate(
    {"node_types": {"spot": {"labels": {"role": "t"}}, "fixed": {"labels": {"role": "t", "kind": "fixed"}}}}
)


def node(name: str, alive: bool = True, reason: int = 0, **labels: str) -> dict[str, Any]:
    """A row of `ray.nodes()`."""
    return {
        "NodeID": name,
        "Alive": alive,
        "NodeManagerAddress": f"10.0.0.{name}",
        "Labels": labels,
        "DeathReason": reason,
    }


def log() -> tuple[NodeLog, list[dict[str, Any]]]:
    """A log and what it tells."""
    told: list[dict[str, Any]] = []
    return NodeLog(CLUSTER, lambda event, **facts: told.append({"event": event, **facts})), told


def test_numbers_by_type_are_told_when_they_change() -> None:
    watch, told = log()
    watch.look([node("1"), node("2", role="t")], {}, 0.0)
    watch.look([node("1"), node("2", role="t")], {}, 0.0)
    watch.look([node("1"), node("2", role="t"), node("3", role="t", kind="fixed")], {}, 0.0)
    watch.close()
    assert [event["counts"] for event in told] == [
        {"other": 1, "spot": 1},
        {"fixed": 1, "other": 1, "spot": 1},
        {},
    ]


def test_a_lost_node_has_its_reason_and_an_idle_one_is_no_loss() -> None:
    watch, told = log()
    watch.look([node("1", role="t"), node("2", role="t"), node("3")], {}, 0.0)
    watch.look([node("1", False, 2, role="t"), node("2", False, 4, role="t"), node("3")], {}, 0.0)
    lost, gone = told[1:3]
    assert lost["event"] == "node_lost" and lost["address"] == "10.0.0.1" and lost["type"] == "spot"
    assert lost["reason"] == "died without warning"
    assert gone["event"] == "node_gone" and "autoscaler" in gone["reason"]
    assert told[3]["counts"] == {"other": 1}


def test_a_warning_is_told_once_and_its_end_is_a_loss() -> None:
    watch, told = log()
    watch.look([node("1", role="t")], {}, 0.0)
    for _ in range(3):
        watch.look([node("1", role="t")], {"1": 121_000}, 1_000.0)
    watch.look([node("1", False, 1, role="t")], {}, 0.0)
    events = [event["event"] for event in told]
    assert events == ["nodes", "node_warned", "node_lost", "nodes"]
    assert told[1]["deadline_s"] == 120.0
