"""Probing an endpoint, and its answers made into targets, over real HTTP and without Ray."""

import asyncio
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_tokenizers import write_tokenizer

from storage.errors import InputError
from storage.object_store import Store
from storage.samples import Sample, SampleBatch
from storage.tokenizer import Tokenizer
from tests.workers.api.endpoint import Endpoint, endpoint
from workers.api.actor import ApiJob, ApiScorer
from workers.api.client import ApiClient
from workers.api.config import ApiConfig
from workers.api.probe import Capabilities, keep_probe, kept_probe, probe, require_signal
from workers.api.reply import BrokenReplyError, Reply
from workers.api.scoring import documents_of, scored_positions, scoring_request, targets_of
from workers.ledger.client import LedgerClient
from workers.ledger.ledger import Budget, Ledger

K = 4
EVERYTHING: dict[str, Any] = {
    "prompt_logprobs": 20, "echo": True, "top_logprobs": 20, "token_ids": True, "id_shift": 0, "reasoning": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    return Tokenizer.load(write_tokenizer(folder))


@pytest.fixture(scope="module")
def server(tokenizer: Tokenizer) -> Iterator[Endpoint]:
    vocab = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    with endpoint(vocab=vocab) as running:
        yield running


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", "sk-right")


def client_of(server: Endpoint, folder: Path) -> ApiClient:
    api = ApiConfig(base_url=server.url, model="teacher", key_env="TEACHER_KEY", max_attempts=2, max_wait_s=0.1)
    return ApiClient(api, LedgerClient.of(Ledger(Store(folder), Budget("run"))))


def probed(server: Endpoint, folder: Path, tokenizer: Tokenizer, **settings: Any) -> Capabilities:
    server.control(**{**EVERYTHING, **settings})

    async def work() -> Capabilities:
        client = client_of(server, folder)
        try:
            return await probe(client, tokenizer, K)
        finally:
            await client.close()

    return asyncio.run(work())


def test_the_richest_signal_is_found_and_each_step_down_is_told(
    server: Endpoint, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    found = probed(server, tmp_path, tokenizer)
    assert (found.signal, found.scoring, found.scored_entries) == ("prompt_scoring", "prompt_logprobs", K)
    assert (found.context_tokens, found.steps_down, found.counts_usage) == (4096, [], True)
    found = probed(server, tmp_path, tokenizer, prompt_logprobs=0)
    assert (found.scoring, len(found.steps_down)) == ("echo", 1)
    found = probed(server, tmp_path, tokenizer, prompt_logprobs=0, echo=False, reasoning=True)
    assert (found.signal, found.top_logprobs, found.returns_ids) == ("generation_logprobs", K, False)
    assert found.reasoning_field
    found = probed(server, tmp_path, tokenizer, prompt_logprobs=0, echo=False, top_logprobs=1)
    assert (found.signal, found.top_logprobs) == ("generation_logprobs", 1)
    found = probed(server, tmp_path, tokenizer, prompt_logprobs=0, echo=False, top_logprobs=0)
    assert found.signal == "text"
    assert "top_logprobs must be at most 0" in found.steps_down[-1]
    with pytest.raises(InputError, match=r"teacher.require is prompt_scoring, and .* gives text at best"):
        require_signal(found, "prompt_scoring")
    require_signal(found, "text")
    store = Store(tmp_path)
    keep_probe(store, found)
    api = ApiConfig(base_url=server.url, model="teacher")
    assert kept_probe(store, api) == found
    assert kept_probe(store, api.model_copy(update={"model": "other"})) is None


def test_an_endpoint_with_another_tokenizer_is_not_taken(
    server: Endpoint, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    found = probed(server, tmp_path, tokenizer, id_shift=5, top_logprobs=0)
    assert found.scoring is None
    assert "nothing about token" in found.steps_down[0]
    assert "other tokens came back" in found.steps_down[1] or "at most 0" in found.steps_down[1]


def sample(*documents: list[int], hidden: int = 0) -> Sample:
    """Documents packed into one window; `hidden` first tokens of each are not supervised, the very first never."""
    tokens = np.array([t for document in documents for t in document], dtype=np.int32)
    number = np.repeat(np.arange(len(documents)), [len(d) for d in documents]).astype(np.int16)
    place = np.concatenate([np.arange(len(d)) for d in documents])
    return Sample("general", tokens, place > hidden, number)


def test_answers_become_targets_document_by_document(server: Endpoint, tmp_path: Path, tokenizer: Tokenizer) -> None:
    server.control(**EVERYTHING)
    size = tokenizer.vocab_size
    samples = SampleBatch.of([sample([5, 36 % size, 9, 2], [7, 50 % size]), sample([3, 4, 8], hidden=1)])

    async def work(method: Any) -> Any:
        client = client_of(server, tmp_path / method)
        scored = []
        for n in range(len(samples)):
            documents = []
            for ids, _ in documents_of(samples.sample(n)):
                reply = await client.ask(scoring_request(ids, "teacher", method, K))
                documents.append(scored_positions(reply, method, ids, K))
            scored.append(documents)
        await client.close()
        return targets_of(samples, scored)

    for method in ("prompt_logprobs", "echo"):
        targets = asyncio.run(work(method))
        before = [5, 36 % size, 9, 7, 4]
        assert targets.count.tolist() == [K] * 5
        wanted = [(b * 7 + j * 13 + 1) % size for b in before for j in range(K)]
        assert targets.id.tolist() == wanted
        assert np.allclose(targets.tail_mass.astype(float), 1 / 16, atol=1e-3)
        top = [(4 * 7 + j * 13 + 1) % size for j in range(20)]
        own = (top.index(8) + 1) * math.log(2) if 8 in top else -math.log(1e-9)
        assert targets.teacher_nll[1] == pytest.approx(own, rel=1e-5)
        parts = [2.0**-n for n in (1, 2, 3, 4, 4)]
        assert targets.teacher_entropy[0] == pytest.approx(-sum(p * math.log(p) for p in parts), rel=1e-5)


def test_what_does_not_fit_the_tokens_is_broken() -> None:
    def reply(rows: Any) -> Reply:
        return Reply("", None, "stop", None, prompt_logprobs=rows)

    good = [None, {"7": {"logprob": -0.1}}, {"8": {"logprob": -0.2}, "1": {"logprob": -0.1}}]
    assert scored_positions(reply(good), "prompt_logprobs", [5, 7, 8], 1).ids == [[7], [1]]
    for rows in (None, good[:2], [None, {"9": {"logprob": -1}}, good[2]], [None, {"7": {}}, good[2]], [1, 2, 3],
                 [None, {"7": {"logprob": float("nan")}}, good[2]]):  # fmt: skip
        with pytest.raises(BrokenReplyError):
            scored_positions(reply(rows), "prompt_logprobs", [5, 7, 8], 1)


def test_strings_that_are_no_ids_are_left_to_the_tail() -> None:
    raw = {
        "tokens": ["token_id:5", "token_id:7"],
        "token_logprobs": [None, -0.5],
        "top_logprobs": [None, {"token_id:7": -0.5, " the": -1.0, "token_id:3": -2.0}],
    }
    found = scored_positions(Reply("", None, "stop", None, logprobs=raw), "echo", [5, 7], 5)
    assert (found.ids, found.own) == ([[7, 3]], [-0.5])


def test_a_job_for_other_processes_holds_no_key() -> None:
    """What goes through Ray names the variable alone."""
    fields = set(ApiJob.__dataclass_fields__)
    assert fields == {"teacher", "samples_url", "dataset_url", "identity", "method", "retry_refused"}
    assert "key" not in ApiScorer.__init__.__annotations__
