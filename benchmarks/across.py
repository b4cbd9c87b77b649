"""A student with a tokenizer of its own: what the losses across tokenizers gain over hard labels.

The quickstart's student, but with a byte-level BPE of 1,024 entries trained on the same text (the teacher's has 4,096),
learns from one dataset of kind `topk` by ALM, by ULD, and from the text alone. Every arm is a `lectern run` of its own
from the same weights in the same order of samples. One JSON line per arm: held-out loss of each source in nats per byte
of text, and how far the likelihoods of chunks are from the teacher's.

    python benchmarks/across.py
    python benchmarks/across.py --arms ce uld --kl 0.5 --ce 0.5 --work /tmp/across
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from cluster.loader import check_config
from workers.embedded import ensure_tokenizer

ROOT = Path(__file__).resolve().parents[1]


def config(options: argparse.Namespace, arm: str, work: Path) -> dict[str, Any]:
    """Return the quickstart's config with another tokenizer and loss."""
    values: dict[str, Any] = yaml.safe_load((ROOT / "examples" / "quickstart.yaml").read_text())
    values["cache"] |= {"url": str(work / "dataset"), "kind": "topk", "top_k": options.top_k}
    values["train"] |= {"steps": options.steps, "seed": options.seed, "workers": 1, "micro_batch_size": 8}
    kl, ce = (0.0, 1.0) if arm == "ce" else (options.kl, options.ce)
    values["train"]["loss"] = {"kl": kl, "ce": ce} | ({} if arm == "ce" else {"divergence": arm})
    values["evaluate"] |= {"baseline": False, "shown_samples": 0}
    plain = check_config(values | {"teacher": {"embedded": {"vocab_size": options.vocab_size}}}, "across")
    own = ensure_tokenizer(plain.teacher.embedded, plain.data)
    values["student"] |= {"tokenizer": str(own), "seed": options.seed}
    return values


def run_arm(options: argparse.Namespace, arm: str, work: Path) -> dict[str, Any]:
    """Run one arm; return its line."""
    path = work / f"{arm}.yaml"
    path.write_text(yaml.safe_dump(config(options, arm, work)))
    command = [sys.executable, "-m", "cluster.cli", "run", str(path), "--run-dir", str(work / arm)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    report = json.loads((work / arm / "report.json").read_text())
    student, teacher = report["eval"]["student"], report["eval"]["teacher"]
    return {
        "benchmark": "across",
        "arm": arm,
        "seed": options.seed,
        "weights": {"kl": options.kl, "ce": options.ce} if arm != "ce" else {"kl": 0.0, "ce": 1.0},
        "unit": student["unit"],
        "loss": student["loss"],
        "chunk_gap": student["chunk_gap"],
        "teacher_loss": teacher["loss"],
        "tokens_per_s": report["train"]["tokens_per_s"],
    }


def main() -> None:
    """Run the arms and print their lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=["ce", "alm", "uld"], choices=["ce", "alm", "uld"])
    parser.add_argument("--steps", type=int, default=180)
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--vocab-size", type=int, default=1024, help="of the student's tokenizer")
    parser.add_argument("--kl", type=float, default=0.9, help="weight of the divergence")
    parser.add_argument("--ce", type=float, default=0.1, help="weight of cross-entropy beside it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="folder of runs and dataset, kept; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lectern-across-") as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for arm in options.arms:
            print(json.dumps(run_arm(options, arm, work)), flush=True)


if __name__ == "__main__":
    main()
