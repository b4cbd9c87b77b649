"""From samples to tensors: padding, packed attention, and the estimate that each kind stands for."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from storage.draws import draw_set
from storage.errors import IntegrityError
from storage.hidden import store_states
from storage.samples import SampleBatch
from tests.trainer.tiny import QWEN2, made_up_targets, make_run, train_config
from tests.workers.tiny import VOCAB_SIZE, window
from trainer.batches import make_batch, take_microbatches
from trainer.feed import step_loader
from trainer.model import predictor_logits, predictor_states
from trainer.sampler import PlannedOrder


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**QWEN2, vocab_size=VOCAB_SIZE)
    return AutoModelForCausalLM.from_config(config, attn_implementation=request.param).eval()


def batch_of(*windows: list[int]):
    samples = SampleBatch.of([window(documents, seed) for seed, documents in enumerate(windows)])
    return samples, make_batch(samples, made_up_targets(samples, "topk", VOCAB_SIZE), "topk")


def test_shapes_padding_and_predictors() -> None:
    samples, batch = batch_of([5], [9])
    assert batch.input_ids.shape == (2, 9)
    assert batch.input_ids[0, 5:].tolist() == [0] * 4
    assert batch.attention is None
    assert batch.position_ids is None
    assert batch.predictor.tolist() == [0, 1, 2, 3, *range(9, 17)]
    assert batch.targets.label.tolist() == samples.tokens[samples.supervised].tolist()
    assert batch.num_supervised == 12


def test_packed_documents_get_the_logits_that_they_get_alone(model: torch.nn.Module) -> None:
    samples, packed = batch_of([7, 4, 11], [6, 3])
    assert packed.position_ids[1].tolist()[:9] == [0, 1, 2, 3, 4, 5, 0, 1, 2]
    with torch.no_grad():
        together = predictor_logits(model, packed)
        apart = []
        for n in range(2):
            one = samples.sample(n)
            for document in range(int(one.document.max()) + 1):
                ids = torch.from_numpy(one.tokens[one.document == document].astype(np.int64))[None]
                apart.append(model(input_ids=ids).logits[0, :-1])
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-4, atol=1e-5)


def test_unpacked_windows_take_the_path_without_mask_and_agree(model: torch.nn.Module) -> None:
    samples, batch = batch_of([8], [12])
    with torch.no_grad():
        states = predictor_states(model, batch)
        alone = [
            model.base_model(torch.from_numpy(samples.sample(n).tokens.astype(np.int64))[None])[0][0, :-1]
            for n in (0, 1)
        ]
    torch.testing.assert_close(states, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_hybrid_estimate_shares_the_mass_outside_the_head_by_draws() -> None:
    samples = SampleBatch.of([window([6])])
    targets = made_up_targets(samples, "hybrid", VOCAB_SIZE)
    sparse = make_batch(samples, targets, "hybrid").targets
    for p in range(targets.num_positions):
        part = slice(*targets.entry_offsets[p : p + 2])
        kept = np.exp(targets.logprob[part].astype(np.float64))
        draws = targets.draws[0, part]
        head = kept[draws == 0].sum()
        mass = float(targets.tail_mass[p]) + kept[draws > 0].sum()
        expected = np.where(draws > 0, mass * draws / draws.sum(), kept)
        np.testing.assert_allclose(sparse.estimate[part].numpy(), expected, rtol=1e-3)
        assert float(sparse.estimate[part].sum()) == pytest.approx(head + mass, abs=1e-3)
        assert float(sparse.estimate[part].sum()) == pytest.approx(1.0, abs=5e-3)


def test_bfloat16_states_are_read_from_their_bit_patterns() -> None:
    samples = SampleBatch.of([window([6])])
    targets = made_up_targets(samples, "topk", VOCAB_SIZE)
    states = torch.randn(5, 3).bfloat16()
    targets.hidden["final"] = states.view(torch.int16).numpy().view(np.uint16)
    batch = make_batch(samples, targets, "topk", ("final",))
    assert batch.hidden["final"].dtype == torch.bfloat16
    assert torch.equal(batch.hidden["final"], states)


def test_int8_states_are_read_with_their_scales_and_know_their_positions() -> None:
    samples = SampleBatch.of([window([6])])
    values = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    targets = replace(
        made_up_targets(samples, "topk", VOCAB_SIZE),
        hidden={"final": store_states(values, "int8")},
        hidden_kept=np.asarray([False, True, False, False, True]),
    )
    batch = make_batch(samples, targets, "topk", ("final",))
    torch.testing.assert_close(batch.hidden["final"], torch.from_numpy(values), atol=0.02, rtol=0)
    assert batch.hidden_rows is not None and batch.hidden_rows.tolist() == [1, 4]


def test_targets_of_other_samples_are_refused() -> None:
    samples = SampleBatch.of([window([6])])
    others = made_up_targets(SampleBatch.of([window([9])]), "topk", VOCAB_SIZE)
    with pytest.raises(IntegrityError, match="do not match its supervised positions"):
        make_batch(samples, others, "topk")


def test_microbatches_cover_the_rows_in_order() -> None:
    assert [list(rows) for rows in take_microbatches(5, 2)] == [[0, 1], [2, 3], [4]]


def test_each_pass_over_a_sample_reads_the_next_set_of_draws(tmp_path: Path) -> None:
    run = make_run(tmp_path, "sampled", draw_sets=2)
    train = train_config(global_batch_size=4, seed=1)
    pool = run.samples.ids(run.samples.rows("train", "general"))[:4]
    order = PlannedOrder({"general": pool}, np.ones((3, 1)), 4, seed=1)
    load = step_loader(run.dataset, order, train, rank=0, world_size=1)
    _, both = run.dataset.read(pool)
    for step in range(3):
        data = load(step)
        for batch in data.batches:
            rows = [pool.index(sample_id) for sample_id in batch.ids]
            wanted = draw_set(both.take(rows), "sampled", np.full(len(rows), (step + 1) % 2))
            assert batch.targets.id.tolist() == wanted.id.tolist()
            assert batch.targets.estimate.sum().item() == pytest.approx(batch.num_supervised)
