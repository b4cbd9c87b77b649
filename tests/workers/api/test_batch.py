"""Batch files over real HTTP: submitted once whatever breaks, collected by whoever comes, never paid twice."""

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from storage.errors import BudgetError, InputError, IntegrityError
from storage.object_store import Store
from tests.workers.api.endpoint import Endpoint, endpoint
from workers.api import batch as module
from workers.api.answers import AnswerStore, request_key
from workers.api.batch import PREFIX, BatchAsker, open_records
from workers.api.batch_calls import BatchCalls
from workers.api.client import ApiClient
from workers.api.config import ApiConfig, BatchConfig, PricesConfig
from workers.api.generation import AskResult
from workers.api.prices import Prices
from workers.api.reply import Request
from workers.ledger.amounts import PICO, Caps
from workers.ledger.client import LedgerClient
from workers.ledger.ledger import Budget, Ledger

PRICES = PricesConfig(input=1.0, output=2.0)
WORDS, MAX_TOKENS = 5, 8


@pytest.fixture
def server() -> Iterator[Endpoint]:
    with endpoint() as running:
        yield running


def requests(count: int, first: int = 0) -> Iterator[tuple[bytes, Request]]:
    for number in range(first, first + count):
        words = " ".join(f"p{number}w{n}" for n in range(WORDS))
        body = {"model": "teacher", "messages": [{"role": "user", "content": words}], "max_tokens": MAX_TOKENS}
        request = Request("/chat/completions", body, WORDS, MAX_TOKENS, WORDS)
        yield request_key(request, "batch"), request


class Run:
    """One process's view: what dies with it, and what is on disk."""

    def __init__(self, folder: Path, server: Endpoint, caps: Caps | None = None, size: int = 10) -> None:
        self.api = ApiConfig(
            base_url=server.url, model="teacher", key_env="TEACHER_KEY", prices=PRICES, max_attempts=2, max_wait_s=0.05,
            batch=BatchConfig(requests=size, poll_s=0.01), extra_body={"user": "lectern"},
        )  # fmt: skip
        self.store = Store(folder)
        self.ledger = Ledger(self.store, Budget("run", "USD", caps or Caps(money=PICO)))
        self.progress: list[int] = []

    def ask(self, count: int, change: Callable[[BatchAsker], None] = lambda asker: None) -> AskResult:
        """Have the first `count` requests answered."""

        async def work() -> AskResult:
            client = ApiClient(self.api, LedgerClient.of(self.ledger))
            self.answers = AnswerStore(self.store)
            prices = Prices(PRICES, 0.5)
            asker = BatchAsker(BatchCalls(client), self.ledger, self.answers, self.store, prices)
            change(asker)
            try:
                return await asker.ask_all(requests(count), lambda result, done: self.progress.append(done))
            finally:
                await client.close()

        return asyncio.run(work())

    @property
    def used(self) -> float:
        return self.ledger.totals().used.currency


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", "sk-right")


def test_requests_go_out_in_files_and_cost_half(tmp_path: Path, server: Endpoint) -> None:
    run = Run(tmp_path, server)
    result = run.ask(25)
    assert (result.requests, result.answered, result.reused) == (25, 25, 0) and not result.failed
    assert len(run.store.list(PREFIX)) == 3 and not open_records(run.store)
    stats = server.stats()
    assert run.used == pytest.approx(stats["billed"]["money"]) and not run.ledger.journal.account.open
    for custom_id, (key, _) in zip(stats["good"], requests(25), strict=False):
        answer = run.answers.get(key)
        assert custom_id == key.hex() and answer is not None and answer.reply is not None
        assert answer.reply.usage is not None and answer.reply.usage.input == WORDS
    again = Run(tmp_path, server)
    result = again.ask(30)
    assert (result.answered, result.reused) == (5, 25)
    assert max(server.stats()["good"].values()) == 1
    assert again.used == pytest.approx(server.stats()["billed"]["money"])


def test_a_file_says_what_is_asked(tmp_path: Path, server: Endpoint) -> None:
    seen: list[dict[str, Any]] = []

    def spy(asker: BatchAsker) -> None:
        real = asker.calls.upload

        async def upload(lines: bytes) -> str:
            seen.extend(json.loads(line) for line in lines.splitlines())
            return await real(lines)

        asker.calls.upload = upload  # type: ignore[method-assign]

    Run(tmp_path, server).ask(3, spy)
    for line, (key, request) in zip(seen, requests(3), strict=True):
        assert line == {
            "custom_id": key.hex(), "method": "POST", "url": "/v1/chat/completions",
            "body": {**request.body, "user": "lectern"},
        }  # fmt: skip


class KilledError(BaseException):
    """Stands for the end of the process."""


def dies_at(name: str) -> Callable[[BatchAsker], None]:
    """Let a process end when it makes this call for the first time; `after ` a name: once it has made it."""

    def change(asker: BatchAsker) -> None:
        owner = asker.calls if not name.endswith("_collect") else asker
        method = name.removeprefix("after ")
        real = getattr(owner, method)

        async def killed(*arguments: Any) -> Any:
            if name.startswith("after "):
                await real(*arguments)
            raise KilledError

        setattr(owner, method, killed)

    return change


