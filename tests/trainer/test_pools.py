"""The samples of one source in the order in which they are drawn: passes, difficulty, a pool that opens."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.trainer.tiny import TinyRun, train_config
from trainer.curriculum import planned_order
from trainer.curriculum_config import CurriculumConfig, DifficultyConfig
from trainer.pools import GROUPS, Pool, by_difficulty, open_sizes


def ids(size: int) -> np.ndarray:
    return np.stack([np.frombuffer(n.to_bytes(16, "big"), dtype=np.uint8) for n in range(size)])


def numbers(rows: np.ndarray) -> list[int]:
    return [int.from_bytes(row.tobytes(), "big") for row in rows]


@st.composite
def openings(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    size = draw(st.integers(1, 40))
    sizes = sorted(draw(st.sets(st.integers(1, size), min_size=1, max_size=5)))
    firsts = [0, *sorted(draw(st.lists(st.integers(0, 200), min_size=len(sizes) - 1, max_size=len(sizes) - 1)))]
    return size, list(zip(firsts, sizes, strict=True))


@given(openings(), st.integers(0, 5))
def test_a_pool_that_opens_gives_open_samples_alone_each_as_often_as_the_others(
    opening: tuple[int, list[tuple[int, int]]], seed: int
) -> None:
    size, sizes = opening
    pool = Pool("general", ids(size), seed)
    pool.open_by(sizes)
    drawn = numbers(pool.draws(0, 250))
    assert numbers(pool.draws(70, 90)) == drawn[70:90]
    ends = [first for first, _ in sizes[1:]] + [250]
    for (first, opened), end in zip(sizes, ends, strict=True):
        part = Counter(drawn[first:end])
        assert set(part) <= set(range(opened))
        assert not part or max(part.values()) - min(part.get(n, 0) for n in range(opened)) <= 1
    seen: dict[int, list[int]] = {}
    for sample, passed in zip(drawn, pool.passes(0, 250).tolist(), strict=True):
        seen.setdefault(sample, []).append(passed)
    assert all(a < b for passes in seen.values() for a, b in pairwise(passes))
    for most in (0, 1, 33, 250):
        assert set(numbers(pool.used(most))) == set(drawn[:most])


def test_an_ordered_pass_goes_through_shuffled_groups_of_rising_difficulty() -> None:
    pool = Pool("general", ids(100), seed=1, groups=GROUPS)
    for first in (0, 100):
        drawn = numbers(pool.draws(first, first + 100))
        assert sorted(drawn) == list(range(100))
        groups = [n // 10 for n in drawn]
        assert groups == sorted(groups)
        assert drawn != sorted(drawn)
    assert numbers(pool.draws(0, 100)) != numbers(pool.draws(100, 200))


def test_difficulty_orders_and_cuts_and_ties_go_by_id() -> None:
    values = np.array([3, 1, 2, 2, 0, 9, 9, 9, 9, 9], dtype=np.float32)
    config = DifficultyConfig(keep=(0.1, 0.6))
    assert numbers(by_difficulty(ids(10), values, config)) == [1, 2, 3, 0, 5]
    shuffled = np.random.default_rng(0).permutation(10)
    assert numbers(by_difficulty(ids(10)[shuffled], values[shuffled], config)) == [1, 2, 3, 0, 5]
    # However few samples there are, one is kept.
    assert numbers(by_difficulty(ids(2), values[:2], DifficultyConfig(keep=(0.0, 0.1)))) == [1]


def test_a_pool_opens_with_the_root_of_competence() -> None:
    config = DifficultyConfig(open_first=0.3, open_until=0.5)
    drawn = np.arange(101) * 4
    sizes = open_sizes(config, 50, drawn)
    assert sizes[0] == (0, 15)
    assert sizes[-1][1] == 50
    for first, size in sizes:
        step = first // 4
        competence = np.sqrt(0.09 + 0.91 * min(step / 50, 1))
        assert size == 5 * np.ceil(np.round(competence * 10, 9))
    # Competence passes 0.9 at 79% of the way, and with it the last tenth opens.
    assert 160 <= sizes[-1][0] < 180


def test_a_run_by_difficulty_begins_with_the_easy_samples(hybrid_run: TinyRun) -> None:
    union = hybrid_run.union
    easy = {"difficulty": {"by": "teacher_entropy", "open_first": 0.2, "open_until": 1.0, "keep": [0.0, 0.9]}}
    rising = {"difficulty": {"by": "teacher_entropy", "order": "rising"}}
    train = train_config(steps=10)
    for fields in (easy, rising):
        order = planned_order(hybrid_run.samples, CurriculumConfig.model_validate(fields), train, union)
        entropy = [union.parts(order.step(step))[0].targets.teacher_entropy.mean() for step in range(10)]
        assert np.mean(entropy[:3]) < np.mean(entropy[-3:])
        assert order.digest() != planned_order(hybrid_run.samples, CurriculumConfig(), train).digest()
    used = {row.tobytes() for step in range(10) for row in order.step(step)}
    assert {row.tobytes() for row in order.used_ids()} == used


def test_impossible_difficulties_are_refused() -> None:
    for fields, message in (
        ({"keep": [0.5, 0.5]}, "must be two rising quantiles"),
        ({"open_first": 0.5, "order": "falling"}, "drop one of the two"),
    ):
        with pytest.raises(ValidationError, match=message):
            DifficultyConfig.model_validate(fields)
