"""Learning rate over the steps."""

from math import cos, pi

from trainer.config import TrainConfig


def learning_rate(train: TrainConfig, step: int) -> float:
    """Return the learning rate of step 0, 1, …: linear warm-up, then a cosine down to the final fraction."""
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    along = (step - train.warmup_steps) / max(train.steps - 1 - train.warmup_steps, 1)
    floor = train.final_learning_rate_fraction
    return train.learning_rate * (floor + (1.0 - floor) * (1.0 + cos(pi * min(along, 1.0))) / 2.0)
