"""Batches in the tokens of a student that has another tokenizer than the teacher."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from storage.hidden import states_tensor
from storage.parts import Part
from storage.samples import Int32Array, Int64Array, SampleBatch, offsets_of
from trainer.alignment import Aligner
from trainer.batches import Batch, join_targets, lay_out, learnt_tokens, sparse_targets
from trainer.losses import SparseTargets
from trainer.losses.across import AcrossTargets


def across_batch(parts: Sequence[Part], aligner: Aligner, layers: tuple[str, ...] = ()) -> Batch:
    """Return a batch in the student's tokens, with the teacher's targets laid over them."""
    aligned = [aligner.align(part.samples.sample(n)) for part in parts for n in range(len(part.samples))]
    samples = SampleBatch.of([one.sample for one in aligned])
    layout = lay_out(samples)
    theirs = [
        sparse_targets(p.targets, p.samples.tokens[p.samples.supervised].astype(np.int64), p.capture.kind)
        for p in parts
    ]
    chunks = offsets_of([one.num_chunks for one in aligned])
    before = np.stack(
        [offsets_of([len(one.teacher_chunk) for one in aligned]), offsets_of(samples.num_supervised())], 1
    )
    pairs = [one.pairs + before[n] for n, one in enumerate(aligned)]
    across = AcrossTargets(
        teacher=join_targets(theirs),
        teacher_chunk=_numbered([one.teacher_chunk for one in aligned], chunks),
        student_chunk=_numbered([one.student_chunk for one in aligned], chunks),
        num_chunks=int(chunks[-1]),
        pairs=torch.from_numpy(np.concatenate(pairs)),
    )
    return Batch(
        ids=[sample_id for part in parts for sample_id in part.samples.ids()],
        sources=samples.source,
        input_ids=layout.input_ids,
        position_ids=layout.position_ids,
        attention=layout.attention,
        predictor=layout.predictor,
        targets=labels_alone(learnt_tokens(samples)),
        hidden={layer: torch.cat([states_tensor(part.targets.hidden[layer]) for part in parts]) for layer in layers},
        hidden_rows=None,
        across=across,
    )


def labels_alone(label: Int64Array) -> SparseTargets:
    """Return targets that hold nothing of a teacher."""
    count = len(label)
    return SparseTargets(
        kind="text",
        label=torch.from_numpy(label),
        entry_offsets=torch.zeros(count + 1, dtype=torch.int64),
        id=torch.zeros(0, dtype=torch.int64),
        estimate=torch.zeros(0),
        logprob=torch.zeros(0),
        drawn=torch.zeros(0, dtype=torch.bool),
        tail_mass=torch.ones(count),
        entropy=torch.zeros(count),
    )


def _numbered(chunks: Sequence[Int32Array], offsets: Int64Array) -> Tensor:
    """Number the chunks of all samples through."""
    each = [np.where(chunk >= 0, chunk + offset, -1) for chunk, offset in zip(chunks, offsets.tolist(), strict=False)]
    return torch.from_numpy(np.concatenate(each).astype(np.int64))
