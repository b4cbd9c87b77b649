"""A run submitted to a real Ray cluster of three nodes that wants a token: followed, left, stopped, resubmitted."""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.loader import load_config
from cluster.selection import capture_rows
from storage.object_store import Store
from storage.reader import Dataset
from storage.sample_set import SampleSet
from tests.cluster.test_end_to_end import CONFIG
from trainer.checkpoint import newest
from trainer.curriculum import planned_order

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

HOST = """
import json, sys, time
from ray.cluster_utils import Cluster
cluster = Cluster()
# Jobs go through the head's agent, whose usual port another Ray on this machine may have.
ports = [int(port) for port in sys.argv[1:]]
cluster.add_node(
    num_cpus=0, include_dashboard=True, dashboard_port=ports.pop(), dashboard_agent_listen_port=ports.pop()
)
def add():
    # Addresses of their own, as on real machines: a driver joins the node of its own address, the head. Folders of
    # their own for what ships: each node that joins would remove that in which the others are at work.
    n = len(ports)
    node = cluster.add_node(
        num_cpus=2,
        labels={"role": "worker"},
        node_ip_address=f"127.0.0.{n + 1}",
        dashboard_agent_listen_port=ports.pop(),
        runtime_env_dir_name=f"runtime_resources_{n}",
    )
    workers[node.node_id] = node
workers = {}
add()
add()
import ray
from ray._raylet import GcsClient
from ray.util.state import list_actors, list_tasks
ray.init(address=cluster.address, log_to_driver=False)
print(json.dumps({"address": cluster.webui_url}), flush=True)
# Named, since this machine may have another Ray.
api = f"http://{cluster.webui_url}"
def at_work(what):
    while True:
        actors = list_actors(api, filters=[("state", "=", "ALIVE")], limit=1000)
        tasks = list_tasks(api, filters=[("state", "=", "RUNNING"), ("name", "=", what)])
        nodes = [a.node_id for a in actors if what in a.class_name] + [t.node_id for t in tasks if t.node_id]
        if nodes:
            return nodes[0]
        time.sleep(0.2)
for line in sys.stdin:
    action, _, what = line.strip().partition(" ")
    if action == "warn":
        # A node is about to be taken away, as a spot machine is.
        doomed = at_work(what)
        ends = int(time.time() * 1000) + 60_000
        GcsClient(cluster.address).drain_node(doomed, 2, "the spot price rose", ends)
    elif action == "retried":
        assert any(task.attempt_number for task in list_tasks(api, filters=[("name", "=", what)]))
    else:
        cluster.remove_node(workers.pop(at_work(what) if what else doomed), allow_graceful=False)
        add()
    print("done", flush=True)
ray.shutdown()
cluster.shutdown()
"""


