"""Prices: by kind of token, by hour, never below what a request can cost."""

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from workers.api.config import HoursConfig, PricesConfig
from workers.api.prices import Prices, Usage
from workers.ledger.amounts import PICO, Amount

PRICES = PricesConfig(
    input=0.55,
    cached_input=0.14,
    output=2.19,
    reasoning=4.0,
    by_hour=[HoursConfig(hours="16:30-00:30", input=0.2, output=1.0, reasoning=1.5)],
)
NOON = datetime(2026, 11, 2, 12, tzinfo=UTC)


def test_every_kind_of_token_has_its_price() -> None:
    cost = Prices(PRICES).settled(Usage(input=1000, output=500, cached=400, reasoning=100), NOON, NOON)
    assert cost == Amount(round((600 * 0.55 + 400 * 0.14 + 400 * 2.19 + 100 * 4.0) * PICO / 1e6), 1500, 1)


def test_hours_pass_midnight_and_a_change_of_price_counts_the_dearer_one() -> None:
    prices, usage = Prices(PRICES), Usage(input=1_000_000, output=0)
    midnight = datetime(2026, 11, 2, 0, 10, tzinfo=UTC)
    assert prices.settled(usage, midnight, midnight).currency == 0.2
    assert prices.settled(usage, midnight, midnight + timedelta(minutes=30)).currency == 0.55
    evening = datetime(2026, 11, 2, 16, 0, tzinfo=UTC)
    assert prices.settled(usage, evening, evening + timedelta(hours=12)).currency == 0.55
    assert prices.settled(usage, evening + timedelta(hours=1), evening + timedelta(hours=8)).currency == 0.2


def test_worst_case_takes_the_dearest_hour_and_kind() -> None:
    assert Prices(PRICES).worst(1_000_000, 1_000_000).currency == 0.55 + 4.0


def test_without_prices_tokens_and_requests_are_still_counted() -> None:
    assert Prices(None).worst(10, 20) == Amount(0, 30, 1)


@given(
    st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6),
    st.floats(0, 2 * 86_400), st.floats(0, 2 * 86_400),
)  # fmt: skip
def test_no_usage_within_its_bounds_costs_more_than_the_worst_case(
    input_: int, output: int, cached: int, reasoning: int, start_s: float, length_s: float
) -> None:
    began = NOON + timedelta(seconds=start_s)
    usage = Usage(input_, output, min(cached, input_), min(reasoning, output))
    worst = Prices(PRICES).worst(input_, output)
    found = Prices(PRICES).settled(usage, began, began + timedelta(seconds=length_s))
    assert found.money <= worst.money
    assert found.tokens <= worst.tokens
