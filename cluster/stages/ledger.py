"""The account of what was spent: shown, and corrected from an invoice."""

from typing import Any

from cluster.config import RunConfig
from cluster.rundir import RunDir
from storage.errors import InputError
from storage.object_store import Store
from workers.ledger.account import RunTotals
from workers.ledger.amounts import Amount, Caps
from workers.ledger.correction import corrections
from workers.ledger.journal import PREFIX, Journal
from workers.ledger.ledger import Budget


def ledger_store(config: RunConfig) -> Store:
    """Return where the ledger of a config lies."""
    return Store(config.budget.ledger or config.cache.url)


def budget_of(config: RunConfig, run: RunDir) -> Budget:
    """Return the limits of a run, under the name that its resumption has too."""
    own = config.budget
    return Budget(
        run=run.store.shown(),
        currency=own.currency,
        run_caps=Caps.of(own.cap, own.cap_tokens, own.cap_requests),
        dataset_caps=Caps.of(own.dataset.cap, own.dataset.cap_tokens, own.dataset.cap_requests),
    )


def account(config: RunConfig, run: RunDir) -> dict[str, Any]:
    """Return the account as JSON values: `{currency, runs: {run: {…}}, total, caps}`; money in units of the currency.

    Raises InputError when nothing was ever spent.
    """
    journal = _open(config)
    budget = budget_of(config, run)
    totals = journal.account.totals()
    return {
        "url": journal.store.shown(),
        "currency": budget.currency,
        "run": budget.run,
        "runs": {name: _facts(part) for name, part in journal.account.runs.items()},
        "total": _facts(totals),
        "caps": {
            "run": _limits(budget.run_caps, journal.account.totals(budget.run).used),
            "dataset": _limits(budget.dataset_caps, totals.used),
        },
    }


def settle(config: RunConfig, run: RunDir, invoice: float, tokens: int | None) -> dict[str, Any]:
    """Close everything unknown so that the total is the invoice's; returns the account after it.

    Raises InputError when there is nothing to correct, or the run is at work.
    """
    with run.locked():
        journal = _open(config)
        while not journal.append(corrections(journal.account, invoice, tokens)):
            pass
    return account(config, run)


def spent_by(config: RunConfig, run: RunDir) -> RunTotals:
    """Return what a run came to; nothing where there is no ledger."""
    store = ledger_store(config)
    if not store.list(PREFIX):
        return RunTotals()
    return Journal(store, config.budget.currency).account.totals(budget_of(config, run).run)


def _open(config: RunConfig) -> Journal:
    store = ledger_store(config)
    if not store.list(PREFIX):
        raise InputError(f"no ledger at {store.shown()}: nothing was spent on a teacher behind an API")
    return Journal(store, config.budget.currency)


def _facts(totals: RunTotals) -> dict[str, Any]:
    return {
        "attempts": totals.attempts,
        "settled": totals.settled.currency,
        "unknown": totals.unknown.currency,
        "reserved": totals.reserved.currency,
        "used": totals.used.currency,
        "tokens": totals.used.tokens,
    }


def _limits(caps: Caps, used: Amount) -> dict[str, Any]:
    left = caps.left(used)
    return {
        name: {
            "cap": Amount(money=limit).currency if name == "money" else limit,
            "left": Amount(money=left[name]).currency if name == "money" else left[name],
        }
        for name in left
        if (limit := getattr(caps, name)) is not None
    }
