"""Whether the nodes of a cluster reach what a run names, asked on the nodes themselves before any work starts."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.errors import InputError, LecternError
from storage.object_store import Store
from storage.store_errors import redact

_PREFIX = ".reach-"
MAX_NODES = 32
"""Nodes that are asked, at most."""


@dataclass(frozen=True)
class Question:
    """What a node is asked: places that it must read and write, folders that it must see."""

    mark: str
    places: Mapping[str, str]
    """What for → URL."""
    folders: Mapping[str, str]
    """What for → absolute path."""

    @staticmethod
    def ask(places: Mapping[str, str], folders: Mapping[str, str]) -> "Question":
        """Lay down an object in every place, for the nodes to find."""
        question = Question(uuid.uuid4().hex, places, folders)
        for url in places.values():
            Store(url).write(question.key("asked"), question.mark.encode())
        return question

    def key(self, node: str) -> str:
        """Name of a node's object."""
        return f"{_PREFIX}{self.mark}-{node}"

    def clear(self, nodes: Sequence[str]) -> None:
        """Remove what was laid down."""
        for url in self.places.values():
            for node in ("asked", *nodes):
                Store(url).delete(self.key(node))


def answer(question: Question, node: str) -> list[str]:
    """Return what this process, on `node`, cannot reach; leaves an object behind in each place that it can."""
    problems = [
        f"{name} {path} is not there; put it on every node, or on an object store or hub that all reach"
        for name, path in question.folders.items()
        if not Path(path).exists()
    ]
    for name, url in question.places.items():
        try:
            store = Store(url)
            if store.read_if_exists(question.key("asked")) is None:
                problems.append(
                    f"{name} {redact(url)} is another place there: the object that the driver wrote is missing. Name "
                    "an object store or a file system that all nodes share"
                )
                continue
            store.write(question.key(node), question.mark.encode())
        except LecternError as error:
            problems.append(f"{name}: {error}")
    return problems


def check_reach(
    places: Mapping[str, str],
    folders: Mapping[str, str],
    bundle: Mapping[str, float],
    timeout_s: float,
    labels: Mapping[str, str] | None = None,
) -> int:
    """Ask the nodes that are there, and one that has the resources and labels of a rank; returns how many answered.

    Ray must be running. Waiting for the latter makes an autoscaler add the node that the work needs anyway.

    Raises InputError, naming node and place, when one cannot read or write what the driver can.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as OnNode

    question = Question.ask(places, folders)
    ask: Any = ray.remote(_on_node)
    alive = [node for node in ray.nodes() if node["Alive"]]
    asked = [
        ask.options(num_cpus=0, max_retries=2, scheduling_strategy=OnNode(node["NodeID"], soft=False)).remote(question)
        for node in alive[:MAX_NODES]
    ]
    if not any(_holds(node["Resources"], bundle) and _carries(node, labels or {}) for node in alive):
        needs = {"num_cpus": bundle.get("CPU", 1.0), "num_gpus": bundle.get("GPU", 0.0)}
        asked.append(ask.options(**needs, max_retries=2, label_selector=dict(labels or {}) or None).remote(question))
    try:
        answers = ray.get(asked, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError as error:
        raise InputError(
            f"no node with {dict(bundle)} and labels {dict(labels or {})} came up in {timeout_s:g} s; the cluster has "
            f"{'; '.join(sorted({_shown(node) for node in alive}))}. `ray status` on the head node says what its "
            "autoscaler waits for; change cluster.placement, or raise teacher.startup_timeout_s"
        ) from error
    question.clear([node for node, _, _ in answers])
    for _, address, problems in answers:
        if problems:
            raise InputError(f"node {address} does not reach what this run needs: {'; '.join(problems)}")
    return len({node for node, _, _ in answers})


def _on_node(question: Question) -> tuple[str, str, list[str]]:
    import ray

    node = str(ray.get_runtime_context().get_node_id())
    return node, str(ray.util.get_node_ip_address()), answer(question, node)


def _shown(node: Mapping[str, Any]) -> str:
    resources = {name: node["Resources"].get(name, 0.0) for name in ("CPU", "GPU")}
    labels = {key: value for key, value in (node.get("Labels") or {}).items() if key != "ray.io/node-id"}
    return f"{node['NodeManagerAddress']} {resources} {labels}"


def _carries(node: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    return labels.items() <= (node.get("Labels") or {}).items()


def _holds(resources: Mapping[str, float], bundle: Mapping[str, float]) -> bool:
    return all(resources.get(name, 0.0) >= amount for name, amount in bundle.items())
