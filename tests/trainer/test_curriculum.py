"""Ratios and learning rates over the steps."""

import itertools

import numpy as np
import pytest

from storage.errors import InputError
from tests.trainer.tiny import train_config
from trainer.config import CurriculumConfig
from trainer.curriculum import planned_shares
from trainer.schedules import learning_rate

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
