"""What the teacher's targets gain over hard labels: the quickstart's student against its baseline, on several seeds.

One `lectern run` with `train.seeds` (fresh weights and sample order for each, one dataset), so that the figures are
those of the real program. Student and baseline of a seed have the same weights, order and steps. One JSON line per
seed, then one with the mean gap (baseline − student, nats per held-out token) and its standard deviation:

    python benchmarks/kd_gain.py
    python benchmarks/kd_gain.py --seeds 0 1 2 3 4 --work /tmp/kd_gain

The goal is a lower held-out loss on every source in every seed.

With `--dense` the same students are also trained on whole distributions, which the final hidden states give back
exactly: what dense online distillation learns from, step by step. A last line says what share of the dense gap the
sparse targets keep (of the mean over sources and seeds; goal 0.95), and their bytes per supervised token:

    python benchmarks/kd_gain.py --dense --set cache.codec=compact --set cache.top_k=4 --set cache.draws=4
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


SHARE_GOAL = 0.95
DENSE = (
    "cache.kind=topk",
    "cache.top_k=1",
    "cache.codec=plain",
    "cache.hidden=[final]",
    "cache.hidden_dtype=bfloat16",
    "train.loss.exact=true",
    "evaluate.baseline=false",
)


def run(config: Path, work: Path, name: str, seeds: list[int], overrides: Sequence[str]) -> dict[str, Any]:
    """Run the pipeline on several seeds; return its report.json."""
    settings = [f"train.seeds={seeds}", f"cache.url={work / f'{name}-dataset'}", *overrides]
    command = [sys.executable, "-m", "cluster.cli", "run", str(config), "--run-dir", str(work / name)]
    for setting in settings:
        command += ["--set", setting]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    return dict(json.loads((work / name / "report.json").read_text()))


def dense_share(sparse: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
    """Compare the gaps to the baseline of students on sparse and on whole distributions, nats per token."""
    baseline = [mean(row["baseline"]["loss"].values()) for row in sparse["seeds"]["seeds"]]
    kept, whole = (
        [base - mean(row["student"]["loss"].values()) for base, row in zip(baseline, rows, strict=True)]
        for rows in (sparse["seeds"]["seeds"], dense["seeds"]["seeds"])
    )
    share = mean(kept) / mean(whole)
    return {
        "bytes_per_token": sparse["cache"]["bytes_per_token"],
        "gap": kept,
        "dense_gap": whole,
        "share": share,
        "goal": SHARE_GOAL,
        "goal_met": share >= SHARE_GOAL,
    }


def main() -> None:
    """Run all seeds and print their JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "examples" / "quickstart.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="two or more")
    parser.add_argument("--work", type=Path, help="folder for run and dataset, kept; default: a temporary one")
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="config override, as for lectern")
    parser.add_argument("--dense", action="store_true", help="compare with whole distributions as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kd-gain-") as temporary:
        work = options.work or Path(temporary)
        report = run(options.config, work, "run", options.seeds, options.overrides)
        dense = run(options.config, work, "dense", options.seeds, DENSE) if options.dense else None
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
    if dense is not None:
        print(json.dumps({"benchmark": "kd_gain", "seeds": options.seeds, **dense_share(report, dense)}))


if __name__ == "__main__":
    main()
