"""One window of another tool's cache, made a sample and its top-k targets of ours."""

from dataclasses import dataclass

import numpy as np

from storage.contract import MAX_LOGPROB, check_contract
from storage.errors import InputError
from storage.identity import DatasetIdentity
from storage.samples import Int64Array, Sample, SampleBatch, offsets_of
from storage.targets import Float32Array, TargetBatch

IGNORED_LABEL = -100
"""Label of a token that is not to be predicted."""


@dataclass(frozen=True, eq=False)
class SourceRow:
    """A row as it was decoded: row j of `ids` and `logprobs` tells what follows token j."""

    where: str
    """File and row, for messages."""
    tokens: Int64Array  # [L]
    ids: Int64Array  # [T, k]
    logprobs: Float32Array  # [T, k]
    document: Int64Array | None = None  # [L], 1, 2, … of packed documents, 0 = padding
    labels: Int64Array | None = None  # [L], −100 = not to be predicted
    defect: str | None = None
    """Why it could not be decoded."""

    @classmethod
    def bad(cls, where: str, defect: str) -> "SourceRow":
        """Return a row that could not be decoded."""
        nothing = np.zeros((0, 0), dtype=np.int64)
        return cls(where, nothing[0:0, 0:0].reshape(0), nothing, nothing.astype(np.float32), defect=defect)


def to_unit(row: SourceRow, identity: DatasetIdentity, source: str) -> tuple[SampleBatch, TargetBatch] | None:
    """Return the sample and targets of a row, or None where it supervises nothing.

    A last target row that tells of a token beyond the window is left out. What a position keeps beyond its entries
    is their rest to 1; the means of loss and entropy spread it evenly over the other tokens.

    Raises:
        InputError: the row is out of contract; the message is the reason.
    """
    if row.defect is not None:
        raise InputError(row.defect)
    sample, predicting = _sample(row, source)
    if not len(predicting):
        return None
    order = np.argsort(-row.logprobs[predicting], axis=1, kind="stable")
    ids = np.take_along_axis(row.ids[predicting], order, axis=1)
    logprobs = np.take_along_axis(row.logprobs[predicting], order, axis=1)
    if not np.isfinite(logprobs).all():
        at = predicting[np.flatnonzero(~np.isfinite(logprobs).all(axis=1))[0]]
        raise InputError(f"position {at} holds NaN or infinite log-probabilities")
    if float(logprobs.max()) > MAX_LOGPROB:
        at = predicting[np.flatnonzero(logprobs[:, 0] > MAX_LOGPROB)[0]]
        raise InputError(
            f"position {at} holds a log-probability of {logprobs.max():.4g}, above 0; logits without their normaliser "
            "give no probabilities"
        )
    samples = SampleBatch.of([sample])
    targets = _targets(samples, ids, np.minimum(logprobs, 0), identity.tokenizer.vocab_size)
    check_contract(samples, targets, identity)
    return samples, targets


def _sample(row: SourceRow, source: str) -> tuple[Sample, Int64Array]:
    """Return the window and the target rows that its supervised positions take."""
    length = len(row.tokens)
    if len(row.ids) not in (length, length - 1) or len(row.logprobs) != len(row.ids):
        raise InputError(f"{len(row.ids)} ids and {len(row.logprobs)} targets for {length} tokens")
    document = np.ones(length, dtype=np.int64) if row.document is None else row.document
    labels = row.tokens if row.labels is None else row.labels
    if len(document) != length or len(labels) != length:
        raise InputError(f"{length} tokens came with {len(document)} document numbers and {len(labels)} labels")
    used = np.flatnonzero(document)
    length = int(used[-1]) + 1 if len(used) else 0
    document, labels, tokens = document[:length], labels[:length], row.tokens[:length]
    if (tokens < 0).any() or (tokens >= 2**31).any():
        raise InputError("token ids outside 0 to 2³¹ − 1")
    starts = np.ones(length, dtype=np.bool_)
    starts[1:] = document[1:] != document[:-1]
    supervised = ~starts & (document != 0) & (labels != IGNORED_LABEL)
    number = (np.cumsum(starts) - 1).astype(np.int16)
    return Sample(source, tokens.astype(np.int32), supervised, number), np.flatnonzero(supervised) - 1


def _targets(samples: SampleBatch, ids: Int64Array, logprobs: Float32Array, vocab_size: int) -> TargetBatch:
    num_positions, k = ids.shape
    truth = samples.tokens[samples.supervised]
    probability = np.exp(logprobs.astype(np.float64))
    tail = np.clip(1 - probability.sum(axis=1), 0, 1)
    # Each token of the tail, were it spread evenly.
    other = np.log(np.maximum(tail, 1e-12) / max(vocab_size - k, 1))
    hit = ids == truth[:, None]
    nll = -np.where(hit.any(axis=1), (logprobs * hit).sum(axis=1), other)
    entropy = -(probability * logprobs).sum(axis=1) - tail * other
    return TargetBatch(
        offsets=offsets_of([num_positions]),
        count=np.full(num_positions, k, dtype=np.int32),
        id=ids.reshape(-1).astype(np.int32),
        logprob=logprobs.reshape(-1).astype(np.float16),
        draws=None,
        tail_mass=tail.astype(np.float16),
        teacher_nll=np.asarray([nll.mean()], dtype=np.float32),
        teacher_entropy=np.asarray([entropy.mean()], dtype=np.float32),
    )
