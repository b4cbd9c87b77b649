"""Is what is stored the teacher, in the mean, and how far does its noise turn the student's gradient?

    python benchmarks/estimator.py                       # both parts
    python benchmarks/estimator.py --train-tokens 60000  # a weaker embedded teacher, trained sooner

*Mean*: 100,000 draws at each of a few positions, made by the selection that captures run; the mean estimate must lie
within 4 standard errors of the truth at every entry (of thousands of entries a few lie beyond 4 by chance alone: their
expected number is printed beside the found one), and every estimate must add up to 1.

*Angle*: between the gradient of the mean forward KL on a mini-batch of 4,096 tokens with stored targets and with the
full distribution, with respect to the student's parameters, at moments of the student's training on full targets.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from storage.config import DataConfig
from storage.sample_set import prepare_samples
from storage.samples import SampleBatch
from storage.tokenizer import Tokenizer
from trainer.batches import sparse_targets
from trainer.losses import ForwardKL, HeadTerms, logits_loss
from workers.config import EmbeddedTeacherConfig
from workers.embedded import ensure_teacher
from workers.local.batching import model_inputs, predicting_rows
from workers.local.scoring import ScoringSettings, merge_parts, score_part
from workers.local.selection import SelectionSettings, select

QUICKSTART = Path(__file__).parent.parent / "examples" / "quickstart.yaml"
DRAWS = 100_000
TARGETS = {"sampled-50": ("sampled", 1, 50), "hybrid-12+12": ("hybrid", 12, 12), "topk-12": ("topk", 12, 0)}


def mean_figures(kind: str, vocab_size: int, positions: int, draws: int, top_k: int) -> dict[str, object]:
    """Return how far the mean of many estimates lies from the truth."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(positions, vocab_size, generator=generator) * torch.linspace(0.5, 4, positions)[:, None]
    settings = SelectionSettings(kind=kind, top_k=top_k, draws=draws, vocab_size=vocab_size)  # type: ignore[arg-type]
    truth = torch.softmax(logits.double(), -1)
    worst, beyond, expected_beyond, sums = 0.0, 0, 0.0, 0.0
    for p in range(positions):
        row = torch.full((DRAWS,), p)
        uniform = torch.rand(DRAWS, 1, dtype=torch.float64, generator=generator)
        kept = select(logits, row, torch.zeros_like(row), uniform, settings)
        assert kept.draws is not None
        drawn = kept.draws[0] > 0
        rest = truth[p].clone()
        head = np.unique(kept.id[~drawn])
        rest[torch.from_numpy(head).long()] = 0
        mass = float(rest.sum())
        mean = np.bincount(kept.id[drawn], weights=kept.draws[0, drawn], minlength=vocab_size) * mass / draws / DRAWS
        fraction = (draws * rest.numpy() / mass) % 1
        error = mass / draws * np.sqrt(fraction * (1 - fraction) / DRAWS)
        score = np.abs(mean - rest.numpy()) / np.maximum(error, 1e-12)
        enough = draws * rest.numpy() / mass * DRAWS >= 25  # where the normal law holds
        worst = max(worst, float(score[enough].max()))
        beyond += int((score[enough] > 4).sum())
        expected_beyond += float(enough.sum()) * math.erfc(4 / math.sqrt(2))
        sums = max(sums, abs(float(mean.sum()) - mass))
    return {
        "benchmark": "estimator",
        "kind": kind,
        "vocab_size": vocab_size,
        "positions": positions,
        "repeats": DRAWS,
        "draws": draws,
        "largest_error_in_standard_errors": round(worst, 3),
        "entries_beyond_4": beyond,
        "expected_beyond_4": round(expected_beyond, 3),
        "sum_error": float(f"{sums:.2e}"),
    }


