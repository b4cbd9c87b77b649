"""The teacher's output head, kept once beside the hidden state `final`: the two give every full distribution back.

It lies at `heads/<digest>.safetensors`, where the digest is that of the file, so that a changed file no longer bears
its name; the file says which dataset it belongs to. A head costs vocabulary · width values once, a position width
values: at 7,168 wide that is 14.3 KB a token in 16 bits, against 258 KB for the logits themselves.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Self

from storage.errors import InputError, IntegrityError
from storage.object_store import Store

if TYPE_CHECKING:
    import torch
    from torch import Tensor

HEAD_PREFIX = "heads/"
FINAL = "final"
"""Name of the hidden state that goes into the output head."""
CHUNK_BYTES = 64 << 20
"""Bytes of float32 logits made at a time."""


@dataclass(frozen=True, eq=False)
class Head:
    """What turns a final hidden state into logits: `softcap(scale · (weight · state + bias))`."""

    weight: "Tensor"  # [padded vocabulary, width]
    bias: "Tensor | None"  # [padded vocabulary]
    vocab_size: int
    """Rows from here on are padding and have no probability."""
    scale: float = 1.0
    softcap: float | None = None
    """Logits x become softcap · tanh(x / softcap), as Gemma 2 has it."""

    def to(self, device: "torch.device | str") -> Self:
        """Return the same head on a device."""
        bias = None if self.bias is None else self.bias.to(device)
        return type(self)(self.weight.to(device), bias, self.vocab_size, self.scale, self.softcap)

    def logits(self, hidden: "Tensor") -> "Tensor":
        """Return float32 logits [P, vocabulary] of states [P, width], without padding.

        States of the head's own dtype go through it in that precision, as they did in the teacher; others in float32.
        """
        from torch.nn.functional import linear

        weight, bias = self.weight[: self.vocab_size], self.bias
        bias = None if bias is None else bias[: self.vocab_size]
        if hidden.dtype != weight.dtype:
            hidden, weight, bias = hidden.float(), weight.float(), None if bias is None else bias.float()
        logits = linear(hidden, weight, bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = (logits / self.softcap).tanh() * self.softcap
        return logits.float()


def full_logprobs(
    hidden: "Tensor", head: Head, temperature: float = 1.0, chunk_bytes: int = CHUNK_BYTES
) -> Iterator["Tensor"]:
    """Yield the teacher's log-probabilities of the whole vocabulary, float32 [p, vocabulary], for runs of positions.

    Args:
        hidden: states of the layer `final`, [P, width], on the head's device; see `hidden.states_tensor`.
        head: the head of the same dataset.
        temperature: T of softmax(logits / T).
        chunk_bytes: bound on one chunk; the [P, vocabulary] tensor never exists whole.

    Raises:
        InputError: the temperature is not positive, or the states are not as wide as the head.
    """
    import torch

    if not temperature > 0:
        raise InputError(f"temperature {temperature} is not positive; give a T above 0")
    if hidden.ndim != 2 or hidden.shape[1] != head.weight.shape[1]:
        raise InputError(
            f"hidden states {list(hidden.shape)} do not fit a head of width {head.weight.shape[1]}; it takes the whole "
            f"states of the layer {FINAL!r}, [P, width]"
        )
    rows = max(1, chunk_bytes // (4 * head.vocab_size))
    for first in range(0, len(hidden), rows):
        yield torch.log_softmax(head.logits(hidden[first : first + rows]) / temperature, dim=-1)


def save_head(store: Store, head: Head, fingerprint: str) -> str:
    """Keep a head in the dataset of this fingerprint unless it is there; returns its key."""
    from safetensors.torch import save

    tensors = {"weight": head.weight.detach().cpu().contiguous()}
    if head.bias is not None:
        tensors["bias"] = head.bias.detach().cpu().contiguous()
    facts = {"vocab_size": head.vocab_size, "scale": head.scale, "softcap": head.softcap}
    # One metadata key: safetensors writes several in no fixed order, which would give one head several digests.
    raw = save(tensors, {"lectern": json.dumps({"fingerprint": fingerprint, **facts}, sort_keys=True)})
    key = f"{HEAD_PREFIX}{_digest(raw)}.safetensors"
    if not store.exists(key):
        store.create(key, raw)
    return key


def load_head(store: Store, fingerprint: str) -> Head:
    """Return the head of the dataset of this fingerprint, on the CPU.

    Raises:
        InputError: the dataset keeps none.
        IntegrityError: it is damaged, or another dataset's.
    """
    from safetensors.torch import load

    keys = store.list(HEAD_PREFIX)
    if not keys:
        raise InputError(
            f"{store.shown()} keeps no output head; capture with cache.hidden: [{FINAL}], which stores it once"
        )
    raw = store.read(keys[0])
    facts = _checked(store, keys[0], raw, fingerprint)
    tensors = load(raw)
    return Head(
        tensors["weight"], tensors.get("bias"), int(facts["vocab_size"]), float(facts["scale"]), facts["softcap"]
    )


def check_heads(store: Store, fingerprint: str, needed: bool) -> list[str]:
    """Return what is wrong with the stored heads of a dataset, one message each; `needed`: there must be one."""
    keys = store.list(HEAD_PREFIX)
    problems = []
    for key in keys:
        try:
            _checked(store, key, store.read(key), fingerprint)
        except IntegrityError as error:
            problems.append(str(error))
    if needed and not keys:
        problems.append(f"{store.shown(HEAD_PREFIX)} is empty: the output head is missing; {_REMEDY}")
    return problems


_REMEDY = "delete it and one record under manifest/, and capture again: a teacher that is loaded stores its head"


def _checked(store: Store, key: str, raw: bytes, fingerprint: str) -> dict[str, Any]:
    """Return what a head's file says of itself."""
    if key != f"{HEAD_PREFIX}{_digest(raw)}.safetensors":
        raise IntegrityError(f"{store.shown(key)} is damaged: its digest is not its name; {_REMEDY}")
    try:
        size = int.from_bytes(raw[:8], "little")
        facts = json.loads(json.loads(raw[8 : 8 + size])["__metadata__"]["lectern"])
        found = facts["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{store.shown(key)} is not an output head of Lectern; {_REMEDY}") from error
    if found != fingerprint:
        raise IntegrityError(f"{store.shown(key)} belongs to a dataset with fingerprint {found}; {_REMEDY}")
    return dict(facts)


def _digest(raw: bytes) -> str:
    return blake2b(raw, digest_size=16, person=b"lectern.head").hexdigest()
