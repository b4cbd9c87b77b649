"""Reads a rank's part of each step ahead of time, so that training does not wait for data."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from storage.draws import draw_set
from storage.hidden import state_width, states_tensor
from storage.parts import Part, TargetReader
from storage.samples import Int64Array, UInt8Array
from trainer.across_batches import across_batch
from trainer.alignment import Aligner
from trainer.batches import Batch, join_batches, make_batch, take_microbatches
from trainer.class_batches import class_batch
from trainer.config import TrainConfig
from trainer.loss_config import LossConfig
from trainer.sampler import PlannedOrder, rank_slice

READ_AHEAD = 4
"""Steps that are read and laid out before they are asked for…"""
THREADS = 2
"""…by this many threads, so that one slow read does not hold up the step after it."""


@dataclass(frozen=True, eq=False)
class StepData:
    """One rank's part of one step."""

    batches: list[Batch]
    sample_id: UInt8Array  # [samples, 16], as read
    num_supervised: int
    num_tokens: int
    """As they were read, of the dataset's tokenizer."""
    num_own_tokens: int
    """As the student reads them."""


class Feed:
    """Gives the steps of one rank in order; use as a context manager."""

    def __init__(self, load: Callable[[int], StepData], first_step: int, last_step: int) -> None:
        """Read steps `first_step` to `last_step` with `load`, called in several threads at once."""
        self.waited_s = 0.0
        """Seconds that `next` has waited for data so far."""
        self._load = load
        self._next = first_step
        self._last = last_step
        self._ahead: deque[Future[StepData]] = deque()
        self._pool = ThreadPoolExecutor(max_workers=THREADS, thread_name_prefix="lectern-feed")

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
    dataset: TargetReader,
    order: PlannedOrder,
    train: TrainConfig,
    rank: int,
    world_size: int,
    aligner: Aligner | None = None,
) -> Callable[[int], StepData]:
    """Return the function that reads and lays out a rank's part of a step."""
    mine = rank_slice(train.global_batch_size, rank, world_size)

    def load(step: int) -> StepData:
        ids = order.step(step)[mine]
        # Another set of draws in each pass, as far as they go; the seed decides which one is first.
        passes = order.step_epochs(step)[mine] + train.seed
        parts = [_one_set(part, passes) for part in dataset.parts(ids)]
        pieces = take_microbatches(len(ids), train.micro_batch_size)
        batches = [microbatch(parts, rows, train.loss, aligner) for rows in pieces]
        supervised = sum(batch.num_supervised for batch in batches)
        read = sum(part.samples.num_tokens for part in parts)
        own = read if aligner is None else sum(aligner.num_tokens(part.samples) for part in parts)
        return StepData(batches, _read_ids(parts), supervised, read, own)

    return load


def _one_set(part: Part, passes: Int64Array) -> Part:
    capture = part.capture
    targets = draw_set(part.targets, capture.kind, passes[part.asked] % capture.draw_sets)
    return replace(part, targets=targets)


def batch_of(
    parts: Sequence[Part], layers: tuple[str, ...] = (), maps: tuple[str, ...] = (), aligner: Aligner | None = None
) -> Batch:
    """Return the batch of all samples of the parts, of one task, those of one dataset after those of another.

    With an `aligner` it is in the student's tokens.
    """
    if aligner is not None:
        return across_batch(parts, aligner, layers)
    if parts[0].capture.task != "next_token":
        return class_batch(parts)
    return join_batches([make_batch(p.samples, p.targets, p.capture.kind, layers, maps) for p in parts])


def microbatch(
    parts: Sequence[Part], rows: range, loss: LossConfig | None = None, aligner: Aligner | None = None
) -> Batch:
    """Return the batch of the asked samples `rows`, those of one dataset after those of another.

    With the states and attention that the loss asks for, and in the student's tokens where there is an `aligner`.
    """
    layers, maps = ((), ()) if loss is None else (loss.layers, loss.attention_layers)
    bounds = [np.searchsorted(part.asked, [rows.start, rows.stop]).tolist() for part in parts]
    own = [part.between(*ends) for part, ends in zip(parts, bounds, strict=True) if ends[0] < ends[1]]
    return batch_of(own, layers, maps, aligner)


def _read_ids(parts: Sequence[Part]) -> UInt8Array:
    """Return the ids of the samples that were read, in the order in which they were asked for."""
    order = np.argsort(np.concatenate([part.asked for part in parts]), kind="stable")
    return np.concatenate([part.samples.sample_id for part in parts])[order]


def state_widths(dataset: TargetReader, ids: UInt8Array, layers: list[str]) -> dict[str, int]:
    """Return the width of the teacher's states: layer → width."""
    hidden = dataset.parts(ids)[0].targets.hidden
    return {layer: state_width(hidden[layer]) for layer in layers}


def channel_variance(dataset: TargetReader, ids: UInt8Array, layers: list[str]) -> dict[str, Tensor]:
    """Return the teacher's variance of each channel over the given samples: layer → float32 [width].

    The samples are the same for every batch and number of ranks, so that neither changes the loss.
    """
    parts = dataset.parts(ids)
    return {
        layer: torch.cat([states_tensor(part.targets.hidden[layer]).float() for part in parts]).var(dim=0, correction=0)
        for layer in layers
    }
