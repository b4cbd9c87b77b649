"""Batches of windows: padding, positions, and attention that stays inside each document."""

import numpy as np
import pytest
import torch

from storage.samples import SampleBatch
from tests.workers.tiny import TINY, tiny_model, window
from workers.local.batching import model_inputs, plan_batches


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
    model = tiny_model(model_type)
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
