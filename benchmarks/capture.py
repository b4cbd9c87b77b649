"""What capturing costs on top of the teacher's forward pass, in one process.

Bare forward passes and whole captures (forward, selection, merge, encoding, commit to a local folder) of the same
batches take turns, so that both see the same machine; medians over the rounds are compared. One JSON line per model:

    python benchmarks/capture.py                       # both models
    python benchmarks/capture.py --model embedded --tokens 16384
    python benchmarks/capture.py --memory              # peak memory instead of time

`efficiency` is capture tokens/s over bare forward tokens/s; `memory_ratio` is the peak of resident memory of a process
that captures over that of one that runs the forward passes alone, weights included. Goals are 0.95 and 1.05 for
`qwen2-1.5b`. Its weights are random, since the cost depends on shapes alone. Run it with nothing else on the machine.
"""

import argparse
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
import yaml
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from storage.config import DataConfig
from storage.identity import CaptureIdentity, DatasetIdentity, TeacherIdentity, TokenizerIdentity
from storage.samples import Sample, SampleBatch
from storage.writer import DatasetWriter
from workers.config import TeacherConfig
from workers.embedded import ensure_teacher
from workers.local.batching import model_inputs, plan_batches
from workers.local.memory import keep_freed_memory
from workers.local.scoring import ScoringSettings, merge_parts, score_part
from workers.local.selection import SelectionSettings

GOAL = {"qwen2-1.5b": 0.95}
MEMORY_GOAL = {"qwen2-1.5b": 1.05}
DEFAULT_TOKENS = {"embedded": 16_384, "qwen2-1.5b": 1024}
QUICKSTART = Path(__file__).parent.parent / "examples" / "quickstart.yaml"


@dataclass(frozen=True)
class Options:
    """What is measured."""

    kind: str
    top_k: int
    draws: int
    window_tokens: int
    batch_tokens: int
    rounds: int


@dataclass(frozen=True)
class Round:
    """Seconds of one round; the three stages add up to `capture_s` but for odds and ends."""

    forward_s: float
    """Bare forward passes."""
    capture_s: float
    in_capture_forward_s: float
    selection_s: float
    commit_s: float


def main() -> None:
    """Measure the asked models and print one JSON line for each."""
    arguments = _parse()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    options = Options(
        arguments.kind,
        arguments.top_k,
        arguments.draws,
        arguments.window_tokens,
        arguments.batch_tokens,
        arguments.rounds,
    )
    for name in arguments.model or list(DEFAULT_TOKENS):
        if arguments.memory and not arguments.peak_of:
            print(json.dumps(compare_memory(name)), flush=True)
            continue
        model = embedded_model() if name == "embedded" else random_qwen2()
        tokens = arguments.tokens or DEFAULT_TOKENS[name]
        if arguments.peak_of:
            print(peak_bytes(arguments.peak_of, name, model, tokens, options))
            return
        print(json.dumps(measure(name, model, tokens, options)), flush=True)


def embedded_model() -> nn.Module:
    """Return the quickstart's embedded teacher in bfloat16, trained first where it is not cached."""
    run = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))
    teacher = TeacherConfig.model_validate(run["teacher"])
    folder = ensure_teacher(teacher.embedded, DataConfig.model_validate(run["data"]))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()  # type: ignore[no-any-return]


def random_qwen2() -> nn.Module:
    """Return a bfloat16 Qwen2 of the 1.5B shape with random weights."""
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return Qwen2ForCausalLM(config).eval()  # type: ignore[no-any-return]
    finally:
        torch.set_default_dtype(before)


