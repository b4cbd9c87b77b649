"""What ranks agree on: whether a step was read, which samples it held, and which error stops them all alike."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import storage.errors
from storage.errors import LecternError, WorkerError
from storage.samples import UInt8Array
from trainer.engine import Place
from trainer.feed import StepData


class StoppedError(Exception):
    """Raised on all ranks alike, so that none is left waiting for another; anything else restarts the ranks."""

    def __init__(self, error: LecternError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True, eq=False)
class StepCounts:
    """What all ranks read for one step."""

    failed: bool
    due: bool
    """Whether a rank would ask for nodes that are about to go, see `trainer.preemption`."""
    num_supervised: int
    num_tokens: int
    num_own_tokens: int
    sample_id: UInt8Array  # [global batch, 16], in the planned order


def gather_counts(data: StepData | None, num_samples: int, place: Place, due: bool = False) -> StepCounts:
    """Exchange counts and sample ids between the ranks; `data` is none on a rank that could not read."""
    mine = np.zeros(5 + 2 * num_samples, dtype=np.int64)
    mine[4] = due
    if data is None:
        mine[0] = 1
    else:
        mine[1:4] = data.num_supervised, data.num_tokens, data.num_own_tokens
        mine[5:] = np.ascontiguousarray(data.sample_id).reshape(-1).view(np.int64)
    tensor = torch.from_numpy(mine).to(place.torch_device)
    parts = [torch.empty_like(tensor) for _ in range(place.world_size)]
    dist.all_gather(parts, tensor)
    table = np.stack([part.cpu().numpy() for part in parts])  # [ranks, 5 + 2 · samples]
    ids = table[:, 5:].reshape(place.world_size, num_samples, 2).transpose(1, 0, 2)  # rank r holds r, r + R, …
    return StepCounts(
        failed=bool(table[:, 0].any()),
        due=bool(table[:, 4].any()),
        num_supervised=int(table[:, 1].sum()),
        num_tokens=int(table[:, 2].sum()),
        num_own_tokens=int(table[:, 3].sum()),
        sample_id=np.ascontiguousarray(ids).view(np.uint8).reshape(-1, 16),
    )


@contextmanager
def together() -> Iterator[None]:
    """Let all ranks stop with the same error when one of them fails inside. Collective."""
    mine: LecternError | None = None
    try:
        yield
    except LecternError as error:
        mine = error
    first = first_error(mine)
    if first is not None:
        raise StoppedError(first)


def first_error(mine: LecternError | None) -> LecternError | None:
    """Return the error of the first rank that has one, on every rank. Collective."""
    for named in everyones(None if mine is None else (type(mine).__name__, str(mine))):
        if named is not None:
            return rebuild_error(*named)
    return None


def rebuild_error(name: str, message: str) -> LecternError:
    """Return the error of our tree that a rank has named."""
    kind = getattr(storage.errors, name, WorkerError)
    assert issubclass(kind, LecternError)
    return kind(message)


def not_finite(what: str, step: int, mine: list[bytes]) -> Exception:
    """Return the error that stops a run whose loss or gradient is not a number. Collective."""
    bad = [sample.hex() for part in everyones(mine) for sample in part]
    shown = ", ".join(bad[:4]) + (f" and {len(bad) - 4} more" if len(bad) > 4 else "")
    return StoppedError(
        WorkerError(
            f"{what} of step {step + 1} is not finite; samples {shown or 'unknown'}. The last checkpoint is kept: "
            "lower train.learning_rate or train.clip_norm, or train in float32, in another --run-dir"
        )
    )


def everyones(mine: Any) -> list[Any]:
    """Return what each rank gave, in the order of the ranks. Collective."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone
