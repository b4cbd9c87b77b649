"""Log-probabilities that come with the teacher's own text: tokens named exactly, found again, made into targets."""

import asyncio
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_tokenizers import write_tokenizer

from storage.object_store import Store
from storage.samples import Sample
from storage.tokenizer import Tokenizer
from workers.api.answers import Answer, AnswerStore, request_key
from workers.api.completions import write_completions
from workers.api.config import GenerateConfig
from workers.api.generated import GeneratedText, GeneratedTokens, TokenNames
from workers.api.generation import Author, chat_request
from workers.api.prompts import Prompt, prompt_ids
from workers.api.reply import Reply

AUTHOR = Author("teacher", "http://x", "x")
CONFIG = GenerateConfig(logprobs=3, max_tokens=8)
PROMPT = Prompt(({"role": "user", "content": "Why?"},))


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer.load(write_tokenizer(tmp_path / "tokenizer", ["the red lamp under the table"] * 3))


def named(token: Any, value: float, top: list[tuple[Any, float]]) -> dict[str, Any]:
    return {"token": token, "logprob": value, "top_logprobs": [{"token": t, "logprob": v} for t, v in top]}


def reply(content: Any) -> Reply:
    return Reply("text", None, "stop", None, logprobs={"content": content})


def test_names_are_exact_or_none(tokenizer: Tokenizer) -> None:
    names = TokenNames(tokenizer)
    (lamp,) = [i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]) == " lamp"]
    assert names.id(" lamp") == names.id(f"token_id:{lamp}") == lamp
    assert names.id("lamp posts") is names.id(None) is names.id("token_id:x") is names.id("\ufffd") is None
    assert names.id(f"token_id:{tokenizer.vocab_size}") is None
    spelled = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    for text in {text for text in spelled if spelled.count(text) > 1}:
        assert names.id(text) is None, "several tokens have this text"


def test_answers_are_read_whole_or_not_at_all(tokenizer: Tokenizer) -> None:
    names = TokenNames(tokenizer)
    good = named("token_id:7", -0.5, [("token_id:7", -0.5), ("no such token", -1.0), ("token_id:9", -2.0)])
    found = GeneratedTokens.of(reply([good, named("token_id:8", 0.1, [])]), names)
    assert found is not None and found.ids == [7, 8] and found.own == [-0.5, 0.0]
    assert found.entries == [{7: -0.5, 9: -2.0}, {}]
    for bad in (
        None,
        [],
        [named("no such token", -1.0, [])],
        [{"token": "token_id:7"}],
        [named("token_id:7", math.nan, [])],
    ):
        assert GeneratedTokens.of(reply(bad), names) is None
    assert GeneratedTokens.of(Reply("text", None, "stop", None), names) is None


def test_samples_of_ones_own_text_get_its_log_probabilities(tmp_path: Path, tokenizer: Tokenizer) -> None:
    answers, out = AnswerStore(Store(tmp_path / "paid")), Store(tmp_path / "made")
    content = [
        named("token_id:7", -0.7, [("token_id:7", -0.7), ("token_id:5", -1.4)]),
        named("token_id:9", -3.0, [("token_id:4", -0.2), ("token_id:6", -2.5), ("token_id:2", -2.6)]),
        named("token_id:8", -1.0, [("what", -0.5)]),
    ]
    key = request_key(chat_request(PROMPT, CONFIG, AUTHOR.model, None), AUTHOR.version, 0)
    asyncio.run(answers.put(key, Answer(reply(content))))
    summary = write_completions(out, [PROMPT], CONFIG, AUTHOR, answers, tokenizer=tokenizer)
    assert summary["kept"] == 1
    before = prompt_ids(PROMPT, tokenizer)
    tokens = np.concatenate([before, [7, 9, 8]]).astype(np.int32)
    supervised = np.arange(len(tokens)) >= len(before)
    text = GeneratedText(out, AnswerStore(Store(tmp_path / "paid")), TokenNames(tokenizer), entries=2)
    assert len(text) == 1
    sample = Sample("made", tokens, supervised, np.zeros(len(tokens), dtype=np.int16))
    found = text.score(sample)
    assert found is not None
    (positions,) = found
    first = len(before) - 1
    assert positions.ids[first:] == [[7, 5], [4, 6], [8]], "the last has no entry with an exact name but its own"
    assert positions.logprobs[first:] == [[-0.7, -1.4], [-0.2, -2.5], [-1.0]]
    assert positions.own[first:] == [-0.7, -3.0, -1.0]
    packed = Sample(
        "made", np.tile(tokens, 2), np.tile(supervised, 2), np.repeat(np.arange(2, dtype=np.int16), len(tokens))
    )
    assert len(text.score(packed) or []) == 2
    for changed in (tokens[:-1], np.append(tokens[:-1], 3).astype(np.int32)):
        other = Sample("made", changed, supervised[: len(changed)], np.zeros(len(changed), dtype=np.int16))
        assert text.score(other) is None


def test_a_completion_without_exact_names_is_filtered(tmp_path: Path, tokenizer: Tokenizer) -> None:
    answers, out = AnswerStore(Store(tmp_path / "paid")), Store(tmp_path / "made")
    key = request_key(chat_request(PROMPT, CONFIG, AUTHOR.model, None), AUTHOR.version, 0)
    asyncio.run(answers.put(key, Answer(reply([named("no such token", -0.7, [])]))))
    assert write_completions(out, [PROMPT], CONFIG, AUTHOR, answers, tokenizer=tokenizer)["filtered"] == {"tokens": 1}
