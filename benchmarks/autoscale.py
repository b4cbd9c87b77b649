"""From no node to as many as there is work for, and back to none: captures on a cluster that Ray's autoscaler grows.

    python -m benchmarks.autoscale                      # prints one JSON line

Ray's own autoscaler (v2) runs with its fake provider, whose nodes are processes of this machine; what it sees of the
demand are pending placement groups, as anywhere. Ranks are light (`light_rank.py`), two to a replica, one replica to a
node. The program moves itself into network and process namespaces of its own, since the fake provider insists on Ray's
usual port; when it ends, the kernel ends all that it started. That takes root, or a kernel that lets users unshare.

Goals: a node's first unit starts at most 10 s after the node has joined; after the capture all nodes are gone again
within the idle time-out and 10 s.
"""

import argparse
import fcntl
import json
import os
import secrets
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from benchmarks.light_rank import WAIT_S, light_capture, light_samples, light_teacher
from storage.verify import verify_dataset
from workers.config import TeacherConfig

ROOT = Path(__file__).parent.parent
RANKS = 2
GOAL_START_S = 10.0
GOAL_LEAVE_S = 10.0
"""Beyond the idle time-out: the autoscaler looks once a second, and a node takes some seconds to end."""
STORE_BYTES = 80 << 20
PORT = 6379
UNIT_TOKENS = 512
SHOWN_LOG = 4000
"""Characters of the autoscaler's own logs that are shown when something fails."""
COMMANDS = ["setup", "head_setup", "worker_setup", "initialization", "head_start_ray", "worker_start_ray"]
"""Commands that the autoscaler wants to be told, though the fake provider runs none."""
NAMESPACES = ["unshare", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"]
INTERFACE_UP = 0x8914  # SIOCSIFFLAGS of netdevice(7)


class NodeWatch(threading.Thread):
    """Notes when nodes join and when they are gone."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.joined: dict[str, float] = {}
        self.left: dict[str, float] = {}
        self.done = threading.Event()

    def run(self) -> None:
        """Look ten times a second."""
        import ray

        while not self.done.wait(0.1):
            alive = {node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")}
            now = time.time()
            for node in alive - self.joined.keys():
                self.joined[node] = now
            for node in self.joined.keys() - alive - self.left.keys():
                self.left[node] = now

    @property
    def num_alive(self) -> int:
        """Nodes that can hold ranks now."""
        return len(self.joined) - len(self.left)


def main() -> None:
    """Measure once, in namespaces of its own, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=3, help="most nodes")
    parser.add_argument("--rounds", type=int, default=2, help="captures, each from no node to no node")
    parser.add_argument("--idle-s", type=float, default=12.0, help="the autoscaler's idle time-out")
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--wait-s", type=float, default=0.002, help="seconds per token of a rank")
    inside_namespaces("benchmarks.autoscale", parser)
    given = parser.parse_args()
    loopback_up()
    folder = Path(tempfile.mkdtemp(prefix="lectern-grow-"))
    os.environ.update({WAIT_S: str(given.wait_s), "PYTHONPATH": str(ROOT), "RAY_TMPDIR": str(folder)})
    try:
        figures = grow_and_shrink(folder, given.nodes, given.rounds, given.idle_s, given.documents)
        print(json.dumps(figures), flush=True)
    except Exception:
        show_logs(folder)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def inside_namespaces(module: str, parser: argparse.ArgumentParser) -> None:
    """Run `python -m module` anew, with the same arguments, where it can neither meet nor leave another Ray."""
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    if not parser.parse_args().inside:
        root = [] if os.geteuid() == 0 else ["--map-root-user"]
        command = [*NAMESPACES, *root, sys.executable, "-m", module, "--inside", *sys.argv[1:]]
        sys.exit(subprocess.run(command, cwd=ROOT).returncode)


def show_logs(folder: Path) -> None:
    """Show the end of what the autoscaler wrote."""
    for log in sorted((folder / "ray" / "session_latest" / "logs").glob("monitor.*")):
        print(f"{log.name}: …{log.read_text(errors='replace')[-SHOWN_LOG:]}", file=sys.stderr)


def loopback_up() -> None:
    """Switch on the one interface of a fresh network namespace."""
    flags = 0x1 | 0x40  # IFF_UP, IFF_RUNNING
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        fcntl.ioctl(probe, INTERFACE_UP, struct.pack("16sh14x", b"lo", flags))


