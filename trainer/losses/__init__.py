"""Distillation losses; `trainer.served` tells which kinds of targets each one takes."""

from trainer.losses.base import EntryView, LossParts, SparseTargets, first_choice
from trainer.losses.choice import DIVERGENCES, chosen_divergence
from trainer.losses.classes import class_loss
from trainer.losses.forward_kl import ForwardKL
from trainer.losses.full import FullTeacher
from trainer.losses.head import HeadTerms, head_loss, logits_loss
from trainer.losses.rows import Divergence

__all__ = [
    "DIVERGENCES",
    "Divergence",
    "EntryView",
    "ForwardKL",
    "FullTeacher",
    "HeadTerms",
    "LossParts",
    "SparseTargets",
    "chosen_divergence",
    "class_loss",
    "first_choice",
    "head_loss",
    "logits_loss",
]
