"""Training of the embedded teacher: a small DeepSeek-V3 model, one process, on the CPU.

Matrices are trained with Muon, everything else with AdamW: at 300,000 tokens that gave 4.66 and 5.00 nats on held-out
prose and code where AdamW alone gave 4.97 and 5.18. Steps are small (1,024 tokens), since on a CPU the rate hardly
depends on the batch and the number of updates is what counts.
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from storage.sample_set import SampleSet
from storage.samples import Int64Array
from storage.tokenizer import Tokenizer
from workers.config import EmbeddedTeacherConfig
from workers.embedded import max_positions
from workers.local.batching import model_inputs, predicting_rows
from workers.local.memory import keep_freed_memory
from workers.muon import Muon, native_dtype

Progress = Callable[[dict[str, Any]], None]

STEP_TOKENS = 1024
"""Tokens of one optimizer step, about."""
MUON_LEARNING_RATE = 0.02
ADAMW_LEARNING_RATE = 3e-3
FINAL_FRACTION = 0.05
"""Learning rates at the last step, as a fraction of their peaks; cosine in between."""
WARMUP_STEPS = 20
WEIGHT_DECAY = 0.1
MAX_PASSES = 2.5
"""A small source is repeated at most this often; beyond that it is only learnt by heart."""
MAX_THREADS = 8
HELDOUT_TOKENS = 20_000
"""Tokens of each source that the final loss is measured on, at most."""
REPORT_EVERY_S = 1.0


def train_teacher(
    teacher: EmbeddedTeacherConfig,
    samples: SampleSet,
    tokenizer: Tokenizer,
    folder: Path,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Train the model on the train split of `samples` and save it to `folder` in float32.

    Returns what is worth knowing of it: parameters, tokens, seconds, and the held-out loss of each source in nats per
    token, as JSON values.
    """
    torch.set_num_threads(min(MAX_THREADS, len(os.sched_getaffinity(0))))
    keep_freed_memory()
    torch.manual_seed(teacher.seed)
    model = DeepseekV3ForCausalLM._from_config(
        embedded_model_config(teacher, tokenizer), experts_implementation="grouped_mm", attn_implementation="sdpa"
    )
    started = time.perf_counter()
    steps = max(1, teacher.train_tokens // (windows_per_step(teacher) * teacher.window_tokens))
    tokens = _train(model, samples, batch_rows(samples, teacher, steps), on_progress)
    seconds = time.perf_counter() - started
    losses = {name: heldout_loss(model, samples, name) for name in samples.source_names}
    model.save_pretrained(folder)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "heldout_loss": losses,
        "recipe": teacher.model_dump(mode="json"),
    }


