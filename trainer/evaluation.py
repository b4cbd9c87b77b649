"""Held-out evaluation from the cache: how well a student predicts the text, and how close it is to the teacher."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from storage.classes import CALLED, auto_model
from storage.errors import InputError
from storage.identity import Task
from storage.parts import Part, TargetReader
from trainer.alignment import Aligned, Aligner
from trainer.batches import make_batch
from trainer.class_batches import is_labelled
from trainer.feed import batch_of
from trainer.losses import SparseTargets, first_choice
from trainer.losses.rows import MIN_TAIL
from trainer.model import predictor_logits
from trainer.totals import Bins, Scores, Totals

BATCH_TOKENS = 4096
"""Padded tokens in one forward pass…"""
LOGIT_BYTES = 256 << 20
"""…or fewer, so that their float32 logits take no more than this."""
SHOWN_CHOICES = 5
"""Teacher's first choices told of each shown token."""
THREADS = 2


def evaluate_model(
    model_folder: str | Path,
    dataset: TargetReader,
    ids_by_source: Mapping[str, Sequence[bytes]],
    device: str = "cpu",
    on_progress: Any = None,
    aligner: Aligner | None = None,
) -> Scores:
    """Score a model on held-out samples of the dataset.

    Args:
        model_folder: a folder with a model of the dataset's task; it is run in float32.
        dataset: holds the samples and what the teacher said about them.
        ids_by_source: held-out sample ids of each source.
        device: torch device.
        on_progress: called with `{"event": "evaluate", "done": samples, "total": samples}`.
        aligner: of a model with another tokenizer than the dataset's; its `loss` is then in nats per byte of text,
            `unit` says `byte`, and token by token there is nothing to compare with the teacher. Instead `chunk_gap` is
            the mean |log p − log q| of the likelihoods that both give a chunk of text, nats, and `chunks_known` the
            share of the chunks whose likelihood the dataset tells.

    Returns:
        `loss` {source: nats per supervised token}, `kl_to_teacher` (nats per token, from the stored targets),
        `top1_agreement` (share of positions where model and teacher have the same first choice), `ece` (expected
        calibration error of the first choice against the text, 15 bins) and `tokens` {source: supervised}. On targets
        of kind `text` there is no teacher to compare with: `kl_to_teacher` and `top1_agreement` are none. Of classes
        also `accuracy`, the share of labelled positions that the model gets right; none where nobody gave labels.
    """
    task = dataset.identity.capture.task
    model = load_model(model_folder, device, task)
    totals = Totals(classifies=task != "next_token", bytes={} if aligner else None)
    total = sum(len(ids) for ids in ids_by_source.values())
    done = 0
    for source, part in held_out_batches(dataset, ids_by_source, LOGIT_BYTES // (4 * num_outputs(model, task))):
        batch = batch_of([part], aligner=aligner).to(device)
        with torch.inference_mode(), evaluation_threads():
            given = np.ones(batch.num_supervised, dtype=np.bool_) if aligner else is_labelled(part)
            logprob = predictor_logits(model, batch).float().log_softmax(-1)
            totals.add(source, batch.targets, logprob, given)
            if batch.across is not None:
                totals.add_chunks(batch.across, logprob.gather(1, batch.targets.label[:, None])[:, 0])
        totals.add_bytes(source, aligned_samples(part, aligner), own=True)
        done += len(part.samples)
        if on_progress is not None:
            on_progress({"event": "evaluate", "done": done, "total": total})
    return totals.scores()


def aligned_samples(part: Part, aligner: Aligner | None) -> list[Aligned]:
    """Return the samples of a part aligned; none without an aligner."""
    return [] if aligner is None else [aligner.align(part.samples.sample(n)) for n in range(len(part.samples))]


def evaluate_teacher(
    dataset: TargetReader, ids_by_source: Mapping[str, Sequence[bytes]], aligner: Aligner | None = None
) -> Scores:
    """Return the teacher's own scores on the samples, from what the dataset holds; needs no model.

    With an `aligner` its loss is in nats per byte, as that of a student with other tokens. Same keys as
    `evaluate_model`: `kl_to_teacher` is 0 and `top1_agreement` 1 by definition, `ece` none where the targets tell no
    probabilities.
    """
    if dataset.identity.capture.task != "next_token":
        return _classifier_scores(dataset, ids_by_source)
    totals = Totals(bytes={} if aligner else None)
    told = True
    bins = Bins()
    for source, part in held_out_batches(dataset, ids_by_source):
        targets = part.targets
        positions = part.samples.num_supervised()
        totals.add_loss(source, float((targets.teacher_nll.astype(np.float64) * positions).sum()), int(positions.sum()))
        totals.add_bytes(source, aligned_samples(part, aligner), own=False)
        told = told and len(targets.id) > 0
        if told:
            sparse = make_batch(part.samples, targets, part.capture.kind).targets
            best, probability = first_choice(sparse)
            bins.add(probability.numpy(), (best == sparse.label).numpy())
    same = {"kl_to_teacher": 0.0, "top1_agreement": 1.0, "ece": bins.error() if told else None}
    return {**totals.scores(), **same, **({} if aligner is None else {"chunk_gap": 0.0, "chunks_known": None})}


def _classifier_scores(dataset: TargetReader, ids_by_source: Mapping[str, Sequence[bytes]]) -> Scores:
    """Return the scores of a teacher of classes; a label that it did not keep counts with the whole tail."""
    totals = Totals(classifies=True)
    for source, part in held_out_batches(dataset, ids_by_source):
        targets = batch_of([part]).targets
        # What was not kept shares the tail: one class of it may have it all, and none has more.
        logprob = targets.tail_mass.clamp_min(MIN_TAIL).log()[:, None].repeat(1, int(part.capture.classes or 0))
        logprob[targets.rows(), targets.id] = targets.logprob
        totals.add(source, targets, logprob, is_labelled(part))
    return {**totals.scores(), "kl_to_teacher": 0.0, "top1_agreement": 1.0}


def token_views(
    model_folder: str | Path, dataset: TargetReader, sample_ids: Sequence[bytes], device: str = "cpu"
) -> list[dict[str, Any]]:
    """Return, for the report, what teacher and model said about the tokens of some samples.

    One entry per sample: `{sample_id, source, tokens: [{id, supervised, teacher: [[id, p], …], tail, student:
    [p, …], student_best: [id, p], student_p}]}`; `student` gives the model's probability of each of the teacher's
    choices, `student_p` that of the token itself. Unsupervised tokens have only `id` and `supervised`.
    """
    model = load_model(model_folder, device)
    views = []
    for sample_id in sample_ids:
        (part,) = dataset.parts([sample_id])
        one = part.samples
        batch = make_batch(one, part.targets, part.capture.kind).to(device)
        with torch.inference_mode(), evaluation_threads():
            probability = predictor_logits(model, batch).float().softmax(-1).cpu()
        tokens = [{"id": int(t), "supervised": bool(s)} for t, s in zip(one.tokens, one.supervised, strict=True)]
        for p, at in enumerate(np.flatnonzero(one.supervised)):
            tokens[at].update(_told(batch.targets.positions(p, p + 1).to("cpu"), probability[p]))
        views.append({"sample_id": one.ids()[0].hex(), "source": one.source[0], "tokens": tokens})
    return views


def _told(targets: SparseTargets, probability: Tensor) -> dict[str, Any]:
    """Return what is shown of one supervised token; `probability` is the model's, [V]."""
    best = torch.argsort(targets.logprob, descending=True, stable=True)[:SHOWN_CHOICES]
    ids = targets.id[best].tolist()
    guess = int(probability.argmax())
    return {
        "teacher": [[i, float(p)] for i, p in zip(ids, targets.logprob[best].exp(), strict=True)],
        "tail": float(targets.tail_mass[0]),
        "student": [float(probability[i]) for i in ids],
        "student_best": [guess, float(probability[guess])],
        "student_p": float(probability[int(targets.label[0])]),
    }


def held_out_batches(
    dataset: TargetReader, ids_by_source: Mapping[str, Sequence[bytes]], most_tokens: int = BATCH_TOKENS
) -> Iterator[tuple[str, Part]]:
    """Yield the samples of each source in batches of at most `most_tokens` and BATCH_TOKENS padded tokens."""
    if not any(ids_by_source.values()):
        raise InputError("there are no held-out samples to evaluate on; raise data.heldout_fraction")
    for source, ids in ids_by_source.items():
        if not ids:
            continue
        for part in dataset.parts(list(ids)):
            size = max(1, min(most_tokens, BATCH_TOKENS) // int(part.samples.lengths().max()))
            for first in range(0, len(part.samples), size):
                yield source, part.between(first, min(first + size, len(part.samples)))


def load_model(folder: str | Path, device: str, task: Task = "next_token") -> Any:
    """Return the model of a folder in float32, ready to evaluate; InputError when it holds none of the task."""
    try:
        model = auto_model(task).from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} holds no {CALLED[task]}: {str(error).splitlines()[0]}") from error
    return model.to(device).eval()


def num_outputs(model: Any, task: Task) -> int:
    """Return how many logits a model gives at a position: its vocabulary, or its classes."""
    return int(model.config.get_text_config().vocab_size if task == "next_token" else model.config.num_labels)


@contextmanager
def evaluation_threads() -> Iterator[None]:
    """Use THREADS threads inside the context and put the number back."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(before)
