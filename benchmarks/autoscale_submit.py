"""A submitted run on a cluster that grows from no node and shrinks to none: the same data as on one machine.

    python -m benchmarks.autoscale_submit               # prints one JSON line

As in `autoscale.py`, Ray's own autoscaler (v2) makes nodes of processes of this machine. Here it has two node types
with labels, `teacher` and `trainer`, and the run comes in through `lectern submit` and the job server, with a token.
Teachers come for the capture and go while the student trains; the trainer comes then. The same config runs first with
a Ray of its own.

Goals: the teachers' nodes go from none to all and to none again before the job ends; after it no node is left; the
dataset has the same units with the same bytes, and the training the same order of samples, as on one machine.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from hashlib import blake2b
from pathlib import Path
from typing import Any

import yaml

from benchmarks.autoscale import PORT, NodeWatch, inside_namespaces, loopback_up, show_logs, start_head

DASHBOARD = 8265
LIMIT_S = 540.0
IDLE_S = 10.0
NODE_TYPES: dict[str, dict[str, Any]] = {
    "teacher": {"labels": {"role": "teacher"}, "resources": {"CPU": 1}},
    "trainer": {"labels": {"role": "trainer"}, "resources": {"CPU": 2}},
}
CONFIG: dict[str, Any] = {
    "data": {
        "sources": [
            {"name": "general", "path": "embedded:general", "max_documents": 50},
            {"name": "domain", "path": "embedded:domain", "max_documents": 50},
        ],
        "window_tokens": 128,
        "heldout_fraction": 0.2,
    },
    "teacher": {
        "sharding": "none",
        "embedded": {"vocab_size": 512, "hidden_size": 64, "layers": 2, "train_tokens": 5000, "window_tokens": 128},
    },
    "cache": {"unit_tokens": 2048, "top_k": 8, "draws": 6},
    "student": {
        "config": {
            "model_type": "qwen2",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        }
    },
    "train": {"steps": 40, "global_batch_size": 8, "micro_batch_size": 4, "checkpoint_every": 20},
    "evaluate": {"samples_per_source": 8, "shown_samples": 1, "baseline": False},
    "cluster": {"placement": {"capture": "teacher", "train": "trainer", "evaluate": "trainer"}},
}


def main() -> None:
    """Measure once, in namespaces of its own, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2, help="most teachers, one to a node")
    inside_namespaces("benchmarks.autoscale_submit", parser)
    num_teachers = parser.parse_args().nodes
    loopback_up()
    folder = Path(tempfile.mkdtemp(prefix="lectern-grow-"))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    os.environ.update(RAY_TMPDIR=str(folder), LECTERN_CACHE=str(folder / "home"), PATH=path)
    try:
        print(json.dumps(measure(folder, num_teachers)), flush=True)
    except Exception:
        show_logs(folder)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(folder: Path, num_teachers: int) -> dict[str, Any]:
    """Run on one machine, then on the cluster; returns the figures."""
    import ray

    project = folder / "project"
    project.mkdir()
    alone, grown = folder / "alone", folder / "grown"
    cluster = {**CONFIG["cluster"], "node_types": NODE_TYPES}
    teacher = {**CONFIG["teacher"], "replicas": {"min": 1, "max": num_teachers}}
    (project / "run.yaml").write_text(yaml.safe_dump({**CONFIG, "teacher": teacher, "cluster": cluster}))
    lectern(project, "run", alone, "cluster.address=local")
    types = {name: {**NODE_TYPES[name], "max_workers": n} for name, n in (("teacher", num_teachers), ("trainer", 1))}
    start_head(folder, types, IDLE_S, DASHBOARD)
    ray.init(address=f"127.0.0.1:{PORT}", log_to_driver=False)
    watch = NodeWatch()
    watch.start()
    assert watch.num_alive == 0
    began = time.monotonic()
    lectern(project, "submit", grown, address=f"http://127.0.0.1:{DASHBOARD}")
    ended = time.monotonic()
    while watch.num_alive:
        assert time.monotonic() - ended < IDLE_S + 60, f"{watch.num_alive} nodes are left"
        time.sleep(0.1)
    events = [json.loads(line) for line in (grown / "run" / "events.jsonl").read_text().splitlines()]
    # The last count is that of a run which watches no more.
    counts = [event["counts"].get("teacher", 0) for event in events if event["event"] == "nodes"]
    stages = {event["stage"]: event["seconds"] for event in events if event["event"] == "stage_finished"}
    same_dataset = dataset_digest(alone) == dataset_digest(grown)
    same_order = order_digest(alone) == order_digest(grown)
    grew = (counts[0], max(counts), counts[-2]) == (0, num_teachers, 0)
    return {
        "benchmark": "autoscale_submit",
        "teachers": [n for i, n in enumerate(counts) if i == 0 or n != counts[i - 1]],
        "nodes_lost": sum(event["event"] == "node_lost" for event in events),
        "replicas_lost": sum(event["event"] == "replica_lost" for event in events),
        "samples": sum(event["samples"] for event in events if event["event"] == "unit_done"),
        "job_s": round(ended - began, 1),
        "stages_s": {name: round(seconds, 1) for name, seconds in stages.items()},
        "nodes_gone_after_s": round(time.monotonic() - ended, 1),
        "same_dataset": same_dataset,
        "same_order": same_order,
        "goal_met": grew and same_dataset and same_order,
    }


def lectern(project: Path, command: str, out: Path, *settings: str, address: str | None = None) -> None:
    """Run a command of the program to its end, in the project's folder."""
    words = [sys.executable, "-m", "cluster.cli", command, "run.yaml", "--run-dir", str(out / "run")]
    for setting in (f"cache.url={out / 'dataset'}", *settings):
        words += ["--set", setting]
    words += [] if address is None else ["--address", address]
    subprocess.run(words, cwd=project, check=True, timeout=LIMIT_S, stdout=sys.stderr)


def dataset_digest(out: Path) -> str:
    """Return a digest of a dataset's units and of the bytes of their data."""
    manifests = [json.loads(path.read_text()) for path in sorted((out / "dataset" / "manifest").glob("*.json"))]
    facts = [[found[key] for key in ("unit", "sha256", "sample_ids_digest", "fingerprint")] for found in manifests]
    return blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


def order_digest(out: Path) -> str:
    """Return the digest of the order in which the student saw its samples."""
    return str(json.loads((out / "run" / "stages" / "student.json").read_text())["result"]["order_digest"])


if __name__ == "__main__":
    main()