class Setting:
    """Teacher, student and one mini-batch."""

    def __init__(self, train_tokens: int, batch_tokens: int) -> None:
        run = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))
        data = DataConfig.model_validate(run["data"])
        folder = ensure_teacher(EmbeddedTeacherConfig(train_tokens=train_tokens), data)
        self.tokenizer = Tokenizer.load(folder)
        self.samples = prepare_samples(data, self.tokenizer, folder.parent / f"{folder.name}-benchmark-samples")
        self.teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        torch.manual_seed(0)
        config = AutoConfig.for_model(**run["student"]["config"], vocab_size=self.tokenizer.vocab_size)
        self.student = AutoModelForCausalLM.from_config(config)
        self.windows = batch_tokens // data.window_tokens
        rows = np.concatenate([self.samples.rows("train", name) for name in self.samples.source_names])
        self.rows = np.random.default_rng(0).permutation(rows)

    def batch(self, number: int) -> SampleBatch:
        """Return a mini-batch."""
        return self.samples.read(self.rows[number * self.windows : (number + 1) * self.windows])

    def logits(self, model: nn.Module, batch: SampleBatch) -> Tensor:
        """Return a model's logits at the supervised positions, [P, V]."""
        inputs = model_inputs(batch)
        output = model(
            input_ids=inputs.input_ids, position_ids=inputs.position_ids, attention_mask=inputs.attention_mask
        )
        return output.logits.flatten(0, 1)[torch.from_numpy(predicting_rows(batch)[0])]  # type: ignore[no-any-return]

    def full_gradient(self, batch: SampleBatch) -> tuple[Tensor, float]:
        """Return the gradient of the mean full KL on the parameters, and its value."""
        with torch.no_grad():
            target = self.logits(self.teacher, batch).log_softmax(-1)
        student = self.logits(self.student, batch).log_softmax(-1)
        loss = (target.exp() * (target - student)).sum(-1).mean()
        return self._gradient(loss), loss.item()

    def stored_gradient(self, batch: SampleBatch, kind: str, top_k: int, draws: int, seed: int) -> Tensor:
        """Return the same from stored targets."""
        kept = SelectionSettings(kind=kind, top_k=top_k, draws=draws, vocab_size=self.tokenizer.vocab_size)  # type: ignore[arg-type]
        scoring = ScoringSettings(
            selection=kept,
            seed=seed,
            draw_sets=1,
            hidden=(),
            hidden_dtype="float16",
            batch_tokens=4096,
            data_parallel=False,
        )
        part = score_part(self.teacher, batch, scoring, 0, 1, torch.device("cpu"))
        label = batch.tokens[batch.supervised].astype(np.int64)
        targets = sparse_targets(merge_parts(batch, [part]), label, kind)
        logits = self.logits(self.student, batch)
        total, _ = logits_loss(logits, targets, HeadTerms(0.0, [(1.0, ForwardKL())]))
        return self._gradient(total / len(label))

    def _gradient(self, loss: Tensor) -> Tensor:
        parameters = [p for p in self.student.parameters() if p.requires_grad]
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    def train(self, steps: int, first: int) -> None:
        """Take steps of AdamW on full targets."""
        optimizer = torch.optim.AdamW(self.student.parameters(), lr=2e-3)
        for step in range(steps):
            with torch.no_grad():
                target = self.logits(self.teacher, self.batch(first + step)).log_softmax(-1)
            student = self.logits(self.student, self.batch(first + step)).log_softmax(-1)
            optimizer.zero_grad()
            (target.exp() * (target - student)).sum(-1).mean().backward()
            optimizer.step()


def angle(left: Tensor, right: Tensor) -> float:
    """Return the angle between two vectors, in degrees."""
    cosine = torch.dot(left.double(), right.double()) / (left.double().norm() * right.double().norm())
    return math.degrees(math.acos(float(cosine.clamp(-1, 1))))


def main() -> None:
    """Print one JSON line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=["mean", "angle"], help="repeatable; default: both")
    parser.add_argument("--train-tokens", type=int, default=400_000, help="of the embedded teacher")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--moments", type=int, nargs="+", default=[0, 20, 60, 180], help="steps of training")
    arguments = parser.parse_args()
    parts = arguments.part or ["mean", "angle"]
    if "mean" in parts:
        for kind, draws, top_k in (("sampled", 50, 1), ("hybrid", 12, 12)):
            print(json.dumps(mean_figures(kind, 1000, 3, draws, top_k)), flush=True)
    if "angle" in parts:
        setting, done = Setting(arguments.train_tokens, arguments.batch_tokens), 0
        for moment in arguments.moments:
            setting.train(moment - done, first=1 + done)
            done = moment
            full, divergence = setting.full_gradient(setting.batch(0))
            degrees = {
                name: round(angle(setting.stored_gradient(setting.batch(0), *how, seed=moment), full), 2)
                for name, how in TARGETS.items()
            }
            line = {"benchmark": "gradient_angle", "train_tokens": arguments.train_tokens, "step": moment}
            line |= {
                "kl": round(divergence, 4),
                "batch_tokens": arguments.batch_tokens,
                "degrees": degrees,
                "goal": 3.0,
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
