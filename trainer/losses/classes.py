"""The terms on the classes of a classifier: few logits, each about its own position or a whole text.

A position without a label counts in the divergence alone.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from storage.samples import NO_LABEL
from trainer.losses.base import SparseTargets
from trainer.losses.full import FullTeacher
from trainer.losses.head import HeadTerms, logits_loss


def class_loss(
    logits: Tensor, targets: SparseTargets, terms: HeadTerms, teacher: FullTeacher | None = None
) -> tuple[Tensor, Tensor]:
    """Return what `logits_loss` returns for the logits of classes [P, C], whose labels may be NO_LABEL."""
    hard = cross_entropy(logits.float(), targets.label, ignore_index=NO_LABEL, reduction="sum")
    known = replace(targets, label=targets.label.clamp_min(0))
    soft, each = logits_loss(logits, known, replace(terms, cross_entropy=0.0), teacher)
    return terms.cross_entropy * hard + soft, torch.cat([hard.detach()[None], each[1:]])
