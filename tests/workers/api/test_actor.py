"""The API replica without Ray around it: units scored over real HTTP, faults and caps included, and committed."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_tokenizers import write_tokenizer

from storage.config import CacheConfig, DataConfig, SourceConfig
from storage.identity import DatasetIdentity
from storage.reader import Dataset
from storage.sample_set import SampleSet, prepare_samples
from storage.tokenizer import Tokenizer
from storage.writer import DatasetWriter
from tests.workers.api.endpoint import Endpoint, endpoint
from workers.api.actor import ApiJob, ApiReceipt, ApiScorer, LedgerOwner
from workers.api.capture import keep_text
from workers.api.config import ApiConfig, PricesConfig
from workers.api.identity import api_identity
from workers.config import TeacherConfig
from workers.ledger.amounts import Caps
from workers.ledger.journal import Journal
from workers.ledger.ledger import Budget
from workers.units import plan_units
from workers.work import missing_rows

K = 3


@dataclass
class Setting:
    """Where everything lies."""

    server: Endpoint
    folder: Path
    samples: SampleSet
    teacher: TeacherConfig
    tokenizer: Tokenizer
    model: Path

    def identity(self, kind: str = "topk") -> DatasetIdentity:
        cache = CacheConfig(url=self.url, kind=kind, top_k=K)  # type: ignore[arg-type]
        return api_identity(self.model, self.teacher, cache, self.tokenizer, uses_chat_template=False)

    @property
    def url(self) -> str:
        return str(self.folder / "cache")

    def capture(self, caps: Caps, retry_refused: bool = False) -> list[ApiReceipt]:
        """Score what is missing with a replica of its own, as the fleet would ask it to: all units at once."""
        identity = self.identity()
        DatasetWriter.create(self.url, identity)
        rows = missing_rows(self.samples, self.samples.rows(), Dataset.open(self.url, identity))
        units = plan_units(rows, self.samples.num_tokens, self.samples.sample_ids, identity.fingerprint, 300)
        owner = LedgerOwner(self.url, Budget("run", "USD", caps))

        async def transact(batch: Any) -> Any:
            return owner.transact(batch)

        async def work() -> list[ApiReceipt]:
            handle = SimpleNamespace(transact=SimpleNamespace(remote=transact))
            job = ApiJob(self.teacher, self.samples.url, self.url, identity, "prompt_logprobs", retry_refused)
            scorer = ApiScorer(job, handle)
            await scorer.load()
            found = await asyncio.gather(*(scorer.score(unit, f"a{n}") for n, unit in enumerate(units)))
            assert await scorer.beat() > 0
            await scorer._client.close()
            return list(found)

        return asyncio.run(work())


@pytest.fixture(scope="module")
def server() -> Iterator[Endpoint]:
    with endpoint(vocab=[f"t{n}" for n in range(261)]) as running:
        yield running


@pytest.fixture
def setting(server: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    monkeypatch.setenv("TEACHER_KEY", "sk-right")
    server.control(faults={}, refuse="", context=4096)
    model = write_tokenizer(tmp_path / "model")
    facts = {"architectures": ["Qwen2ForCausalLM"], "vocab_size": 261, "max_position_embeddings": 128}
    (model / "config.json").write_text(json.dumps(facts))
    lines = [json.dumps({"text": f"sentence number {n} of a small text, with a few more words."}) for n in range(40)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    source = SourceConfig(name="general", path=str(tmp_path / "text.jsonl"))
    tokenizer = Tokenizer.load(model)
    samples = prepare_samples(
        DataConfig(sources=[source], window_tokens=96, heldout_fraction=0.3), tokenizer, tmp_path / "samples"
    )
    api = ApiConfig(
        base_url=server.url, model="teacher", key_env="TEACHER_KEY", attempt_timeout_s=20, max_wait_s=0.1,
        max_attempts=8, prices=PricesConfig(input=1, output=2),
    )  # fmt: skip
    teacher = TeacherConfig(kind="api", name=str(model), api=api, dtype="bfloat16")
    return Setting(server, tmp_path, samples, teacher, tokenizer, model)


def test_a_cap_leaves_whole_samples_and_the_rest_is_scored_later_once(setting: Setting) -> None:
    shares = dict.fromkeys(("429", "500", "cut", "truncated", "null", "counts", "no-usage"), 0.06)
    setting.server.control(faults=shares)
    before = setting.server.stats()
    receipts = setting.capture(Caps(requests=25))
    assert any("cap of 25 requests is reached" in str(receipt.stopped) for receipt in receipts)
    part = len(Dataset.open(setting.url).catalog)
    assert 0 < part < setting.samples.num_samples
    assert part == sum(receipt.samples for receipt in receipts)
    receipts = setting.capture(Caps(money=10**12))
    assert not any(receipt.stopped or receipt.failed or receipt.refused for receipt in receipts)
    dataset = Dataset.open(setting.url)
    assert len(dataset.catalog) == setting.samples.num_samples
    samples, targets = dataset.read(dataset.catalog.sample_ids)
    before_token = samples.tokens[np.flatnonzero(samples.supervised) - 1]
    wanted = (before_token[:, None].astype(np.int64) * 7 + np.arange(K) * 13 + 1) % 261
    assert np.array_equal(targets.id.reshape(-1, K), wanted)
    assert np.allclose(targets.tail_mass.astype(float), 1 / 8, atol=1e-3)
    stats = setting.server.stats()
    asked_once = {name: n for name, n in stats["good"].items() if name not in before["good"]}
    assert set(asked_once.values()) == {1}
    used = Journal(dataset.store, "USD").account.totals().used.currency
    assert stats["billed"]["money"] - before["billed"]["money"] <= used < 1


def test_what_is_refused_is_left_out_and_told(setting: Setting) -> None:
    longest = int(setting.samples.num_tokens.max())
    setting.server.control(context=40)
    receipts = setting.capture(Caps(requests=1000))
    refused = {sample: reason for receipt in receipts for sample, reason in receipt.refused.items()}
    assert longest > 40 and refused
    assert all("maximum context length is 40" in reason for reason in refused.values())
    lengths = dict(zip(setting.samples.ids(setting.samples.rows()), setting.samples.num_tokens, strict=True))
    assert all(lengths[sample] > 40 for sample in refused)
    assert len(Dataset.open(setting.url).catalog) == sum(receipt.samples for receipt in receipts)
    billed = setting.server.stats()["billed"]
    setting.capture(Caps(requests=1000))
    assert setting.server.stats()["billed"] == billed
    setting.server.control(context=4096)
    again = setting.capture(Caps(requests=1000))
    assert sum(len(receipt.refused) for receipt in again) == len(refused)
    assert setting.server.stats()["billed"] == billed
    mended = setting.capture(Caps(requests=1000), retry_refused=True)
    assert not any(receipt.refused for receipt in mended)
    assert len(Dataset.open(setting.url).catalog) == setting.samples.num_samples


def test_text_is_kept_without_asking(setting: Setting) -> None:
    billed = setting.server.stats()["billed"]
    cache = CacheConfig(url=setting.url, kind="text")
    for expected in (setting.samples.num_samples, 0):
        found = keep_text(setting.teacher, cache, setting.samples, setting.samples.rows(), setting.identity("text"))
        assert found.scored_samples == expected
    assert len(Dataset.open(setting.url).catalog) == setting.samples.num_samples
    assert setting.server.stats()["billed"] == billed
