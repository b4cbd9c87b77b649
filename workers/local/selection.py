"""Chooses the entries that are kept of each distribution, on the device that holds the logits.

The vocabulary is cut into blocks. One pass gives each block's maximum and its sum of exponentials; after that
only the blocks that hold one of the k best entries, or a draw, are looked at again:

* the k best entries lie in the k blocks with the largest maxima;
* systematic resampling (one uniform u per position, points (u + i)/n · M over the cumulated mass) finds each
  point's block from the block sums, then its entry inside that block.

Positions are taken in chunks for the pass, so that the `[positions, vocabulary]` tensor in float32 never exists whole.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage.config import Kind
from storage.draws import drawn_logprob
from storage.samples import Int32Array, UInt8Array
from storage.targets import Float16Array, Float32Array

BLOCK = 128
"""Entries of one block of the vocabulary."""
POSITIONS = 256
"""Positions whose blocks are looked up together."""
LOG2_E = 1 / math.log(2)
UNSHIFTED = 50.0
"""Logits up to this size are exponentiated as they are: float32 holds 10^38 of them."""
CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 1 << 30}
"""Float32 scratch of one chunk of positions: the CPU's fits its cache, the GPU's fills the device."""
PADDING = -1e30
"""Logit of entries that do not exist: no probability, and unlike −inf no NaN when multiplied by it."""


@dataclass(frozen=True)
class SelectionSettings:
    """What is kept at each position."""

    kind: Kind
    top_k: int
    """Entries kept for their rank (`topk`, `hybrid…`)."""
    draws: int
    """Draws of one set, from the rest (`hybrid…`) or from everything (`sampled`)."""
    vocab_size: int
    """Ids from here on are padding and have no probability."""


@dataclass(frozen=True, eq=False)
class Selection:
    """The targets of P positions, on the host; fields as in `storage.targets.TargetBatch`, statistics per position."""

    count: Int32Array  # [P]
    id: Int32Array  # [E]
    logprob: Float16Array  # [E]
    draws: UInt8Array | None  # [R, E]
    tail_mass: Float16Array  # [P]
    nll: Float32Array  # [P], of the true token
    entropy: Float32Array  # [P]

    @staticmethod
    def concat(parts: Sequence["Selection"]) -> "Selection":
        """Join selections of one kind, keeping their order."""
        drawn = [part.draws for part in parts if part.draws is not None]
        return Selection(
            count=np.concatenate([part.count for part in parts]),
            id=np.concatenate([part.id for part in parts]),
            logprob=np.concatenate([part.logprob for part in parts]),
            draws=np.concatenate(drawn, axis=1) if drawn else None,
            tail_mass=np.concatenate([part.tail_mass for part in parts]),
            nll=np.concatenate([part.nll for part in parts]),
            entropy=np.concatenate([part.entropy for part in parts]),
        )


class NonFiniteLogitsError(ValueError):
    """The teacher returned NaN or infinity; `positions` index the positions asked for."""

    def __init__(self, positions: list[int]) -> None:
        super().__init__(f"logits of positions {positions[:5]} are not finite")
        self.positions = positions


def uniforms(seed: int, sample_id: bytes, num_positions: int, draw_sets: int = 1) -> NDArray[np.float64]:
    """Return one uniform of [0, 1) per supervised position and set of draws, [P, R].

    A pure function of seed, sample, position and set.
    """
    key = blake2b(sample_id, digest_size=16, salt=(seed % 2**64).to_bytes(8, "little"), person=b"lectern.draws")
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key.digest(), "little")))
    return generator.random((draw_sets, num_positions)).T


def select(logits: Tensor, positions: Tensor, truth: Tensor, uniform: Tensor, settings: SelectionSettings) -> Selection:
    """Select the entries of P positions.

    Args:
        logits: [T, W] of any float dtype; columns from `vocab_size` on are padding.
        positions: int64 [P], the rows of `logits` to look at, at least one.
        truth: int64 [P], the tokens that really follow.
        uniform: float64 [P, R], the offset of each position's systematic draws, for R independent sets.
        settings: kind and sizes.

    Raises:
        NonFiniteLogitsError: a distribution is NaN or infinite.
    """
    parts = []
    for at in range(0, len(positions), POSITIONS):
        part = slice(at, at + POSITIONS)
        rows = positions[part]
        sums = _scan(logits, rows, settings.vocab_size, at)
        nll = sums.log_z_P - logits[rows, truth[part]].float()
        if settings.kind == "dense":
            parts.append(_dense(logits[rows, : settings.vocab_size].float() - sums.log_z_P[:, None], nll, sums))
        elif settings.kind == "text":
            parts.append(_text(nll, sums))
        else:
            parts.append(_sparse(_Logits(logits, rows, sums, settings.vocab_size), nll, uniform[part], settings))
    return Selection.concat(parts)


@dataclass(frozen=True, eq=False)
class _Sums:
    """What one pass over the logits tells; names: P positions, B blocks of S entries, k head, n draws, R sets."""

    max_PB: Tensor  # of the logits
    sum_PB: Tensor  # Σ exp(x − shift)
    shift_P: Tensor
    log_z_P: Tensor  # log Σ exp(x)
    entropy_P: Tensor


def _scan(logits: Tensor, positions: Tensor, vocab_size: int, start: int) -> _Sums:
    """Pass once over the logits of P positions, a few at a time, so that what is at work stays in the cache."""
    num_blocks = -(-vocab_size // BLOCK)
    rows = max(1, CHUNK_BYTES.get(logits.device.type, CHUNK_BYTES["cuda"]) // (4 * num_blocks * BLOCK))
    rows = min(rows, len(positions))
    # Scratch is made once: fresh pages for each chunk would cost more than the arithmetic on them.
    scratch = torch.full((2, rows, num_blocks * BLOCK), PADDING, dtype=torch.float32, device=logits.device)
    max_PB = scratch.new_empty(len(positions), num_blocks)
    sum_PB = torch.empty_like(max_PB)
    shift_P, dot_P = scratch.new_empty(2, len(positions))
    for at in range(0, len(positions), rows):
        part = positions[at : at + rows]
        x_PV, exp_PV = scratch[:, : len(part)]
        # Neighbours are read where they lie; gathering rows would copy them once more.
        rows_PW = logits[int(part[0]) : int(part[0]) + len(part)] if _neighbours(part) else logits[part]
        x_PV[:, :vocab_size] = rows_PW[:, :vocab_size]
        inside = slice(at, at + len(part))
        torch.amax(x_PV.view(len(part), -1, BLOCK), -1, out=max_PB[inside])
        largest_P = max_PB[inside].amax(-1)
        # Logits of ordinary size need no shift before the exponential; that to base 2 takes half the time.
        shift_P[inside] = torch.where(largest_P.abs() > UNSHIFTED, largest_P, 0.0)
        if shift_P[inside].any():
            x_PV -= shift_P[inside, None]
        x_PV *= LOG2_E
        torch.exp2(x_PV, out=exp_PV)
        torch.sum(exp_PV.view(len(part), -1, BLOCK), -1, out=sum_PB[inside])
        x_PV *= exp_PV
        torch.sum(x_PV, -1, out=dot_P[inside])
        if torch.isnan(dot_P[inside]).any():  # entries at −inf count as 0
            torch.sum(x_PV.nan_to_num_(nan=0.0), -1, out=dot_P[inside])
        x_PV[:, vocab_size:] = PADDING
    finite_P = torch.isfinite(max_PB.amax(-1))
    if not finite_P.all():
        raise NonFiniteLogitsError([start + int(p) for p in torch.nonzero(~finite_P)[:, 0]])
    z_P = sum_PB.sum(-1)
    entropy_P = (z_P.log() - dot_P / LOG2_E / z_P).clamp_(min=0)
    return _Sums(max_PB, sum_PB, shift_P, shift_P + z_P.log(), entropy_P)


def _neighbours(positions: Tensor) -> bool:
    return bool((positions.diff() == 1).all())


class _Logits:
    """Looks up blocks of a few positions' logits."""

    def __init__(self, logits: Tensor, positions: Tensor, sums: _Sums, vocab_size: int) -> None:
        self.sums = sums
        self._logits, self._positions, self._vocab_size = logits, positions, vocab_size
        self._inside = torch.arange(BLOCK, device=logits.device)

    def blocks(self, blocks_Pm: Tensor) -> Tensor:
        """Return the named blocks of each position, [P, m, BLOCK], PADDING beyond the vocabulary."""
        id_PmS = blocks_Pm[:, :, None] * BLOCK + self._inside
        x_PmS = self._logits[self._positions[:, None, None], id_PmS.clamp(max=self._vocab_size - 1)].float()
        return x_PmS.masked_fill_(id_PmS >= self._vocab_size, PADDING)

    def weights(self, x: Tensor) -> Tensor:
        """Return exp(x − shift) of logits [P, …]."""
        shift_P = self.sums.shift_P
        return (x - shift_P.view(-1, *[1] * (x.dim() - 1))).exp_()


