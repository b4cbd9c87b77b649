"""What an attempt costs, in three whole numbers: money, tokens, requests."""

from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Any, Self

PICO = 10**12
"""Money is counted in whole 1e-12 units of the currency: sums are exact, and no cap is passed by rounding."""


def to_pico(value: float | Decimal, rounding: str = ROUND_CEILING) -> int:
    """Return an amount of the currency in picos; costs round up, caps are rounded down by their callers."""
    return int((Decimal(str(value)) * PICO).to_integral_value(rounding=rounding))


@dataclass(frozen=True, slots=True)
class Amount:
    """Money in picos, tokens (prompt and output together) and requests."""

    money: int = 0
    tokens: int = 0
    requests: int = 0

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(self.money + other.money, self.tokens + other.tokens, self.requests + other.requests)

    def __sub__(self, other: "Amount") -> "Amount":
        return Amount(self.money - other.money, self.tokens - other.tokens, self.requests - other.requests)

    @property
    def currency(self) -> float:
        """The money in units of the currency."""
        return self.money / PICO

    def to_list(self) -> list[int]:
        """Return `[money, tokens, requests]`, as the journal holds it."""
        return [self.money, self.tokens, self.requests]

    @classmethod
    def of(cls, values: Any) -> Self:
        """Read back what `to_list` gave."""
        money, tokens, requests = (int(value) for value in values)
        return cls(money, tokens, requests)


NOTHING = Amount()


@dataclass(frozen=True, slots=True)
class Caps:
    """Upper limits of an `Amount`; None means no limit."""

    money: int | None = None
    tokens: int | None = None
    requests: int | None = None

    @classmethod
    def of(cls, money: float | None, tokens: int | None, requests: int | None) -> Self:
        """Build from the config's units."""
        return cls(None if money is None else to_pico(money, ROUND_FLOOR), tokens, requests)

    @property
    def any(self) -> bool:
        """Whether anything is limited."""
        return any(limit is not None for limit in (self.money, self.tokens, self.requests))

    def first_passed(self, used: Amount) -> str | None:
        """Return `money`, `tokens` or `requests`, the first limit that `used` passes, or None."""
        for name in ("money", "tokens", "requests"):
            limit = getattr(self, name)
            if limit is not None and getattr(used, name) > limit:
                return name
        return None

    def left(self, used: Amount) -> dict[str, int]:
        """Return what is left below each limit that there is, never negative."""
        names = ("money", "tokens", "requests")
        limits = {name: getattr(self, name) for name in names}
        return {name: max(0, limit - getattr(used, name)) for name, limit in limits.items() if limit is not None}


NO_CAPS = Caps()
