"""From a spec to the module that is trained: student, frozen parts, projectors, the teacher's head."""

import math
from collections.abc import Mapping

import torch

from storage.errors import InputError
from storage.heads import load_head
from storage.hidden import positions_per_state
from storage.sample_set import SampleSet
from storage.union import DatasetUnion
from trainer.anatomy import Anatomy, examine
from trainer.engine import Place
from trainer.ewc import anchor
from trainer.feed import channel_variance, state_widths
from trainer.loss_config import LossConfig
from trainer.losses.hidden import HiddenTransfer
from trainer.model import DistilModel
from trainer.sampler import PlannedOrder
from trainer.spec import LoopSpec
from trainer.student import build_student, prepare_student

VARIANCE_SAMPLES = 32
"""Samples that the teacher's channel variance is measured on."""


def build_module(
    spec: LoopSpec, samples: SampleSet, dataset: DatasetUnion, order: PlannedOrder, place: Place
) -> DistilModel:
    """Return the module of a run, alike on all ranks; InputError when spec, student and dataset do not fit."""
    model = build_student(spec.student, spec.student_folder, spec.identity)
    prepare_student(model, spec.student, spec.train.loss)
    if spec.train.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    loss = spec.train.loss
    mapped = loss.hidden_map if loss.transfers else {}
    anatomy = examine(model, list(loss.student_layers), spec.train.zero_stage, spec.identity.capture.task)
    if loss.relates:
        require_heads(loss, anatomy, state_widths(dataset, order.pool_start(1), list(loss.relation_map)))
    if loss.adaptive == "gradient" and loss.student_layers and anatomy.head_path == "model":
        raise InputError(
            "train.loss.adaptive gradient compares terms on hidden states with those on the vocabulary at the input of "
            "the output head, but this student's logits are more than a product with it; set adaptive to uncertainty"
        )
    transfer = None
    if mapped:
        variance = channel_variance(dataset, order.pool_start(VARIANCE_SAMPLES), list(mapped))
        widths = {layer: (anatomy.widths[name], len(variance[layer])) for layer, name in mapped.items()}
        with torch.random.fork_rng():
            torch.manual_seed(spec.student.seed)
            transfer = HiddenTransfer(widths, variance, loss.hidden_distance, loss.hidden_norm)
    weight = positions_per_state(spec.identity.capture.hidden_every)
    head = None
    if loss.distils and loss.exact:
        head = load_head(dataset.datasets[0].store, spec.identity.fingerprint).to(place.torch_device)
    ewc, held = spec.train.ewc, None
    if ewc is not None:
        held = anchor(model, ewc, samples, dataset, spec.earlier, spec.train.seed, place, spec.aligner)
    return DistilModel(model, loss, anatomy.head_path, transfer, weight, head, held).train()


def require_heads(loss: LossConfig, anatomy: Anatomy, teacher_widths: Mapping[str, int]) -> None:
    """Raise InputError unless the states of every mapped layer can be cut into the relation heads."""
    for layer, own in loss.relation_map.items():
        widths = (teacher_widths[layer], anatomy.widths[own])
        if any(width % loss.relation_heads for width in widths):
            fitting = math.gcd(*widths)
            raise InputError(
                f"train.loss.relation_heads {loss.relation_heads} does not divide the widths of {layer} ({widths[0]}) "
                f"and of the student's {own} ({widths[1]}); use a divisor of {fitting}"
            )
