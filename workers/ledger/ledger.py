"""The one owner of a run's spending: takes batches of settlements and reservations, and journals both in one append."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from storage.errors import BudgetError, InputError
from storage.object_store import Store
from workers.ledger.account import Entry, RunTotals
from workers.ledger.amounts import NO_CAPS, NOTHING, PICO, Amount, Caps
from workers.ledger.journal import Journal

REFRESH_S = 1.0
"""A refused reservation looks for what other runs gave back, but not more often than this."""


@dataclass(frozen=True)
class Batch:
    """What one group commit holds; settlements count before reservations."""

    settled: Sequence[tuple[str, Amount]] = ()
    kept: Sequence[str] = ()
    """Ids whose outcome is unknown."""
    reserve: Sequence[tuple[str, Amount]] = ()
    last_call: bool = False
    """The reservations are given up if they do not fit now."""


@dataclass(frozen=True)
class Budget:
    """Whose spending this is, and its limits."""

    run: str
    """Name of the run; a resumed run keeps it."""
    currency: str = "USD"
    run_caps: Caps = NO_CAPS
    dataset_caps: Caps = NO_CAPS


@dataclass
class Standing:
    """Where a run stands, for progress and reports; money in units of the currency."""

    currency: str
    spent: float = 0.0
    """Settled, and kept because unknown."""
    reserved: float = 0.0
    left: float | None = None
    cap: float | None = None
    tokens: int = 0
    requests: int = 0
    unknown: float = 0.0
    unknown_requests: int = 0
    refused: str | None = field(default=None)


class Ledger:
    """Owner of one run's account on a journal that others may share. Not safe for several threads."""

    def __init__(self, store: Store, budget: Budget) -> None:
        """Open the journal.

        Raises InputError where the store ignores conditional creates: two runs could then spend the same money.
        """
        if not store.probe():
            raise InputError(
                f"{store.shown()} ignores conditional creates, so that two runs could spend the same budget; set "
                "budget.ledger to a folder or to a store that honours them"
            )
        self.budget = budget
        self.journal = Journal(store, budget.currency)
        self._refreshed = time.monotonic()

    def transact(self, batch: Batch) -> list[str | None]:
        """Journal a batch; returns for each reservation None when it is granted, else why it is not.

        What is granted is in the journal when this returns. Raises StorageError when the store failed: then nothing
        was granted, and what may have been written counts as spent.
        """
        closing = [self._settle(name, amount) for name, amount in batch.settled]
        closing += [{"type": "keep", "id": name} for name in batch.kept]
        if batch.last_call:
            self._refresh(0.0)
        while True:
            reasons, granted = self._decide(batch)
            if any(reasons) and self._refresh(REFRESH_S):
                reasons, granted = self._decide(batch)
            if not (closing or granted) or self.journal.append([*closing, *granted]):
                return reasons

    def standing(self) -> Standing:
        """Return where the run stands."""
        totals = self.totals()
        caps = self.budget.run_caps
        unknown = [item for item in self.journal.account.kept.values() if item.run == self.budget.run]
        return Standing(
            currency=self.budget.currency,
            spent=(totals.settled + totals.unknown).currency,
            reserved=totals.reserved.currency,
            left=None if caps.money is None else max(0, caps.money - totals.used.money) / PICO,
            cap=None if caps.money is None else caps.money / PICO,
            tokens=totals.used.tokens,
            requests=totals.used.requests,
            unknown=totals.unknown.currency,
            unknown_requests=len(unknown),
        )

    def totals(self) -> RunTotals:
        """Return the run's totals."""
        return self.journal.account.totals(self.budget.run)

    def _settle(self, name: str, amount: Amount) -> Entry:
        return {"type": "settle", "id": name, "run": self.budget.run, "amount": amount.to_list()}

    def _decide(self, batch: Batch) -> tuple[list[str | None], list[Entry]]:
        """Grant in order what fits after the settlements; later, smaller ones may fit where an earlier one does not."""
        account, budget = self.journal.account, self.budget
        freed = NOTHING
        for name, amount in batch.settled:
            held = account.open.get(name) or account.kept.get(name)
            freed += (held.amount if held is not None else NOTHING) - amount
        run_used = account.totals(budget.run).used - freed
        all_used = account.totals().used - freed
        reasons: list[str | None] = []
        granted: list[Entry] = []
        for name, amount in batch.reserve:
            reason = self._reason("run", budget.run_caps, run_used, amount)
            reason = reason or self._reason("dataset", budget.dataset_caps, all_used, amount)
            reasons.append(reason)
            if reason is None:
                run_used, all_used = run_used + amount, all_used + amount
                granted.append({"type": "reserve", "id": name, "run": budget.run, "amount": amount.to_list()})
        return reasons, granted

    def _reason(self, scope: str, caps: Caps, used: Amount, amount: Amount) -> str | None:
        limit = caps.first_passed(used + amount)
        if limit is None:
            return None
        unit, scale = (self.budget.currency, PICO) if limit == "money" else (limit, 1)
        cap, before, next_ = (getattr(item, limit) / scale for item in (caps, used, amount))
        return (
            f"the {scope}'s cap of {cap:,.6g} {unit} is reached: {before:,.6g} is spent or reserved, and the next "
            f"attempt may take up to {next_:,.6g}"
        )

    def _refresh(self, every_s: float) -> bool:
        if time.monotonic() - self._refreshed < every_s:
            return False
        self.journal.catch_up()
        self._refreshed = time.monotonic()
        return True


def refused(reason: str) -> BudgetError:
    """Return the error that stops a run at its cap."""
    return BudgetError(
        f"{reason}. All that was paid for is kept; raise the cap (budget.cap, budget.cap_tokens, budget.cap_requests, "
        "budget.dataset) and run the same command to go on, or correct unknown outcomes with `lectern ledger settle`"
    )


def describe(standing: Standing) -> dict[str, Any]:
    """Return a standing as the `cost` of a report."""
    return {
        "currency": standing.currency,
        "spent": round(standing.spent, 9),
        "reserved": round(standing.reserved, 9),
        "cap": standing.cap,
    }
