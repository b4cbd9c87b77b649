"""Ratios and learning rates over the steps."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from storage.errors import InputError
from tests.trainer.tiny import train_config
from trainer.curriculum import planned_shares
from trainer.curriculum_config import CurriculumConfig
from trainer.loss_config import LossConfig, ScheduleConfig, both_ends
from trainer.schedules import learning_rate, value_at

SAMPLES = {"general": 30, "domain": 10}
RAMP = {"start": {"general": 9, "domain": 1}, "end": {"general": 0.1, "domain": 0.9}}


def shares(**fields: object) -> np.ndarray:
    return planned_shares(CurriculumConfig.model_validate(fields), SAMPLES, 11)


def test_linear_ramp_goes_from_start_to_end() -> None:
    table = shares(**RAMP)
    np.testing.assert_allclose(table[:, 1], np.linspace(0.1, 0.9, 11))
    np.testing.assert_allclose(table.sum(axis=1), 1)


def test_cosine_and_step_have_the_same_ends_and_middle() -> None:
    cosine, step = shares(**RAMP, shape="cosine")[:, 1], shares(**RAMP, shape="step")[:, 1]
    np.testing.assert_allclose(cosine[[0, 5, 10]], [0.1, 0.5, 0.9])
    assert 0.1 < cosine[1] < 0.18
    np.testing.assert_allclose(step, [0.1] * 5 + [0.9] * 6)


def test_begin_and_finish_bound_the_ramp() -> None:
    domain = shares(**RAMP, begin=0.4, finish=0.6)[:, 1]
    np.testing.assert_allclose(domain, [0.1] * 5 + [0.5] + [0.9] * 5)
    np.testing.assert_allclose(shares(**RAMP, begin=0.5, finish=0.5)[:, 1], [0.1] * 5 + [0.9] * 6)


def test_without_start_the_shares_follow_the_samples() -> None:
    np.testing.assert_allclose(shares(), np.tile([0.75, 0.25], (11, 1)))
    np.testing.assert_allclose(shares(start={"domain": 2}), np.tile([0, 1], (11, 1)))


def test_a_table_is_linear_between_its_rows() -> None:
    table = {0.8: {"domain": 3, "general": 1}, 0.2: {"general": 2}, 0.6: {"general": 1, "domain": 1}}
    domain = shares(table=table)[:, 1]
    np.testing.assert_allclose(domain, [0, 0, 0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.75, 0.75])
    with pytest.raises(InputError, match=r"curriculum.table.0.5 names 'code'; the sources are general, domain"):
        shares(table={0.5: {"code": 1}})
    for fields, message in (
        ({"table": {1.5: {"general": 1}}}, "table 1.5: give shares at a fraction"),
        ({"table": {0: {}}}, "table 0: give shares"),
        ({"table": {0: {"general": -1}}}, "must be non-negative"),
        ({"table": {0: {"general": 1}}, "start": {"general": 1}}, "both a table and start"),
    ):
        with pytest.raises(ValidationError, match=message):
            CurriculumConfig.model_validate(fields)


def test_unknown_and_empty_sources_are_refused() -> None:
    with pytest.raises(InputError, match=r"curriculum.start names 'code'; the sources are general, domain"):
        shares(start={"code": 1})
    with pytest.raises(InputError, match="gives 'domain' a share, but it has no training samples"):
        planned_shares(CurriculumConfig.model_validate(RAMP), {"general": 5, "domain": 0}, 4)
    with pytest.raises(InputError, match="no source has training samples"):
        planned_shares(CurriculumConfig(), {"general": 0}, 4)


def test_learning_rate_warms_up_and_falls_to_its_fraction() -> None:
    train = train_config(steps=101, warmup_steps=10, learning_rate=1e-2, final_learning_rate_fraction=0.1)
    rates = [learning_rate(train, step) for step in range(101)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) * 1e-3)
    assert max(rates) == rates[10] == pytest.approx(1e-2)
    assert rates[55] == pytest.approx(5.5e-3)
    assert rates[-1] == pytest.approx(1e-3)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_schedules_move_from_start_to_end() -> None:
    def values(shape: str, **fields: float) -> list[float]:
        schedule = ScheduleConfig.model_validate({"shape": shape, "start": 2.0, **fields})
        return [value_at(schedule, step, 11) for step in range(11)]

    assert values("constant") == [2.0] * 11
    np.testing.assert_allclose(values("linear", end=1.0), np.linspace(2, 1, 11))
    np.testing.assert_allclose(values("cosine", end=1.0)[::5], [2, 1.5, 1])
    np.testing.assert_allclose(values("step", end=1.0, begin=0.2, finish=0.6), [2] * 4 + [1] * 7)
    stable = values("warmup_stable_decay", end=0.5, begin=0.2, finish=0.8)
    np.testing.assert_allclose(stable, [1] + [2] * 8 + [1.25, 0.5])
    two = values("two_stage", end=1.0, begin=0.5)
    np.testing.assert_allclose(two[:6], 2)
    assert all(a > b for a, b in itertools.pairwise(two[5:]))
    assert two[-1] == pytest.approx(1)
    assert value_at(0.3, 7, 11) == 0.3


@given(
    st.sampled_from(["constant", "linear", "cosine", "step", "warmup_stable_decay", "two_stage"]),
    st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
    st.floats(0, 10),
    st.floats(0, 10),
    st.integers(1, 50),
)
def test_schedules_stay_between_their_ends(shape: str, span: list[float], start: float, end: float, steps: int) -> None:
    fields = {"shape": shape, "start": start, "begin": span[0], "finish": span[1]}
    schedule = ScheduleConfig.model_validate({**fields, **({} if shape == "constant" else {"end": end})})
    low = 0.0 if shape == "warmup_stable_decay" else min(both_ends(schedule))
    for step in range(steps):
        assert low - 1e-9 <= value_at(schedule, step, steps) <= max(both_ends(schedule)) + 1e-9


def test_impossible_schedules_are_refused() -> None:
    for fields, message in (
        ({"shape": "linear", "start": 1, "begin": 0.6, "finish": 0.5}, "finish 0.5 lies before begin 0.6"),
        ({"shape": "constant", "start": 1, "end": 2}, "a constant has no end 2"),
    ):
        with pytest.raises(ValidationError, match=message):
            ScheduleConfig.model_validate(fields)
    with pytest.raises(ValidationError, match="must stay above 0"):
        LossConfig(temperature={"shape": "linear", "start": 2.0, "end": 0.0})
    with pytest.raises(ValidationError, match="give them as plain numbers"):
        LossConfig(kl={"shape": "linear", "start": 1.0}, adaptive="uncertainty")
    with pytest.raises(ValidationError, match="all 0"):
        LossConfig(kl={"shape": "linear", "start": 0.0}, ce=0.0)


def test_a_learning_rate_may_have_its_own_schedule() -> None:
    stable = {"shape": "warmup_stable_decay", "start": 1e-2, "end": 0.0, "finish": 0.5}
    train = train_config(steps=21, warmup_steps=4, learning_rate=stable)
    rates = [learning_rate(train, step) for step in range(21)]
    np.testing.assert_allclose(rates[:4], [0.0025, 0.005, 0.0075, 0.01])
    np.testing.assert_allclose(rates[4:11], 1e-2)
    assert rates[-1] == 0


def test_batches_must_split_at_every_number_of_ranks() -> None:
    assert train_config(workers=4, min_workers=2, micro_batch_size=2, global_batch_size=24).min_workers == 2
    for fields, message in (
        ({"workers": 2, "min_workers": 3}, "min_workers 3 is more than train.workers 2"),
        (
            {"workers": 3, "min_workers": 1},
            "into workers 1 to 3 × micro_batch_size 4; use a multiple of 24",
        ),
        ({"workers": 3}, "into workers 3 × micro_batch_size 4; use a multiple of 12"),
    ):
        with pytest.raises(ValidationError, match=message):
            train_config(**fields)
