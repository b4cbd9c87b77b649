"""A unit scored by one rank or by several, against plain transformers."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from storage.contract import check_contract
from storage.errors import InputError
from storage.identity import CaptureIdentity, DatasetIdentity, TeacherIdentity, TokenizerIdentity
from storage.samples import SampleBatch, offsets_of
from storage.targets import TargetBatch
from tests.workers.tiny import PADDED_SIZE, VOCAB_SIZE, tiny_model, window
from workers.local.hooks import attention_module, check_layers
from workers.local.scoring import ScoringSettings, merge_parts, score_part, scored_samples
from workers.local.selection import SelectionSettings

SAMPLES = SampleBatch.of([window([9, 4], 1), window([12], 2), window([3, 2, 6], 3), window([5], 4)])
CPU = torch.device("cpu")


def settings(data_parallel: bool = False, kind: str = "hybrid", hidden: tuple[str, ...] = ()) -> ScoringSettings:
    selection = SelectionSettings(kind=kind, top_k=6, draws=5, vocab_size=VOCAB_SIZE)  # type: ignore[arg-type]
    return ScoringSettings(selection, 0, 1, hidden, "float16", batch_tokens=24, data_parallel=data_parallel)


def targets(model: torch.nn.Module, how: ScoringSettings, num_ranks: int = 1) -> TargetBatch:
    parts = [score_part(model, SAMPLES, how, rank, num_ranks, CPU) for rank in range(num_ranks)]
    return merge_parts(SAMPLES, parts, how)


def reference(model: torch.nn.Module) -> torch.Tensor:
    """Return the log-probabilities of every supervised position, [P, VOCAB_SIZE], one document at a time."""
    rows = []
    for n in range(len(SAMPLES)):
        sample = SAMPLES.sample(n)
        for document in np.unique(sample.document):
            tokens = torch.from_numpy(sample.tokens[sample.document == document].astype(np.int64))
            with torch.no_grad():
                logits = model(input_ids=tokens[None]).logits[0, :-1, :VOCAB_SIZE]
            rows.append(torch.log_softmax(logits.double(), -1))
    return torch.cat(rows)


def test_targets_match_plain_transformers() -> None:
    model = tiny_model("qwen2")
    got, expected = targets(model, settings()), reference(model)
    position = np.repeat(np.arange(got.num_positions), got.count)
    np.testing.assert_allclose(got.logprob.astype(np.float64), expected[position, got.id], rtol=1e-3, atol=1e-3)
    kept = np.bincount(position, weights=expected[position, got.id].exp().numpy())
    np.testing.assert_allclose(got.tail_mass.astype(np.float64), 1 - kept, atol=2e-3)
    truth = SAMPLES.tokens[SAMPLES.supervised]
    nll = -expected[np.arange(len(truth)), truth].numpy()
    ends = np.cumsum(SAMPLES.num_supervised())
    np.testing.assert_allclose(got.teacher_nll, [part.mean() for part in np.split(nll, ends[:-1])], rtol=1e-5)


@pytest.mark.parametrize("kind", ["sampled", "text"])
def test_kinds_without_logprobs_are_scored_and_keep_the_contract(kind: str) -> None:
    how = replace(settings(kind=kind), draw_sets=2 if kind == "sampled" else 1)
    got = targets(tiny_model("qwen2"), how)
    identity = DatasetIdentity(
        teacher=TeacherIdentity(name="tiny", architecture="Qwen2", weights="0" * 64, parameters=1),
        tokenizer=TokenizerIdentity(digest="0" * 64, vocab_size=VOCAB_SIZE),
        precision="float32",
        capture=CaptureIdentity(
            kind=kind,  # type: ignore[arg-type]
            draws=5 if kind == "sampled" else None,
            draw_sets=how.draw_sets,
            seed=0 if kind == "sampled" else None,
        ),
    )
    check_contract(SAMPLES, got, identity)
    assert (got.teacher_nll > 0).all() and (got.teacher_entropy > 0).all()


@pytest.mark.parametrize("data_parallel", [False, True])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_shares_of_ranks_add_up_to_the_whole(data_parallel: bool, num_ranks: int) -> None:
    model = tiny_model("llama")
    whole = targets(model, settings(hidden=("final",)))
    shared = targets(model, settings(data_parallel, hidden=("final",)), num_ranks)
    for field in ("offsets", "count", "id", "draws"):
        np.testing.assert_array_equal(getattr(shared, field), getattr(whole, field))
    np.testing.assert_allclose(shared.logprob, whole.logprob, rtol=1e-3)
    np.testing.assert_array_equal(shared.hidden["final"].shape, whole.hidden["final"].shape)
    np.testing.assert_allclose(shared.hidden["final"], whole.hidden["final"], atol=2e-3)


def test_final_hidden_state_gives_the_logits_back() -> None:
    model = tiny_model("qwen2")
    got = targets(model, settings(kind="topk", hidden=("final", "model.layers.0")))
    head = model.get_output_embeddings().weight[:VOCAB_SIZE].detach().float()
    logits = torch.from_numpy(got.hidden["final"].astype(np.float32)) @ head.T
    best = logits.argmax(-1).numpy()
    firsts = got.id[got.entry_offsets[:-1]]
    assert (best == firsts).mean() > 0.97
    assert got.hidden["model.layers.0"].shape == (got.num_positions, 32)
    assert got.id.max() < PADDED_SIZE


def test_unknown_layer_lists_those_that_exist() -> None:
    with pytest.raises(InputError, match=r"no layer 'model\.layers\.7'.*model\.layers\.0.*model\.layers\.1"):
        check_layers(tiny_model("qwen2"), ["final", "model.layers.7"])


def test_parts_of_a_block_are_refused_where_tensor_parallelism_splits_them() -> None:
    model, values = tiny_model("qwen2"), "model.layers.1.self_attn.v_proj"
    check_layers(model, [values])
    check_layers(model, ["final", "model.layers.1", "model.layers.1.self_attn"], split=True)
    with pytest.raises(InputError, match=rf"own share of what {values} puts out; set teacher.sharding to zero3"):
        check_layers(model, [values], split=True)


@pytest.mark.parametrize("num_ranks,data_parallel", [(1, False), (3, False), (2, True)])
def test_samples_with_logits_that_are_no_numbers_are_left_out(num_ranks: int, data_parallel: bool) -> None:
    model, how = tiny_model("qwen2"), settings(data_parallel, hidden=("final",))
    whole = targets(model, how)
    tokens = [set(SAMPLES.sample(n).tokens.tolist()) for n in range(len(SAMPLES))]
    own = next(token for token in sorted(tokens[1]) if not any(token in tokens[n] for n in (0, 2, 3)))
    with torch.no_grad():
        model.get_input_embeddings().weight[own] = float("nan")
    parts = [score_part(model, SAMPLES, how, rank, num_ranks, CPU) for rank in range(num_ranks)]
    assert scored_samples(len(SAMPLES), parts) == [0, 2, 3]
    got = merge_parts(SAMPLES, parts, how)
    kept = np.repeat(np.array([True, False, True, True]), SAMPLES.num_supervised())
    np.testing.assert_array_equal(got.count, whole.count[kept])
    np.testing.assert_array_equal(got.id, whole.id[np.repeat(kept, whole.count)])
    np.testing.assert_array_equal(got.offsets, offsets_of(SAMPLES.take([0, 2, 3]).num_supervised()))
    np.testing.assert_allclose(got.hidden["final"], whole.hidden["final"][kept], atol=2e-3)
    np.testing.assert_allclose(got.teacher_nll, whole.teacher_nll[[0, 2, 3]], rtol=1e-4)


def test_a_teacher_of_nan_refuses_all() -> None:
    model = tiny_model("qwen2")
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = float("nan")
    part = score_part(model, SAMPLES, settings(), 0, 1, CPU)
    assert scored_samples(len(SAMPLES), [part]) == [] and part.selection is None


@pytest.mark.parametrize("num_ranks,data_parallel", [(1, False), (3, False), (2, True)])
def test_kept_states_and_attention_are_those_of_plain_transformers(num_ranks: int, data_parallel: bool) -> None:
    model = tiny_model("qwen2", attention="eager")
    how = replace(settings(data_parallel, hidden=("final",)), hidden_dtype="float32", attention=("model.layers.1",))
    whole = targets(model, how, num_ranks)
    assert whole.attention_count is not None
    rows: list[np.ndarray] = []
    for n in range(len(SAMPLES)):
        sample = SAMPLES.sample(n)
        for document in np.unique(sample.document):
            tokens = torch.from_numpy(sample.tokens[sample.document == document].astype(np.int64))
            with torch.no_grad():
                maps = model(input_ids=tokens[None], output_attentions=True).attentions[1]
            rows += [maps[0].mean(0)[query, : query + 1].numpy() for query in range(len(tokens) - 1)]
    assert [len(row) for row in rows] == whole.attention_count.tolist()
    np.testing.assert_allclose(whole.attention["model.layers.1"], np.concatenate(rows), atol=1e-3)
    part = targets(model, replace(how, hidden_every=3.0), num_ranks)
    assert part.hidden_kept is not None and 0 < part.hidden_kept.sum() < len(rows)
    np.testing.assert_allclose(part.hidden["final"], whole.hidden["final"][part.hidden_kept], atol=1e-5)
    kept = [row for row, keep in zip(rows, part.hidden_kept, strict=True) if keep]
    np.testing.assert_allclose(part.attention["model.layers.1"], np.concatenate(kept), atol=1e-3)


def test_a_layer_without_attention_lists_those_that_have_it() -> None:
    model = tiny_model("qwen2")
    assert attention_module(model, "model.layers.1") is model.get_submodule("model.layers.1.self_attn")
    with pytest.raises(InputError, match=r"no attention in 'model\.layers\.9'; there is in \['model\.layers\.0'"):
        attention_module(model, "model.layers.9")
