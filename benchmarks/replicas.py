"""What a second replica is worth: the same work done by one replica, and by two on two simulated nodes.

    python -m benchmarks.replicas                       # prints one JSON line

A Ray cluster of two nodes runs on this machine (`ray.cluster_utils.Cluster`); a replica of two ranks fills a node.
Ranks are light (`light_rank.py`): scoring is a declared wait per token, so that two cores suffice; planning, dispatch,
Ray, reading, encoding and commits are real. One and two replicas take turns, each time on a dataset of its own. What is
compared is the scheduler's own accounting: tokens of committed units over the time from the first ready replica to the
last receipt, so that a late start of the second replica and the idle end are part of it. The goal is 1.8 times as much.
"""

import argparse
import json
import os
import secrets
import shutil
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from benchmarks.light_rank import WAIT_S, light_capture, light_samples, light_teacher
from storage.verify import verify_dataset
from workers.config import TeacherConfig

ROOT = Path(__file__).parent.parent
GOAL = 1.8
RANKS = 2
STORE_BYTES = 80 << 20


def main() -> None:
    """Measure once and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--unit-tokens", type=int, default=512)
    parser.add_argument("--wait-s", type=float, default=0.001, help="seconds per token of a rank")
    given = parser.parse_args()
    os.environ.update({WAIT_S: str(given.wait_s), "PYTHONPATH": str(ROOT)})
    folder = Path(tempfile.mkdtemp(prefix="lectern-replicas-"))
    try:
        print(json.dumps(compare(folder, given.rounds, given.documents, given.unit_tokens)), flush=True)
    finally:
        shutil.rmtree(folder)


def compare(folder: Path, rounds: int, num_documents: int, unit_tokens: int) -> dict[str, Any]:
    """Let one and two replicas take turns at the same samples; returns the figures."""
    import ray
    from ray.cluster_utils import Cluster

    samples, vocab_size = light_samples(folder / "samples", num_documents)
    light_teacher(folder / "teacher", vocab_size)
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=RANKS, object_store_memory=STORE_BYTES)
        ray.init(address=cluster.address, log_to_driver=False)
        pairs = [[one_capture(folder, n, replicas, unit_tokens) for replicas in (1, 2)] for n in range(rounds)]
    finally:
        ray.shutdown()
        cluster.shutdown()
    ratios = [two["tokens_per_s"] / one["tokens_per_s"] for one, two in pairs]
    return {
        "benchmark": "replicas",
        "samples": samples.num_samples,
        "tokens": pairs[0][0]["tokens"],
        "unit_tokens": unit_tokens,
        "ratio": round(median(ratios), 3),
        "ratio_by_round": [round(ratio, 3) for ratio in ratios],
        "goal": GOAL,
        "one": pairs[-1][0],
        "two": pairs[-1][1],
    }


def one_capture(folder: Path, number: int, replicas: int, unit_tokens: int) -> dict[str, Any]:
    """Capture everything with so many replicas, each on a node of its own; returns what the scheduler counted."""
    nodes: dict[int, set[str]] = {}

    def follow(event: dict[str, Any]) -> None:
        if event["event"] == "replica_started":
            nodes[event["replica"]] = {rank["node"] for rank in event["ranks"]}

    url = str(folder / f"dataset-{number}-{replicas}")
    teacher = TeacherConfig(name="light", ranks=RANKS, replicas={"min": replicas, "max": replicas})
    found = light_capture(folder, url, teacher, unit_tokens, follow)
    assert not found.failed_units and not found.replicas_lost, (found.failed_units, found.replicas_lost)
    assert verify_dataset(url).ok
    on_one = all(len(where) == 1 for where in nodes.values())
    assert len(nodes) == replicas == len(set.union(*nodes.values())) and on_one, f"replicas on nodes: {nodes}"
    return {
        "replicas": replicas,
        "nodes": len(set.union(*nodes.values())),
        "tokens": found.tokens,
        "units": found.fleet["units_done"],
        "seconds": round(found.seconds, 3),
        "tokens_per_s": round(found.tokens_per_s, 1),
        "busy_share": round(1 - found.fleet["idle_s"] / found.fleet["machine_s"], 4),
    }


if __name__ == "__main__":
    main()
