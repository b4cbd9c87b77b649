"""The nodes of a joined cluster over a run: which there are, which were warned or lost, and why."""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from cluster.config import ClusterConfig

EVERY_S = 5.0
"""Time between two looks at the cluster."""
_OTHER = "other"
_REASONS = {
    0: "no reason was given",
    1: "ended as asked",
    2: "died without warning",
    3: "preempted",
    4: "idle, ended by the autoscaler",
}
"""Ray's `NodeDeathInfo.Reason`."""
_EXPECTED = {1, 4}

Notify = Callable[..., None]


class NodeLog:
    """Turns looks at a cluster into events; knows nothing of Ray, so that any cluster can be played to it.

    Events: `nodes {counts}` whenever their numbers by type change, `node_warned {node, address, type, deadline_s}`,
    `node_lost {node, address, type, reason}` and `node_gone` likewise for one that ended as it should.
    """

    def __init__(self, cluster: ClusterConfig, notify: Notify) -> None:
        self._cluster, self._notify = cluster, notify
        self._counts: dict[str, int] | None = None
        self._alive: set[str] = set()
        self._warned: set[str] = set()

    def look(self, nodes: Sequence[Mapping[str, Any]], draining: Mapping[str, int], now_ms: float) -> None:
        """Take a look.

        Args:
            nodes: rows of `ray.nodes()`.
            draining: node → when it will end, in milliseconds since 1970; 0 where nobody knows.
            now_ms: the time of the look.
        """
        alive = {str(node["NodeID"]): node for node in nodes if node["Alive"]}
        for node in nodes:
            name = str(node["NodeID"])
            if name in self._alive and name not in alive:
                reason = node.get("DeathReason") or 0
                event = "node_gone" if reason in _EXPECTED and name not in self._warned else "node_lost"
                text = str(node.get("DeathReasonMessage") or "").strip()
                told = f"{_REASONS.get(reason, _REASONS[0])}{f': {text}' if text else ''}"
                self._notify(event, **self._facts(node), reason=told)
        for name in draining.keys() - self._warned:
            if name in alive:
                left = round((draining[name] - now_ms) / 1000, 1) if draining[name] else None
                self._notify("node_warned", **self._facts(alive[name]), deadline_s=left)
        self._warned |= set(draining)
        self._alive = set(alive)
        counts = dict(sorted(Counter(self.type_of(node) for node in alive.values()).items()))
        if counts != self._counts:
            self._counts = counts
            self._notify("nodes", counts=counts)

    def close(self) -> None:
        """Say that nobody looks any more: from here on no node is this run's."""
        if self._counts is not None:
            self._notify("nodes", counts={})

    def type_of(self, node: Mapping[str, Any]) -> str:
        """Return the name of the node type in the config whose labels a node carries, the most specific one."""
        labels = node.get("Labels") or {}
        fitting = [
            (len(node_type.labels), name)
            for name, node_type in self._cluster.node_types.items()
            if node_type.labels and node_type.labels.items() <= labels.items()
        ]
        return max(fitting)[1] if fitting else _OTHER

    def _facts(self, node: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "node": str(node["NodeID"])[:12],
            "address": str(node.get("NodeManagerAddress", "")),
            "type": self.type_of(node),
        }


@contextlib.contextmanager
def node_watch(cluster: ClusterConfig, notify: Notify) -> Iterator[None]:
    """Keep a `NodeLog` of the Ray cluster that this process is in, from a thread of its own."""
    import ray

    log, stop = NodeLog(cluster, notify), threading.Event()
    state: Any = ray._private.state.state

    def watch() -> None:
        while not stop.is_set():
            # A cluster that does not answer is no reason to end a run: its own calls will say so.
            with contextlib.suppress(Exception):
                log.look(ray.nodes(), state.get_draining_nodes() or {}, time.time() * 1000)
            stop.wait(EVERY_S)

    thread = threading.Thread(target=watch, name="lectern-nodes", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=EVERY_S)
        log.close()