def _sparse(logits: _Logits, nll: Tensor, uniform: Tensor, settings: SelectionSettings) -> Selection:
    """Keep the head, draws or both."""
    sums, sets = logits.sums, uniform.shape[1]
    if settings.kind == "sampled":
        drawn = _systematic(logits, sums.sum_PB, None, uniform, settings.draws)
        return _sampled(drawn.id_Pm, sets, nll, sums)
    head = _head(logits, min(settings.top_k, settings.vocab_size))
    head_log_Pk = head.value_Pk - sums.log_z_P[:, None]
    # What is left of each touched block is summed again without its head entries: a difference would cancel.
    rest_PB = sums.sum_PB.scatter(1, head.blocks_Pb, head.rest_PbS.sum(-1))
    z_P = (sums.log_z_P - sums.shift_P).exp()
    if settings.kind == "topk":
        return _topk(head.id_Pk, head_log_Pk, rest_PB.sum(-1) / z_P, nll, sums)
    drawn = _systematic(logits, rest_PB, head, uniform, settings.draws)
    id_Pm, order_Pm, first_Pm, times_RPm = _runs(drawn.id_Pm, sets)
    first_Pm &= drawn.any_P[:, None]
    if settings.kind == "hybrid_counts":
        value_Pm = times_RPm.sum(0) * (rest_PB.sum(-1) / (sets * settings.draws))[:, None]
        rest_P = torch.zeros_like(z_P)
    else:
        value_Pm = drawn.weight_Pm.gather(1, order_Pm)
        rest_P = (rest_PB.sum(-1) - (value_Pm * first_Pm).sum(-1)).clamp_(min=0) / z_P
    drawn_log_Pm = value_Pm.log() - z_P.log()[:, None]
    return _hybrid(head.id_Pk, head_log_Pk, id_Pm, drawn_log_Pm, first_Pm, times_RPm, rest_P, nll, sums)


