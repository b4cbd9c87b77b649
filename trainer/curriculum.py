"""The mixing curriculum: which share of every step each source is planned to have, and the order that follows."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from storage.difficulty import difficulty
from storage.errors import InputError
from storage.sample_set import SampleSet
from storage.samples import UInt8Array
from storage.targets import Float32Array
from storage.union import DatasetUnion
from trainer.config import TrainConfig
from trainer.curriculum_config import CurriculumConfig
from trainer.sampler import PlannedOrder
from trainer.schedules import ramp

Float64Array = NDArray[np.float64]


def planned_order(
    samples: SampleSet,
    curriculum: CurriculumConfig,
    train: TrainConfig,
    dataset: DatasetUnion | None = None,
    left_out: Sequence[bytes] = (),
    earlier: Mapping[str, float] | None = None,
) -> PlannedOrder:
    """Return the planned order of a run over the training samples but those `left_out`.

    `dataset` tells how hard they are, where the curriculum asks for it; `earlier` is what stages before have used, see
    `planned_shares`. InputError when the mixture cannot be met.
    """
    hard = curriculum.difficulty
    assert hard is None or dataset is not None, "an order by difficulty needs the dataset"
    without = frozenset(left_out)
    ids = {
        name: [sample_id for sample_id in samples.ids(samples.rows("train", name)) if sample_id not in without]
        for name in samples.source_names
    }
    shares = planned_shares(curriculum, {name: len(pool) for name, pool in ids.items()}, train.steps, earlier)

    def measure(sample_ids: UInt8Array) -> Float32Array:
        assert hard is not None and dataset is not None
        return difficulty(dataset, sample_ids, hard.by)

    order = PlannedOrder(ids, shares, train.global_batch_size, train.seed, hard, measure)
    order.check_epochs(curriculum.max_epochs)
    return order


def planned_shares(
    curriculum: CurriculumConfig, num_samples: Mapping[str, int], steps: int, earlier: Mapping[str, float] | None = None
) -> Float64Array:
    """Return the share of each source at each step, [steps, sources]; rows sum to 1.

    `num_samples` gives the training samples of each source and fixes the order of the columns. Shares move from
    `start` at the fraction `begin` of the steps to `end` at the fraction `finish`, or through the rows of `table`;
    without both they follow the number of samples. Of `earlier`, how many samples of each source the stages before
    have used, those that this curriculum names nowhere are replayed: together they get `replay` of every step.

    Raises:
        InputError: the curriculum names a source that is not there, or one without training samples.
    """
    names = list(num_samples)
    at = np.arange(steps, dtype=np.float64) / max(steps - 1, 1)
    if curriculum.table:
        shares = _between(curriculum.table, names, at)
    else:
        start = _row(curriculum.start or dict(num_samples), names, "start")
        end = _row(curriculum.end, names, "end") if curriculum.end else start
        shares = start + ramp(curriculum.shape, curriculum.begin, curriculum.finish, at)[:, None] * (end - start)
    shares = _with_replay(shares, np.array([(earlier or {}).get(name, 0.0) for name in names]), curriculum.replay)
    for column, name in enumerate(names):
        if num_samples[name] == 0 and shares[:, column].any():
            raise InputError(
                f"the curriculum gives {name!r} a share, but it has no training samples; "
                "add text to that source or take it out of the curriculum"
            )
    return shares


def _with_replay(shares: Float64Array, earlier: Float64Array, replay: float) -> Float64Array:
    """Give a part of every step to the sources that were used before and have no share now."""
    replayed = np.where(shares.any(axis=0), 0.0, earlier)
    if not replayed.any():
        return shares
    return np.asarray((1.0 - replay) * shares + replay * replayed / replayed.sum())


def _between(table: Mapping[float, Mapping[str, float]], names: list[str], at: Float64Array) -> Float64Array:
    """Return the table's shares at fractions `at` of the steps, linear between its rows, [len(at), sources]."""
    knots = sorted(table)
    rows = np.stack([_row(table[knot], names, f"table.{knot:g}") for knot in knots])
    return np.stack([np.interp(at, knots, column) for column in rows.T], axis=1)


def _row(shares: Mapping[str, float], names: list[str], field: str) -> Float64Array:
    unknown = sorted(set(shares) - set(names))
    if unknown:
        raise InputError(f"curriculum.{field} names {unknown[0]!r}; the sources are {', '.join(names)}")
    row = np.array([shares.get(name, 0.0) for name in names], dtype=np.float64)
    if row.sum() <= 0:
        raise InputError(f"no source has training samples ({', '.join(names)}); lower data.heldout_fraction")
    return np.asarray(row / row.sum())
