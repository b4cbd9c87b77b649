"""Whole teacher distributions: exact divergences at any temperature.

They come from the cached hidden state `final` and the teacher's head, or from targets of kind `dense`. Teacher logits
exist for one chunk of positions at a time, and all that is made of them for few rows of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from storage.heads import Head
from trainer.losses.base import SparseTargets
from trainer.losses.rows import Divergence, FullRows

BLOCK_BYTES = 16 << 20
"""Bytes of float32 log-probabilities worked on at a time."""
LOG_FLOOR = -60.0
"""Log-probability of tokens that the teacher does not have, such as a student's padding."""


@dataclass(frozen=True, eq=False)
class FullTeacher:
    """Gives the teacher's logits over the student's vocabulary.

    Either `states` (input of the head, [P, width]) and `head`, or `dense` targets with all entries.
    """

    states: Tensor | None = None
    head: Head | None = None
    dense: SparseTargets | None = None

    def logits(self, first: int, last: int, vocabulary: int) -> Tensor:
        """Return logits of positions `first` to `last`, float32 [C, vocabulary]; −inf where the teacher has none."""
        if self.states is None or self.head is None:
            assert self.dense is not None
            part = self.dense.positions(first, last)
            out = part.logprob.new_full((last - first, vocabulary), -torch.inf)
            out[part.rows(), part.id] = part.logprob
            return out
        found = self.head.logits(self.states[first:last])
        missing = vocabulary - found.shape[1]
        return torch.nn.functional.pad(found, (0, missing), value=-torch.inf) if missing else found


def full_gradient(
    logits: Tensor, teacher: Tensor, divergences: Sequence[tuple[float, Divergence]], temperature: float
) -> list[Tensor]:
    """Overwrite teacher logits [C, V] with the gradient of T²·Σ weight·D(t_T, s_T) on the student's logits.

    D sees both at temperature T; T² keeps gradients as large as at T = 1 (Hinton et al. 2015).

    Returns:
        T² · the sum of each divergence over the chunk.
    """
    sums = [torch.zeros((), device=logits.device) for _ in divergences]
    size = max(1, BLOCK_BYTES // (4 * logits.shape[1]))
    for block, student in zip(torch.split(teacher, size), torch.split(logits, size), strict=True):
        log_t = torch.log_softmax(block / temperature, 1).clamp_min_(LOG_FLOOR)
        rows = FullRows(log_t, torch.log_softmax(student / temperature, 1))
        s = rows.log_s.exp()
        block.zero_()
        for n, (weight, divergence) in enumerate(divergences):
            value, slope = divergence.pointwise(rows)
            sums[n] += value.sum() * temperature**2
            block += (slope - s * rows.spread(rows.sum(slope))) * (weight * temperature)
    return sums
