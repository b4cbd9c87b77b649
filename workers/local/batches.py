"""From samples to the padded tensors of one forward pass, and the planning of those passes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage.samples import Int64Array, SampleBatch


@dataclass(frozen=True, eq=False)
class ForwardBatch:
    """N windows padded on the right to L tokens.

    The state at flat index n·L + i − 1 predicts the supervised token i of window n; P positions in all, window by
    window.
    """

    input_ids: Tensor  # int64 [N, L]; padding is token 0
    position_ids: Tensor | None  # int64 [N, L], restarting at each document; none where no window is packed
    attention: Tensor | None  # bool [N, 1, L, L], true where attended; none where plain causal attention is right
    predictor: Tensor  # int64 [P], flat index of the state that predicts
    label: Tensor  # int64 [P], the token that was to be predicted

    def to(self, device: torch.device | str) -> "ForwardBatch":
        """Return the same batch on a device."""
        position_ids = None if self.position_ids is None else self.position_ids.to(device, non_blocking=True)
        attention = None if self.attention is None else self.attention.to(device, non_blocking=True)
        ids, predictor, label = (x.to(device, non_blocking=True) for x in (self.input_ids, self.predictor, self.label))
        return ForwardBatch(ids, position_ids, attention, predictor, label)


def plan_batches(lengths: Int64Array, batch_tokens: int) -> list[list[int]]:
    """Group samples of similar length so that number × longest stays within `batch_tokens`.

    Returns lists of sample numbers, longest samples first, each sample once. A sample longer than the limit gets a
    batch of its own.
    """
    order = np.argsort(-lengths, kind="stable")
    batches: list[list[int]] = []
    room = 0
    for number in order.tolist():
        if room == 0:
            batches.append([])
            room = max(1, batch_tokens // max(1, int(lengths[number])))
        batches[-1].append(number)
        room -= 1
    return batches


def make_forward_batch(samples: SampleBatch) -> ForwardBatch:
    """Pad samples to the longest of them.

    Windows of one document each need no mask: attention is causal and the padding lies to the right. A packed window
    gets an explicit block-diagonal mask and positions that restart at each document.
    """
    lengths = samples.lengths()
    width = int(lengths.max())
    columns = np.arange(samples.num_tokens) - np.repeat(samples.offsets[:-1], lengths)
    flat = np.repeat(np.arange(len(samples)) * width, lengths) + columns
    supervised = np.flatnonzero(samples.supervised)
    document = _padded(samples.document, flat, len(samples), width, fill=-1)
    packed = bool((samples.document != 0).any())
    return ForwardBatch(
        input_ids=torch.from_numpy(_padded(samples.tokens, flat, len(samples), width)),
        position_ids=torch.from_numpy(_restarting_positions(document)) if packed else None,
        attention=_block_diagonal(torch.from_numpy(document)) if packed else None,
        predictor=torch.from_numpy(flat[supervised] - 1),
        label=torch.from_numpy(samples.tokens[supervised].astype(np.int64)),
    )


def padding_fraction(lengths: Int64Array, batches: Sequence[Sequence[int]]) -> float:
    """Return which share of the padded tokens of planned batches is padding."""
    padded = sum(len(batch) * int(lengths[list(batch)].max()) for batch in batches)
    return 1.0 - float(lengths.sum()) / padded if padded else 0.0


def _restarting_positions(document: Int64Array) -> Int64Array:
    """Return each token's distance from the start of its document, [N, L]."""
    starts = np.ones(document.shape, dtype=np.bool_)
    starts[:, 1:] = document[:, 1:] != document[:, :-1]
    column = np.arange(document.shape[1])
    return np.asarray(column - np.maximum.accumulate(np.where(starts, column, 0), axis=1), dtype=np.int64)


def _block_diagonal(document: Tensor) -> Tensor:
    """Return which earlier tokens of its own document each token attends to, bool [N, 1, L, L]."""
    length = document.shape[1]
    same = document[:, None, :, None] == document[:, None, None, :]
    return same & torch.ones(length, length, dtype=torch.bool).tril()


def _padded(
    values: NDArray[np.generic], flat: Int64Array, num_rows: int, width: int, fill: int = 0
) -> NDArray[np.int64]:
    out = np.full(num_rows * width, fill, dtype=np.int64)
    out[flat] = values
    return out.reshape(num_rows, width)
