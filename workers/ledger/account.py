"""The account: a pure fold over the journal's entries.

Entries are JSON objects with a `type`:

* `reserve`: `{id, run, amount}`, the worst case of one attempt, written before the attempt is made;
* `settle`: `{id, run, amount}`, what the attempt came to, by the provider's own count;
* `keep`: `{id}`, the outcome is unknown: the whole reservation stays spent until somebody corrects it;
* `correct`: `{ids, run, amount}`, an invoice says what these unknown ones came to, all together.

An amount is `[money in 1e-12 of the currency, tokens, requests]`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from storage.errors import IntegrityError
from workers.ledger.amounts import NOTHING, Amount, Caps

Entry = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Reservation:
    """An amount set apart for one attempt of a run."""

    run: str
    amount: Amount


@dataclass
class RunTotals:
    """What one run came to."""

    settled: Amount = NOTHING
    """Counted by the provider."""
    reserved: Amount = NOTHING
    """Open: in flight, or left behind by a process that died."""
    unknown: Amount = NOTHING
    """Kept whole, since the outcome is unknown."""
    attempts: int = 0

    @property
    def used(self) -> Amount:
        """What counts against the caps."""
        return self.settled + self.reserved + self.unknown


@dataclass
class Account:
    """The state after some entries."""

    open: dict[str, Reservation] = field(default_factory=dict)
    kept: dict[str, Reservation] = field(default_factory=dict)
    runs: dict[str, RunTotals] = field(default_factory=dict)

    def totals(self, run: str | None = None) -> RunTotals:
        """Return the totals of a run, or of all of them together."""
        if run is not None:
            return self.runs.get(run, RunTotals())
        whole = RunTotals()
        for part in self.runs.values():
            whole.settled += part.settled
            whole.reserved += part.reserved
            whole.unknown += part.unknown
            whole.attempts += part.attempts
        return whole

    def refusal(self, run: str, amount: Amount, run_caps: Caps, dataset_caps: Caps) -> tuple[str, str] | None:
        """Return (`run` or `dataset`, the limit) that reserving `amount` would pass, or None when it fits."""
        limit = run_caps.first_passed(self.totals(run).used + amount)
        if limit is not None:
            return "run", limit
        limit = dataset_caps.first_passed(self.totals().used + amount) if dataset_caps.any else None
        return None if limit is None else ("dataset", limit)

    def apply(self, entries: Iterable[Entry]) -> None:
        """Take entries in order; IntegrityError for one that no release of this program writes."""
        for entry in entries:
            self._apply(entry)

    def _apply(self, entry: Entry) -> None:
        try:
            kind = entry["type"]
            if kind == "reserve":
                self._reserve(entry)
            elif kind == "settle":
                self._close([entry["id"]], entry["run"], Amount.of(entry["amount"]))
            elif kind == "keep":
                self._keep(entry["id"])
            elif kind == "correct":
                self._close(entry["ids"], entry["run"], Amount.of(entry["amount"]))
            elif kind not in {"batch", "ledger"}:
                raise ValueError(f"type {kind!r}")
        except (KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"the ledger holds an entry that cannot be read ({error}): {entry}") from error

    def _reserve(self, entry: Entry) -> None:
        reservation = Reservation(entry["run"], Amount.of(entry["amount"]))
        if entry["id"] in self.open:
            raise ValueError(f"reservation {entry['id']} made twice")
        self.open[entry["id"]] = reservation
        totals = self.runs.setdefault(reservation.run, RunTotals())
        totals.reserved += reservation.amount
        totals.attempts += 1

    def _keep(self, reservation_id: str) -> None:
        reservation = self.open.pop(reservation_id, None)
        if reservation is not None:
            self.kept[reservation_id] = reservation
            totals = self.runs[reservation.run]
            totals.reserved -= reservation.amount
            totals.unknown += reservation.amount

    def _close(self, ids: Iterable[str], run: str, amount: Amount) -> None:
        """Put an amount in place of reservations. One that was closed before adds to what it was closed with."""
        for reservation_id in ids:
            if reservation_id in self.open:
                reservation = self.open.pop(reservation_id)
                self.runs[reservation.run].reserved -= reservation.amount
            elif reservation_id in self.kept:
                reservation = self.kept.pop(reservation_id)
                self.runs[reservation.run].unknown -= reservation.amount
        self.runs.setdefault(run, RunTotals()).settled += amount

    def to_json(self) -> dict[str, Any]:
        """Return the state as JSON values."""

        def reservations(held: Mapping[str, Reservation]) -> dict[str, Any]:
            return {name: [item.run, item.amount.to_list()] for name, item in held.items()}

        runs = {run: [totals.settled.to_list(), totals.attempts] for run, totals in self.runs.items()}
        return {"open": reservations(self.open), "kept": reservations(self.kept), "runs": runs}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Account":
        """Read back what `to_json` gave."""
        account = cls()
        for run, (settled, attempts) in values["runs"].items():
            account.runs[run] = RunTotals(settled=Amount.of(settled), attempts=attempts)
        for name, (run, amount) in values["open"].items():
            account.open[name] = Reservation(run, Amount.of(amount))
            account.runs[run].reserved += account.open[name].amount
        for name, (run, amount) in values["kept"].items():
            account.kept[name] = Reservation(run, Amount.of(amount))
            account.runs[run].unknown += account.kept[name].amount
        return account