def measure(name: str, model: nn.Module, num_tokens: int, options: Options) -> dict[str, object]:
    """Return the figures of one model over about `num_tokens` tokens a round."""
    vocab_size = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    samples = random_samples(max(1, num_tokens // options.window_tokens), options.window_tokens, vocab_size)
    identity = random_identity(name, vocab_size, options)
    folder = Path(tempfile.mkdtemp(prefix="lectern-bench-"))
    try:
        writer = DatasetWriter.create(str(folder), identity)
        bare_forward_s(model, samples, options)
        rounds = [one_round(model, samples, options, writer, number) for number in range(options.rounds)]
    finally:
        shutil.rmtree(folder)
    forward_s, capture_s = median(r.forward_s for r in rounds), median(r.capture_s for r in rounds)
    stages = ("in_capture_forward_s", "selection_s", "commit_s")
    stage_ms = {stage[:-2]: median(asdict(r)[stage] for r in rounds) * 1000 / samples.num_tokens for stage in stages}
    return {
        "benchmark": "capture",
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocab_size": vocab_size,
        **asdict(options),
        "tokens": samples.num_tokens,
        "threads": torch.get_num_threads(),
        "forward_tokens_per_s": round(samples.num_tokens / forward_s, 1),
        "capture_tokens_per_s": round(samples.num_tokens / capture_s, 1),
        "efficiency": round(forward_s / capture_s, 4),
        "efficiency_by_round": [round(r.forward_s / r.capture_s, 4) for r in rounds],
        "ms_per_token": {stage: round(value, 4) for stage, value in stage_ms.items()},
        "goal": GOAL.get(name),
    }


def compare_memory(name: str) -> dict[str, object]:
    """Return the peaks of two processes with this one's arguments: forward passes alone, and a capture."""
    peaks = {}
    for work in ("forward", "capture"):
        command = [sys.executable, *sys.argv, "--model", name, "--peak-of", work]
        peaks[work] = int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return {
        "benchmark": "capture",
        "model": name,
        "peak_bytes": peaks,
        "memory_ratio": round(peaks["capture"] / peaks["forward"], 4),
        "goal": MEMORY_GOAL.get(name),
    }


def peak_bytes(work: str, name: str, model: nn.Module, num_tokens: int, options: Options) -> int:
    """Return the peak of this process's resident memory after a round of forward passes or of capture."""
    vocab_size = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    samples = random_samples(max(1, num_tokens // options.window_tokens), options.window_tokens, vocab_size)
    if work == "forward":
        bare_forward_s(model, samples, options)
    else:
        with tempfile.TemporaryDirectory(prefix="lectern-bench-") as folder:
            writer = DatasetWriter.create(folder, random_identity(name, vocab_size, options))
            capture(model, samples, options, writer, 0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def one_round(model: nn.Module, samples: SampleBatch, options: Options, writer: DatasetWriter, number: int) -> Round:
    """Time the bare forwards, then a whole capture of the same batches into a unit of its own."""
    forward_s = bare_forward_s(model, samples, options)
    return Round(forward_s, **capture(model, samples, options, writer, number))


def capture(
    model: nn.Module, samples: SampleBatch, options: Options, writer: DatasetWriter, number: int
) -> dict[str, float]:
    """Capture the samples into a unit of its own; returns the seconds of `Round` but those of the bare forwards."""
    vocab_size = writer.info.identity.tokenizer.vocab_size
    settings = ScoringSettings(
        selection=SelectionSettings(
            kind=options.kind,  # type: ignore[arg-type]
            top_k=min(options.top_k, vocab_size),
            draws=options.draws,
            vocab_size=vocab_size,
        ),
        seed=0,
        draw_sets=1,
        hidden=(),
        hidden_dtype="float16",
        batch_tokens=options.batch_tokens,
        data_parallel=False,
    )
    start = time.perf_counter()
    part = score_part(model, samples, settings, 0, 1, torch.device("cpu"))
    scored = time.perf_counter()
    writer.commit(f"round{number}", samples, merge_parts(samples, [part], settings), "a1")
    end = time.perf_counter()
    return {
        "capture_s": end - start,
        "in_capture_forward_s": part.forward_s,
        "selection_s": part.selection_s,
        "commit_s": end - scored,
    }


@torch.no_grad()
def bare_forward_s(model: nn.Module, samples: SampleBatch, options: Options) -> float:
    """Return the seconds that the model alone takes for the batches that a capture would make."""
    total = 0.0
    for rows in plan_batches(samples.lengths(), options.batch_tokens):
        inputs = model_inputs(samples.take(rows))
        start = time.perf_counter()
        logits = model(
            input_ids=inputs.input_ids,
            position_ids=inputs.position_ids,
            attention_mask=inputs.attention_mask,
            use_cache=False,
        ).logits
        total += time.perf_counter() - start
        del logits
    return total


def random_samples(count: int, window_tokens: int, vocab_size: int) -> SampleBatch:
    """Return windows of one document each, random tokens, all but the first supervised."""
    generator = np.random.default_rng(0)
    supervised = np.ones(window_tokens, dtype=np.bool_)
    supervised[0] = False
    document = np.zeros(window_tokens, dtype=np.int16)
    tokens = generator.integers(0, vocab_size, (count, window_tokens)).astype(np.int32)
    return SampleBatch.of([Sample("general", row, supervised, document) for row in tokens])


def random_identity(name: str, vocab_size: int, options: Options) -> DatasetIdentity:
    """Return an identity for the throw-away dataset."""
    sampled = options.kind == "hybrid"
    return DatasetIdentity(
        teacher=TeacherIdentity(name=name, architecture="benchmark", weights="0" * 64, parameters=0),
        tokenizer=TokenizerIdentity(digest="0" * 64, vocab_size=vocab_size),
        precision="bfloat16",
        capture=CaptureIdentity(
            kind=options.kind,
            top_k=options.top_k,
            draws=options.draws if sampled else None,
            seed=0 if sampled else None,
        ),
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=list(DEFAULT_TOKENS), help="repeatable; default: all")
    parser.add_argument("--tokens", type=int, help="tokens of one round; default by model")
    parser.add_argument("--kind", choices=["hybrid", "topk"], default="hybrid")
    parser.add_argument("--top-k", type=int, default=12)
    parser.add_argument("--draws", type=int, default=12)
    parser.add_argument("--window-tokens", type=int, default=256)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="measure peak memory instead of time")
    parser.add_argument("--peak-of", choices=["forward", "capture"], help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    return parser.parse_args()


if __name__ == "__main__":
    main()
