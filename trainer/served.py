"""Which kinds of targets each divergence takes, and whether a dataset can serve a config; imports no torch."""

from dataclasses import dataclass

from storage.errors import InputError
from storage.heads import FINAL
from storage.identity import CaptureIdentity, TokenizerIdentity
from trainer.loss_config import LossConfig


@dataclass(frozen=True)
class Fit:
    """What a divergence can be computed from; whole distributions (`train.loss.exact`) serve every one."""

    accepts: tuple[str, ...] = ("topk", "hybrid", "dense")
    """Kinds of targets, the usual choice first."""
    unbiased_on: tuple[str, ...] = ("dense",)
    """Kinds on which its gradient is that of the full teacher distribution, in expectation."""


FITS: dict[str, Fit] = {
    # Linear in the teacher's probabilities, and so the one that draws serve: E[t̂] = t.
    "forward_kl": Fit(
        ("hybrid", "hybrid_counts", "sampled", "topk", "dense"), ("hybrid", "hybrid_counts", "sampled", "dense")
    ),
    # These need the log-probabilities that were stored, and take what is outside the entries as one bucket.
    **dict.fromkeys(("reverse_kl", "jsd", "skew_kl", "reverse_skew_kl", "adaptive_kl", "tvd"), Fit()),
    # Across tokenizers: the likelihood of the text's own tokens, where they were kept.
    "alm": Fit(("topk", "hybrid", "dense")),
    # Drawn entries have no rank.
    "uld": Fit(("topk", "dense")),
}
"""Every divergence of `train.loss.divergence`."""


def require_served(loss: LossConfig, capture: CaptureIdentity) -> None:
    """Raise InputError when a dataset cannot serve the divergence of a config, naming what would fit."""
    if capture.task != "next_token":
        _require_classes_alone(loss, capture)
    if loss.distils and loss.exact:
        _require_final(capture)
    elif loss.distils:
        _require_kind(loss.divergence, capture.kind)
        if loss.softened and capture.kind != "dense":
            raise InputError(
                f"train.loss.temperature other than 1 needs whole distributions, but of targets of kind {capture.kind} "
                f"the tail is known at temperature 1 alone; leave it at 1, or {_whole(capture)}"
            )


def require_same_tokens(loss: LossConfig, student: str, own: TokenizerIdentity, teacher: TokenizerIdentity) -> None:
    """Raise InputError where a loss compares position by position, but student and teacher have other tokenizers.

    `student` is what messages call the student.
    """
    if own.digest == teacher.digest:
        return
    sides = (
        f"the tokenizer of {student} ({own.vocab_size} ids, {own.digest[:12]}…) is not the one that the dataset is "
        f"captured with ({teacher.vocab_size} ids, {teacher.digest[:12]}…)"
    )
    if loss.distils and not loss.crosses:
        raise InputError(
            f"{sides}, and {loss.divergence} needs a student of the same one; set train.loss.divergence to alm or uld, "
            "which compare across tokenizers, or train on the text alone with train.loss.kl: 0"
        )
    if (loss.layers and not loss.exact) or loss.attends:
        raise InputError(
            f"{sides}; train.loss.hidden, attention and relation compare position by position: leave them out"
        )


def _require_classes_alone(loss: LossConfig, capture: CaptureIdentity) -> None:
    asked = {
        f"divergence {loss.divergence}": loss.crosses,
        "hidden": loss.transfers,
        "attention": loss.attends,
        "exact": loss.distils and loss.exact,
    }
    for name in (name for name, is_asked in asked.items() if is_asked):
        raise InputError(
            f"train.loss.{name} needs what a dataset of classes ({capture.task}) does not hold; leave it out: kl and "
            "ce serve there, and targets of kind dense any temperature"
        )


def _whole(capture: CaptureIdentity) -> str:
    """Return how a dataset comes to tell whole distributions."""
    if capture.task != "next_token":
        return "capture with cache.kind: dense"
    return f"set train.loss.exact and cache.hidden: [{FINAL}]"


def _require_kind(name: str, kind: str) -> None:
    accepts = FITS[name].accepts
    if kind in accepts:
        return
    fitting = [other for other, fit in FITS.items() if kind in fit.accepts]
    hint = f"set train.loss.divergence: {fitting[0]}" if fitting else "train on the text alone with train.loss.kl: 0"
    raise InputError(
        f"the divergence {name} needs targets of kind {', '.join(accepts)}, not {kind}; {hint}, or capture with "
        f"cache.kind: {accepts[0]}"
    )


def _require_final(capture: CaptureIdentity) -> None:
    remedy = f"capture with cache.hidden: [{FINAL}] and cache.hidden_every: 1, or leave train.loss.exact out"
    if FINAL not in capture.hidden:
        held = ", ".join(capture.hidden) or "no layer"
        raise InputError(f"train.loss.exact needs the hidden state {FINAL!r}, but those of {held} are kept; {remedy}")
    if capture.hidden_every is not None:
        raise InputError(
            f"train.loss.exact needs the hidden state of every position, but cache.hidden_every is "
            f"{capture.hidden_every:g}; {remedy}"
        )
    if capture.hidden_projection is not None:
        raise InputError(
            f"train.loss.exact needs whole hidden states, but they were projected to {capture.hidden_projection} "
            f"values; {remedy}"
        )