@pytest.mark.parametrize("moment", ["create", "after create", "state", "_collect", "after _collect", "content"])
def test_whatever_the_moment_of_a_kill_nothing_is_paid_twice(tmp_path: Path, server: Endpoint, moment: str) -> None:
    with pytest.raises(KilledError):
        Run(tmp_path, server, size=100).ask(20, dies_at(moment))
    reserved = Run(tmp_path, server).ledger.totals().reserved.money
    assert (reserved > 0) == (moment != "after _collect")
    run = Run(tmp_path, server, size=100)
    result = run.ask(20)
    assert result.answered + result.reused == 20
    stats = server.stats()
    assert max(stats["good"].values()) == 1 and len(stats["good"]) == 20
    unknown = run.ledger.totals().unknown.currency
    # A batch that was recorded and never created cannot be told from one whose creation nobody heard of.
    assert (unknown > 0) == (moment == "create")
    assert run.used - unknown == pytest.approx(stats["billed"]["money"])
    assert not open_records(run.store) and not run.ledger.journal.account.open


def test_a_creation_without_an_answer_is_looked_up(tmp_path: Path, server: Endpoint) -> None:
    for other in range(5):
        Run(tmp_path / f"other{other}", server).ask(1)
    server.control(batch_fault="unheard")
    billed = server.stats()["billed"]["money"]
    run = Run(tmp_path / "own", server)
    assert run.ask(8).answered == 8
    assert run.used == pytest.approx(server.stats()["billed"]["money"] - billed), "submitted twice"
    server.control(batch_fault="lost")
    result = run.ask(14)
    assert (result.answered, result.reused) == (0, 8)
    assert run.ledger.totals().unknown.money == 6 * Prices(PRICES, 0.5).worst(WORDS, MAX_TOKENS).money
    assert run.ask(14).answered == 6


def test_what_a_batch_leaves_undone_is_free_and_asked_again(tmp_path: Path, server: Endpoint) -> None:
    server.control(batch_fault="expired")
    run = Run(tmp_path, server)
    result = run.ask(10)
    assert result.answered == 5 and sum(result.failed.values()) == 5
    assert run.used == pytest.approx(server.stats()["billed"]["money"])
    server.control(batch_fault="")
    result = run.ask(10)
    assert (result.answered, result.reused) == (5, 5)


def test_refused_requests_are_set_aside_and_failed_files_told(tmp_path: Path, server: Endpoint) -> None:
    server.control(refuse="p3w0", batch_fault="")
    run = Run(tmp_path, server)
    result = run.ask(6)
    assert (result.answered, result.set_aside) == (5, 1)
    (key, _) = list(requests(6))[3]
    answer = run.answers.get(key)
    assert answer is not None and "content filter" in str(answer.set_aside)
    assert run.ask(6).reused == 6
    server.control(batch_fault="failed")
    result = run.ask(9)
    assert result.failed == {"the batch failed: the file is malformed": 3}
    assert run.used == pytest.approx(server.stats()["billed"]["money"])


def test_an_answer_without_usage_keeps_its_reservation(tmp_path: Path, server: Endpoint) -> None:
    server.control(batch_fault="no-usage")
    run = Run(tmp_path, server)
    assert run.ask(4).answered == 4
    assert run.ledger.totals().unknown.money == 4 * Prices(PRICES, 0.5).worst(WORDS, MAX_TOKENS).money


def test_a_cap_bounds_what_is_submitted(tmp_path: Path, server: Endpoint) -> None:
    worst = Prices(PRICES, 0.5).worst(WORDS, MAX_TOKENS).money
    run = Run(tmp_path, server, Caps(money=7 * worst))
    result = run.ask(20)
    assert isinstance(result.stopped, BudgetError) and "cap of" in str(result.stopped)
    assert result.answered == 7 == len(server.stats()["good"])
    assert run.used <= 7 * worst / PICO
    more = Run(tmp_path, server, Caps(money=40 * worst))
    assert more.ask(20).answered == 13


def test_what_is_wrong_for_all_stops_and_gives_back(tmp_path: Path, server: Endpoint) -> None:
    run = Run(tmp_path, server)
    run.api = run.api.model_copy(update={"base_url": f"{server.root}/nowhere"})
    with pytest.raises(InputError, match="404"):
        run.ask(3)
    assert run.used == 0 and not open_records(run.store)


def test_a_damaged_record_is_told(tmp_path: Path, server: Endpoint) -> None:
    Store(tmp_path).write(f"{PREFIX}x.json", b"{}")
    with pytest.raises(IntegrityError, match=r"batches/x\.json is damaged"):
        Run(tmp_path, server).ask(1)


def test_large_bodies_close_a_file(tmp_path: Path, server: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 300)
    run = Run(tmp_path, server, size=1000)
    assert run.ask(9).answered == 9
    assert len(run.store.list(PREFIX)) > 2
