"""The ledger: what is billed never passes a cap, under any interleaving, lost reply and crash."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from storage.errors import BudgetError, InputError, StorageError
from storage.object_store import Store
from workers.ledger.amounts import Amount, Caps
from workers.ledger.client import LedgerClient
from workers.ledger.journal import Journal
from workers.ledger.ledger import Batch, Budget, Ledger

RUN_CAP, DATASET_CAP = 100, 150


class MemoryStore:
    """Objects in memory with the store's own rules; fails before or after its effect when told to."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.fail: str | None = None

    def shown(self, key: str = "") -> str:
        return f"memory/{key}"

    def probe(self) -> bool:
        return True

    def list(self, prefix: str = "") -> list[str]:
        return sorted(key for key in self.objects if key.startswith(prefix))

    def read(self, key: str) -> bytes:
        return self.objects[key]

    def read_if_exists(self, key: str) -> bytes | None:
        return self.objects.get(key)

    def write(self, key: str, data: bytes) -> None:
        self.objects[key] = data

    def create(self, key: str, data: bytes) -> bool:
        fail, self.fail = self.fail, None
        if fail == "before":
            raise StorageError("no answer")
        if key in self.objects:
            return False
        self.objects[key] = data
        if fail == "after":
            raise StorageError("no answer")
        # A retried request meets what its own first try made.
        return fail != "retried"


def budget(run: str) -> Budget:
    return Budget(run, "USD", Caps(money=RUN_CAP), Caps(money=DATASET_CAP))


class Spending(RuleBasedStateMachine):
    """Two runs on one dataset, whose owners may die at any moment; a provider that bills up to the worst case."""

    granted = Bundle("granted")

    @initialize()
    def begin(self) -> None:
        self.store = MemoryStore()
        self.owners: dict[str, Ledger] = {}
        self.billed = {"a": 0, "b": 0}
        self.names = 0

    def owner(self, run: str) -> Ledger:
        if run not in self.owners:
            self.owners[run] = Ledger(self.store, budget(run))  # type: ignore[arg-type]
        return self.owners[run]

    def transact(self, run: str, batch: Batch) -> list[str | None]:
        try:
            return self.owner(run).transact(batch)
        except StorageError:
            return ["no answer"] * len(batch.reserve)

    @rule(
        target=granted,
        run=st.sampled_from("ab"),
        sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
        last_call=st.booleans(),
    )
    def reserve_and_send(self, run: str, sizes: list[int], last_call: bool) -> Any:
        asked = []
        for size in sizes:
            self.names += 1
            asked.append((f"r{self.names}", Amount(size, size, 1)))
        reasons = self.transact(run, Batch(reserve=asked, last_call=last_call))
        sent = [(name, amount) for (name, amount), reason in zip(asked, reasons, strict=True) if reason is None]
        # The request is out: from here on it may be billed in full, whatever we hear of it.
        self.billed[run] += sum(amount.money for _, amount in sent)
        return (run, sent)

    @rule(item=consumes(granted), share=st.floats(0, 1))
    def answered(self, item: tuple[str, list[tuple[str, Amount]]], share: float) -> None:
        run, sent = item
        settled = []
        for name, amount in sent:
            cost = int(amount.money * share)
            self.billed[run] -= amount.money - cost
            settled.append((name, Amount(cost, cost, 1)))
        self.transact(run, Batch(settled=settled))

    @rule(item=consumes(granted))
    def unknown(self, item: tuple[str, list[tuple[str, Amount]]]) -> None:
        self.transact(item[0], Batch(kept=[name for name, _ in item[1]]))

    @rule(item=consumes(granted))
    def never_heard_of_again(self, item: Any) -> None:
        """The reservations stay open for ever."""

    @rule(run=st.sampled_from("ab"))
    def crash(self, run: str) -> None:
        self.owners.pop(run, None)

    @rule(how=st.sampled_from(["before", "after", "retried"]))
    def store_fails_next(self, how: str) -> None:
        self.store.fail = how

    @invariant()
    def caps_hold(self) -> None:
        assert max(self.billed.values()) <= RUN_CAP
        assert sum(self.billed.values()) <= DATASET_CAP

    @invariant()
    def a_reopened_journal_tells_the_same(self) -> None:
        account = Journal(self.store, "USD").account  # type: ignore[arg-type]
        for run, billed in self.billed.items():
            assert billed <= account.totals(run).used.money <= RUN_CAP
        for owner in self.owners.values():
            owner.journal.catch_up()
            assert owner.journal.account == account


TestSpending = Spending.TestCase
TestSpending.settings = settings(max_examples=40, stateful_step_count=30, suppress_health_check=[HealthCheck.too_slow])


def test_states_are_a_short_cut_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("workers.ledger.journal.STATE_EVERY", 4)
    store = Store(tmp_path)
    ledger = Ledger(store, Budget("r"))
    for n in range(10):
        ledger.transact(
            Batch(settled=[(f"x{n - 1}", Amount(1, 1, 1))] if n else [], reserve=[(f"x{n}", Amount(9, 9, 1))])
        )
    states = [key for key in store.list("ledger/") if "state" in key]
    assert states == ["ledger/state-00000004.json", "ledger/state-00000008.json"]
    with_state = Journal(store, "USD").account
    for key in states:
        store.delete(key)
    assert Journal(store, "USD").account == with_state == ledger.journal.account
    assert with_state.totals("r").used == Amount(9 + 9, 9 + 9, 10)


