"""Distillation losses. Each declares the kinds of targets that it accepts."""

from trainer.losses.base import EntryView, LossParts, SparseLoss, SparseTargets, require_kind
from trainer.losses.head import HeadTerms, head_loss, logits_loss
from trainer.losses.sparse_kl import ForwardKL

SPARSE_LOSSES: list[SparseLoss] = [ForwardKL()]
"""Every divergence that a config can ask for."""

__all__ = [
    "SPARSE_LOSSES",
    "EntryView",
    "ForwardKL",
    "HeadTerms",
    "LossParts",
    "SparseLoss",
    "SparseTargets",
    "head_loss",
    "logits_loss",
    "require_kind",
]
