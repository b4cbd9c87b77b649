"""Tiny random models and windows for the tests of this room."""

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from storage.samples import Sample

VOCAB_SIZE = 64
PADDED_SIZE = 72

TINY: dict[str, dict[str, Any]] = {
    "qwen2": {"num_key_value_heads": 2},
    "llama": {"num_key_value_heads": 2},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
}


def tiny_model(
    model_type: str,
    seed: int = 0,
    width: int = 32,
    vocab_size: int = PADDED_SIZE,
    spread: float = 0.2,
    attention: str | None = None,
) -> nn.Module:
    """Return a random causal language model of two layers whose vocabulary is padded."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=spread,
        **TINY[model_type],
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()  # type: ignore[no-any-return]


def window(documents: list[int], seed: int = 0) -> Sample:
    """Return a window of packed documents of these lengths; all but their first tokens are supervised."""
    length = sum(documents)
    document = np.repeat(np.arange(len(documents), dtype=np.int16), documents)
    supervised = np.ones(length, dtype=np.bool_)
    supervised[np.concatenate([[0], np.cumsum(documents)[:-1]])] = False
    tokens = np.random.default_rng(seed).integers(0, VOCAB_SIZE, length).astype(np.int32)
    return Sample("general", tokens, supervised, document)
