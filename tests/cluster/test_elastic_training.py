"""A training on a real Ray cluster that loses one of its two machines for good, and later gets another."""

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from storage.object_store import Store
from tests.cluster.conftest import World
from trainer.checkpoint import newest
from trainer.curriculum import planned_order

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

HOST = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster()
cluster.add_node(num_cpus=0)
def add(n):
    # Addresses and folders of their own, as on real machines.
    return cluster.add_node(
        num_cpus=1,
        labels={"role": "trainer"},
        node_ip_address=f"127.0.0.{n + 2}",
        runtime_env_dir_name=f"runtime_resources_{n}",
    )
nodes = [add(0), add(1)]
# No machine of a trainer's: what is free here is not for the training.
cluster.add_node(num_cpus=4, labels={"role": "teacher"}, node_ip_address="127.0.0.9", runtime_env_dir_name="other")
print(cluster.address, flush=True)
for line in sys.stdin:
    if line == "take\\n":
        cluster.remove_node(nodes.pop(), allow_graceful=False)
    else:
        add(2)
    print("done", flush=True)
cluster.shutdown()
"""

ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # A group that counted on a machine just lost waits so long for it.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    # Five missed heartbeats are a lost machine.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "PYTHONPATH": "",
    # By default its workers give way to all else on the machine.
    "RAY_worker_niceness": "0",
}

STUDENT = {"model_type": "qwen2", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
STUDENT |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
TRAIN = {"steps": 250, "global_batch_size": 8, "micro_batch_size": 1, "workers": 2, "min_workers": 1, "zero_stage": 2}


@pytest.fixture
def environment() -> dict[str, str]:
    return {**os.environ, **ENVIRONMENT, "RAY_AUTH_TOKEN": secrets.token_hex(32)}


@pytest.fixture
def host(environment: dict[str, str], tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Start the cluster in a process of its own; it prints its address, and takes `take` and `add`."""
    with (tmp_path / "cluster.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", HOST],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    assert process.stdin is not None
    try:
        yield process
    finally:
        process.stdin.close()
        process.wait(timeout=60)


def tell(host: "subprocess.Popen[str]", word: str) -> None:
    assert host.stdin is not None and host.stdout is not None
    host.stdin.write(f"{word}\n")
    host.stdin.flush()
    assert any(line == "done\n" for line in host.stdout)


def events(run_dir: Path, name: str) -> list[dict[str, Any]]:
    path = run_dir / "events.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [event for event in map(json.loads, lines) if event["event"] == name]


def test_a_training_shrinks_and_grows_with_its_machines(
    world: World, host: "subprocess.Popen[str]", environment: dict[str, str], tmp_path: Path
) -> None:
    assert host.stdout is not None
    address = next(line.strip() for line in host.stdout if ":" in line)
    world.values["train"] |= {**TRAIN, "checkpoint_every": 10, "grow_every_s": 3, "dtype": "float32"}
    world.values["student"] = {"config": STUDENT}
    world.values["evaluate"] |= {"baseline": False}
    world.values["cluster"] = {
        "address": address,
        "node_types": {"trainer": {"labels": {"role": "trainer"}, "resources": {"CPU": 1}}},
        "placement": {"train": "trainer"},
    }
    world.capture()
    command = [sys.executable, "-m", "cluster.cli", "train", world.config_path, "--run-dir", str(world.run_dir)]
    log = tmp_path / "train.log"
    with log.open("w") as stream:
        training = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)

    def wait_until(reached: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + 500
        while not reached():
            assert training.poll() is None, f"the training ended before {what}: {log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"{what} did not come: {log.read_text()[-3000:]}"
            time.sleep(0.2)

    checkpoints = Store(world.run_dir / "checkpoints" / "student")
    try:
        wait_until(lambda: newest(checkpoints), "a whole checkpoint")
        tell(host, "take")
        wait_until(lambda: events(world.run_dir, "workers_lost"), "a smaller training")
        alone = newest(checkpoints)
        wait_until(lambda: (found := newest(checkpoints)) and found != alone, "its checkpoint")
        tell(host, "add")
        wait_until(lambda: events(world.run_dir, "workers_joined"), "a larger training")
        assert training.wait(timeout=600) == 0, log.read_text()[-3000:]
    finally:
        training.kill()
        training.wait()

    config, samples = world.config, world.samples()
    result = json.loads((world.run_dir / "stages" / "student.json").read_text())["result"]
    assert result["order_digest"] == planned_order(samples, config.curriculum, config.train).digest().hex()
    lost, joined = events(world.run_dir, "workers_lost"), events(world.run_dir, "workers_joined")
    assert [(event["before"], event["workers"]) for event in (*lost, *joined)] == [(2, 1), (1, 2)]
    assert lost[0]["step"] < joined[0]["step"]
    assert events(world.run_dir, "node_lost")[0]["type"] == "trainer"
    told = log.read_text()
    assert "2 → 1 workers" in told and "1 → 2 workers" in told and "machines have come" in told

    reported = [sys.executable, "-m", "cluster.cli", "report", world.config_path, "--run-dir", str(world.run_dir)]
    subprocess.run(reported, env=environment, check=True, stdout=subprocess.DEVNULL)
    report = json.loads((world.run_dir / "report.json").read_text())
    assert [row["workers"] for row in report["train"]["workers"]] == [2, 1, 2]
    assert any("2 → 1 workers" in row["what"] for row in report["failures"])
    assert "1 from step" in (world.run_dir / "report.html").read_text()
