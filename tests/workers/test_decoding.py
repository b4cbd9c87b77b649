"""Decoding against transformers' own, and its independence of the batch."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.workers.tiny import VOCAB_SIZE, tiny_model
from workers.local.decoding import Completion, Decoding, Ranks, choose, complete

CPU = torch.device("cpu")
GREEDY = Decoding(max_tokens=12, temperature=0.0, top_p=1.0, vocab_size=VOCAB_SIZE, end_ids=frozenset())
SAMPLED = replace(GREEDY, temperature=0.8, top_p=0.9)


def spelled(ids: Any) -> str:
    return "".join(chr(ord("A") + int(i)) for i in ids)


def rows(count: int, seed: int = 0) -> list[Completion]:
    """Prompts of several lengths."""
    chance = np.random.default_rng(seed)
    prompts = [chance.integers(1, VOCAB_SIZE, 2 + 3 * n).astype(np.int32) for n in range(count)]
    return [Completion(prompt, bytes([n + 1]) * 16) for n, prompt in enumerate(prompts)]


def run(model: torch.nn.Module, batch: list[Completion], how: Decoding, **more: Any) -> list[Completion]:
    complete(model, batch, how, spelled, CPU, **more)
    return batch


@pytest.mark.parametrize("model_type", ["qwen2", "llama", "deepseek_v3"])
def test_greedy_completions_are_those_of_transformers(model_type: str) -> None:
    model = tiny_model(model_type)
    for row in run(model, rows(3), GREEDY):
        prompt = torch.from_numpy(row.prompt.astype(np.int64))[None]
        model.generation_config.eos_token_id = None
        with torch.no_grad():
            logits_too = model.generate(
                prompt, max_new_tokens=12, do_sample=False, suppress_tokens=list(range(VOCAB_SIZE, 72)), pad_token_id=0
            )
        assert row.ids == logits_too[0, prompt.shape[1] :].tolist()
        assert (row.finish_reason, row.text) == ("length", spelled(row.ids))


def test_a_completion_does_not_depend_on_its_batch() -> None:
    model = tiny_model("qwen2")
    together = run(model, rows(4), SAMPLED)
    alone = [run(model, [row], SAMPLED)[0] for row in rows(4)]
    assert [row.ids for row in together] == [row.ids for row in alone]
    assert len({tuple(row.ids) for row in together}) == 4
    other = rows(4)
    other[0] = Completion(other[0].prompt, bytes(16))
    assert run(model, other, SAMPLED)[0].ids != together[0].ids, "the seed decides"


def test_rows_that_end_early_leave_and_change_nothing() -> None:
    model = tiny_model("llama")
    whole = run(model, rows(5), SAMPLED)
    ends = frozenset(row.ids[2] for row in whole[:3])
    sizes: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    ended = run(model, rows(5), replace(SAMPLED, end_ids=ends))
    for before, after in zip(whole, ended, strict=True):
        first = next((n for n, token in enumerate(before.ids) if token in ends), None)
        assert after.ids == before.ids[:first]
        assert after.finish_reason == ("length" if first is None else "stop")
        assert after.text == spelled(after.ids)
    assert sizes[0] == 5 and min(sizes) < 4, "finished rows are computed to the end"


def test_stop_texts_end_a_completion_and_are_cut_off() -> None:
    model = tiny_model("qwen2")
    whole = run(model, rows(2), SAMPLED)
    stop = whole[0].text[4:6]
    ended = run(model, rows(2), replace(SAMPLED, stop=(stop, "never")))
    assert ended[0].text == whole[0].text[: whole[0].text.index(stop)]
    assert ended[0].finish_reason == "stop" and len(ended[0].ids) <= 6


def test_the_models_positions_bound_a_completion() -> None:
    (row,) = run(tiny_model("qwen2"), rows(1), replace(GREEDY, max_positions=5))
    assert len(row.prompt) + len(row.ids) == 5 and row.finish_reason == "length"


def test_logits_that_are_no_numbers_end_their_row_alone() -> None:
    model = tiny_model("qwen2")
    batch = rows(2)
    batch[0] = Completion(np.array([0, 5], dtype=np.int32), bytes(16))
    expected = run(model, rows(2), GREEDY)[1].ids
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = float("nan")
    model.get_output_embeddings().weight = torch.nn.Parameter(model.get_output_embeddings().weight.detach().clone())
    got = run(model, batch, GREEDY)
    assert got[0].finish_reason == "not_finite"
    assert got[1].ids == expected


def test_choices_follow_the_nucleus() -> None:
    chance = torch.tensor([0.4, 0.05, 0.3, 0.15, 0.1], dtype=torch.float64)
    points = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    got = choose(chance.log().float().expand(20_000, -1), points, temperature=1.0, top_p=0.8)
    share = torch.bincount(got, minlength=5).double() / 20_000
    torch.testing.assert_close(share, torch.tensor([0.4, 0, 0.3, 0.15, 0]).double() / 0.85, atol=1e-3, rtol=0)
    sharp = choose(chance.log().float().expand(20_000, -1), points, temperature=0.5, top_p=1.0)
    wanted = chance**2 / (chance**2).sum()
    share = torch.bincount(sharp, minlength=5).double() / 20_000
    torch.testing.assert_close(share, wanted, atol=1e-3, rtol=0)
    assert choose(chance.log()[None], torch.tensor([0.999999]).double(), 1.0, 1e-6).item() == 0


def test_a_rank_without_rows_keeps_in_step() -> None:
    model = tiny_model("qwen2")
    left = [True, True, True, False]
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    complete(model, [], GREEDY, spelled, CPU, Ranks(any_busy=lambda busy: busy or left.pop(0)))
    assert len(calls) == 3
