"""What distillation at the output head costs: time and peak memory of forward + backward, hidden states to gradients.

    python benchmarks/loss.py                                   # 2,048 tokens, width 512, vocabularies 32k and 152k
    python benchmarks/loss.py --device cuda --tokens 8192 --width 4096 --vocabularies 151936

Methods, on the same hidden states, head and labels, in float32:

* `ce`: our chunked pass with cross-entropy alone, the baseline;
* `kd`: the same pass with forward KL on `hybrid` targets of 24 entries (12 best + 12 drawn) beside cross-entropy;
* `trl_dense`: both heads, then `trl.experimental.gkd.GKDTrainer.generalized_jsd_loss(beta=0)` on whole logits and
  torch's cross-entropy on the student's, as dense online distillation does;
* `trl_chunked`: `trl.kernels.chunked_divergence.ChunkedDivergenceFunction(beta=0)`, without cross-entropy.

The dense ones make the teacher's logits from its final states, [tokens, width] as well; its forward pass before the
head, which they need and a cache does not, is not counted. Times are medians of interleaved repetitions. Memory is the
growth of the process beyond the inputs at its peak, gradients included, the least of three processes of each method.
`trl` comes with the extra `bench`; without it the two lines are left out. One JSON line per vocabulary and method.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from trainer.loss_config import LossConfig
from trainer.losses import HeadTerms, SparseTargets, chosen_divergence, head_loss

BEST, DRAWN = 12, 12
GOALS = {"ce": (1.05, 1.05), "trl_dense": (0.5, 0.2)}
"""Most of this method's time and memory that `kd` may take."""


