"""Classifiers, teachers and students: what they are called with, and which output is about which position.

Token classification has a row of classes for every token, sequence classification one for a whole sample, which then
has one supervised position. Samples hold one document each: an encoder looks both ways, and would look across borders.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from storage.errors import IntegrityError
from storage.identity import Task
from storage.samples import Int64Array, SampleBatch

AUTO_MODELS: Mapping[Task, str] = {
    "next_token": "AutoModelForCausalLM",
    "token_classification": "AutoModelForTokenClassification",
    "sequence_classification": "AutoModelForSequenceClassification",
}
CALLED: Mapping[Task, str] = {
    "next_token": "causal language model",
    "token_classification": "classifier of tokens",
    "sequence_classification": "classifier of texts",
}
"""What a model of each task is called in messages."""


@dataclass(frozen=True, eq=False)
class ClassifierInputs:
    """What a classifier is called with; N samples padded on the right to the longest, L."""

    input_ids: Tensor  # int64 [N, L]
    attention_mask: Tensor  # int64 [N, L], 1 for tokens
    pad_id: int
    """Occurs in no sample: decoders with a classifier's head find the last token by it."""

    def to(self, device: torch.device | str) -> "ClassifierInputs":
        """Return the same inputs on a device."""
        return ClassifierInputs(self.input_ids.to(device), self.attention_mask.to(device), self.pad_id)

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


@contextmanager
def padded_with(model: nn.Module, pad_id: int) -> Iterator[None]:
    """Have a decoder with a classifier's head find the last token by this padding while the context is open."""
    config: Any = model.config
    before, config.pad_token_id = getattr(config, "pad_token_id", None), pad_id
    try:
        yield
    finally:
        config.pad_token_id = before


def auto_model(task: Task) -> Any:
    """Return the class of transformers that loads models of a task."""
    import transformers

    return getattr(transformers, AUTO_MODELS[task])


def class_rows(samples: SampleBatch, task: Task) -> Int64Array:
    """Return, for each supervised position, the row of the flattened output that is about it, int64 [P].

    The output is [N·L, C] for token classification, [N, C] for sequence classification.
    """
    flat = np.flatnonzero(samples.supervised)
    owner = np.searchsorted(samples.offsets, flat, side="right") - 1
    if task == "sequence_classification":
        return owner
    return owner * int(samples.lengths().max()) + flat - samples.offsets[owner]