def test_a_state_does_not_outlive_its_journal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("workers.ledger.journal.STATE_EVERY", 2)
    store = Store(tmp_path)
    ledger = Ledger(store, Budget("r"))
    for n in range(2):
        ledger.transact(Batch(reserve=[(f"x{n}", Amount(9, 9, 1))]))
    for key in ["ledger/00000000.jsonl", "ledger/00000001.jsonl"]:
        store.delete(key)
    assert Journal(store, "USD").account.runs == {}


def test_another_currency_and_a_damaged_segment_are_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    Ledger(store, Budget("r", "USD")).transact(Batch(reserve=[("x", Amount(1, 1, 1))]))
    with pytest.raises(InputError, match=r"kept in USD, budget\.currency says EUR"):
        Ledger(store, Budget("r", "EUR"))
    store.write("ledger/00000001.jsonl", b'{"type": "reser')
    with pytest.raises(InputError, match="what was spent cannot be told"):
        Ledger(store, Budget("r", "USD"))


def test_a_store_that_ignores_conditions_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "probe", lambda self: False)
    with pytest.raises(InputError, match="two runs could spend the same budget"):
        Ledger(Store(tmp_path), Budget("r"))


def test_each_cap_refuses_by_its_own_name(tmp_path: Path) -> None:
    one = Amount(10**12, 100, 1)
    for number, (caps, unit) in enumerate(
        [(Caps(money=3 * 10**12), "3 USD"), (Caps(tokens=250), "250 tokens"), (Caps(requests=2), "2 requests")]
    ):
        ledger = Ledger(Store(tmp_path / str(number)), Budget("r", "USD", caps))
        reasons = ledger.transact(Batch(reserve=[(f"x{n}", one) for n in range(4)]))
        assert reasons[:2] == [None, None]
        assert f"the run's cap of {unit} is reached" in str(reasons[3])
    ledger = Ledger(Store(tmp_path / "d"), Budget("r", "USD", Caps(), Caps(requests=1)))
    assert "the dataset's cap" in str(ledger.transact(Batch(reserve=[("x", one), ("y", one)]))[1])


def test_raising_the_cap_resumes_and_old_reservations_count(tmp_path: Path) -> None:
    store, one = Store(tmp_path), Amount(10, 10, 1)
    dead = Ledger(store, Budget("r", "USD", Caps(money=20)))
    assert dead.transact(Batch(reserve=[("a", one), ("b", one), ("c", one)]))[:2] == [None, None]
    again = Ledger(store, Budget("r", "USD", Caps(money=20)))
    assert again.transact(Batch(reserve=[("d", one)], last_call=True)) != [None]
    raised = Ledger(store, Budget("r", "USD", Caps(money=30)))
    assert raised.transact(Batch(reserve=[("d", one)], last_call=True)) == [None]
    assert raised.standing().reserved == 30 / 10**12


def test_many_attempts_at_once_share_few_appends_and_use_the_cap_up(tmp_path: Path) -> None:
    store = Store(tmp_path)
    cap = 1000
    worst, real = Amount(20, 20, 1), Amount(13, 13, 1)

    async def attempt(client: LedgerClient) -> int:
        try:
            name = await client.reserve(worst)
        except BudgetError:
            return 0
        await asyncio.sleep(0.001)
        client.settle(name, real)
        return real.money

    async def work() -> int:
        client = LedgerClient.of(Ledger(store, Budget("r", "USD", Caps(money=cap))))
        billed = await asyncio.gather(*(attempt(client) for _ in range(300)))
        await client.close()
        return sum(billed)

    billed = asyncio.run(work())
    assert cap - worst.money < billed <= cap
    segments = store.list("ledger/")
    assert len(segments) < 150
    lines = [json.loads(line) for key in segments for line in store.read(key).splitlines()]
    assert sum(line["type"] == "reserve" for line in lines) == billed // real.money
    assert Journal(store, "USD").account.totals("r").settled.money == billed


def test_two_runs_share_a_budget_and_a_waiting_attempt_that_is_cancelled_gives_back(tmp_path: Path) -> None:
    store, caps = Store(tmp_path), Caps(money=100)

    async def work() -> None:
        first, second = (
            LedgerClient.of(Ledger(store, Budget(run, "USD", Caps(), caps))) for run in ("first", "second")
        )
        names = [await first.reserve(Amount(30, 0, 1)) for _ in range(3)]
        with pytest.raises(BudgetError, match="the dataset's cap"):
            await second.reserve(Amount(30, 0, 1))
        waiting = asyncio.create_task(first.reserve(Amount(30, 0, 1)))
        await asyncio.sleep(0.05)
        waiting.cancel()
        for name in names:
            first.settle(name, Amount(1, 0, 1))
        await first.close()
        await second.reserve(Amount(90, 0, 1))
        await second.close()

    asyncio.run(work())
    totals = Journal(store, "USD").account.totals()
    assert (totals.settled.money, totals.reserved.money) == (3, 90)


def test_when_the_store_fails_nothing_more_is_granted() -> None:
    store = MemoryStore()

    async def work() -> None:
        client = LedgerClient.of(Ledger(store, Budget("r")))  # type: ignore[arg-type]
        store.fail = "after"
        for _ in range(2):
            with pytest.raises(StorageError, match="no answer"):
                await client.reserve(Amount(5, 5, 1))

    asyncio.run(work())
    assert Journal(store, "USD").account.totals("r").used.money == 5  # type: ignore[arg-type]
