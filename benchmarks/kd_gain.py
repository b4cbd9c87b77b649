"""What the teacher's targets gain over hard labels: the quickstart's student against its baseline, on several seeds.

One `lectern run` with `train.seeds` (fresh weights and sample order for each, one dataset), so that the figures are
those of the real program. Student and baseline of a seed have the same weights, order and steps. One JSON line per
seed, then one with the mean gap (baseline − student, nats per held-out token) and its standard deviation:

    python benchmarks/kd_gain.py
    python benchmarks/kd_gain.py --seeds 0 1 2 3 4 --work /tmp/kd_gain

The goal is a lower held-out loss on every source in every seed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def run(config: Path, work: Path, seeds: list[int], overrides: list[str]) -> dict[str, Any]:
    """Run the pipeline on several seeds; return its report.json."""
    settings = [f"train.seeds={seeds}", f"cache.url={work / 'dataset'}", *overrides]
    command = [sys.executable, "-m", "cluster.cli", "run", str(config), "--run-dir", str(work / "run")]
    for setting in settings:
        command += ["--set", setting]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    return dict(json.loads((work / "run" / "report.json").read_text()))


def main() -> None:
    """Run all seeds and print their JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "examples" / "quickstart.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="two or more")
    parser.add_argument("--work", type=Path, help="folder for run and dataset, kept; default: a temporary one")
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="config override, as for lectern")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kd-gain-") as temporary:
        report = run(options.config, options.work or Path(temporary), options.seeds, options.overrides)
    found = report["seeds"]
    for row in found["seeds"]:
        models = {"teacher": report["eval"]["teacher"], "student": row["student"], "baseline": row["baseline"]}
        figures = {
            name: {key: scores[key] for key in ("loss", "kl_to_teacher", "top1_agreement", "ece")}
            for name, scores in models.items()
        }
        gap = {source: row["baseline"]["loss"][source] - loss for source, loss in row["student"]["loss"].items()}
        print(json.dumps({"benchmark": "kd_gain", "seed": row["seed"], "gap": gap, **figures}), flush=True)
    met = all(gap["won"] == len(options.seeds) for gap in found["gap"].values())
    print(json.dumps({"benchmark": "kd_gain", "seeds": options.seeds, "gap": found["gap"], "goal_met": met}))


if __name__ == "__main__":
    main()