def start_head(
    folder: Path, node_types: dict[str, dict[str, Any]], idle_s: float, dashboard_port: int | None = None
) -> None:
    """Start a head node without room for ranks, the autoscaler, and a dashboard where it gets a port.

    `node_types` are as in a cluster's launch file: resources, perhaps labels, and max_workers.
    """
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    workers = {
        name: {
            "node_config": {},
            "min_workers": 0,
            **kind,
            "resources": {**kind["resources"], "object_store_memory": STORE_BYTES},
        }
        for name, kind in node_types.items()
    }
    config = {
        "cluster_name": "growing",
        "max_workers": sum(kind["max_workers"] for kind in node_types.values()),
        "idle_timeout_minutes": idle_s / 60,
        "upscaling_speed": 100.0,
        "provider": {
            "type": "external",
            "module": "benchmarks.fake_nodes.ApartNodeProvider",
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
        },
        "available_node_types": {"ray.head.default": head, **workers},
        "head_node_type": "ray.head.default",
        **{f"{whose}_commands": [] for whose in COMMANDS},
        "cluster_synced_files": [],
    }
    path = folder / "cluster.json"
    path.write_text(json.dumps(config))
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }
    command = [Path(sys.executable).parent / "ray", "start", "--head", "--num-cpus=0", f"--port={PORT}"]
    options = [f"--object-store-memory={STORE_BYTES}", f"--autoscaling-config={path}"]
    options += (
        ["--include-dashboard=false"]
        if dashboard_port is None
        else ["--include-dashboard=true", f"--dashboard-port={dashboard_port}"]
    )
    subprocess.run([*command, *options], env=environment, check=True, stdout=subprocess.DEVNULL)


def grow_and_shrink(folder: Path, num_nodes: int, rounds: int, idle_s: float, num_documents: int) -> dict[str, Any]:
    """Capture several times on a cluster that has no node for it in between; returns the figures."""
    import ray

    samples, vocab_size = light_samples(folder / "samples", num_documents)
    light_teacher(folder / "teacher", vocab_size)
    start_head(folder, {"worker": {"resources": {"CPU": RANKS}, "max_workers": num_nodes}}, idle_s)
    ray.init(address=f"127.0.0.1:{PORT}", log_to_driver=False)
    watch = NodeWatch()
    watch.start()
    found = [one_round(folder, number, num_nodes, idle_s, watch) for number in range(rounds)]
    watch.done.set()
    ray.shutdown()
    starts = [delay for figures in found for delay in figures["first_unit_after_s"]]
    leaves = [figures["nodes_gone_after_s"] for figures in found]
    return {
        "benchmark": "autoscale",
        "samples": samples.num_samples,
        "nodes": [figures["nodes"] for figures in found],
        "idle_timeout_s": idle_s,
        "first_unit_after_s": max(starts),
        "goal_first_unit_s": GOAL_START_S,
        "nodes_gone_after_s": max(leaves),
        "goal_nodes_gone_s": idle_s + GOAL_LEAVE_S,
        "rounds": found,
    }


def one_round(folder: Path, number: int, num_nodes: int, idle_s: float, watch: NodeWatch) -> dict[str, Any]:
    """Capture once from no node, wait until there is none again, and return when what happened."""
    assert watch.num_alive == 0
    known = set(watch.joined)
    nodes: set[str] = set()

    def follow(event: dict[str, Any]) -> None:
        if event["event"] == "replica_started":
            nodes.update(rank["node"] for rank in event["ranks"])

    asked_at = time.time()
    url = str(folder / f"dataset-{number}")
    teacher = TeacherConfig(name="light", ranks=RANKS, replicas={"min": 1, "max": num_nodes}, startup_timeout_s=60)
    result = light_capture(folder, url, teacher, UNIT_TOKENS, follow, may_grow=True)
    ended_at = time.time()
    assert not result.failed_units and verify_dataset(url).ok
    while watch.num_alive:
        assert time.time() - ended_at < idle_s + 60, f"{watch.num_alive} nodes are left"
        time.sleep(0.1)
    joined = {node: at for node, at in watch.joined.items() if node not in known}
    first = first_units(folder / "teacher", nodes)
    return {
        "nodes": len(joined),
        "nodes_joined_after_s": sorted(round(at - asked_at, 1) for at in joined.values()),
        "first_unit_after_s": sorted(round(first[node] - joined[node], 1) for node in first),
        "capture_s": round(ended_at - asked_at, 1),
        "nodes_gone_after_s": round(max(watch.left[node] for node in joined) - ended_at, 1),
    }


def first_units(teacher: Path, nodes: set[str]) -> dict[str, float]:
    """Return when each of the nodes began its first unit, as its ranks noted it."""
    notes = [json.loads(path.read_text()) for path in teacher.glob("rank-*.json")]
    began: dict[str, float] = {}
    for note in notes:
        if note["node"] in nodes and "first_unit_at" in note:
            began[note["node"]] = min(note["first_unit_at"], began.get(note["node"], float("inf")))
    return began


if __name__ == "__main__":
    main()
