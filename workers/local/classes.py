"""Classifiers as teachers: what they are called with, and which of their outputs is about which position.

Token classification has a row of classes for every token, sequence classification one for a whole sample, which then
has one supervised position. Samples hold one document each: an encoder looks both ways, and would look across borders.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from storage.errors import IntegrityError
from storage.identity import Task
from storage.samples import Int64Array, SampleBatch


@dataclass(frozen=True, eq=False)
class ClassifierInputs:
    """What a classifier is called with; N samples padded on the right to the longest, L."""

    input_ids: Tensor  # int64 [N, L]
    attention_mask: Tensor  # int64 [N, L], 1 for tokens
    pad_id: int
    """Occurs in no sample: decoders with a classifier's head find the last token by it."""

    @classmethod
    def of(cls, samples: SampleBatch, device: torch.device) -> "ClassifierInputs":
        """Pad samples; IntegrityError where one holds several documents."""
        if samples.document.any():
            raise IntegrityError("a classifier takes one document at a time; prepare the samples with data.pack false")
        lengths = samples.lengths()
        valid = np.arange(int(lengths.max()))[None, :] < lengths[:, None]
        used = np.unique(samples.tokens)
        pad_id = next(n for n in range(len(used) + 1) if n == len(used) or used[n] != n)
        ids = np.full(valid.shape, pad_id, dtype=np.int64)
        ids[valid] = samples.tokens
        mask = torch.from_numpy(valid.astype(np.int64))
        return cls(torch.from_numpy(ids).to(device), mask.to(device), pad_id)


def class_rows(samples: SampleBatch, task: Task) -> Int64Array:
    """Return, for each supervised position, the row of the flattened output that is about it, int64 [P].

    The output is [N·L, C] for token classification, [N, C] for sequence classification.
    """
    flat = np.flatnonzero(samples.supervised)
    owner = np.searchsorted(samples.offsets, flat, side="right") - 1
    if task == "sequence_classification":
        return owner
    return owner * int(samples.lengths().max()) + flat - samples.offsets[owner]
