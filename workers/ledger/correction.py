"""Corrects what is unknown from an invoice: reservations whose outcome nobody heard of."""

from storage.errors import InputError
from workers.ledger.account import Account, Entry
from workers.ledger.amounts import Amount, to_pico


def corrections(account: Account, invoice: float, tokens: int | None = None) -> list[Entry]:
    """Return the entries that bring an account's total to an invoice's.

    Every open or unknown reservation is closed. What the invoice holds beyond the settled attempts is shared over the
    runs in the ratio of what they had set apart.

    Args:
        invoice: money that the provider billed for all attempts of this ledger, in units of the currency.
        tokens: tokens that it billed, all together; none keeps the reserved ones.

    Raises:
        InputError: there is nothing unknown, or less was billed than is settled already.
    """
    held = [*account.open.items(), *account.kept.items()]
    if not held:
        raise InputError("the ledger holds nothing unknown: every attempt was settled by the provider's own count")
    whole = account.totals()
    money = to_pico(invoice) - whole.settled.money
    if money < 0:
        raise InputError(
            f"the invoice of {invoice:,.6g} is less than the {whole.settled.currency:,.6g} that the provider's own "
            f"counts came to; give what was billed for all attempts of this ledger ({whole.attempts:,})"
        )
    if tokens is not None and tokens < whole.settled.tokens:
        raise InputError(f"{tokens:,} tokens are less than the {whole.settled.tokens:,} that are settled already")
    apart = (whole.reserved + whole.unknown).money
    entries: list[Entry] = []
    for run, totals in account.runs.items():
        names = [name for name, item in held if item.run == run]
        mine = totals.reserved + totals.unknown
        if names:
            share = mine.money / apart if apart else len(names) / len(held)
            counted = mine.tokens if tokens is None else round((tokens - whole.settled.tokens) * share)
            amount = Amount(-(-money * mine.money // apart) if apart else money, counted, mine.requests)
            entries.append({"type": "correct", "ids": names, "run": run, "amount": amount.to_list()})
    return entries
