"""Chooses the entries that are kept of each distribution, on the device that holds the logits.

The vocabulary is cut into blocks. One pass gives each block's maximum and its sum of exponentials; after that
only the blocks that hold one of the k best entries, or a draw, are looked at again:

* the k best entries lie in the k blocks with the largest maxima;
* systematic resampling (one uniform u per position, points (u + i)/n · M over the cumulated mass) finds each
  point's block from the block sums, then its entry inside that block.

Positions are taken in chunks, so that the `[positions, vocabulary]` tensor in float32 never exists whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage.config import Kind
from storage.draws import sampled_logprob
from storage.samples import Int32Array, UInt8Array
from storage.targets import Float16Array, Float32Array

BLOCK = 128
"""Entries of one block of the vocabulary."""
CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 1 << 30}
"""Float32 scratch of one chunk of positions: the CPU's fits its cache, the GPU's fills the device."""
PADDING = -1e30
"""Logit of entries that do not exist: no probability, and unlike −inf no NaN when multiplied by it."""


@dataclass(frozen=True)
class SelectionSettings:
    """What is kept at each position."""

    kind: Kind
    top_k: int
    """Entries kept for their rank (`topk`, `hybrid`)."""
    draws: int
    """Draws of one set, from the rest (`hybrid`) or from everything (`sampled`)."""
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
    rows = max(1, CHUNK_BYTES.get(logits.device.type, CHUNK_BYTES["cuda"]) // (4 * logits.shape[1]))
    rows = min(rows, len(positions))
    num_blocks = -(-settings.vocab_size // BLOCK)
    # Scratch is made once: fresh pages for each chunk would cost more than the arithmetic on them.
    scratch = torch.full((2, rows, num_blocks * BLOCK), PADDING, dtype=torch.float32, device=logits.device)
    parts = []
    for at in range(0, len(positions), rows):
        part = slice(at, at + rows)
        chunk = logits[positions[part]]
        parts.append(_select_chunk(chunk, truth[part], uniform[part], settings, at, scratch))
    return Selection.concat(parts)


def _select_chunk(
    logits: Tensor, truth: Tensor, uniform: Tensor, settings: SelectionSettings, start: int, scratch: Tensor
) -> Selection:
    """Select the entries of a few positions at once; names: P positions, B blocks of S entries, k head, n draws."""
    x_PBS, exp_PBS = scratch[:, : len(logits)].view(2, len(logits), -1, BLOCK)
    flat_PV = x_PBS.flatten(1)
    flat_PV[:, : settings.vocab_size] = logits[:, : settings.vocab_size]
    flat_PV[:, settings.vocab_size :] = PADDING
    max_PB = x_PBS.amax(-1)
    max_P = max_PB.amax(-1)
    if not torch.isfinite(max_P).all():
        raise NonFiniteLogitsError([start + int(p) for p in torch.nonzero(~torch.isfinite(max_P))[:, 0]])
    truth_P = flat_PV.gather(1, truth[:, None])[:, 0] - max_P
    head = _head(x_PBS, max_PB, settings.top_k) if settings.kind in {"topk", "hybrid"} else None
    x_PBS -= max_P[:, None, None]
    torch.exp(x_PBS, out=exp_PBS)
    sum_PB = exp_PBS.sum(-1)
    z_P = sum_PB.sum(-1)
    log_z_P = z_P.log()
    nll = log_z_P - truth_P
    log_PV = flat_PV[:, : settings.vocab_size] - log_z_P[:, None] if settings.kind == "dense" else None
    entropy = (log_z_P - _dot_into(x_PBS, exp_PBS) / z_P).clamp_(min=0)
    if log_PV is not None:
        return _dense(log_PV, nll, entropy)
    if settings.kind == "text":
        return _text(nll, entropy)
    if head is None:
        drawn_Pm, _ = _systematic(exp_PBS, sum_PB, uniform, settings.draws)
        return _sampled(drawn_Pm, uniform.shape[1], nll, entropy)
    head_value_Pk, head_id_Pk = head
    head_log_Pk = head_value_Pk - (max_P + log_z_P)[:, None]
    # What is left of each touched block is summed again without its head entries: a difference would cancel.
    exp_PBS.flatten(1).scatter_(1, head_id_Pk, 0.0)
    touched_Pk = head_id_Pk // BLOCK
    rest_PB = sum_PB.scatter(1, touched_Pk, _rows(exp_PBS, touched_Pk).sum(-1))
    if settings.kind == "topk":
        return _topk(head_id_Pk, head_log_Pk, rest_PB.sum(-1) / z_P, nll, entropy)
    drawn_Pm, has_rest_P = _systematic(exp_PBS, rest_PB, uniform, settings.draws)
    drawn_Pm, first_Pm, times_RPm = _runs(drawn_Pm, uniform.shape[1])
    first_Pm &= has_rest_P[:, None]
    value_Pm = exp_PBS.flatten(1).gather(1, drawn_Pm)
    drawn_log_Pm = value_Pm.log() - log_z_P[:, None]
    rest_P = (rest_PB.sum(-1) - (value_Pm * first_Pm).sum(-1)).clamp_(min=0) / z_P
    return _hybrid(head_id_Pk, head_log_Pk, drawn_Pm, drawn_log_Pm, first_Pm, times_RPm, rest_P, nll, entropy)


def _rows(x_PBS: Tensor, blocks_Pm: Tensor) -> Tensor:
    """Return the named blocks of each position, [P, m, BLOCK]."""
    position_P1 = torch.arange(len(x_PBS), device=x_PBS.device)[:, None]
    return x_PBS[position_P1, blocks_Pm]


def _head(x_PBS: Tensor, max_PB: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest logits of each position and their ids, falling; at most the whole vocabulary."""
    blocks_Pb = max_PB.topk(min(k, max_PB.shape[1])).indices
    inside = _rows(x_PBS, blocks_Pb).flatten(1)
    value_Pk, where_Pk = inside.topk(min(k, inside.shape[1]))
    return value_Pk, blocks_Pb.gather(1, where_Pk // BLOCK) * BLOCK + where_Pk % BLOCK


def _dot_into(x_PBS: Tensor, exp_PBS: Tensor) -> Tensor:
    """Return Σ exp(x)·x of each position, [P], entries at −inf counting as 0; overwrites x."""
    x_PBS *= exp_PBS
    total_P = x_PBS.sum(-1).sum(-1)
    if torch.isnan(total_P).any():
        total_P = x_PBS.nan_to_num_(nan=0.0).sum(-1).sum(-1)
    return total_P


def _systematic(weight_PBS: Tensor, sum_PB: Tensor, uniform: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Draw R sets of n entries of each position with probability ∝ weight by systematic resampling.

    The order of the vocabulary is left as it is: each entry by itself is drawn ⌊n·t⌋ or ⌈n·t⌉ times with mean n·t
    under any order of the others.

    Returns the ids, those of one set after those of another, rising inside each, [P, R·n], and whether the position
    had anything to draw from, [P].
    """
    cumulated_PB = sum_PB.double().cumsum(-1)
    total_P = cumulated_PB[:, -1]
    step = torch.arange(n, dtype=torch.float64, device=weight_PBS.device)
    point_Pn = (uniform[:, :, None] + step).flatten(1) * (total_P / n)[:, None]
    last_block_P = _last_positive(sum_PB)
    block_Pn = torch.minimum(torch.searchsorted(cumulated_PB, point_Pn, right=True), last_block_P[:, None])
    before_Pn = cumulated_PB.gather(1, block_Pn) - sum_PB.double().gather(1, block_Pn)
    inside_PnS = _rows(weight_PBS, block_Pn)
    cumulated_PnS = inside_PnS.double().cumsum(-1)
    found_Pn = (cumulated_PnS <= (point_Pn - before_Pn)[..., None]).sum(-1)
    # Rounding may push a point past the last entry that has any weight.
    entry_Pn = torch.minimum(found_Pn, _last_positive(inside_PnS))
    return block_Pn * BLOCK + entry_Pn, total_P > 0


def _last_positive(x: Tensor) -> Tensor:
    """Return the index of the last positive value along the last dimension, 0 where there is none."""
    index = torch.arange(x.shape[-1], device=x.device)
    return torch.where(x > 0, index, 0).amax(-1)


def _runs(drawn_Pm: Tensor, sets: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the drawn ids of all sets, rising, where each run of equal ids begins, and each set's part of the run.

    Shapes [P, R·n], [P, R·n] and, valid where a run begins, [R, P, R·n].
    """
    rising_Pm, order_Pm = drawn_Pm.sort(-1)
    first_Pm = torch.ones_like(rising_Pm, dtype=torch.bool)
    first_Pm[:, 1:] = rising_Pm[:, 1:] != rising_Pm[:, :-1]
    same_Pmm = rising_Pm[:, :, None] == rising_Pm[:, None, :]
    set_Pm = order_Pm // (drawn_Pm.shape[1] // sets)
    times = [(same_Pmm & (set_Pm == number)[:, None, :]).sum(-1) for number in range(sets)]
    return rising_Pm, first_Pm, torch.stack(times)


def _topk(ids: Tensor, logprob: Tensor, tail: Tensor, nll: Tensor, entropy: Tensor) -> Selection:
    count = np.full(len(ids), ids.shape[1], dtype=np.int32)
    return _selection(count, ids.flatten(), logprob.flatten(), None, tail, nll, entropy)


def _dense(log_PV: Tensor, nll: Tensor, entropy: Tensor) -> Selection:
    positions, vocab_size = log_PV.shape
    count = np.full(positions, vocab_size, dtype=np.int32)
    ids = torch.arange(vocab_size).repeat(positions)
    # Dense targets have nothing outside; float16 holds no smaller logarithm than this.
    floored = log_PV.flatten().clamp(min=float(np.finfo(np.float16).min))
    return _selection(count, ids, floored, None, torch.zeros_like(nll), nll, entropy)


def _text(nll: Tensor, entropy: Tensor) -> Selection:
    nothing = torch.zeros(0, device=nll.device)
    return _selection(np.zeros(len(nll), np.int32), nothing, nothing, None, torch.ones_like(nll), nll, entropy)


def _sampled(drawn_Pm: Tensor, sets: int, nll: Tensor, entropy: Tensor) -> Selection:
    ids_Pm, first_Pm, times_RPm = _runs(drawn_Pm, sets)
    count = first_Pm.sum(1).cpu().numpy().astype(np.int32)
    draws = times_RPm[:, first_Pm]
    logprob = torch.from_numpy(sampled_logprob(draws.cpu().numpy().astype(np.uint8), count))
    return _selection(count, ids_Pm[first_Pm], logprob, draws, torch.zeros_like(nll), nll, entropy)


def _hybrid(
    head_id_Pk: Tensor,
    head_log_Pk: Tensor,
    drawn_Pm: Tensor,
    drawn_log_Pm: Tensor,
    first_Pm: Tensor,
    times_RPm: Tensor,
    tail: Tensor,
    nll: Tensor,
    entropy: Tensor,
) -> Selection:
    """Put the drawn entries behind the head of each position."""
    kept = torch.cat([torch.ones_like(head_id_Pk, dtype=torch.bool), first_Pm], dim=1)
    ids = torch.cat([head_id_Pk, drawn_Pm], dim=1)[kept]
    logprob = torch.cat([head_log_Pk, drawn_log_Pm], dim=1)[kept]
    draws = torch.cat([head_id_Pk.new_zeros(len(times_RPm), *head_id_Pk.shape), times_RPm], dim=2)[:, kept]
    count = kept.sum(1).cpu().numpy().astype(np.int32)
    return _selection(count, ids, logprob, draws, tail, nll, entropy)


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
