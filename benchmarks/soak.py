"""A capture that everything happens to: processes are killed, stopped and slowed at random until enough was broken.

    python -m benchmarks.soak --kills 100 --limit-s 1200           # prints one JSON line
    python -m benchmarks.soak --kills 0 --drivers 2                # two coordinators on one dataset, nothing breaks

A Ray cluster of several nodes runs on this machine. A driver in a process of its own captures with light ranks (a wait
instead of a model, see `light_rank.py`; all else is real), two to a replica. At random moments one of these happens:

* `rank`, `replica`: `kill -9` of one or of all ranks of a replica;
* `node`: all processes of a node are killed, and a new node joins;
* `driver`: `kill -9` of the driver, and with it of the coordinator, which runs there; a new one goes on;
* `hang`: a rank is stopped for good (SIGSTOP), so that only its missing heartbeat tells;
* `second`: another driver works on the same dataset at the same time.

One rank in ten is eight times slower than the others. When all samples are captured the dataset is checked: every row
exactly once, its targets right, `verify` clean; and no rank, actor or placement group may be left.
"""

import argparse
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np

from benchmarks.light_rank import light_capture, light_identity, light_samples, light_targets, light_teacher
from storage.reader import Dataset
from storage.verify import verify_dataset
from workers.config import TeacherConfig

ROOT = Path(__file__).parent.parent
WEIGHTS = {"rank": 6, "replica": 4, "hang": 3, "driver": 3, "node": 2, "second": 1}
STORE_BYTES = 80 << 20
UNIT_TOKENS = 128


class Soak:
    """A cluster, a dataset, and drivers that come and go."""

    def __init__(
        self, folder: Path, num_nodes: int, num_documents: int, wait_s: float, seed: int, num_drivers: int
    ) -> None:
        from ray.cluster_utils import Cluster

        os.environ.update(LECTERN_LIGHT_WAIT_S=str(wait_s), LECTERN_LIGHT_SLOW_SHARE="0.1", PYTHONPATH=str(ROOT))
        self.folder, self.chance, self.num_drivers = folder, random.Random(seed), num_drivers
        self.samples, self.vocab_size = light_samples(folder / "samples", num_documents)
        self.broken: Counter[str] = Counter()
        self.teacher = light_teacher(folder / "teacher", self.vocab_size)
        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE_BYTES}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes = [self._add_node() for _ in range(num_nodes)]
        self.drivers: list[subprocess.Popen[bytes]] = []
        self.round = 0

    def _add_node(self) -> Any:
        return self.cluster.add_node(num_cpus=2, object_store_memory=STORE_BYTES)

    @property
    def url(self) -> str:
        """The dataset of this round."""
        return str(self.folder / f"dataset-{self.round}")

    def start_driver(self) -> None:
        """Start a process that captures into the dataset."""
        log = (self.folder / "drivers.log").open("ab")
        command = [sys.executable, "-m", "benchmarks.soak", "--drive", self.url, "--folder", str(self.folder)]
        environment = {**os.environ, "RAY_ADDRESS": self.cluster.address}
        self.drivers.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=ROOT))

    def captured(self) -> int:
        """Count the units committed in this round."""
        folder = Path(self.url) / "manifest"
        return len(list(folder.iterdir())) if folder.exists() else 0

    def ranks(self) -> dict[str, list[int]]:
        """Return the living ranks of each replica."""
        found: dict[str, list[int]] = {}
        for path in self.teacher.glob("rank-*.json"):
            pid = int(path.stem.partition("-")[2])
            if is_rank(pid):
                found.setdefault(json.loads(path.read_text())["replica"], []).append(pid)
        return found

    def run_round(self, kills: int, deadline: float) -> None:
        """Capture everything while things break, at most `kills` times in all or until the deadline."""
        self.round += 1
        before = self.captured()
        for _ in range(self.num_drivers):
            self.start_driver()
        next_at = time.monotonic() + 3
        while self.drivers:
            time.sleep(0.1)
            self._reap()
            now, count = time.monotonic(), self.captured()
            if (
                now > next_at
                and count > before
                and sum(self.broken.values()) < kills
                and now < deadline
                and self.drivers
            ):
                # Things break only after something was done: otherwise there may never be an end.
                self._break()
                before, next_at = self.captured(), time.monotonic() + self.chance.uniform(0.5, 3.0)

    def _reap(self) -> None:
        for driver in list(self.drivers):
            if driver.poll() is None:
                continue
            self.drivers.remove(driver)
            log = (self.folder / "drivers.log").read_text(errors="replace")[-3000:]
            assert driver.returncode == 0, f"a driver ended with {driver.returncode}:\n{log}"

    def choose(self) -> str:
        """Choose what breaks next."""
        return self.chance.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]

    def _break(self) -> None:
        what = self.choose()
        replicas = self.ranks()
        if what in {"rank", "replica", "hang"}:
            if not replicas:
                return
            pids = self.chance.choice(sorted(replicas.values()))
            number = signal.SIGSTOP if what == "hang" else signal.SIGKILL
            for pid in pids if what == "replica" else [self.chance.choice(pids)]:
                os.kill(pid, number)
        elif what == "node":
            node = self.nodes.pop(self.chance.randrange(len(self.nodes)))
            self.cluster.remove_node(node, allow_graceful=False)
            self.nodes.append(self._add_node())
        elif what == "driver":
            driver = self.drivers.pop(0)
            driver.kill()
            driver.wait()
            self.start_driver()
        elif len(self.drivers) <= self.num_drivers:
            self.start_driver()
        else:
            return
        self.broken[what] += 1

    def check(self) -> int:
        """Check the dataset of this round and what is left; returns its rows."""
        identity = light_identity(self.vocab_size)
        dataset = Dataset.open(self.url, identity)
        ids = self.samples.ids(self.samples.rows())
        assert len(dataset.catalog) == len(ids) and dataset.catalog.num_duplicates == 0, "rows missing or twice"
        assert sum(record.rows for record in dataset.manifests) == len(ids), "a row lies in two units"
        assert verify_dataset(self.url).ok
        read, targets = dataset.read(ids)
        expected = light_targets(read, self.vocab_size)
        assert np.array_equal(targets.id, expected.id) and np.array_equal(targets.logprob, expected.logprob)
        wait_until(lambda: not self.ranks(), "ranks are left: {}", self.ranks)
        return len(ids)

    def scored_by_driver(self) -> list[int]:
        """Return how many samples each driver that ever was has scored, killed ones among them, most first."""
        scored = []
        for path in self.folder.glob("events-*.jsonl"):
            lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
            events = [event for event in map(json.loads, lines) if event["event"] == "unit_done"]
            scored.append(sum(event["samples"] for event in events))
        return sorted(scored, reverse=True)

    def check_cluster(self) -> None:
        """Check that Ray knows of no living actor and no placement group any more."""
        import ray

        ray.init(address=self.cluster.address, log_to_driver=False)
        try:
            wait_until(lambda: not living_actors() and not living_groups(), "left: {}", living_actors)
        finally:
            ray.shutdown()

    def close(self) -> None:
        """End the cluster and every driver."""
        for driver in self.drivers:
            driver.kill()
            driver.wait()
        self.cluster.shutdown()


