"""What a student forgets of prose while it learns code, with replay, with consolidation (EWC), and with neither.

One student of the quickstart learns prose (stage `general`); from the same weights each arm then learns code (stage
`domain`). Every arm is a `lectern run` of its own; the teacher and its dataset are shared by all, the first stage by
the arms of a seed. One JSON line per arm and seed: the held-out loss on prose before and after the second stage (nats
per token), the difference (`damage`), KL(before ‖ after), and what was learned of code; then one line per arm with
means and standard deviations over the seeds. The goal is less than half the damage of `none`.

    python benchmarks/forgetting.py
    python benchmarks/forgetting.py --seeds 0 --arms none ewc --ewc-weight 10 30 100 300 --work /tmp/forgetting

The second one compares values of λ. Two to three minutes an arm on two shared cores, and as much for the first stage of
each seed; with `--work` the same command goes on where it was stopped.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
FIRST = "student-general"
GOAL = 0.5

Arm = tuple[str, float]
"""`none`, `replay` or `ewc`, and the share that is replayed or λ."""
Line = dict[str, Any]


def config(options: argparse.Namespace, arm: Arm, seed: int, work: Path) -> dict[str, Any]:
    """Return the quickstart's config with two stages."""
    name, setting = arm
    values: dict[str, Any] = yaml.safe_load((ROOT / "examples" / "quickstart.yaml").read_text())
    second: dict[str, Any] = {"steps": options.steps[1], "learning_rate": options.learning_rate}
    if name == "ewc":
        second["ewc"] = {"weight": setting, "samples": options.ewc_samples}
    values["cache"]["url"] = str(work / "dataset")
    values["evaluate"] |= {"baseline": False, "shown_samples": 0}
    # One rank: the arms are short, and each rank's start counts.
    values["train"] |= {"seed": seed, "steps": options.steps[0], "workers": 1, "micro_batch_size": 8}
    values["student"]["seed"] = seed
    replay = setting if name == "replay" else 0.0
    values["stages"] = [
        {"name": "general", "curriculum": {"start": {"general": 1}}},
        {"name": "domain", "train": second, "curriculum": {"start": {"domain": 1}, "replay": replay}},
    ]
    return values


def run_arm(options: argparse.Namespace, arm: Arm, seed: int, work: Path) -> Line:
    """Run one arm on one seed; return its line."""
    name, setting = arm
    run_dir = work / f"seed{seed}-{name}-{setting:g}"
    first = next((folder for folder in work.glob(f"seed{seed}-*/{FIRST}") if folder.parent != run_dir), None)
    if first is not None and not (run_dir / FIRST).exists():
        shutil.copytree(first, run_dir / FIRST)
    path = work / f"{run_dir.name}.yaml"
    path.write_text(yaml.safe_dump(config(options, arm, seed, work)))
    command = [sys.executable, "-m", "cluster.cli", "run", str(path), "--run-dir", str(run_dir)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    report = json.loads((run_dir / "report.json").read_text())
    sources = report["eval"]["student"]["forgetting"]["sources"]
    return {
        "benchmark": "forgetting",
        "arm": name,
        "setting": setting,
        "seed": seed,
        "damage": sources["general"]["after"] - sources["general"]["before"],
        "learned": sources["domain"]["before"] - sources["domain"]["after"],
        "sources": sources,
    }


def summaries(lines: Sequence[Line]) -> Iterator[Line]:
    """Yield a line for each arm: means and standard deviations over its seeds, and what share of the damage is left."""
    without = {line["seed"]: line["damage"] for line in lines if line["arm"] == "none"}
    for arm in dict.fromkeys((line["arm"], line["setting"]) for line in lines):
        own = [line for line in lines if (line["arm"], line["setting"]) == arm]
        found: Line = {"benchmark": "forgetting", "arm": arm[0], "setting": arm[1]}
        found["seeds"] = [line["seed"] for line in own]
        values = {name: [line[name] for line in own] for name in ("damage", "learned")}
        if arm[0] != "none" and len(without) == len(own):
            values["of_none"] = [line["damage"] / without[line["seed"]] for line in own]
        for name, of in values.items():
            found |= {name: mean(of), f"{name}_std": stdev(of) if len(of) > 1 else None}
        if "of_none" in values:
            found |= {"goal": GOAL, "goal_met": max(values["of_none"]) < GOAL}
        yield found


def main() -> None:
    """Run the arms and print their lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=["none", "replay", "ewc"], choices=["none", "replay", "ewc"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of weights and sample order")
    parser.add_argument("--steps", type=int, nargs=2, default=[180, 90], help="of the two stages")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="of the second stage")
    parser.add_argument("--replay", type=float, nargs="+", default=[0.1], help="shares of prose in the second stage")
    parser.add_argument("--ewc-weight", type=float, nargs="+", default=[100.0], help="values of λ")
    parser.add_argument("--ewc-samples", type=int, default=64, help="windows for the Fisher information")
    parser.add_argument("--work", type=Path, help="folder of runs and dataset, kept; default: a temporary one")
    options = parser.parse_args()
    settings = {"none": [0.0], "replay": options.replay, "ewc": options.ewc_weight}
    lines = []
    with tempfile.TemporaryDirectory(prefix="lectern-forgetting-") as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for seed in options.seeds:
            for arm in [(name, setting) for name in options.arms for setting in settings[name]]:
                lines.append(run_arm(options, arm, seed, work))
                print(json.dumps(lines[-1]), flush=True)
    for line in summaries(lines):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
