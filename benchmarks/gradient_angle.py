"""Angle between the gradient on stored targets and that of full distillation, over all parameters of a student.

    python -m benchmarks.gradient_angle                  # both teachers that are trained here once
    python -m benchmarks.gradient_angle --case embedded

Full distillation compares the student with the teacher's whole distributions, at a mini-batch of 4,096 supervised
tokens; each encoding of the same tokens gives another gradient, and the angle between the two is what it loses. The
student learns from whole distributions for as many steps as `--moments` says, since the angle grows as the gradient
shrinks. Encodings: `sampled` with the least draws that are no worse than 50 multinomial ones and with so many times
them as `--factor` says (codec.py measures the bytes of both), `hybrid` with the quickstart's 12 + 12, 50 multinomial
draws, and the 12 best entries made to sum to one.
One JSON line for each teacher and moment.
"""

import argparse
import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from benchmarks.codec import TEACHERS, Errors, targets_at, window_logits
from storage.config import DataConfig
from storage.sample_set import prepare_samples
from storage.samples import Sample
from storage.tokenizer import Tokenizer
from trainer.batches import sparse_targets
from trainer.losses import ForwardKL, HeadTerms, logits_loss
from trainer.losses.base import SparseTargets
from workers.embedded import ensure_teacher
from workers.local.selection import Selection, SelectionSettings, select, uniforms

QUICKSTART = Path(__file__).parent.parent / "examples" / "quickstart.yaml"
BATCH_TOKENS = 4096
MULTINOMIAL = 50
TOP_K = DRAWS = 12
LEARNING_RATE = 4e-3
KL = HeadTerms(cross_entropy=0.0, divergences=[(1.0, ForwardKL())])

Loss = Callable[[Tensor, Tensor, "Window"], Tensor]
"""Sums a loss over a window: student's logits [P, V], teacher's logits [P, V], the window."""


@dataclass(frozen=True, eq=False)
class Window:
    """A sample and where it is supervised."""

    sample: Sample
    at: Tensor  # int64 [P]

    @staticmethod
    def of(sample: Sample) -> "Window":
        """Return the window of a sample."""
        return Window(sample, torch.from_numpy(np.flatnonzero(sample.supervised)))

    @property
    def truth(self) -> Tensor:
        """Token that follows at each supervised position, int64 [P]."""
        return torch.from_numpy(self.sample.tokens.astype(np.int64))[self.at]


def full(student: Tensor, teacher: Tensor, _: Window) -> Tensor:
    """Cross-entropy with the whole distribution; its gradient is that of the divergence."""
    return -(teacher.softmax(1) * student.log_softmax(1)).sum()


def multinomial(student: Tensor, teacher: Tensor, _: Window) -> Tensor:
    """Cross-entropy with 50 independent draws."""
    drawn = torch.multinomial(teacher.softmax(1), MULTINOMIAL, replacement=True)
    return -student.log_softmax(1).gather(1, drawn).sum() / MULTINOMIAL


def renormalised(student: Tensor, teacher: Tensor, _: Window) -> Tensor:
    """Cross-entropy with the 12 best entries, made to sum to one."""
    best = teacher.topk(TOP_K)
    return -(best.values.softmax(1) * student.log_softmax(1).gather(1, best.indices)).sum()


def kept(kind: str, draws: int) -> Loss:
    """Return our loss on what a capture of this kind keeps."""

    def loss(student: Tensor, teacher: Tensor, window: Window) -> Tensor:
        settings = SelectionSettings(kind=kind, top_k=TOP_K, draws=draws, vocab_size=teacher.shape[1])  # type: ignore[arg-type]
        uniform = torch.from_numpy(uniforms(0, window.sample.sample_id, len(teacher)))
        chosen = select(teacher, torch.arange(len(teacher)), window.truth, uniform, settings)
        return logits_loss(student, as_targets(chosen, window.truth, kind), KL)[0]

    return loss


def as_targets(chosen: Selection, label: Tensor, kind: str) -> SparseTargets:
    """Return a selection as the trainer reads it back."""
    return sparse_targets(targets_at(np.array([0, len(label)]), chosen), label.numpy(), kind)


