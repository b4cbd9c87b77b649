"""What requests cost: pure functions of the config's price list. Money in whole 1e-12 units of the currency."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Self

from workers.api.config import PricesConfig, RatesConfig
from workers.ledger.amounts import Amount, to_pico

DAY_MINUTES = 24 * 60
_PER = 10**6  # prices are per million tokens


@dataclass(frozen=True)
class Usage:
    """Tokens that a provider counted for one attempt. `output` includes `reasoning`, `input` includes `cached`."""

    input: int
    output: int
    cached: int = 0
    reasoning: int = 0


@dataclass(frozen=True)
class Rates:
    """Prices of one token, in picos, rounded up."""

    input: int
    cached: int
    output: int
    reasoning: int

    @classmethod
    def of(cls, config: RatesConfig, share: float = 1.0) -> Self:
        """Read a price list's prices per million tokens, each times `share`."""

        def per_token(price: float) -> int:
            return -(-to_pico(Decimal(str(price)) * Decimal(str(share))) // _PER)

        cached = config.input if config.cached_input is None else config.cached_input
        reasoning = config.output if config.reasoning is None else config.reasoning
        return cls(*(per_token(price) for price in (config.input, cached, config.output, reasoning)))

    def cost(self, usage: Usage) -> int:
        """Return what an attempt costs."""
        plain_input, plain_output = usage.input - usage.cached, usage.output - usage.reasoning
        return (
            plain_input * self.input
            + usage.cached * self.cached
            + plain_output * self.output
            + usage.reasoning * self.reasoning
        )

    def worst(self, input_tokens: int, output_tokens: int) -> int:
        """Return the most that so many tokens can cost."""
        return input_tokens * max(self.input, self.cached) + output_tokens * max(self.output, self.reasoning)


class Prices:
    """A price list with its hours."""

    def __init__(self, config: PricesConfig | None, share: float = 1.0) -> None:
        """Read the list, all of it taken times `share`; without one everything is free."""
        config = config or PricesConfig(input=0.0, output=0.0)
        self._standard = Rates.of(config, share)
        self._spans = [(*_span(item.hours), Rates.of(item, share)) for item in config.by_hour]

    def worst(self, input_tokens: int, output_tokens: int) -> Amount:
        """Return the most that one attempt can take, at the dearest hour and with nothing cached."""
        money = max(rates.worst(input_tokens, output_tokens) for rates in self._all())
        return Amount(money, input_tokens + output_tokens, 1)

    def expected(self, input_tokens: int, output_tokens: int, requests: int = 1) -> Amount:
        """Return what attempts cost at the standard price, with nothing cached and no thinking."""
        return Amount(self._standard.cost(Usage(input_tokens, output_tokens)), input_tokens + output_tokens, requests)

    def settled(self, usage: Usage, began: datetime, ended: datetime) -> Amount:
        """Return what an attempt cost. Where it ran over a change of price, the dearer one is taken."""
        money = max(rates.cost(usage) for rates in self._during(began, ended))
        return Amount(money, usage.input + usage.output, 1)

    def _all(self) -> Iterable[Rates]:
        return [self._standard, *(rates for _, _, rates in self._spans)]

    def _during(self, began: datetime, ended: datetime) -> Iterable[Rates]:
        """Prices in force at some moment between two moments, found at the ends and at each border between."""
        start = _minute(began)
        length = (ended - began).total_seconds() / 60
        if length >= DAY_MINUTES:
            return self._all()
        moments = [start, (start + length) % DAY_MINUTES]
        borders = [float(border) for first, last, _ in self._spans for border in (first, last)]
        moments += [border for border in borders if (border - start) % DAY_MINUTES <= length]
        return [self._at(moment) for moment in moments]

    def _at(self, minute: float) -> Rates:
        for first, last, rates in self._spans:
            inside = first <= minute < last if first < last else minute >= first or minute < last
            if inside:
                return rates
        return self._standard


def _span(hours: str) -> tuple[int, int]:
    first, _, last = hours.partition("-")
    start, end = (int(text[:2]) * 60 + int(text[3:]) for text in (first, last))
    return start, end


def _minute(moment: datetime) -> float:
    utc = moment.astimezone(UTC)
    return utc.hour * 60 + utc.minute + utc.second / 60 + utc.microsecond / 60e6