class Problem:
    """The inputs of one shape."""

    def __init__(self, tokens: int, width: int, vocabulary: int, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(tokens, width, generator=generator).to(device).requires_grad_()
        self.weight = (torch.randn(vocabulary, width, generator=generator) / width**0.5).to(device).requires_grad_()
        self.teacher_hidden = torch.randn(tokens, width, generator=generator).to(device)
        self.label = torch.randint(vocabulary, (tokens,), generator=generator).to(device)
        self.targets = self._sparse(tokens, vocabulary, generator).to(device)

    def _sparse(self, tokens: int, vocabulary: int, generator: torch.Generator) -> SparseTargets:
        size = BEST + DRAWN
        start = torch.randint(vocabulary, (tokens, 1), generator=generator)
        stride = torch.randint(1, vocabulary // size, (tokens, 1), generator=generator)
        share = torch.rand(tokens, size, generator=generator).softmax(1) * 0.9
        return SparseTargets(
            kind="hybrid",
            label=self.label.cpu(),
            entry_offsets=torch.arange(tokens + 1) * size,
            id=((start + stride * torch.arange(size)) % vocabulary).flatten(),
            estimate=share.flatten(),
            logprob=share.log().flatten(),
            drawn=(torch.arange(size) >= BEST).repeat(tokens),
            tail_mass=torch.full((tokens,), 0.1),
            entropy=torch.zeros(tokens),
        )

    def run(self, method: str) -> None:
        """Run one forward and backward pass."""
        self.hidden.grad = self.weight.grad = None
        METHODS[method](self).backward()


def cross_entropy(problem: Problem) -> Tensor:
    """Chunked cross-entropy alone."""
    return head_loss(problem.hidden, problem.weight, None, problem.targets, HeadTerms(1.0))[0]


def distillation(problem: Problem) -> Tensor:
    """Cross-entropy and forward KL on sparse targets, as a run has it by default."""
    terms = HeadTerms(0.1, [(0.9, chosen_divergence(LossConfig()))])
    return head_loss(problem.hidden, problem.weight, None, problem.targets, terms)[0]


def trl_dense(problem: Problem) -> Tensor:
    """Whole logits of both sides."""
    from trl.experimental.gkd import GKDTrainer

    with torch.no_grad():
        teacher = problem.teacher_hidden @ problem.weight.T
    student = problem.hidden @ problem.weight.T
    divergence = GKDTrainer.generalized_jsd_loss(student[None], teacher[None], beta=0, reduction="sum")
    hard = torch.nn.functional.cross_entropy(student, problem.label, reduction="sum")
    return 0.9 * divergence + 0.1 * hard


def trl_chunked(problem: Problem) -> Tensor:
    """Tiles of both sides' logits, made again in the backward pass."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    divergence, _ = ChunkedDivergenceFunction.apply(
        problem.hidden, problem.weight, None, problem.teacher_hidden, problem.weight.detach(), None, 0.0
    )
    return divergence.sum()


METHODS: dict[str, Callable[[Problem], Tensor]] = {
    "ce": cross_entropy,
    "kd": distillation,
    "trl_dense": trl_dense,
    "trl_chunked": trl_chunked,
}


def seconds(problem: Problem, methods: list[str], rounds: int) -> dict[str, float]:
    """Return the median time of each method; ours run in every round, the peers' in every third."""
    found: dict[str, list[float]] = {method: [] for method in methods}
    for turn in range(rounds + 1):
        order = [method for method in methods if method in ("ce", "kd") or turn % 3 == 1]
        for method in order if turn % 2 else reversed(order):
            began = time.perf_counter()
            problem.run(method)
            if problem.hidden.is_cuda:
                torch.cuda.synchronize()
            if turn:  # the first round warms up
                found[method].append(time.perf_counter() - began)
    return {method: median(times) for method, times in found.items()}


def peak_bytes(options: argparse.Namespace, vocabulary: int, method: str) -> int:
    """Return what one pass takes beyond its inputs, measured in a fresh process."""
    command = [sys.executable, __file__, "--memory-of", method, "--vocabularies", str(vocabulary)]
    for name in ("tokens", "width", "device"):
        command += [f"--{name}", str(getattr(options, name))]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def own_peak_bytes(problem: Problem, small: Problem, method: str) -> int:
    """Return how far one pass raises this process's memory; `small` has loaded all code before."""
    small.run(method)
    if problem.hidden.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        problem.run(method)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is held now
    before = _status("VmRSS")
    problem.run(method)
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def lines(options: argparse.Namespace, vocabulary: int, methods: list[str]) -> list[dict[str, Any]]:
    """Measure one vocabulary."""
    times = seconds(Problem(options.tokens, options.width, vocabulary, options.device), methods, options.rounds)
    # The allocator holds one freed chunk more or less, whatever the method: the least of three processes is compared.
    memory = {method: min(peak_bytes(options, vocabulary, method) for _ in range(3)) for method in methods}
    shape = {"tokens": options.tokens, "width": options.width, "vocabulary": vocabulary, "device": options.device}
    found = []
    for method in methods:
        line = {"benchmark": "loss", **shape, "method": method, "threads": torch.get_num_threads()}
        line |= {"seconds": round(times[method], 4), "peak_mb": round(memory[method] / 1e6, 1)}
        if method != "kd":
            ratio = {"time": times["kd"] / times[method], "memory": memory["kd"] / memory[method]}
            line["kd_over_this"] = {name: round(value, 4) for name, value in ratio.items()}
        if method in GOALS:
            line["goal"] = dict(zip(("time", "memory"), GOALS[method], strict=True))
            line["goal_met"] = {name: ratio[name] <= goal for name, goal in line["goal"].items()}
        found.append(line)
    return found


def main() -> None:
    """Print the JSON lines, or with --memory-of one number of bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32_000, 151_936])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of ours")
    parser.add_argument("--memory-of", choices=list(METHODS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        small = Problem(64, 64, 1024, options.device)
        problem = Problem(options.tokens, options.width, options.vocabularies[0], options.device)
        print(own_peak_bytes(problem, small, options.memory_of))
        return
    there = importlib.util.find_spec("trl") is not None
    methods = [m for m in METHODS if m == "kd" or (m in options.methods and (there or not m.startswith("trl")))]
    for vocabulary in options.vocabularies:
        for line in lines(options, vocabulary, methods):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
