"""What distillation costs over plain cross-entropy in a step of the whole trainer, with data from the cache.

    python benchmarks/step.py                                      # width 256, 4 layers, vocabulary 32,000
    python benchmarks/step.py --device gpu --width 2048 --layers 16 --vocabulary 151936 --window-tokens 2048

Both arms run `trainer.loop.run_rank` itself (reading, DeepSpeed, optimizer, metrics) on the same dataset of kind
`hybrid` (12 best + 12 drawn entries a token), in the same order: `kd` with `kl: 0.9, ce: 0.1`, `ce` with
`kl: 0, ce: 1`. Each round is a process of its own, the arms take turns, and times are medians over all steps but the
first of each process. Data wait is the share of the step in which the loop waited for its data; memory is the
process's peak. One JSON line per arm.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
ARMS = {"ce": {"kl": 0.0, "ce": 1.0}, "kd": {"kl": 0.9, "ce": 0.1}}
GOALS = {"time": 1.08, "data_wait_fraction": 0.02}
WARM_UP = 3
PER_UNIT = 32


def write_data(options: argparse.Namespace, folder: Path) -> None:
    """Write the dataset, and the samples that it is about."""
    from reading.rows import identity, make_rows

    from storage.object_store import Store
    from storage.sample_file import META_KEY, PartFacts, PartWriter, SetFacts
    from storage.writer import DatasetWriter

    known = identity(options.vocabulary)
    dataset, samples = DatasetWriter.create(str(folder / "dataset"), known), Store(folder / "samples")
    part, group_rows = PartWriter(), []
    for unit in range(-(-options.samples // PER_UNIT)):
        batch, targets = make_rows(PER_UNIT, options.window_tokens, unit, options.vocabulary)
        dataset.commit(f"u{unit:04d}", batch, targets, attempt=0)
        part.add([batch.sample(n) for n in range(PER_UNIT)], ["train"] * PER_UNIT)
        group_rows.append(PER_UNIT)
    content = part.finish()
    samples.write("samples-00000.parquet", content)
    facts = SetFacts(
        key="benchmark",
        window_tokens=options.window_tokens,
        tokenizer={"digest": known.tokenizer.digest, "vocab_size": options.vocabulary},
        counters={"general": {}},
        parts=[PartFacts(name="samples-00000.parquet", bytes=len(content), group_rows=group_rows)],
    )
    samples.write(META_KEY, facts.model_dump_json().encode())


def run_arm(options: argparse.Namespace, arm: str, folder: Path) -> None:
    """Train in this process, writing metrics.jsonl below the folder."""
    import torch.distributed as dist
    from reading.rows import identity

    from storage.shard_source import Reading
    from trainer.config import StudentConfig, TrainConfig
    from trainer.curriculum_config import CurriculumConfig
    from trainer.engine import Place
    from trainer.loop import run_rank
    from trainer.spec import LoopSpec

    heads = max(1, options.width // 64)
    student = {
        "model_type": "qwen2",
        "hidden_size": options.width,
        "intermediate_size": 3 * options.width,
        "num_hidden_layers": options.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": options.window_tokens,
        "tie_word_embeddings": True,
    }
    train = {
        "steps": options.steps,
        "global_batch_size": options.batch,
        "micro_batch_size": options.micro_batch,
        "workers": 1,
        "dtype": options.dtype,
        "warmup_steps": 1,
        "checkpoint_every": options.steps,
        "loss": ARMS[arm],
    }
    spec = LoopSpec(
        name=arm,
        student=StudentConfig(config=student),
        student_folder=None,
        train=TrainConfig.model_validate(train),
        curriculum=CurriculumConfig(),
        dataset_urls=(str(folder / "dataset"),),
        identity=identity(options.vocabulary),
        samples_url=str(folder / "samples"),
        run_dir=str(folder / "run"),
        device=options.device,
        reading=Reading(layers=()),
        facts={},
    )
    gpu = options.device == "gpu"
    with tempfile.NamedTemporaryFile() as meeting:
        dist.init_process_group("nccl" if gpu else "gloo", f"file://{meeting.name}-store", rank=0, world_size=1)
        run_rank(spec, Place(0, 1, 0, 1, options.device), lambda *_: None, lambda: contextlib.nullcontext(None))


def measured(options: argparse.Namespace, arm: str, folder: Path) -> list[dict[str, Any]]:
    """Run one arm in a process of its own; return its lines of metrics, the first few left out."""
    (folder / "run" / "metrics.jsonl").unlink(missing_ok=True)
    given = [
        f"--{name.replace('_', '-')}={value}" for name, value in vars(options).items() if name not in ("arm", "work")
    ]
    command = [sys.executable, __file__, *given, f"--arm={arm}", f"--work={folder}"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return lines[WARM_UP:]


def summary(options: argparse.Namespace, arm: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of one arm."""
    shape = ("width", "layers", "vocabulary", "window_tokens", "batch", "micro_batch", "dtype", "device", "rounds")
    seconds = sum(line["seconds"] for line in lines)
    waited = sum(line["data_wait_fraction"] * line["seconds"] for line in lines) / seconds
    return {
        "benchmark": "step",
        "arm": arm,
        **{name: getattr(options, name) for name in shape},
        "seconds": round(median(line["seconds"] for line in lines), 4),
        "tokens_per_s": round(median(line["tokens_per_s"] for line in lines), 1),
        "data_wait_fraction": round(waited, 5),
        "peak_mb": round(max(line["peak_memory_bytes"] for line in lines) / 1e6, 1),
    }


def main() -> None:
    """Print the JSON lines; with --arm train one arm and print nothing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--window-tokens", type=int, default=256)
    parser.add_argument("--samples", type=int, default=256, help="windows in the dataset")
    parser.add_argument("--batch", type=int, default=8, help="windows in a step")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu", choices=["cpu", "gpu"])
    parser.add_argument("--steps", type=int, default=15, help="in each process")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each arm")
    parser.add_argument("--work", type=Path, help="folder of the data; default: a temporary one")
    parser.add_argument("--arm", choices=list(ARMS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        run_arm(options, options.arm, options.work)
        return
    with tempfile.TemporaryDirectory(prefix="lectern-step-") as temporary:
        folder = options.work or Path(temporary)
        write_data(options, folder)
        found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
        for turn in range(options.rounds):
            for arm in list(ARMS) if turn % 2 else reversed(ARMS):
                found[arm] += measured(options, arm, folder)
    lines = {arm: summary(options, arm, rows) for arm, rows in found.items()}
    over = {
        key: round(lines["kd"][name] / lines["ce"][name], 4)
        for key, name in (("time", "seconds"), ("memory", "peak_mb"))
    }
    lines["kd"]["over_ce"] = over
    figures = {"time": over["time"], "data_wait_fraction": lines["kd"]["data_wait_fraction"]}
    lines["kd"] |= {"goal": GOALS, "goal_met": {name: figures[name] <= goal for name, goal in GOALS.items()}}
    for line in lines.values():
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
