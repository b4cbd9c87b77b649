"""Values over the steps: loss weights, temperature, learning rate. Pure functions of the step."""

import numpy as np
from numpy.typing import NDArray

from trainer.config import TrainConfig
from trainer.loss_config import Schedule, ScheduleConfig

Float64Array = NDArray[np.float64]


def value_at(schedule: Schedule, step: int, steps: int) -> float:
    """Return the value at step 0, 1, … of a run of `steps`; a plain number stays what it is."""
    if not isinstance(schedule, ScheduleConfig):
        return float(schedule)
    at = np.array([step / max(steps - 1, 1)])
    along = float(ramp(schedule.shape, schedule.begin, schedule.finish, at)[0])
    value = schedule.start + along * (schedule.end - schedule.start)
    if schedule.shape == "warmup_stable_decay":
        rise = round(schedule.begin * steps)
        value *= min(1.0, (step + 1) / rise) if rise else 1.0
    return value


def ramp(shape: str, begin: float, finish: float, at: Float64Array) -> Float64Array:
    """Return how far a value has moved from its start (0) to its end (1) at fractions `at` of the run, same shape.

    `linear` and `cosine` move between `begin` and `finish`, `step` jumps half-way between them. `two_stage` holds the
    start until `begin` and then anneals it by a cosine. `warmup_stable_decay` holds it until `finish`, then falls
    linearly to the last step (Hu et al. 2024); its rise until `begin` is `value_at`'s.
    """
    if shape == "constant":
        return np.zeros_like(at)
    if shape == "warmup_stable_decay":
        begin, finish = finish, 1.0
    width = finish - begin
    # A ramp narrower than this is a jump, and dividing by it could overflow.
    along = np.clip((at - begin) / width, 0.0, 1.0) if width > 1e-12 else (at >= begin) * 1.0
    if shape in {"cosine", "two_stage"}:
        return np.asarray((1.0 - np.cos(np.pi * along)) / 2.0)
    if shape == "step":
        return np.asarray((along >= 0.5) * 1.0)
    return np.asarray(along)


def learning_rate(train: TrainConfig, step: int) -> float:
    """Return the learning rate of step 0, 1, …: linear warm-up, then the schedule.

    A plain number is the peak of a cosine from the end of the warm-up down to the final fraction of it.
    """
    warm = min(1.0, (step + 1) / train.warmup_steps) if train.warmup_steps else 1.0
    if isinstance(train.learning_rate, ScheduleConfig):
        return warm * value_at(train.learning_rate, step, train.steps)
    fall = ScheduleConfig(shape="cosine", start=1.0, end=train.final_learning_rate_fraction)
    return (
        warm * train.learning_rate * value_at(fall, max(step - train.warmup_steps, 0), train.steps - train.warmup_steps)
    )
