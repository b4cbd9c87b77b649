"""The torch dataset: one order for any number of workers, no overlap between ranks, exact resume."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from storage.errors import InputError
from storage.reader import Dataset
from storage.torch_dataset import TargetBatches
from storage.writer import DatasetWriter


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_identity: Any, make_unit: Any) -> str:
    """Return a dataset of 30 samples in 5 units."""
    url = str(tmp_path_factory.mktemp("dataset"))
    identity = make_identity(hidden=["final"], hidden_dtype="bfloat16")
    writer = DatasetWriter.create(url, identity)
    for n in range(5):
        writer.commit(f"u{n}", *make_unit(identity, 6, n), attempt=1)
    return url


def ids(batches: Any) -> list[list[bytes]]:
    return [[bytes(row) for row in batch["sample_id"].numpy()] for batch in batches]


@pytest.mark.parametrize("seed", [None, 3])
def test_workers_give_the_order_of_one_process(folder: str, seed: int | None) -> None:
    for rank in range(2):
        batches = TargetBatches(folder, batch_size=4, seed=seed, rank=rank, world_size=2)
        alone = ids(batches)
        loader = DataLoader(batches, batch_size=None, num_workers=2, multiprocessing_context="fork")
        assert ids(loader) == alone


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_the_samples_without_overlap(folder: str, world_size: int) -> None:
    everything = {bytes(row) for row in Dataset.open(folder).catalog.sample_ids}
    orders = []
    for epoch in (0, 1):
        parts = [
            ids(TargetBatches(folder, batch_size=4, seed=0, epoch=epoch, rank=rank, world_size=world_size))
            for rank in range(world_size)
        ]
        flat = [sample for part in parts for batch in part for sample in batch]
        assert len(flat) == 30
        assert set(flat) == everything
        orders.append(flat)
    assert orders[0] != orders[1]
    whole = [
        ids(TargetBatches(folder, batch_size=4, seed=0, rank=rank, world_size=world_size, drop_last=True))
        for rank in range(world_size)
    ]
    assert {len(part) for part in whole} == {7 // world_size}
    assert all(len(batch) == 4 for part in whole for batch in part)


def test_a_resumed_pass_goes_on_exactly(folder: str) -> None:
    whole = ids(TargetBatches(folder, batch_size=4, seed=1, epoch=2))
    for position in range(len(whole) + 1):
        batches = TargetBatches(folder, batch_size=4, seed=1)
        batches.load_state_dict({"epoch": 2, "position": position})
        assert ids(batches) == whole[position:]
        assert batches.state_dict() == {"epoch": 2, "position": position}


def test_tensors_are_those_of_the_dataset(folder: str) -> None:
    dataset = Dataset.open(folder)
    (batch,) = TargetBatches(folder, batch_size=30)
    samples, targets = dataset.read(dataset.catalog.sample_ids)
    for name, array in {
        "sample_id": samples.sample_id,
        "offsets": samples.offsets,
        "tokens": samples.tokens,
        "supervised": samples.supervised,
        "document": samples.document,
        "position_offsets": targets.offsets,
        "target_count": targets.count,
        "target_id": targets.id,
        "target_logprob": targets.logprob,
        "target_draws": targets.draws,
        "tail_mass": targets.tail_mass,
        "teacher_nll": targets.teacher_nll,
        "teacher_entropy": targets.teacher_entropy,
    }.items():
        np.testing.assert_array_equal(batch[name].numpy(), array, err_msg=name)
    assert batch["hidden_final"].dtype == torch.bfloat16
    np.testing.assert_array_equal(batch["hidden_final"].view(torch.uint16).numpy(), targets.hidden["final"])
    batch["tokens"] += 1  # its memory is its own
    again, _ = dataset.read(dataset.catalog.sample_ids)
    np.testing.assert_array_equal(again.tokens, samples.tokens)


@pytest.mark.parametrize("wrong", [{"rank": 2, "world_size": 2}, {"rank": -1}, {"batch_size": 0}])
def test_impossible_parts_are_refused(folder: str, wrong: dict[str, int]) -> None:
    make: Callable[..., TargetBatches] = TargetBatches
    with pytest.raises(InputError, match="ranks go from 0, sizes from 1"):
        make(folder, **{"batch_size": 4, **wrong})


def test_nothing_is_opened_until_it_is_read(tmp_path: Path) -> None:
    batches = TargetBatches(str(tmp_path / "nowhere"), batch_size=4)
    with pytest.raises(InputError, match="no dataset at"):
        next(iter(batches))
