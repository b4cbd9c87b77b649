"""Relations between the positions of a document, as MiniLMv2 transfers them (Wang et al. 2021).

States A [n, width] of a document's positions are cut into `heads` relation heads A_h of width d; the relation of a head
is softmax(A_h·A_hᵀ/√d) over the document's positions. The distance is KL(teacher ‖ student) of each row, averaged over
the heads. Teacher and student may differ in width and number of attention heads, and nothing is projected: with the
outputs of a layer's query, key and value projections as states this is MiniLMv2, with hidden states the same on them.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


def relation_distance(
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    heads: int,
    group: Tensor,
    rows: Tensor | None = None,
    weight: float = 1.0,
) -> Tensor:
    """Return the distance summed over positions, averaged over layers, a float32 scalar.

    Args:
        student: dataset layer → the mapped student states, [P, student width].
        teacher: dataset layer → teacher states, [K, teacher width].
        heads: relation heads; both widths must be multiples.
        group: int64 [P, 2], sample and document of each position, rising.
        rows: int64 [K], the positions that the teacher's states belong to; none where K = P.
        weight: how many positions each kept one stands for, so that the sum is that over all P in expectation.
    """
    own = group if rows is None else group.index_select(0, rows)
    place, together = _layout(own)
    total = torch.zeros((), dtype=torch.float32, device=group.device)
    for layer, states in student.items():
        kept = states if rows is None else states.index_select(0, rows)
        log_s, log_t = (_log_relation(one, heads, place, together) for one in (kept, teacher[layer]))
        total = total + torch.where(together[:, None], log_t.exp() * (log_t - log_s), 0.0).sum()
    return total * weight / (heads * len(student))


def _layout(group: Tensor) -> tuple[Tensor, Tensor]:
    """Return where each position stands in a padded [N, L], int64 [K], and which pairs share a document, [N, L, L]."""
    _, sample, count = torch.unique_consecutive(group[:, 0], return_inverse=True, return_counts=True)
    width = int(count.max()) if len(count) else 0
    place = sample * width + torch.arange(len(group), device=group.device) - (count.cumsum(0) - count)[sample]
    document = group.new_full((len(count) * width,), -1).index_copy_(0, place, group[:, 1]).view(len(count), width)
    together = (document[:, :, None] == document[:, None, :]) & (document >= 0)[:, :, None]
    return place, together


def _log_relation(states: Tensor, heads: int, place: Tensor, together: Tensor) -> Tensor:
    """Return the logarithm of each relation, float32 [N, heads, L, L]; 0 outside documents."""
    num, width = together.shape[:2]
    padded = states.new_zeros((num * width, states.shape[1]), dtype=torch.float32).index_copy(0, place, states.float())
    split = padded.view(num, width, heads, -1).transpose(1, 2)
    scores = split @ split.transpose(2, 3) / split.shape[-1] ** 0.5
    # Rows of padding have no pair: they are left even, and count nowhere.
    even = ~together.any(-1, keepdim=True)
    relation = scores.masked_fill(~(together | even)[:, None], -torch.inf).log_softmax(-1)
    return torch.where(together[:, None], relation, 0.0)
