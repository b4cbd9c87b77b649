"""A dataset as a torch `IterableDataset` of ready batches, split between ranks and DataLoader workers.

    batches = TargetBatches("s3://bucket/targets", batch_size=16, seed=0, rank=rank, world_size=world_size)
    for batch in DataLoader(batches, batch_size=None, num_workers=2, multiprocessing_context="forkserver"):
        ...

The order is a pure function of the seed, the epoch and what the dataset holds: neither the number of workers nor an
interruption changes it. A batch is a dict of tensors; see `tensors`.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from storage.errors import InputError
from storage.hidden import states_tensor
from storage.open_shard import Shard
from storage.permutation import permutation
from storage.reader import Dataset
from storage.samples import UInt8Array
from storage.shard_source import DEFAULT_READING, Reading


class TargetBatches(IterableDataset[dict[str, Tensor]]):
    """The batches of one rank, in order; every sample is in exactly one batch of one rank in each epoch."""

    def __init__(
        self,
        url: str,
        batch_size: int,
        seed: int | None = None,
        epoch: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        reading: Reading = DEFAULT_READING,
    ) -> None:
        """Take a part of the dataset at `url`; nothing is opened until it is read.

        Args:
            url: any fsspec URL.
            batch_size: samples in a batch; the last batch of an epoch may be smaller.
            seed: of the order; none means the order in which samples are stored, the fastest to read.
            epoch: gives each pass over the data an order of its own.
            rank: which part this process reads: batches `rank`, `rank + world_size`, ….
            world_size: parts there are.
            drop_last: leave the last batches out where not every rank would get a whole one.
            reading: checks and bounds; memory is divided between the workers.
        """
        if not (0 <= rank < world_size and batch_size > 0):
            raise InputError(f"rank {rank} of {world_size} and batch_size {batch_size}: ranks go from 0, sizes from 1")
        self.url, self.batch_size, self.seed, self.epoch = url, batch_size, seed, epoch
        self.rank, self.world_size, self.drop_last, self.reading = rank, world_size, drop_last, reading
        self.position = 0
        """Batches of this rank that were consumed in this epoch: set it before iterating to go on from there."""

    def state_dict(self) -> dict[str, int]:
        """Return what `load_state_dict` needs; the caller keeps `position` up to date."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a state."""
        self.epoch, self.position = state["epoch"], state["position"]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        reading = self.reading.divided(count)
        # Opened here, in the process that reads: connections do not survive a fork.
        dataset = Dataset.open(self.url, reading=reading)
        mine = self.batches(dataset.catalog.sample_ids)[self.position :]
        # A DataLoader takes from its workers in turn, which puts the batches back into this order.
        yield from map(tensors, dataset.iterate(mine[number::count]))

    def batches(self, sample_ids: UInt8Array) -> list[UInt8Array]:
        """Return the ids of all batches of this rank, of a dataset with these samples [N, 16]."""
        ids = sample_ids if self.seed is None else sample_ids[permutation(len(sample_ids), self.seed, self.epoch)]
        whole = len(ids) // (self.batch_size * self.world_size) * self.world_size
        num_batches = whole if self.drop_last else -(-len(ids) // self.batch_size)
        return [
            ids[n * self.batch_size : (n + 1) * self.batch_size] for n in range(self.rank, num_batches, self.world_size)
        ]


def tensors(shard: Shard) -> dict[str, Tensor]:
    """Return a batch of N samples, T tokens, P supervised positions and E entries as tensors, without a copy.

    `sample_id` uint8 [N, 16] · `offsets` int64 [N + 1], where each sample's tokens begin · `tokens` int32 [T] ·
    `supervised` bool [T] · `document` int16 [T] · `position_offsets` int64 [N + 1], where each sample's positions
    begin · `target_count` int32 [P] · `target_id` int32 [E] · `target_logprob` float16 [E] · `target_draws`
    uint8 [R, E], where the kind has draws · `tail_mass` float16 [P] · `teacher_nll`, `teacher_entropy` float32 [N] ·
    `hidden_<layer>` [P, width].
    """
    samples, targets = shard
    arrays: dict[str, NDArray[Any] | None] = {
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
    }
    found = {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items() if array is not None}
    return found | {f"hidden_{layer}": states_tensor(states) for layer, states in targets.hidden.items()}
