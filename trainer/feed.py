"""Reads a rank's part of each step ahead of time, so that training does not wait for data."""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from storage.draws import draw_set
from storage.hidden import states_tensor
from storage.reader import Dataset
from storage.samples import UInt8Array
from trainer.batches import Batch, make_batch, take_microbatches
from trainer.config import TrainConfig
from trainer.sampler import PlannedOrder, rank_slice

READ_AHEAD = 2
"""Steps that are read and laid out before they are asked for."""


@dataclass(frozen=True, eq=False)
class StepData:
    """One rank's part of one step."""

    batches: list[Batch]
    sample_id: UInt8Array  # [samples, 16], as read
    num_supervised: int
    num_tokens: int


class Feed:
    """Gives the steps of one rank in order; use as a context manager."""

    def __init__(self, load: Callable[[int], StepData], first_step: int, last_step: int) -> None:
        """Read steps `first_step` to `last_step` with `load`, in one thread."""
        self.waited_s = 0.0
        """Seconds that `next` has waited for data so far."""
        self._load = load
        self._next = first_step
        self._last = last_step
        self._ahead: deque[Future[StepData]] = deque()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lectern-feed")

    def __enter__(self) -> Self:
        self._fill()
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def next(self) -> StepData:
        """Return the next step's data; raises what reading it raised."""
        self._fill()
        began = time.perf_counter()
        try:
            return self._ahead.popleft().result()
        finally:
            self.waited_s += time.perf_counter() - began
            self._fill()

    def _fill(self) -> None:
        while self._next < self._last and len(self._ahead) < READ_AHEAD:
            self._ahead.append(self._pool.submit(self._load, self._next))
            self._next += 1


def step_loader(
    dataset: Dataset, order: PlannedOrder, train: TrainConfig, rank: int, world_size: int
) -> Callable[[int], StepData]:
    """Return the function that reads and lays out a rank's part of a step."""
    capture = dataset.identity.capture
    kind = capture.kind
    layers = wanted_layers(train)
    part = rank_slice(train.global_batch_size, rank, world_size)

    def load(step: int) -> StepData:
        samples, targets = dataset.read(order.step(step)[part])
        # Another set of draws in each pass, as far as they go; the seed decides which one is first.
        targets = draw_set(targets, kind, (order.step_epochs(step)[part] + train.seed) % capture.draw_sets)
        rows = take_microbatches(len(samples), train.micro_batch_size)
        batches = [make_batch(samples.take(list(r)), targets.take(list(r)), kind, layers) for r in rows]
        return StepData(batches, samples.sample_id, int(samples.supervised.sum()), samples.num_tokens)

    return load


def wanted_layers(train: TrainConfig) -> tuple[str, ...]:
    """Return the dataset's layers whose hidden states the loss uses."""
    return tuple(train.loss.hidden_map) if train.loss.hidden > 0 else ()


def channel_variance(dataset: Dataset, ids: UInt8Array, layers: list[str]) -> dict[str, Tensor]:
    """Return the teacher's variance of each channel over the given samples: layer → float32 [width].

    The samples are the same for every batch and number of ranks, so that neither changes the loss.
    """
    _, targets = dataset.read(ids)
    return {layer: states_tensor(targets.hidden[layer]).float().var(dim=0, correction=0) for layer in layers}
