"""The client against a server that misbehaves over real HTTP: what it retries, what it stops at, what it accounts."""

import asyncio
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from storage.errors import BudgetError, InputError
from storage.object_store import Store
from tests.workers.api.endpoint import Endpoint, endpoint
from workers.api.client import ApiClient, GivenUpError, SetAsideError
from workers.api.config import ApiConfig, PricesConfig
from workers.api.limiter import Limiter
from workers.api.reply import Reply, Request
from workers.api.verdicts import retry_after, scrub
from workers.ledger.amounts import NO_CAPS, Caps
from workers.ledger.client import LedgerClient
from workers.ledger.journal import Journal
from workers.ledger.ledger import Budget, Ledger

PRICES = PricesConfig(input=1.0, output=2.0)
CLEAN: dict[str, Any] = {
    "faults": {}, "refuse": "", "balance": None, "key": "sk-right", "model": "teacher", "context": 4096,
    "top_logprobs": 20, "reasoning": False, "hang_s": 20.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[Endpoint]:
    with endpoint() as running:
        yield running


@pytest.fixture
def clean(server: Endpoint, monkeypatch: pytest.MonkeyPatch) -> Endpoint:
    server.control(**CLEAN)
    monkeypatch.setenv("TEACHER_KEY", "sk-right")
    return server


def chat(n: int = 0, max_tokens: int = 8) -> Request:
    words = f"say number {n}"
    body = {"model": "teacher", "messages": [{"role": "user", "content": words}], "max_tokens": max_tokens}
    return Request("/chat/completions", body, most_input=8, most_output=max_tokens, least_input=3)


def words(text: str) -> int:
    return len(text.split())


def ask(
    server: Endpoint,
    folder: Path,
    requests: list[Request],
    caps: Caps = NO_CAPS,
    **settings: Any,
) -> tuple[list[Reply | BaseException], ApiClient]:
    """Ask all at once; returns replies or errors in order."""

    async def work() -> tuple[list[Reply | BaseException], ApiClient]:
        ledger = LedgerClient.of(Ledger(Store(folder), Budget("run", "USD", caps)))
        defaults = {"attempt_timeout_s": 20.0, "max_wait_s": 0.2, "key_env": "TEACHER_KEY", "prices": PRICES}
        api = ApiConfig(**{"base_url": server.url, "model": "teacher", **defaults, **settings})
        client = ApiClient(api, ledger, count_tokens=words)
        found = await asyncio.gather(*(client.ask(request) for request in requests), return_exceptions=True)
        await client.close()
        return found, client

    return asyncio.run(work())


def used(folder: Path) -> float:
    return Journal(Store(folder), "USD").account.totals().used.currency


def test_a_plain_answer_is_settled_to_the_last_token(clean: Endpoint, tmp_path: Path) -> None:
    before = clean.stats()["billed"]["money"]
    found, client = ask(clean, tmp_path, [chat(n) for n in range(40)])
    assert all(isinstance(reply, Reply) and reply.text and reply.usage for reply in found)
    assert used(tmp_path) == pytest.approx(clean.stats()["billed"]["money"] - before, abs=1e-12)
    assert (client.counters.attempts, client.counters.unknown) == (40, 0)


@pytest.mark.parametrize(
    ("fault", "kept"),
    [
        ("429", False), ("500", True), ("503", True), ("cut", True), ("truncated", True), ("drip", True),
        ("hang", True), ("empty", False), ("null", False),
    ],
)  # fmt: skip
def test_each_failure_is_tried_again_and_accounted(clean: Endpoint, tmp_path: Path, fault: str, kept: bool) -> None:
    before = clean.stats()["billed"]["money"]
    clean.control(faults={fault: 1.0}, hang_s=3.0)
    patience = 0.4 if fault in {"hang", "drip"} else 20.0
    found, client = ask(clean, tmp_path, [chat(1)], max_attempts=2, attempt_timeout_s=patience)
    assert isinstance(found[0], GivenUpError), found
    assert client.counters.attempts == 2
    assert client.counters.unknown == (2 if kept else 0)
    billed = clean.stats()["billed"]["money"] - before
    worst = 2 * (8 * 1.0 + 8 * 2.0) / 1e6
    assert used(tmp_path) == pytest.approx(worst if kept else billed)
    clean.control(faults={})
    again, _ = ask(clean, tmp_path, [chat(1)])
    assert isinstance(again[0], Reply)


@pytest.mark.parametrize("fault", ["no-usage", "low-usage", "high-usage", "text-usage"])
def test_a_usage_that_cannot_be_right_is_not_believed(clean: Endpoint, tmp_path: Path, fault: str) -> None:
    clean.control(faults={fault: 1.0})
    found, client = ask(clean, tmp_path, [chat(1)])
    assert isinstance(found[0], Reply) and found[0].usage is None
    assert client.counters.unknown == 1
    assert used(tmp_path) == pytest.approx((8 * 1.0 + 8 * 2.0) / 1e6)


@pytest.mark.parametrize("fault", ["429-after", "429-date"])
def test_retry_after_is_kept_to(clean: Endpoint, tmp_path: Path, fault: str) -> None:
    clean.control(faults={fault: 1.0})
    start = time.monotonic()
    found, _ = ask(clean, tmp_path, [chat(1)], max_attempts=2)
    assert isinstance(found[0], GivenUpError)
    assert time.monotonic() - start > (1.0 if fault == "429-after" else 0.05)
    assert used(tmp_path) == 0


@pytest.mark.parametrize(
    ("control", "settings", "request_", "kind", "text"),
    [
        ({"key": "sk-other"}, {}, chat(), InputError, "key in TEACHER_KEY is not accepted"),
        ({"balance": 0.0}, {}, chat(), BudgetError, "wants to be paid first"),
        ({"model": "renamed"}, {}, chat(), InputError, "it offers another-model, renamed"),
        ({"context": 5}, {}, chat(), SetAsideError, "maximum context length"),
        ({"refuse": "number"}, {}, chat(), SetAsideError, "content filter"),
    ],
)  # fmt: skip
def test_what_cannot_be_mended_is_not_tried_again(
    clean: Endpoint, tmp_path: Path, control: Any, settings: Any, request_: Request, kind: type[Exception], text: str
) -> None:
    clean.control(**control)
    found, client = ask(clean, tmp_path, [request_], **settings)
    assert isinstance(found[0], kind), found
    assert text in str(found[0])
    assert "sk-" not in str(found[0])
    assert client.counters.attempts == 1
    assert used(tmp_path) == 0


def test_no_key_names_the_variable(clean: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEACHER_KEY")
    with pytest.raises(InputError, match="environment variable TEACHER_KEY is not set"):
        ask(clean, tmp_path, [])


def test_a_server_that_is_not_there_costs_nothing(clean: Endpoint, tmp_path: Path) -> None:
    found, client = ask(clean, tmp_path, [chat()], base_url="http://127.0.0.1:9/v1", max_attempts=2)
    assert isinstance(found[0], GivenUpError)
    assert (used(tmp_path), client.counters.unknown) == (0, 0)


def test_cancelling_keeps_what_is_out_and_gives_back_what_is_not(clean: Endpoint, tmp_path: Path) -> None:
    clean.control(faults={"hang": 1.0}, hang_s=2.0)

    async def work() -> None:
        ledger = LedgerClient.of(Ledger(Store(tmp_path), Budget("run")))
        api = ApiConfig(base_url=clean.url, model="teacher", key_env="TEACHER_KEY", prices=PRICES, concurrency=2)
        client = ApiClient(api, ledger)
        tasks = [asyncio.create_task(client.ask(chat(n))) for n in range(4)]
        await asyncio.sleep(0.3)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert client.limiter.in_flight == 0
        await client.close()

    asyncio.run(work())
    totals = Journal(Store(tmp_path), "USD").account.totals()
    assert (totals.reserved.requests, totals.unknown.requests, totals.settled.requests) == (0, 2, 0)


def test_streams_are_put_together_with_their_usage(clean: Endpoint, tmp_path: Path) -> None:
    clean.control(reasoning=True)
    whole, _ = ask(clean, tmp_path, [chat(3, 12)])
    found, client = ask(clean, tmp_path, [chat(3, 12)], stream=True)
    assert isinstance(found[0], Reply) and isinstance(whole[0], Reply)
    assert found[0].reasoning and found[0].text
    assert found[0].usage and found[0].usage.reasoning > 0
    assert client.counters.unknown == 0


def test_a_third_of_all_faulty_under_a_cap(clean: Endpoint, tmp_path: Path) -> None:
    shares = dict.fromkeys(("429", "500", "503", "cut", "truncated", "no-usage", "low-usage", "high-usage"), 0.03)
    clean.control(faults={**shares, "hang": 0.03, "empty": 0.03, "null": 0.03}, hang_s=2.0)
    before = clean.stats()["billed"]["money"]
    cap = 150 * 20e-6
    requests = [chat(n) for n in range(400)]
    found, _ = ask(clean, tmp_path, requests, Caps.of(cap, None, None), concurrency=64, attempt_timeout_s=1.0)
    billed = clean.stats()["billed"]["money"] - before
    assert 0 < billed <= cap
    assert any(isinstance(item, BudgetError) for item in found)
    assert cap * 0.95 < used(tmp_path) <= cap


def test_concurrency_falls_and_comes_back(clean: Endpoint) -> None:
    now = [0.0]
    limiter = Limiter(100, clock=lambda: now[0])
    for _ in range(50):
        limiter.throttled(0.0)
    assert limiter.limit == 70
    now[0] = 2.0
    limiter.throttled(0.0)
    assert limiter.limit == pytest.approx(49)
    for _ in range(6000):
        limiter.answered()
    assert limiter.limit == 100


def test_never_more_in_flight_than_allowed(clean: Endpoint, tmp_path: Path) -> None:
    with endpoint(delay_s=0.01) as own:
        ask(own, tmp_path, [chat(n) for n in range(60)], concurrency=7)
        assert 1 < own.stats()["most_in_flight"] <= 7

    async def rate() -> float:
        limiter = Limiter(100, requests_per_minute=1200)
        start = time.monotonic()
        for _ in range(30):
            await limiter.acquire(1)
        return time.monotonic() - start

    assert asyncio.run(rate()) > 0.4


def test_retry_after_reads_seconds_and_dates_and_nothing_else() -> None:
    now = datetime(2026, 11, 2, 12, 0, 0, tzinfo=UTC)
    assert retry_after({"retry-after": "7"}, now) == 7
    assert retry_after({"retry-after": "1.5"}, now) == 1.5
    assert retry_after({"retry-after-ms": "250"}, now) == 0.25
    assert retry_after({"retry-after": "Mon, 02 Nov 2026 12:00:30 GMT"}, now) == 30
    assert retry_after({"retry-after": "Mon, 02 Nov 2026 11:00:30 GMT"}, now) == 0
    for nonsense in ("soon", "", "-3", "Mon, 99 Nov"):
        assert retry_after({"retry-after": nonsense}, now) == 0


def test_scrub_knows_the_key_and_its_kind() -> None:
    assert scrub("Bearer abc123secret and sk-proj-1234567 plain", "secret") == "Bearer *** and *** plain"
