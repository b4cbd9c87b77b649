"""Planning of work units."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from workers.units import plan_units


def ids_of(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 16)).astype(np.uint8)


@given(
    lengths=st.lists(st.integers(2, 300), min_size=1, max_size=80),
    unit_tokens=st.integers(1, 2000),
    seed=st.integers(0, 5),
)
def test_each_row_lies_in_exactly_one_unit(lengths: list[int], unit_tokens: int, seed: int) -> None:
    num_tokens, ids = np.array(lengths, dtype=np.int64), ids_of(len(lengths))
    rows = np.random.default_rng(seed).permutation(len(lengths))[: max(1, len(lengths) // 2)]
    units = plan_units(rows, num_tokens, ids, "f", unit_tokens)
    assert [row for unit in units for row in unit.rows] == sorted(rows.tolist())
    assert all(unit.num_tokens == num_tokens[list(unit.rows)].sum() for unit in units)
    assert all(unit.num_tokens < unit_tokens + max(lengths) for unit in units)
    assert plan_units(rows[::-1], num_tokens, ids, "f", unit_tokens) == units
    assert len({unit.unit_id for unit in units}) == len(units)


def test_unit_ids_depend_on_samples_and_fingerprint() -> None:
    num_tokens, ids = np.full(4, 10, dtype=np.int64), ids_of(4)
    base = plan_units([0, 1], num_tokens, ids, "f", 100)[0].unit_id
    assert plan_units([0, 1], num_tokens, ids, "g", 100)[0].unit_id != base
    assert plan_units([0, 2], num_tokens, ids, "f", 100)[0].unit_id != base


def test_nothing_missing_means_no_units() -> None:
    assert list(plan_units([], np.zeros(0, dtype=np.int64), ids_of(0), "f", 100)) == []


@given(
    lengths=st.lists(st.integers(2, 300), min_size=1, max_size=80),
    unit_tokens=st.integers(1, 2000),
    seed=st.integers(0, 5),
)
def test_units_stay_the_same_while_others_get_done(lengths: list[int], unit_tokens: int, seed: int) -> None:
    num_tokens, ids = np.array(lengths, dtype=np.int64), ids_of(len(lengths))
    everything = np.arange(len(lengths))
    units = list(plan_units(everything, num_tokens, ids, "f", unit_tokens))
    left = [unit for n, unit in enumerate(units) if (n + seed) % 3]
    missing = [row for unit in left for row in unit.rows]
    assert list(plan_units(missing, num_tokens, ids, "f", unit_tokens, everything)) == left


@given(
    lengths=st.lists(st.integers(2, 300), min_size=1, max_size=80),
    unit_tokens=st.integers(1, 2000),
    seed=st.integers(0, 5),
)
def test_remains_of_units_are_put_together(lengths: list[int], unit_tokens: int, seed: int) -> None:
    num_tokens, ids = np.array(lengths, dtype=np.int64), ids_of(len(lengths))
    missing = np.flatnonzero(np.random.default_rng(seed).random(len(lengths)) < 0.3)
    units = plan_units(missing, num_tokens, ids, "f", unit_tokens, np.arange(len(lengths)))
    assert [row for unit in units for row in unit.rows] == missing.tolist()
    assert units.tokens == sum(unit.num_tokens for unit in units)
    start = 3
    assert [u.unit_id for u in units.rotated(start)] == [
        units[(n + start) % len(units)].unit_id for n in range(len(units))
    ]
