"""What the teacher's targets gain over hard labels: the quickstart's student against its baseline, on several seeds.

Each seed is one whole `lectern run` of the config (fresh weights and sample order, one shared dataset), so that the
figures are those of the real program. Student and baseline of a seed have the same weights, order and steps. One JSON
line per seed, then one with the mean gap (baseline − student, nats per held-out token) and its standard deviation:

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
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def run_seed(config: Path, work: Path, seed: int, overrides: list[str]) -> dict[str, Any]:
    """Run the pipeline with one seed; return the `eval` part of its report.json."""
    settings = [f"train.seed={seed}", f"student.seed={seed}", f"cache.url={work / 'dataset'}", *overrides]
    command = [sys.executable, "-m", "cluster.cli", "run", str(config), "--run-dir", str(work / f"seed-{seed}")]
    for setting in settings:
        command += ["--set", setting]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    report: dict[str, Any] = json.loads((work / f"seed-{seed}" / "report.json").read_text())
    return dict(report["eval"])


def gaps(scores: dict[str, Any]) -> dict[str, float]:
    """Return baseline loss − student loss for each source, nats per token."""
    student, baseline = scores["student"]["loss"], scores["baseline"]["loss"]
    return {source: baseline[source] - student[source] for source in student}


def main() -> None:
    """Run all seeds and print their JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "examples" / "quickstart.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, help="folder for runs and dataset, kept; default: a temporary one")
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="config override, as for lectern")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kd-gain-") as temporary:
        work = options.work or Path(temporary)
        found = []
        for seed in options.seeds:
            scores = run_seed(options.config, work, seed, options.overrides)
            found.append(gaps(scores))
            figures = {
                name: {key: scores[name][key] for key in ("loss", "kl_to_teacher", "top1_agreement", "ece")}
                for name in ("teacher", "student", "baseline")
            }
            print(json.dumps({"benchmark": "kd_gain", "seed": seed, "gap": found[-1], **figures}), flush=True)
        summary = {
            source: {
                "mean": mean(gap[source] for gap in found),
                "stdev": stdev(gap[source] for gap in found) if len(found) > 1 else None,
                "seeds_won": sum(gap[source] > 0 for gap in found),
            }
            for source in found[0]
        }
        met = all(value > 0 for gap in found for value in gap.values())
        print(json.dumps({"benchmark": "kd_gain", "seeds": options.seeds, "gap": summary, "goal_met": met}))


if __name__ == "__main__":
    main()