@dataclass(frozen=True, eq=False)
class _Head:
    """The k best entries and the blocks that hold them."""

    value_Pk: Tensor  # falling
    id_Pk: Tensor
    blocks_Pb: Tensor
    rest_PbS: Tensor  # weights of these blocks, 0 at the head's entries


def _head(logits: _Logits, k: int) -> _Head:
    """Return the k best entries: they lie in the k blocks with the largest maxima."""
    max_PB = logits.sums.max_PB
    blocks_Pb = max_PB.topk(min(k, max_PB.shape[1])).indices
    x_PbS = logits.blocks(blocks_Pb)
    value_Pk, where_Pk = x_PbS.flatten(1).topk(k)
    rest_PbS = logits.weights(x_PbS)
    rest_PbS.flatten(1).scatter_(1, where_Pk, 0.0)
    return _Head(value_Pk, blocks_Pb.gather(1, where_Pk // BLOCK) * BLOCK + where_Pk % BLOCK, blocks_Pb, rest_PbS)


@dataclass(frozen=True, eq=False)
class _Drawn:
    """Drawn entries, those of one set after those of another."""

    id_Pm: Tensor  # [P, R·n]
    weight_Pm: Tensor
    any_P: Tensor  # whether there was anything to draw from


def _systematic(logits: _Logits, sum_PB: Tensor, head: _Head | None, uniform: Tensor, n: int) -> _Drawn:
    """Draw R sets of n entries of each position with probability ∝ weight by systematic resampling.

    Each set walks over the blocks in a random order of its own, so that which entries are drawn together does not
    depend on how the vocabulary is numbered. An entry is drawn ⌊n·t⌋ or ⌈n·t⌉ times with mean n·t under any order.
    """
    sets = [_points(sum_PB, uniform[:, number], n) for number in range(uniform.shape[1])]
    block_Pm, beyond_Pm = (torch.cat(parts, 1) for parts in zip(*sets, strict=True))
    weight_PmS = logits.weights(logits.blocks(block_Pm))
    if head is not None:
        same_Pmb = block_Pm[:, :, None] == head.blocks_Pb[:, None, :]
        row, place = torch.nonzero(same_Pmb.any(-1), as_tuple=True)
        weight_PmS[row, place] = head.rest_PbS[row, same_Pmb[row, place].int().argmax(-1)]
    cumulated_PmS = weight_PmS.double().cumsum(-1)
    found_Pm = (cumulated_PmS <= beyond_Pm[..., None]).sum(-1)
    # Rounding may push a point past the last entry that has any weight.
    entry_Pm = torch.minimum(found_Pm, _last_positive(weight_PmS))
    weight_Pm = weight_PmS.gather(-1, entry_Pm[..., None])[..., 0]
    return _Drawn(block_Pm * BLOCK + entry_Pm, weight_Pm, sum_PB.sum(-1) > 0)


def _points(sum_PB: Tensor, uniform_P: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return the blocks that n evenly spaced points fall into, [P, n], and how far into them, in weight."""
    prime = _prime_from(sum_PB.shape[1])
    # Multiples of any number modulo a prime pass over all residues; the uniform's low bits choose the number.
    stride_P = 1 + (uniform_P * 2.0**50).long() % (prime - 1)
    order_PB = stride_P[:, None] * torch.arange(prime, device=sum_PB.device) % prime
    walked_PB = torch.nn.functional.pad(sum_PB, (0, prime - sum_PB.shape[1])).gather(1, order_PB).double()
    cumulated_PB = walked_PB.cumsum(-1)
    step = torch.arange(n, dtype=torch.float64, device=sum_PB.device)
    point_Pn = (uniform_P[:, None] + step) * (cumulated_PB[:, -1:] / n)
    at_Pn = torch.searchsorted(cumulated_PB, point_Pn, right=True)
    at_Pn = torch.minimum(at_Pn, _last_positive(walked_PB)[:, None])
    beyond_Pn = point_Pn - (cumulated_PB.gather(1, at_Pn) - walked_PB.gather(1, at_Pn))
    return order_PB.gather(1, at_Pn), beyond_Pn


@lru_cache
def _prime_from(number: int) -> int:
    """Return the least prime that is not below a number."""
    candidate = max(number, 2)
    while any(candidate % divisor == 0 for divisor in range(2, int(candidate**0.5) + 1)):
        candidate += 1
    return candidate


def _last_positive(x: Tensor) -> Tensor:
    """Return the index of the last positive value along the last dimension, 0 where there is none."""
    index = torch.arange(x.shape[-1], device=x.device)
    return torch.where(x > 0, index, 0).amax(-1)


def _runs(drawn_Pm: Tensor, sets: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the drawn ids, rising, where they stood, where each run of equal ids begins, and each set's part of it.

    Shapes [P, R·n] three times and, valid where a run begins, [R, P, R·n].
    """
    rising_Pm, order_Pm = drawn_Pm.sort(-1)
    first_Pm = torch.ones_like(rising_Pm, dtype=torch.bool)
    first_Pm[:, 1:] = rising_Pm[:, 1:] != rising_Pm[:, :-1]
    same_Pmm = rising_Pm[:, :, None] == rising_Pm[:, None, :]
    set_Pm = order_Pm // (drawn_Pm.shape[1] // sets)
    times = [(same_Pmm & (set_Pm == number)[:, None, :]).sum(-1) for number in range(sets)]
    return rising_Pm, order_Pm, first_Pm, torch.stack(times)


def _topk(ids: Tensor, logprob: Tensor, tail: Tensor, nll: Tensor, sums: _Sums) -> Selection:
    count = np.full(len(ids), ids.shape[1], dtype=np.int32)
    return _selection(count, ids.flatten(), logprob.flatten(), None, tail, nll, sums.entropy_P)


def _dense(log_PV: Tensor, nll: Tensor, sums: _Sums) -> Selection:
    positions, vocab_size = log_PV.shape
    count = np.full(positions, vocab_size, dtype=np.int32)
    ids = torch.arange(vocab_size).repeat(positions)
    # Dense targets have nothing outside; float16 holds no smaller logarithm than this.
    floored = log_PV.flatten().clamp(min=float(np.finfo(np.float16).min))
    return _selection(count, ids, floored, None, torch.zeros_like(nll), nll, sums.entropy_P)


def _text(nll: Tensor, sums: _Sums) -> Selection:
    nothing = torch.zeros(0, device=nll.device)
    return _selection(np.zeros(len(nll), np.int32), nothing, nothing, None, torch.ones_like(nll), nll, sums.entropy_P)


def _sampled(drawn_Pm: Tensor, sets: int, nll: Tensor, sums: _Sums) -> Selection:
    ids_Pm, _, first_Pm, times_RPm = _runs(drawn_Pm, sets)
    count = first_Pm.sum(1).cpu().numpy().astype(np.int32)
    draws = times_RPm[:, first_Pm]
    logprob = torch.from_numpy(drawn_logprob(draws.cpu().numpy().astype(np.uint8), count))
    return _selection(count, ids_Pm[first_Pm], logprob, draws, torch.zeros_like(nll), nll, sums.entropy_P)


def _hybrid(
    head_id_Pk: Tensor,
    head_log_Pk: Tensor,
    drawn_Pm: Tensor,
    drawn_log_Pm: Tensor,
    first_Pm: Tensor,
    times_RPm: Tensor,
    tail: Tensor,
    nll: Tensor,
    sums: _Sums,
) -> Selection:
    """Put the drawn entries behind the head of each position."""
    kept = torch.cat([torch.ones_like(head_id_Pk, dtype=torch.bool), first_Pm], dim=1)
    ids = torch.cat([head_id_Pk, drawn_Pm], dim=1)[kept]
    logprob = torch.cat([head_log_Pk, drawn_log_Pm], dim=1)[kept]
    draws = torch.cat([head_id_Pk.new_zeros(len(times_RPm), *head_id_Pk.shape), times_RPm], dim=2)[:, kept]
    count = kept.sum(1).cpu().numpy().astype(np.int32)
    return _selection(count, ids, logprob, draws, tail, nll, sums.entropy_P)


def _selection(
    count: Int32Array,
    ids: Tensor,
    logprob: Tensor,
    draws: Tensor | None,
    tail: Tensor,
    nll: Tensor,
    entropy: Tensor,
) -> Selection:
    return Selection(
        count=count,
        id=ids.cpu().numpy().astype(np.int32),
        logprob=logprob.clamp(max=0.0).half().cpu().numpy(),
        draws=None if draws is None else draws.cpu().numpy().astype(np.uint8),
        tail_mass=tail.clamp(0.0, 1.0).half().cpu().numpy(),
        nll=nll.float().cpu().numpy(),
        entropy=entropy.float().cpu().numpy(),
    )
