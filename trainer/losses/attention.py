"""Attention transfer: the student's attention, averaged over its heads, against the teacher's.

The teacher's rows are cached for the positions that keep states: of the weights with which a token attends to those of
its document up to itself. A row is a distribution, so the distance is the sum of squared differences over it (Zagoruyko
and Komodakis 2017; as in TinyBERT, Jiao et al. 2020), at most 2.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


def row_entries(predictor: Tensor, count: Tensor, width: int) -> Tensor:
    """Return where the entries of all kept rows lie in flattened maps [N, L, L], int64 [A].

    Args:
        predictor: int64 [P], flat index n·L + q of the token that attends.
        count: int64 [P], tokens that each row covers, the last of them the one that attends; 0 where none is kept.
        width: L.
    """
    query = torch.repeat_interleave(predictor, count)
    first = predictor % width + 1 - count
    begin = torch.repeat_interleave(count.cumsum(0) - count, count)
    within = torch.arange(len(query), device=query.device) - begin
    return query * width + torch.repeat_interleave(first, count) + within


def attention_distance(
    student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], predictor: Tensor, count: Tensor, weight: float = 1.0
) -> Tensor:
    """Return the distance summed over positions, averaged over layers, a float32 scalar.

    Args:
        student: dataset layer → the mapped attention, [N, heads, L, L].
        teacher: dataset layer → rows of the kept positions, joined, [A].
        predictor: int64 [P], see `row_entries`.
        count: int64 [P], see `row_entries`.
        weight: how many positions each kept one stands for, so that the sum is that over all P in expectation.
    """
    total = torch.zeros((), dtype=torch.float32, device=predictor.device)
    for layer, maps in student.items():
        mean = maps.float().mean(1)
        rows = mean.reshape(-1).index_select(0, row_entries(predictor, count, mean.shape[-1]))
        total = total + (rows - teacher[layer].float()).square().sum()
    return total * weight / len(student)