class Batches:
    """Mini-batches of windows with the teacher's logits."""

    def __init__(self, case: str, train_tokens: int) -> None:
        from transformers import AutoModelForCausalLM

        config = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))
        data = DataConfig.model_validate(config["data"])
        folder = ensure_teacher(TEACHERS[case].model_copy(update={"train_tokens": train_tokens}), data)
        self.tokenizer = Tokenizer.load(folder)
        self.teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.student_config = {**config["student"]["config"], "vocab_size": self.tokenizer.vocab_size}
        samples = prepare_samples(data, self.tokenizer, folder.parent / f"{folder.name}-benchmark-samples")
        rows = np.concatenate([samples.rows("train", source) for source in samples.source_names])
        self._samples, self._rows = samples, np.random.default_rng(0).permutation(rows)

    def __iter__(self) -> Iterator[list[Window]]:
        """Yield batches without end."""
        batch: list[Window] = []
        tokens = 0
        while True:
            for row in self._rows:
                batch.append(Window.of(self._samples.read(np.array([row])).sample(0)))
                tokens += len(batch[-1].at)
                if tokens >= BATCH_TOKENS:
                    yield batch
                    batch, tokens = [], 0

    def gradient(self, student: torch.nn.Module, batch: list[Window], loss: Loss) -> Tensor:
        """Return the gradient of the mean loss over all parameters, [N]."""
        student.zero_grad()
        for window in batch:
            with torch.no_grad():
                teacher = window_logits(self.teacher, window.sample)[:, : self.tokenizer.vocab_size]
            tokens = torch.from_numpy(window.sample.tokens.astype(np.int64))
            logits = student(input_ids=tokens[None]).logits[0, window.at - 1]
            loss(logits, teacher, window).div(sum(len(w.at) for w in batch)).backward()
        return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])

    def draws(self) -> int:
        """Return how many systematic draws are no worse than 50 multinomial ones."""
        errors = Errors()
        for window in next(iter(self)):
            with torch.no_grad():
                errors.add(window_logits(self.teacher, window.sample)[:, : self.tokenizer.vocab_size].softmax(1))
        return errors.draws()


def angle(a: Tensor, b: Tensor) -> float:
    """Return the angle between two vectors in degrees."""
    cosine = torch.dot(a.double(), b.double()) / (a.double().norm() * b.double().norm())
    return math.degrees(math.acos(min(1.0, float(cosine))))


def measure(case: str, train_tokens: int, moments: list[int], factor: float) -> Iterator[dict[str, Any]]:
    """Yield the angles of each encoding at each moment."""
    from transformers import AutoConfig, AutoModelForCausalLM

    batches = Batches(case, train_tokens)
    draws = batches.draws()
    more = round(factor * draws)
    losses = {
        "sampled": kept("sampled", draws),
        "sampled_more": kept("sampled", more),
        "hybrid": kept("hybrid", DRAWS),
        "multinomial": multinomial,
        "top_renormalised": renormalised,
    }
    torch.manual_seed(0)
    student = AutoModelForCausalLM.from_config(AutoConfig.for_model(**batches.student_config), dtype=torch.float32)
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95))
    for step, batch in enumerate(batches):
        wanted = batches.gradient(student, batch, full)
        if step in moments:
            twin = copy.deepcopy(student)
            angles = {name: angle(batches.gradient(twin, batch, loss), wanted) for name, loss in losses.items()}
            yield {
                "benchmark": "gradient_angle",
                "case": case,
                "steps": step,
                "tokens": sum(len(window.at) for window in batch),
                "draws": draws,
                "more_draws": more,
                "gradient_norm": round(float(wanted.norm()), 4),
                "degrees": {name: round(value, 2) for name, value in angles.items()},
                "goal_met": angles["sampled_more"] <= 3,
            }
        if step >= max(moments):
            return
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()


def main() -> None:
    """Print the JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=list(TEACHERS), help="repeatable; default: all")
    parser.add_argument("--moments", type=int, nargs="+", default=[0, 10, 30, 100], help="steps of learning before")
    parser.add_argument("--factor", type=float, default=3.5, help="of the second measure of `sampled`")
    parser.add_argument("--train-tokens", type=int, default=300_000, help="of the teachers trained here")
    options = parser.parse_args()
    for case in options.case or TEACHERS:
        for line in measure(case, options.train_tokens, options.moments, options.factor):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