def is_rank(pid: int) -> bool:
    """Tell whether a process is a living rank."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z" and Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::LightRank")
    except OSError:
        return False


def living_actors() -> list[str]:
    """Return the actors that Ray counts as not dead."""
    import ray

    return [name for name, facts in ray._private.state.actors().items() if facts["State"] != "DEAD"]


def living_groups() -> list[str]:
    """Return the placement groups that are not removed."""
    import ray

    table = ray.util.placement_group_table()
    return [name for name, facts in table.items() if facts["state"] != "REMOVED"]


def wait_until(condition: Callable[[], bool], message: str, shown: Callable[[], Any], limit_s: float = 30.0) -> None:
    """Wait for something that must come true soon."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, message.format(shown())
        time.sleep(0.2)


def drive(folder: Path, url: str) -> None:
    """Capture as a driver: join the cluster named in the environment and work until nothing is missing."""
    import ray

    ray.init(log_to_driver=False)
    teacher = TeacherConfig(
        name="light", ranks=2, replicas={"max": 3}, heartbeat_timeout_s=6, startup_timeout_s=120, max_attempts=20
    )
    events = (folder / f"events-{os.getpid()}.jsonl").open("w")

    def write(event: dict[str, Any]) -> None:
        print(json.dumps(event, default=str), file=events, flush=True)

    result = light_capture(folder, url, teacher, UNIT_TOKENS, write)
    assert not result.failed_units, result.failed_units
    ray.shutdown()


def soak(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Break things until there were `kills` of them or the time is up; returns the figures, or fails."""
    began, kills, limit_s = time.monotonic(), given.kills, given.limit_s
    work = Soak(folder, given.nodes, given.documents, given.wait_s, given.seed, given.drivers)
    rows = 0
    try:
        while True:
            work.run_round(kills, began + limit_s)
            rows += work.check()
            if sum(work.broken.values()) >= kills or time.monotonic() - began > limit_s:
                break
        work.check_cluster()
    finally:
        work.close()
    wait_until(lambda: not work.ranks(), "ranks outlived their cluster: {}", work.ranks)
    return {
        "benchmark": "soak",
        "broken": sum(work.broken.values()),
        "of_these": dict(work.broken),
        "rounds": work.round,
        "rows": rows,
        "rows_lost_or_twice": 0,
        "left_behind": 0,
        "scored_by_driver": work.scored_by_driver(),
        "nodes": given.nodes,
        "seed": given.seed,
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> None:
    """Soak once, or be a driver of a soak."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--limit-s", type=float, default=1800)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--drivers", type=int, default=1, help="coordinators that work on the dataset at once")
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--wait-s", type=float, default=0.002, help="seconds per token of a rank")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--drive", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.drive:
        drive(given.folder, given.drive)
        return
    folder = Path(tempfile.mkdtemp(prefix="lectern-soak-"))
    print(json.dumps(soak(given, folder)), flush=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
