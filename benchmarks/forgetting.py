"""What a student forgets of prose while it learns code, with replay, with consolidation (EWC), and with neither.

One student of the quickstart learns prose (stage `general`); from the same weights each arm then learns code (stage
`domain`). Every arm is a `lectern run` of its own; teacher, dataset and first stage are shared. One JSON line per arm:
the held-out loss on prose before and after the second stage (nats per token), the difference (`damage`),
KL(before ‖ after), and what was learned of code. The goal is less than half the damage of `none`.

    python benchmarks/forgetting.py
    python benchmarks/forgetting.py --arms none replay ewc --ewc-weight 30 --work /tmp/forgetting
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
FIRST = "student-general"
GOAL = 0.5


def config(options: argparse.Namespace, arm: str, work: Path) -> dict[str, Any]:
    """Return the quickstart's config with two stages."""
    values: dict[str, Any] = yaml.safe_load((ROOT / "examples" / "quickstart.yaml").read_text())
    replay = options.replay if arm == "replay" else 0.0
    second: dict[str, Any] = {"steps": options.steps[1], "learning_rate": options.learning_rate}
    if arm == "ewc":
        second["ewc"] = {"weight": options.ewc_weight}
    values["cache"]["url"] = str(work / "dataset")
    values["evaluate"]["baseline"] = False
    values["train"] |= {"seed": options.seed, "steps": options.steps[0]}
    values["student"]["seed"] = options.seed
    values["stages"] = [
        {"name": "general", "curriculum": {"start": {"general": 1}}},
        {"name": "domain", "train": second, "curriculum": {"start": {"domain": 1}, "replay": replay}},
    ]
    return values


def run_arm(options: argparse.Namespace, arm: str, work: Path) -> dict[str, Any]:
    """Run one arm; return `before`, `after` and `kl` of each source over the second stage."""
    run_dir = work / arm
    first = next((folder for folder in work.glob(f"*/{FIRST}") if folder.parent != run_dir), None)
    if first is not None and not (run_dir / FIRST).exists():
        shutil.copytree(first, run_dir / FIRST)
    path = work / f"{arm}.yaml"
    path.write_text(yaml.safe_dump(config(options, arm, work)))
    command = [sys.executable, "-m", "cluster.cli", "run", str(path), "--run-dir", str(run_dir)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    report = json.loads((run_dir / "report.json").read_text())
    return dict(report["eval"]["student"]["forgetting"]["sources"])


def main() -> None:
    """Run the arms and print their lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=["none", "replay", "ewc"], choices=["none", "replay", "ewc"])
    parser.add_argument("--steps", type=int, nargs=2, default=[180, 90], help="of the two stages")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="of the second stage")
    parser.add_argument("--replay", type=float, default=0.1)
    parser.add_argument("--ewc-weight", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="folder of runs and dataset, kept; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lectern-forgetting-") as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        without: float | None = None
        for arm in options.arms:
            found = run_arm(options, arm, work)
            damage = found["general"]["after"] - found["general"]["before"]
            line: dict[str, Any] = {"benchmark": "forgetting", "arm": arm, "seed": options.seed, "sources": found}
            line |= {"damage": damage, "learned": found["domain"]["before"] - found["domain"]["after"]}
            if arm == "none":
                without = damage
            elif without is not None:
                line |= {"of_none": damage / without, "goal": GOAL, "goal_met": damage < GOAL * without}
            if arm != "none":
                line["setting"] = options.replay if arm == "replay" else options.ewc_weight
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
