"""Batches of windows: padding, positions, and attention that stays inside each document."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from storage.samples import Sample, SampleBatch
from workers.local.batching import model_inputs, plan_batches

TINY = {
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


def window(documents: list[int], seed: int = 0) -> Sample:
    length = sum(documents)
    document = np.repeat(np.arange(len(documents), dtype=np.int16), documents)
    supervised = np.ones(length, dtype=np.bool_)
    supervised[np.concatenate([[0], np.cumsum(documents)[:-1]])] = False
    tokens = np.random.default_rng(seed).integers(0, 64, length).astype(np.int32)
    return Sample("general", tokens, supervised, document)


def test_batches_hold_every_sample_once_within_the_limit() -> None:
    lengths = np.random.default_rng(0).integers(2, 100, 50).astype(np.int64)
    batches = list(plan_batches(lengths, 256))
    assert sorted(i for batch in batches for i in batch) == list(range(50))
    assert all(len(batch) * lengths[batch].max() <= 256 for batch in batches)
    assert [len(b) for b in plan_batches(np.array([500, 3], dtype=np.int64), 256)] == [1, 1]


def test_plain_windows_need_no_mask() -> None:
    inputs = model_inputs(SampleBatch.of([window([8], 0), window([8], 1)]))
    assert inputs.attention_mask is None
    assert inputs.position_ids[1].tolist() == list(range(8))


def test_positions_restart_and_masks_are_block_diagonal() -> None:
    inputs = model_inputs(SampleBatch.of([window([3, 2]), window([4])]))
    assert inputs.position_ids[0].tolist() == [0, 1, 2, 0, 1]
    assert inputs.attention_mask is not None
    first = inputs.attention_mask[0, 0].int().tolist()
    assert first == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]


@pytest.mark.parametrize("model_type", sorted(TINY))
def test_packed_windows_score_as_their_documents_alone(model_type: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        **TINY[model_type],
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    packed = window([7, 5, 9])
    other = window([11], seed=1)
    with torch.no_grad():
        inputs = model_inputs(SampleBatch.of([packed, other]))
        together = model(
            input_ids=inputs.input_ids, position_ids=inputs.position_ids, attention_mask=inputs.attention_mask
        ).logits[0]
        for start, end in [(0, 7), (7, 12), (12, 21)]:
            tokens = torch.from_numpy(packed.tokens[start:end].astype(np.int64))[None]
            alone = model(input_ids=tokens).logits[0]
            torch.testing.assert_close(together[start:end], alone, rtol=1e-4, atol=1e-5)