@dataclass
class Site:
    """A cluster, and a project folder on the machine that submits to it."""

    address: str
    folder: Path
    token: str
    process: "subprocess.Popen[str]"
    clients: list["subprocess.Popen[str]"] = field(default_factory=list)

    def start(self, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
        """Start a `lectern` command in the project folder, as the user of the cluster."""
        values = {**os.environ, "RAY_AUTH_TOKEN": self.token, "DB_PASSWORD": "correct-horse-battery", **environment}
        command = [sys.executable, "-m", "cluster.cli", *arguments, "--address", self.address]
        client = subprocess.Popen(
            command, cwd=self.folder, env=values, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.clients.append(client)
        return client

    def submit(self, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
        """Submit the project's run."""
        return self.start(
            "submit", "run.yaml", "--run-dir", str(self.folder / "out" / "run"), *arguments, **environment
        )

    def tell(self, word: str) -> None:
        """Have the cluster do something to one of its nodes."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        assert any(line == "done\n" for line in self.process.stdout)

    def run(self, *arguments: str, **environment: str) -> tuple[int, str]:
        """Run a `lectern` command to its end; returns its exit code and all that it printed."""
        client = self.start(*arguments, **environment)
        text, _ = client.communicate(timeout=120)
        return client.returncode, text


def free_ports(number: int) -> list[int]:
    """Return ports that are free now, each another."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """Start head and workers in a process of their own, with a token of their own."""
    folder = tmp_path / "project"
    folder.mkdir()
    values: dict[str, Any] = {
        **CONFIG,
        # One sample in each unit, so that the capture lasts until its node is taken, however fast the machine is.
        "cache": {**CONFIG["cache"], "unit_tokens": 128, "url": str(folder / "out" / "cache")},
        "teacher": {**CONFIG["teacher"], "ranks": 1, "sharding": "none", "replicas": 2, "dtype": "float32"},
        "train": {**CONFIG["train"], "steps": 600, "dtype": "float32", "checkpoint_every": 1000},
        "cluster": {
            "node_types": {"worker": {"labels": {"role": "worker"}, "resources": {"CPU": 2}, "price_per_hour": 3.6}},
            "placement": {"capture": "worker", "train": "worker", "evaluate": "worker"},
        },
    }
    values["evaluate"] = {**CONFIG["evaluate"], "baseline": False}
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    (folder / ".env").write_text("KEY=the-value-in-dot-env\n")
    (folder / ".rayignore").write_text("out/\n")
    ports = free_ports(7)
    token = secrets.token_hex(32)
    environment = {
        **os.environ,
        "RAY_AUTH_TOKEN": token,
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
        "LECTERN_CACHE": str(tmp_path / "home"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": "",
    }
    with (tmp_path / "cluster.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", HOST, *map(str, ports)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    assert process.stdin is not None and process.stdout is not None
    facts = yaml.safe_load(next(line for line in process.stdout if line.startswith("{")))
    made = Site(f"http://{facts['address']}", folder, token, process)
    try:
        yield made
    finally:
        for client in made.clients:
            client.kill()
            client.wait()
        process.stdin.close()
        process.wait(timeout=60)


def wait_for(path: Path, text: str, times: int = 1, timeout_s: float = 180) -> None:
    """Wait until a file holds a text so many times."""
    deadline = time.monotonic() + timeout_s
    while not (path.exists() and path.read_text().count(text) >= times):
        assert time.monotonic() < deadline, f"{text} did not come into {path}"
        time.sleep(0.2)


def test_a_run_from_a_laptop(site: Site, tmp_path: Path) -> None:
    refused_without_the_token(site, tmp_path)
    events = site.folder / "out" / "run" / "events.jsonl"

    # Twice at once: one job, which both follow.
    first, second = site.submit("--env", "DB_PASSWORD"), site.submit("--env", "DB_PASSWORD")
    wait_for(events, '"unit_done"')

    # Ctrl-C leaves the job running.
    first.send_signal(signal.SIGINT)
    left = first.communicate(timeout=30)[0]
    assert first.returncode == 1 and "goes on" in left and "lectern job stop lectern-run-" in left
    assert "SECRET     .env stays here (by its name)" in left
    code, listed = site.run("job", "list")
    assert code == 0 and listed.count("RUNNING") == 1 and listed.count("lectern-run-") == 1

    # Stopped half-way: who follows is told, and how to go on.
    name = listed.split()[0]
    assert site.run("job", "stop", name)[0] == 0
    told = second.communicate(timeout=60)[0]
    assert second.returncode == 1 and "was stopped; what it committed is kept" in told
    assert "STOPPED" in site.run("job", "status", name)[1]
    scored = len(list((site.folder / "out" / "cache" / "manifest").iterdir()))
    assert scored >= 1

    # Resubmitted: nothing is scored twice. Each stage loses the node that it works on. That of the training is about to
    # go, so it writes a checkpoint; the node goes, and the training resumes elsewhere.
    started = events.read_text().count('"replica_started"')
    third = site.submit("--env", "DB_PASSWORD")
    wait_for(events, '"replica_started"', times=started + 1)
    site.tell("take Rank")
    wait_for(site.folder / "out" / "run" / "metrics.jsonl", '"step"')
    assert '"replica_lost"' in events.read_text()
    site.tell("warn TrainWorker")
    wait_for(events, '"node_warned"')
    wait_for_checkpoint(site.folder / "out" / "run" / "checkpoints" / "student")
    site.tell("take")
    wait_for(events, '"stage": "evaluate"')
    site.tell("take score_models")
    text = third.communicate(timeout=400)[0]
    assert third.returncode == 0, text[-3000:]
    assert "SUCCEEDED" in text and "exit code 0" in text
    assert "correct-horse-battery" not in left + told + text
    # A node is given up after some missed heartbeats; the evaluation was over before.
    assert events.read_text().count('"node_lost"') >= 2
    site.tell("retried score_models")

    same_as_on_one_machine(site)
    told_in_the_report(site)
    nothing_secret_is_written(site)


def wait_for_checkpoint(folder: Path, timeout_s: float = 120) -> None:
    """Wait until a folder holds a whole checkpoint: one that is still being written is lost with its node."""
    deadline = time.monotonic() + timeout_s
    while not (folder.exists() and newest(Store(str(folder)))):
        assert time.monotonic() < deadline, f"no checkpoint came into {folder}"
        time.sleep(0.2)


def told_in_the_report(site: Site) -> None:
    """The report knows of the lost node, of node-hours and their price, and of the plan."""
    report = yaml.safe_load((site.folder / "out" / "run" / "report.json").read_text())
    what = [row["what"] for row in report["failures"]]
    assert any("(worker) was about to be taken away" in row for row in what), what
    assert any("(worker) was lost" in row for row in what), what
    assert report["nodes"]["worker"] > 0
    assert report["cost"]["machines"] == pytest.approx(report["nodes"]["worker"] * 3.6, rel=1e-3)
    rows = {row["what"]: row for row in report["plan"]}
    assert rows["tokens scored"]["planned"] == rows["tokens scored"]["happened"]
    assert rows["added to the dataset"]["happened"] > 0


def refused_without_the_token(site: Site, tmp_path: Path) -> None:
    code, text = site.run("job", "list", RAY_AUTH_TOKEN="0" * 64)
    assert code == 2 and "refuses the token" in text and text.count("error: ") == 1
    code, text = site.run("job", "list", RAY_AUTH_TOKEN="", RAY_AUTH_MODE="", HOME=str(tmp_path))
    assert code == 2 and "wants a token and none was found" in text
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{site.address}/api/jobs/")
    assert refused.value.code == 401
    # The dashboard listens on loopback alone.
    other = next((a for *_, (a, *_) in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)), "127.0.0.1")
    if not other.startswith("127."):
        with pytest.raises(OSError):
            socket.create_connection((other, int(site.address.rpartition(":")[2])), timeout=2).close()


def same_as_on_one_machine(site: Site) -> None:
    """Every sample once, and the order that one process would have drawn."""
    config = load_config(str(site.folder / "run.yaml"))
    samples = SampleSet.open(str(site.folder / "out" / "run" / "samples"))
    rows = capture_rows(samples, config.evaluate.samples_per_source)
    dataset = Dataset.open(config.cache.url)
    assert not len(dataset.missing(samples.ids(rows)))
    assert dataset.totals().samples == len(rows)
    expected = planned_order(samples, config.curriculum, config.train).digest().hex()
    result = yaml.safe_load((site.folder / "out" / "run" / "stages" / "student.json").read_text())["result"]
    assert result["order_digest"] == expected
    assert result["resumed_from"] >= 1


def nothing_secret_is_written(site: Site) -> None:
    """No file of the run or of the jobs' working directories holds what was to stay, or to be shown nowhere."""
    told = [b"correct-horse-battery", b"the-value-in-dot-env", site.token.encode()]
    for path in (site.folder / "out").rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert not [secret for secret in told if secret in data], path