def embedded_model_config(teacher: EmbeddedTeacherConfig, tokenizer: Tokenizer) -> DeepseekV3Config:
    """Return the transformers config: latent attention, a dense first layer, routed experts beside a shared one."""
    width = teacher.hidden_size
    heads = max(1, width // 64)
    return DeepseekV3Config(
        vocab_size=tokenizer.vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        moe_intermediate_size=width // 2,
        num_hidden_layers=teacher.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        n_routed_experts=teacher.experts,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        q_lora_rank=None,
        kv_lora_rank=max(16, width // 4),
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=width // heads,
        num_mtp_layers=0,
        max_position_embeddings=max_positions(teacher),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=None,
    )


def batch_rows(samples: SampleSet, teacher: EmbeddedTeacherConfig, steps: int) -> Iterator[Int64Array]:
    """Yield the sample rows of each step: sources mixed evenly, none beyond `MAX_PASSES`, each pass in a new order."""
    per_step = windows_per_step(teacher)
    drawn = steps * per_step
    rng = np.random.default_rng(teacher.seed)
    pools = [samples.rows("train", name) for name in samples.source_names]
    sequence = np.concatenate([_passes(pool, n, rng) for pool, n in zip(pools, shares(pools, drawn), strict=True)])
    yield from rng.permutation(sequence).reshape(steps, per_step)


def windows_per_step(teacher: EmbeddedTeacherConfig) -> int:
    """Return the samples of one optimizer step."""
    return max(1, STEP_TOKENS // teacher.window_tokens)


def shares(pools: list[Int64Array], drawn: int) -> list[int]:
    """Return how many of `drawn` samples come from each pool: evenly, but a pool gives at most `MAX_PASSES` of itself.

    What a small pool cannot give is taken from the larger ones; where all are too small, all are repeated alike.
    """
    sizes = np.array([len(pool) for pool in pools], dtype=np.float64)
    limit = np.maximum(sizes * MAX_PASSES, drawn * sizes / sizes.sum())
    counts = np.zeros(len(pools))
    for place, index in enumerate(np.argsort(limit)):
        counts[index] = min(limit[index], (drawn - counts.sum()) / (len(pools) - place))
    whole = np.floor(counts).astype(int)
    whole[int(np.argmax(limit))] += drawn - int(whole.sum())
    return [int(count) for count in whole]


def _passes(pool: Int64Array, count: int, rng: np.random.Generator) -> Int64Array:
    """Return `count` rows of a pool, each as often as any other up to one, in a new order on each pass."""
    passes = -(-count // len(pool)) if len(pool) else 0
    return np.concatenate([rng.permutation(pool) for _ in range(passes)] + [pool[:0]])[:count]


@torch.no_grad()
def heldout_loss(model: nn.Module, samples: SampleSet, source: str) -> float | None:
    """Return the mean loss on a source's held-out supervised tokens, in nats; None where nothing is held out."""
    rows = samples.rows("heldout", source)
    enough = int(np.searchsorted(np.cumsum(samples.num_tokens[rows]), HELDOUT_TOKENS)) + 1
    total, count = 0.0, 0
    model.eval()
    for start in range(0, min(enough, len(rows)), 16):
        losses = _token_losses(model, samples, rows[start : min(start + 16, enough)])
        total, count = total + float(losses.sum()), count + len(losses)
    model.train()
    return round(total / count, 4) if count else None


def _train(model: nn.Module, samples: SampleSet, plan: Iterator[Int64Array], on_progress: Progress | None) -> int:
    """Run the planned steps; return the number of tokens trained on."""
    batches = list(plan)
    optimizers = _optimizers(model)
    peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    started = reported = time.perf_counter()
    tokens, smooth = 0, math.nan
    for step, rows in enumerate(batches):
        scale = learning_rate_scale(step, len(batches))
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * scale
        loss = _token_losses(model, samples, rows).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        tokens += int(samples.num_tokens[rows].sum())
        nats = loss.item()
        smooth = nats if math.isnan(smooth) else 0.95 * smooth + 0.05 * nats
        now = time.perf_counter()
        if on_progress is not None and (now - reported > REPORT_EVERY_S or step + 1 == len(batches)):
            reported = now
            facts = {"step": step + 1, "steps": len(batches), "loss": smooth, "tokens_per_s": tokens / (now - started)}
            on_progress({"stage": "teacher", **facts})
    return tokens


def _token_losses(model: nn.Module, samples: SampleSet, rows: Int64Array) -> Tensor:
    """Return the loss at each supervised position of the samples at `rows`, float32 [P]."""
    batch = samples.read(rows)
    inputs, (predicting, labels) = model_inputs(batch), predicting_rows(batch)
    with torch.autocast("cpu", torch.bfloat16, enabled=native_dtype() is torch.bfloat16):
        logits = model(
            inputs.input_ids, attention_mask=inputs.attention_mask, position_ids=inputs.position_ids, use_cache=False
        ).logits.flatten(0, 1)
    chosen = logits[torch.from_numpy(predicting)].float()
    return nn.functional.cross_entropy(chosen, torch.from_numpy(labels), reduction="none")


def learning_rate_scale(step: int, steps: int) -> float:
    """Return the learning rate at `step`, as a fraction of its peak: linear warm-up, then a cosine."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return warmup * (FINAL_FRACTION + (1 - FINAL_FRACTION) * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Return Muon over the matrices inside the layers and AdamW over everything else."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inner = parameter.ndim == 2 and ".layers." in name and not name.endswith("gate.weight")
        (matrices if inner else others).append(parameter)
    return [
        Muon(matrices, lr=MUON_LEARNING_RATE, weight_decay=WEIGHT_DECAY),
        torch.optim.AdamW(others, lr=ADAMW_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True),
    ]
