"""Prompt scoring by a real vLLM server against local scoring of the same weights, and the students that each teaches.

vLLM wants an environment of its own (docs/api-teachers.md says how to make one); this starts its server on loopback and
runs the whole `lectern run` twice on the same samples and order: `local`, a teacher of our own fleet, and `vllm`, the
same folder behind the server. One JSON line compares the datasets position by position (log-probabilities of the ids
that both list, and of the token itself), one per student gives held-out losses:

    python benchmarks/vllm.py --vllm /opt/vllm/bin/vllm --model runs/quickstart/student

`--model` is a folder that both can load, for instance the quickstart's student. Each arm trains with every seed given;
the difference of the arms' mean losses is to be judged against the spread over seeds.
"""

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from storage.reader import Dataset  # noqa: E402

TOP_K = 20
GOAL = 0.02
"""Most of the median difference of log-probabilities, nats, in bfloat16."""


@contextlib.contextmanager
def vllm_server(vllm: Path, model: Path, context: int, log: Path) -> Iterator[str]:
    """Serve a folder as model `teacher` on loopback; yield the address for `teacher.api.base_url`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [vllm, "serve", model, "--served-model-name", "teacher", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "bfloat16", "--max-model-len", str(context), "--max-logprobs", str(TOP_K)]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("wb") as out:
        server = subprocess.Popen(list(map(str, command)), stdout=out, stderr=out, env=environment)
        try:
            for _ in range(300):
                if server.poll() is not None:
                    break
                with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                    yield f"http://127.0.0.1:{port}/v1"
                    return
                time.sleep(1)
            raise SystemExit(f"vLLM did not come up; its last words:\n{log.read_text()[-2000:]}")
        finally:
            server.terminate()
            server.wait(60)


def run(values: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """Run the pipeline of a config; return its report.json."""
    config = run_dir.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "cluster.cli", "run", str(config), "--run-dir", str(run_dir)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    return dict(json.loads((run_dir / "report.json").read_text()))


def compare(local_url: str, vllm_url: str) -> dict[str, Any]:
    """Compare two datasets of kind `topk` on the samples of both, nats."""
    local, served = Dataset.open(local_url), Dataset.open(vllm_url)
    ids_of = [{row.tobytes() for row in dataset.catalog.sample_ids} for dataset in (local, served)]
    names = sorted(ids_of[0] & ids_of[1])
    (samples, ours), (_, theirs) = local.read(names), served.read(names)
    ids = [targets.id.reshape(-1, TOP_K) for targets in (ours, theirs)]
    logprobs = [targets.logprob.astype(np.float64).reshape(-1, TOP_K) for targets in (ours, theirs)]
    position, here, there = np.nonzero(ids[0][:, :, None] == ids[1][:, None, :])
    apart = np.abs(logprobs[0][position, here] - logprobs[1][position, there])
    tail = np.abs(ours.tail_mass.astype(np.float64) - theirs.tail_mass.astype(np.float64))
    return {
        "samples": len(samples),
        "positions": len(ids[0]),
        "samples_of_one_only": len(ids_of[0] ^ ids_of[1]),
        "ids_shared": round(len(position) / ids[0].size, 4),
        "logprob_difference": {
            "median": float(np.median(apart)),
            "p99": float(np.quantile(apart, 0.99)),
            "max": float(apart.max()),
        },
        "tail_mass_difference_median": float(np.median(tail)),
        "teacher_nll_difference_median": float(np.median(np.abs(ours.teacher_nll - theirs.teacher_nll))),
        "goal": GOAL,
        "goal_met": bool(np.median(apart) <= GOAL),
    }


def main() -> None:
    """Run both arms and print the JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path, required=True, help="the vllm program of its own environment")
    parser.add_argument("--model", type=Path, required=True, help="folder with weights and tokenizer")
    parser.add_argument("--config", type=Path, default=ROOT / "examples" / "quickstart.yaml")
    parser.add_argument("--documents", type=int, default=150, help="documents of each source")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--work", type=Path, help="folder for runs and datasets, kept; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vllm-") as temporary, contextlib.ExitStack() as closing:
        work = (options.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        model = options.model.resolve()
        url = closing.enter_context(vllm_server(options.vllm, model, 512, work / "vllm.log"))
        api = {"base_url": url, "model": "teacher", "key_env": None, "concurrency": 16}
        arms: dict[str, dict[str, Any]] = {
            "local": {"sharding": "none", "ranks": 1},
            "vllm": {"kind": "api", "api": api, "require": "prompt_scoring"},
        }
        losses: dict[str, list[float]] = {}
        for name, arm in arms.items():
            for seed in options.seeds:
                values: dict[str, Any] = yaml.safe_load(options.config.read_text())
                for source in values["data"]["sources"]:
                    source["max_documents"] = options.documents
                values["teacher"] = {"name": str(model), "dtype": "bfloat16", **arm}
                values["cache"] |= {"url": str(work / name), "kind": "topk", "top_k": TOP_K}
                values["train"] |= {"steps": options.steps, "seed": seed}
                values["student"]["seed"] = seed
                values["evaluate"]["baseline"] = False
                scores = run(values, work / f"{name}-{seed}")["eval"]["student"]
                losses.setdefault(name, []).append(mean(scores["loss"].values()))
                line = {"benchmark": "vllm", "arm": name, "seed": seed, "loss": scores["loss"]}
                print(json.dumps(line), flush=True)
        print(json.dumps({"benchmark": "vllm", **compare(str(work / "local"), str(work / "vllm"))}), flush=True)
        summary = {name: {"mean": mean(found), "stdev": stdev(found)} for name, found in losses.items() if found[1:]}
        apart = mean(losses["vllm"]) - mean(losses["local"])
        print(json.dumps({"benchmark": "vllm", "student_loss": summary, "difference": apart}))


if __name__ == "__main__":
    main()
