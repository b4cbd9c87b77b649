"""The whole idea on one page: train a student from captured targets in plain PyTorch.

    python examples/minimal.py DATASET STUDENT OUT

DATASET is the folder of a capture of kind `hybrid` or `topk`, codec `plain` (of others, what `lectern export` writes);
STUDENT any causal language model folder with the teacher's tokenizer. Of Lectern only the loss is used; the rest of
it adds what a page cannot: mixtures, exact resumption, ZeRO over many ranks, object stores, evaluation.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM

from trainer.losses import ForwardKL, HeadTerms, SparseTargets, head_loss


def read_samples(dataset: Path) -> Iterator[dict[str, Any]]:
    """Yield one row per sample; a data file without a record under manifest/ was never committed."""
    for record in sorted(dataset.glob("manifest/*.json")):
        yield from pq.read_table(dataset / json.loads(record.read_text())["data_key"]).to_pylist()


def read_targets(row: dict[str, Any]) -> SparseTargets:
    """Return what the teacher said at the row's supervised positions, with the estimate t̂ of its distribution."""
    count, tail = torch.tensor(row["target_count"]), torch.tensor(row["tail_mass"], dtype=torch.float32)
    logprob = torch.tensor(row["target_logprob"], dtype=torch.float32)
    draws = torch.tensor(row.get("target_draws") or [0] * len(logprob), dtype=torch.float32)
    position = torch.repeat_interleave(torch.arange(len(count)), count)
    drawn = draws > 0  # never drawn: kept for its rank, and exact
    mass = tail.index_add(0, position[drawn], logprob[drawn].exp())  # all draws of a position share what is not exact
    share = draws / torch.zeros_like(tail).index_add(0, position, draws).clamp_min(1)[position]
    label = torch.tensor(row["tokens"])[torch.tensor(row["supervised"])]
    return SparseTargets(
        kind="hybrid" if "target_draws" in row else "topk",
        label=label,
        entry_offsets=torch.nn.functional.pad(count.cumsum(0), (1, 0)),
        id=torch.tensor(row["target_id"]),
        estimate=torch.where(drawn, mass[position] * share, logprob.exp()),
        logprob=logprob,
        drawn=drawn,
        tail_mass=tail,
        entropy=torch.full_like(tail, row["teacher_entropy"]),
    )


def hidden_states(model: Any, row: dict[str, Any]) -> torch.Tensor:
    """Return the input of the output head at the tokens before the supervised ones, [P, width]."""
    document = torch.tensor(row["document"] or [0] * len(row["tokens"]))
    at = torch.arange(len(document))
    same = (document[:, None] == document) & (at[:, None] >= at)  # attention and positions restart at each document
    start = torch.searchsorted(document, document)
    states = model.base_model(
        input_ids=torch.tensor(row["tokens"])[None],
        position_ids=(at - start)[None],
        attention_mask=same[None, None],
        use_cache=False,
    )[0][0]
    return states[torch.tensor(row["supervised"]).nonzero()[:, 0] - 1]


def train(dataset: Path, student: Path, out: Path, batch: int = 8, learning_rate: float = 1e-3) -> list[float]:
    """Pass over the dataset once and save the student; returns the loss of each step, nats per supervised token."""
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    terms = HeadTerms(cross_entropy=0.1, divergences=[(0.9, ForwardKL(draw_weight=0.5))])
    head, samples, losses = model.get_output_embeddings(), list(read_samples(dataset)), []
    for first in range(0, len(samples), batch):
        rows = samples[first : first + batch]
        num_supervised = sum(sum(row["supervised"]) for row in rows)
        total = 0.0
        for row in rows:
            loss, _ = head_loss(hidden_states(model, row), head.weight, head.bias, read_targets(row), terms)
            (loss / num_supervised).backward()
            total += loss.item() / num_supervised
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        print(f"step {len(losses)}: {total:.3f}")
    model.save_pretrained(out)
    return losses


if __name__ == "__main__":
    train(*(Path(argument) for argument in sys.argv[1:4]))
