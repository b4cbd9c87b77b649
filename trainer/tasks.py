"""Tasks: a model answers prompts, or ranks candidates, and is scored against references."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from storage.tokenizer import Tokenizer
from trainer.config import TaskConfig
from trainer.evaluation import evaluation_threads, load_model
from trainer.task_file import Example
from trainer.task_metrics import bleu, bleu_counts, exact_match, interval, mean, recall, token_f1

BATCH = 16
"""Prompts or candidates in one forward pass."""


def run_tasks(
    model_folder: str | Path,
    tasks: Sequence[tuple[TaskConfig, list[Example]]],
    device: str = "cpu",
    on_progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Score a model with its tokenizer on tasks.

    Args:
        model_folder: an `AutoModelForCausalLM` folder; it is run in float32, greedily.
        tasks: what is asked, see `task_file.read_task`.
        device: torch device.
        on_progress: called with the task's name, examples done and examples in all.

    Returns:
        By task `{metric, score, low, high, examples}`; low and high end the 95% bootstrap interval.
    """
    model, tokenizer = load_model(model_folder, device), Tokenizer.load(model_folder)
    found = {}
    for task, examples in tasks:
        rows: list[list[float]] = []
        for first in range(0, len(examples), BATCH):
            rows += _rows(model, tokenizer, task, examples[first : first + BATCH])
            if on_progress is not None:
                on_progress(task.name, len(rows), len(examples))
        score, low, high = interval(np.array(rows), bleu if task.metric == "bleu" else mean)
        found[task.name] = {"metric": task.metric, "score": score, "low": low, "high": high, "examples": len(rows)}
    return found


def _rows(model: Any, tokenizer: Tokenizer, task: TaskConfig, examples: Sequence[Example]) -> list[list[float]]:
    if task.metric == "recall":
        ranked = [rank_candidates(model, tokenizer, one) for one in examples]
        return [recall(order, one.references, task.k) for order, one in zip(ranked, examples, strict=True)]
    free = [one.prompt for one in examples if not one.candidates]
    written = iter(generate(model, tokenizer, free, task.max_new_tokens, task.stop) if free else [])
    answers = [rank_candidates(model, tokenizer, one)[0] if one.candidates else next(written) for one in examples]
    measure = {"accuracy": exact_match, "f1": token_f1, "bleu": bleu_counts}[task.metric]
    return [measure(answer, one.references) for answer, one in zip(answers, examples, strict=True)]


def generate(model: Any, tokenizer: Tokenizer, prompts: Sequence[str], max_new_tokens: int, stop: str) -> list[str]:
    """Return the greedy continuation of each prompt, up to its end token or to `stop`, without either."""
    ids = [_with_bos(tokenizer, encoded.tolist()) for encoded in tokenizer.encode_batch(prompts)]
    width = max(len(row) for row in ids)
    # Padded on the left, so that every prompt ends where the new tokens begin.
    padded = torch.tensor([[0] * (width - len(row)) + row for row in ids], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=model.device)
    with torch.inference_mode(), evaluation_threads():
        out = model.generate(
            input_ids=padded,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_id,
            pad_token_id=0 if tokenizer.eos_id is None else tokenizer.eos_id,
        )
    return [_text(tokenizer, row[width:].tolist(), stop) for row in out]


def rank_candidates(model: Any, tokenizer: Tokenizer, example: Example) -> list[str]:
    """Return the candidates by falling log-probability after the prompt, summed over their tokens."""
    prompt = _with_bos(tokenizer, tokenizer.encode_batch([example.prompt])[0].tolist())
    rows = [encoded.tolist() for encoded in tokenizer.encode_batch(example.candidates)]
    scores: list[float] = []
    for first in range(0, len(rows), BATCH):
        part = rows[first : first + BATCH]
        width = max(len(row) for row in part)
        ids = torch.tensor([prompt + row + [0] * (width - len(row)) for row in part], device=model.device)
        with torch.inference_mode(), evaluation_threads():
            logprob = model(input_ids=ids, use_cache=False).logits[:, len(prompt) - 1 : -1].float().log_softmax(-1)
        scores += _sums(logprob, ids[:, len(prompt) :], [len(row) for row in part])
    return [example.candidates[n] for n in sorted(range(len(scores)), key=lambda n: (-scores[n], n))]


def _sums(logprob: Tensor, ids: Tensor, lengths: list[int]) -> list[float]:
    """Sum the log-probabilities [C, width, V] of tokens [C, width] over each row's first `lengths`."""
    own = logprob.gather(-1, ids[..., None])[..., 0]
    return [float(row[:length].sum()) for row, length in zip(own, lengths, strict=True)]


def _with_bos(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return ids if tokenizer.bos_id is None else [tokenizer.bos_id, *ids]


def _text(tokenizer: Tokenizer, ids: list[int], stop: str) -> str:
    if tokenizer.eos_id in ids:
        ids = ids[: ids.index(tokenizer.eos_id)]
    text = tokenizer.decode(ids)
    return (text.split(stop, 1)[0] if stop else text).strip()
