"""What samples and targets must be like to be stored. Checked before anything is written, and again by `verify`."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.errors import IntegrityError
from storage.hidden import NUMPY_DTYPES, attention_lengths, bad_states, kept_positions, state_width
from storage.identity import HEAD_KINDS, DatasetIdentity
from storage.samples import ID_BYTES, BoolArray, SampleBatch, compute_sample_id, offsets_of
from storage.schema import max_entries
from storage.targets import TargetBatch

MAX_LOGPROB = 2e-3
"""A log-probability above 0 by more than float16 rounding is wrong."""
MAX_MASS_ERROR = 0.02
"""Kept entries and tail add up to 1 within this; float16 log-probabilities alone cost up to 0.005."""
_NAMED = 5


def check_contract(samples: SampleBatch, targets: TargetBatch, identity: DatasetIdentity) -> None:
    """Raise IntegrityError, naming sample ids, unless the rows may be stored under this identity."""
    if len(samples) == 0:
        raise IntegrityError("a unit without samples cannot be stored; plan at least one sample in each unit")
    if len(samples) != len(targets):
        raise IntegrityError(f"{len(samples)} samples came with the targets of {len(targets)}; they must pair up")
    _check_samples(samples, identity)
    _check_shapes(samples, targets, identity)
    _check_finite(samples, targets)
    _check_entries(samples, targets, identity)
    if targets.draws is not None:
        _check_draws(samples, targets, identity)


def _check_samples(samples: SampleBatch, identity: DatasetIdentity) -> None:
    num_tokens = len(samples.tokens)
    shapes = (len(samples.supervised), len(samples.document), int(samples.offsets[-1]))
    if set(shapes) != {num_tokens} or samples.sample_id.shape != (len(samples), ID_BYTES):
        raise IntegrityError(f"sample arrays disagree: {num_tokens} tokens, but {shapes} masks, documents and offsets")
    token_bad = (samples.tokens < 0) | (samples.tokens >= identity.tokenizer.vocab_size)
    _refuse_tokens(token_bad, samples, f"token ids outside the vocabulary of {identity.tokenizer.vocab_size}")
    first = np.zeros(num_tokens, dtype=np.bool_)
    first[samples.offsets[:-1][samples.lengths() > 0]] = True
    steps = np.diff(samples.document, prepend=np.int16(0))
    _refuse_tokens(first & (samples.document != 0), samples, "document numbers that do not start at 0")
    _refuse_tokens(~first & (steps != 0) & (steps != 1), samples, "document numbers that do not go up by one")
    starts = first | (steps != 0)
    _refuse_tokens(starts & samples.supervised, samples, "a supervised first token of a document")
    ids = samples.ids()
    if len(set(ids)) != len(ids):
        raise IntegrityError("a unit holds one sample twice; plan each sample id once")
    wrong = [i for n, i in enumerate(ids) if _recomputed_id(samples, n) != i]
    _refuse(wrong, "sample ids that are not those of their tokens")


def _recomputed_id(samples: SampleBatch, n: int) -> bytes:
    part = slice(samples.offsets[n], samples.offsets[n + 1])
    return compute_sample_id(samples.tokens[part], samples.supervised[part], samples.document[part])


def _check_shapes(samples: SampleBatch, targets: TargetBatch, identity: DatasetIdentity) -> None:
    wanted, got = samples.num_supervised(), np.diff(targets.offsets)
    if (wanted != got).any():
        n = int(np.flatnonzero(wanted != got)[0])
        raise IntegrityError(
            f"sample {samples.ids()[n].hex()} has {wanted[n]} supervised positions but {got[n]} target rows; there "
            "must be exactly one for each"
        )
    entries, positions = int(targets.count.sum()), targets.num_positions
    sizes = {"id": (len(targets.id), entries), "logprob": (len(targets.logprob), entries)}
    sizes["tail_mass"] = (len(targets.tail_mass), positions)
    sizes["teacher_nll"] = (len(targets.teacher_nll), len(samples))
    sizes["teacher_entropy"] = (len(targets.teacher_entropy), len(samples))
    if targets.draws is not None:
        sizes["draws"] = (targets.draws.shape[-1], entries)
    kept = kept_positions(samples.sample_id, wanted, identity.capture.hidden_every)
    sizes |= {f"hidden {layer}": (len(values), int(kept.sum())) for layer, values in targets.hidden.items()}
    for name, (found, expected) in sizes.items():
        if found != expected:
            raise IntegrityError(f"targets.{name} holds {found} values where {expected} belong")
    capture = identity.capture
    if (targets.draws is not None) != (capture.draws is not None):
        raise IntegrityError(f"kind {capture.kind} {'needs' if targets.draws is None else 'has no'} target draws")
    if targets.num_draw_sets != capture.draw_sets:
        raise IntegrityError(f"{targets.num_draw_sets} sets of draws came where {capture.draw_sets} belong")
    if sorted(targets.hidden) != sorted(capture.hidden):
        raise IntegrityError(f"hidden states {sorted(targets.hidden)} came where {sorted(capture.hidden)} belong")
    _check_states(samples, targets, identity, kept)


def _check_states(samples: SampleBatch, targets: TargetBatch, identity: DatasetIdentity, kept: BoolArray) -> None:
    capture = identity.capture
    if sorted(targets.attention) != sorted(capture.attention):
        raise IntegrityError(f"attention of {sorted(targets.attention)} came where {capture.attention} belongs")
    if (capture.hidden_every is None) != (targets.hidden_kept is None) or (
        targets.hidden_kept is not None and not np.array_equal(targets.hidden_kept, kept)
    ):
        raise IntegrityError(
            f"hidden states were kept at other positions than hidden_every {capture.hidden_every} asks"
        )
    kind = np.dtype(NUMPY_DTYPES[capture.hidden_dtype or "float16"])
    for layer, values in targets.hidden.items():
        width = capture.hidden_projection or (state_width(values) if values.ndim == 2 else 0)
        if values.ndim != 2 or values.dtype != kind or state_width(values) != width:
            raise IntegrityError(
                f"hidden state {layer} is {values.dtype}{list(values.shape)}; [P, {width or 'width'}] of {kind} belongs"
            )
    wanted = np.where(kept, attention_lengths(samples), 0)
    for layer, weights in targets.attention.items():
        if targets.attention_count is None or not np.array_equal(targets.attention_count, wanted):
            raise IntegrityError("attention rows are not as long as what their positions look back on")
        if weights.dtype != np.float16 or weights.shape != (int(wanted.sum()),):
            raise IntegrityError(
                f"attention of {layer} is {weights.dtype}{list(weights.shape)}, not float16[{wanted.sum()}]"
            )


def _check_finite(samples: SampleBatch, targets: TargetBatch) -> None:
    what = "NaN or infinite values from the teacher"
    offsets = targets.entry_offsets
    _refuse_entries(~np.isfinite(targets.logprob), offsets, samples, targets, what)
    _refuse_positions(~np.isfinite(targets.tail_mass), samples, targets, what)
    rows = ~(np.isfinite(targets.teacher_nll) & np.isfinite(targets.teacher_entropy))
    _refuse(_ids_at(samples, np.flatnonzero(rows)), what)
    positions = np.arange(targets.num_positions)
    kept = positions if targets.hidden_kept is None else positions[targets.hidden_kept]
    for layer, values in targets.hidden.items():
        _refuse_positions(kept[bad_states(values)], samples, targets, f"{what} in hidden state {layer}")
    if targets.attention_count is not None:
        offsets = offsets_of(targets.attention_count.astype(np.int64))
        for layer, weights in targets.attention.items():
            wrong = ~((weights >= 0) & (weights <= 1 + MAX_LOGPROB))
            _refuse_entries(wrong, offsets, samples, targets, f"attention weights of {layer} outside 0 to 1")


def _check_entries(samples: SampleBatch, targets: TargetBatch, identity: DatasetIdentity) -> None:
    limit, vocab_size, kind = max_entries(identity), identity.num_targets, identity.capture.kind
    least = {"dense": vocab_size, "text": 0}.get(kind, 1)
    bad = (targets.count < least) | (targets.count > limit)
    _refuse_positions(bad, samples, targets, f"positions without {least} to {limit} entries")
    offsets = targets.entry_offsets
    outside = (targets.id < 0) | (targets.id >= vocab_size)
    what = f"{vocab_size} classes" if identity.capture.classes else f"vocabulary of {vocab_size}"
    _refuse_entries(outside, offsets, samples, targets, f"target ids outside the {what}")
    _refuse_entries(targets.logprob > MAX_LOGPROB, offsets, samples, targets, "log-probabilities above 0")
    outside = (targets.tail_mass < 0) | (targets.tail_mass > 1 + MAX_LOGPROB)
    _refuse_positions(outside, samples, targets, "a tail mass outside 0 to 1")
    position = np.repeat(np.arange(targets.num_positions, dtype=np.int64), targets.count)
    keys = np.sort(position * vocab_size + targets.id)
    twice = np.unique(keys[1:][keys[1:] == keys[:-1]] // vocab_size)
    _refuse_positions(twice, samples, targets, "one token id twice at a position")
    if targets.num_positions and kind != "text":
        kept = np.add.reduceat(np.exp(targets.logprob.astype(np.float32)), offsets[:-1])
        off = np.abs(kept + targets.tail_mass.astype(np.float32) - 1) > MAX_MASS_ERROR
        _refuse_positions(off, samples, targets, f"entries and tail that do not add up to 1 within {MAX_MASS_ERROR}")


def _check_draws(samples: SampleBatch, targets: TargetBatch, identity: DatasetIdentity) -> None:
    assert targets.draws is not None
    draws, hybrid = identity.capture.draws, identity.capture.kind in HEAD_KINDS
    if targets.num_positions:
        sums = np.add.reduceat(targets.draws.astype(np.int64), targets.entry_offsets[:-1], axis=1)
        # None at all is right where a head holds the whole mass, so that nothing is left to draw from.
        bad = (sums != draws).any(axis=0)
        if hybrid:
            bad &= sums.any(axis=0)
        _refuse_positions(bad, samples, targets, f"draws that do not add up to {draws}")
    if not hybrid:
        never = np.asarray(targets.draws.sum(axis=0) == 0)
        _refuse_entries(never, targets.entry_offsets, samples, targets, "entries that were never drawn")


def _refuse_tokens(bad: BoolArray, samples: SampleBatch, what: str) -> None:
    if bad.any():
        rows = np.unique(np.searchsorted(samples.offsets, np.flatnonzero(bad), side="right") - 1)
        _refuse(_ids_at(samples, rows), what)


def _refuse_entries(
    bad: BoolArray, offsets: NDArray[np.int64], samples: SampleBatch, targets: TargetBatch, what: str
) -> None:
    if bad.any():
        positions = np.unique(np.searchsorted(offsets, np.flatnonzero(bad), side="right") - 1)
        _refuse_positions(positions, samples, targets, what)


def _refuse_positions(bad: NDArray[Any], samples: SampleBatch, targets: TargetBatch, what: str) -> None:
    """Refuse the samples of positions, given as a mask [P] or as indices."""
    positions = np.flatnonzero(bad) if bad.dtype == np.bool_ else bad
    if len(positions):
        rows = np.unique(np.searchsorted(targets.offsets, positions, side="right") - 1)
        _refuse(_ids_at(samples, rows), what)


def _ids_at(samples: SampleBatch, rows: NDArray[np.int64]) -> list[bytes]:
    ids = samples.ids()
    return [ids[int(row)] for row in rows]


def _refuse(ids: list[bytes], what: str) -> None:
    if ids:
        shown = ", ".join(i.hex() for i in ids[:_NAMED]) + (
            f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else ""
        )
        raise IntegrityError(f"{what}: sample {shown}; such rows are never stored")
