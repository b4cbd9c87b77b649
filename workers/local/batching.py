"""Samples → padded model inputs whose attention stays inside each packed document."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from storage.samples import Int64Array, SampleBatch


@dataclass(frozen=True, eq=False)
class ModelInputs:
    """What a causal language model is called with; N samples padded to the longest, L.

    `attention_mask` is None where plain causal attention is right: one document per window and no padding.
    """

    input_ids: Tensor  # int64 [N, L]
    position_ids: Tensor  # int64 [N, L], restarting at each document
    attention_mask: Tensor | None  # bool [N, 1, L, L], true where a query may look; or, additive, a float

    def additive(self, dtype: torch.dtype) -> "ModelInputs":
        """Return the inputs with a mask that eager attention adds to its scores: 0 or the least number."""
        if self.attention_mask is None:
            return self
        mask = torch.zeros(self.attention_mask.shape, dtype=dtype, device=self.attention_mask.device)
        mask.masked_fill_(~self.attention_mask, torch.finfo(dtype).min)
        return ModelInputs(self.input_ids, self.position_ids, mask)

    def to(self, device: torch.device) -> "ModelInputs":
        """Return the inputs on a device."""
        mask = None if self.attention_mask is None else self.attention_mask.to(device)
        return ModelInputs(self.input_ids.to(device), self.position_ids.to(device), mask)


def plan_batches(lengths: Int64Array, batch_tokens: int) -> Iterator[list[int]]:
    """Yield lists of sample indices, long samples first, each at most `batch_tokens` padded tokens (or one sample)."""
    batch: list[int] = []
    for index in np.argsort(-lengths, kind="stable").tolist():
        longest = int(lengths[batch[0]]) if batch else int(lengths[index])
        if batch and longest * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def padded_tokens(lengths: Int64Array, batch_tokens: int) -> int:
    """Return the tokens of all batches of `plan_batches`, padding included."""
    return sum(len(batch) * int(lengths[batch[0]]) for batch in plan_batches(lengths, batch_tokens))


def model_inputs(samples: SampleBatch) -> ModelInputs:
    """Pad samples to one length and build positions and, where needed, the block-diagonal causal mask."""
    lengths = samples.lengths()
    longest = int(lengths.max())
    valid = np.arange(longest)[None, :] < lengths[:, None]
    tokens = np.zeros(valid.shape, dtype=np.int64)
    document = np.full(valid.shape, -1, dtype=np.int64)
    tokens[valid], document[valid] = samples.tokens, samples.document
    index = np.arange(longest)[None, :]
    starts = np.ones(valid.shape, dtype=np.bool_)
    starts[:, 1:] = document[:, 1:] != document[:, :-1]
    positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    plain = bool(valid.all()) and not samples.document.any()
    mask = None if plain else _document_mask(torch.from_numpy(document))
    return ModelInputs(torch.from_numpy(tokens), torch.from_numpy(positions), mask)


def predicting_rows(samples: SampleBatch) -> tuple[Int64Array, Int64Array]:
    """Return, for each supervised position, the row of the flattened [N·L] output that predicts it, and its token.

    The state at token i−1 predicts token i; both int64 [P], sample by sample.
    """
    lengths, flat = samples.lengths(), np.flatnonzero(samples.supervised)
    owner = np.searchsorted(samples.offsets, flat, side="right") - 1
    rows = owner * int(lengths.max()) + flat - samples.offsets[owner] - 1
    return rows, samples.tokens[flat].astype(np.int64)


def _document_mask(document_NL: Tensor) -> Tensor:
    """Return bool [N, 1, L, L]: same document, not later. Padding is a document of its own, so no row is empty."""
    same = document_NL[:, :, None] == document_NL[:, None, :]
    return same.tril()[:, None]
