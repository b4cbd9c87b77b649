"""Batches whose targets are classes, of texts or of tokens."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from storage.classes import ClassifierInputs, class_rows
from storage.parts import Part
from storage.samples import NO_LABEL, BoolArray, Int64Array, SampleBatch
from trainer.batches import Batch, join_targets, sparse_targets
from trainer.losses import first_choice


def class_batch(parts: Sequence[Part]) -> Batch:
    """Return a batch whose targets are classes. IntegrityError when a sample holds several documents.

    A position's label is what the data says; where it says nothing of a whole sample, the teacher's likeliest class.
    """
    samples = SampleBatch.concat([part.samples for part in parts])
    inputs = ClassifierInputs.of(samples, torch.device("cpu"))
    label = torch.from_numpy(np.concatenate([given_labels(part) for part in parts]))
    said = torch.from_numpy(np.concatenate([is_labelled(part) for part in parts]))
    known = join_targets([sparse_targets(p.targets, given_labels(p), p.capture.kind) for p in parts])
    return Batch(
        ids=samples.ids(),
        sources=samples.source,
        input_ids=inputs.input_ids,
        position_ids=None,
        attention=None,
        predictor=torch.from_numpy(class_rows(samples, parts[0].capture.task)),
        targets=known if said.all() else replace(known, label=torch.where(said, label, first_choice(known)[0])),
        hidden={},
        hidden_rows=None,
        classifier=inputs,
    )


def given_labels(part: Part) -> Int64Array:
    """Return the class that the data gives each supervised position, int64 [P]; NO_LABEL where it gives none."""
    counts = part.samples.num_supervised()
    known = part.label or [None] * len(counts)
    each = [np.full(n, NO_LABEL) if one is None else one for one, n in zip(known, counts.tolist(), strict=True)]
    return np.concatenate(each).astype(np.int64)


def is_labelled(part: Part) -> BoolArray:
    """Return which supervised positions belong to samples that the data says any class of, bool [P]."""
    counts = part.samples.num_supervised()
    known = [one is not None for one in part.label] if part.label else np.zeros(len(counts), dtype=np.bool_)
    return np.repeat(np.asarray(known, dtype=np.bool_), counts)
