"""Adaptive mixing: sources on which the student lags behind the teacher get larger shares (DDK, Liu et al. 2024).

Every so many steps the student's loss on held-out windows of each source is compared with the teacher's cached one.
With r the shares so far, ψ_i = r_i · exp(PPL_student / PPL_teacher), and the new shares are α·ψ_i / Σψ + (1 − α) / N:
the even part keeps every source alive. Decisions are part of the checkpoint, so a resumed run keeps the order.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from storage.errors import InputError
from storage.sample_set import SampleSet
from storage.union import DatasetUnion
from trainer.batches import take_microbatches
from trainer.collective import everyones
from trainer.config import TrainConfig
from trainer.curriculum_config import AdaptiveConfig
from trainer.engine import Place
from trainer.feed import microbatch
from trainer.sampler import PlannedOrder, rank_slice

Float64Array = NDArray[np.float64]


@dataclass(frozen=True)
class Decision:
    """Shares from a step on, and the losses that led to them (nats per supervised token)."""

    step: int
    shares: dict[str, float]
    student: dict[str, float]
    teacher: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def next_shares(shares: Float64Array, student: Float64Array, teacher: Float64Array, smoothing: float) -> Float64Array:
    """Return the shares that follow from losses on each source, all [sources]; a share of 0 stays 0. See the module."""
    there = shares > 0
    # exp of a ratio of perplexities overflows early in training, so the largest is taken out first.
    ratio = np.exp(np.minimum(student - teacher, 60.0))
    log_psi = np.where(there, np.log(np.where(there, shares, 1.0)) + ratio, -np.inf)
    psi = np.exp(log_psi - log_psi.max())
    return np.asarray(smoothing * psi / psi.sum() + (1.0 - smoothing) * there / there.sum())


def heldout_ids(samples: SampleSet, adaptive: AdaptiveConfig, dataset: DatasetUnion) -> dict[str, list[bytes]]:
    """Return the held-out windows of each source that are compared: those with the smallest ids, as in evaluation.

    Raises:
        InputError: the dataset has none of a source.
    """
    found = {name: dataset.held(sorted(samples.ids(samples.rows("heldout", name)))) for name in samples.source_names}
    empty = [name for name, ids in found.items() if not ids]
    if empty:
        raise InputError(
            f"curriculum.adaptive compares held-out samples, but {dataset.shown()} has none of {empty[0]!r}; raise "
            "data.heldout_fraction and run the capture"
        )
    return {name: ids[: adaptive.samples] for name, ids in found.items()}


def apply(order: PlannedOrder, decisions: Sequence[Mapping[str, Any]]) -> None:
    """Plan the steps after each decision anew; the steps before it stay as they were."""
    shares = order.shares.copy()
    for decision in decisions:
        shares[decision["step"] :] = [decision["shares"][name] for name in order.sources]
    if decisions:
        order.replan(shares)


def segments(first: int, last: int, every: int | None) -> Iterator[tuple[int, int]]:
    """Yield the runs of steps between which the mixture may change; one run without `every`."""
    while first < last:
        end = last if every is None else min(last, (first // every + 1) * every)
        yield first, end
        first = end


class Mixer:
    """Decides on the shares of a run, on all ranks alike."""

    def __init__(
        self, adaptive: AdaptiveConfig, samples: SampleSet, dataset: DatasetUnion, train: TrainConfig, place: Place
    ) -> None:
        self._adaptive, self._dataset, self._train, self._place = adaptive, dataset, train, place
        self._ids = heldout_ids(samples, adaptive, dataset)
        self.every = adaptive.every

    def decide(self, engine: Any, order: PlannedOrder, step: int) -> Decision:
        """Return the shares from `step` on. Collective; takes as many forward passes on every rank."""
        student, teacher = self._losses(engine)
        behind, target = (np.array([losses[name] for name in order.sources]) for losses in (student, teacher))
        shares = next_shares(order.shares[step], behind, target, self._adaptive.smoothing)
        return Decision(step, dict(zip(order.sources, shares.tolist(), strict=True)), student, teacher)

    def _losses(self, engine: Any) -> tuple[dict[str, float], dict[str, float]]:
        engine.eval()
        with torch.no_grad():
            sums = {name: self._source(engine, ids) for name, ids in self._ids.items()}
        engine.train()
        # Summed in the order of the ranks, so that all have the same bits.
        parts = everyones(sums)
        total = {name: np.sum([part[name] for part in parts], axis=0) for name in sums}
        student, teacher = ({name: float(row[n] / row[2]) for name, row in total.items()} for n in (0, 1))
        return student, teacher

    def _source(self, engine: Any, ids: list[bytes]) -> Float64Array:
        """Return this rank's sums on a source: student's loss, teacher's loss, supervised tokens."""
        mine, size = ids[rank_slice(len(ids), self._place.rank, self._place.world_size)], self._train.micro_batch_size
        sums = np.zeros(3)
        batches = [mine[rows.start : rows.stop] for rows in take_microbatches(len(mine), size)]
        for batch in batches:
            sums += self._batch(engine, batch)
        # Under ZeRO 3 all ranks must run as many passes: one with fewer samples runs some for nothing.
        passes = math.ceil(math.ceil(len(ids) / self._place.world_size) / size)
        for _ in range(len(batches), passes):
            self._batch(engine, ids[:1])
        return sums

    def _batch(self, engine: Any, ids: list[bytes]) -> Float64Array:
        parts = self._dataset.parts(ids)
        batch = microbatch(parts, range(len(ids)), self._train.loss)
        _, terms = engine(batch.to(self._place.torch_device))
        teacher = sum(float(part.targets.teacher_nll @ part.samples.num_supervised()) for part in parts)
        return np.array([float(terms[0]), teacher, batch.num_supervised])
