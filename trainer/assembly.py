"""From a spec to the module that is trained: student, frozen parts, projectors, the teacher's head."""

import torch

from storage.heads import load_head
from storage.hidden import positions_per_state
from storage.sample_set import SampleSet
from storage.union import DatasetUnion
from trainer.anatomy import examine
from trainer.engine import Place
from trainer.ewc import anchor
from trainer.feed import channel_variance
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
    anatomy = examine(model, list(mapped.values()), spec.train.zero_stage, spec.identity.capture.task)
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
        held = anchor(model, ewc, samples, dataset, spec.earlier, spec.train.seed, place)
    return DistilModel(model, loss, anatomy.head_path, transfer, weight, head, held).train()
