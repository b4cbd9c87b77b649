"""Scores samples: forward pass, selection of entries, hidden states. One rank's part of a unit, and their merge.

How the ranks of a replica share a unit depends on how the model is sharded:

* whole or tensor parallel: every rank runs every batch and selects an equal share of its positions;
* ZeRO-3: the ranks take turns at the batches; who has one less runs a dummy, since all must gather weights together.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from storage.errors import IntegrityError
from storage.samples import Int64Array, SampleBatch, offsets_of, ragged_index
from storage.targets import TargetBatch
from workers.local.batching import ModelInputs, model_inputs, plan_batches, predicting_rows
from workers.local.hooks import captured_hidden
from workers.local.selection import NonFiniteLogitsError, Selection, SelectionSettings, select, uniforms


@dataclass(frozen=True)
class ScoringSettings:
    """How samples are scored and what is kept."""

    selection: SelectionSettings
    seed: int
    draw_sets: int
    hidden: tuple[str, ...]
    hidden_dtype: str
    batch_tokens: int
    data_parallel: bool
    """Ranks take turns at batches (ZeRO-3) instead of sharing each one."""


@dataclass(frozen=True, eq=False)
class ScoredPart:
    """What one rank found out about a unit: targets of some of its supervised positions."""

    positions: Int64Array  # [p], index among the unit's supervised positions
    selection: Selection | None  # of those positions; None when there are none
    hidden: Mapping[str, NDArray[np.generic]]  # layer → [p, width]
    forward_s: float
    selection_s: float


@dataclass(frozen=True, eq=False)
class _Positions:
    """Where the supervised positions of a batch lie."""

    unit: Int64Array  # [p], index among the unit's supervised positions
    logits_row: Int64Array  # [p], row of the flattened [N·L] output that predicts the position
    truth: Int64Array  # [p]
    uniform: NDArray[np.float64]  # [p, R], of R sets of draws


def score_part(
    model: nn.Module,
    samples: SampleBatch,
    settings: ScoringSettings,
    rank: int,
    num_ranks: int,
    device: torch.device,
    on_batch: Callable[[], None] = lambda: None,
) -> ScoredPart:
    """Run this rank's share of a unit's batches; `on_batch` is called after each.

    Raises:
        IntegrityError: the teacher's logits are NaN or infinite; the message names the samples.
    """
    batches = list(plan_batches(samples.lengths(), settings.batch_tokens))
    pieces: list[tuple[_Positions, Selection, dict[str, NDArray[np.generic]]]] = []
    forward_s = selection_s = 0.0
    step = num_ranks if settings.data_parallel else 1
    for first in range(0, len(batches), step):
        turn = first + rank if settings.data_parallel else first
        is_dummy = turn >= len(batches)
        rows = batches[first if is_dummy else turn]
        start = time.perf_counter()
        logits, hidden = _forward(model, model_inputs(samples.take(rows)).to(device), settings.hidden)
        forward_s += time.perf_counter() - start
        start = time.perf_counter()
        where = _supervised(samples, rows, settings)
        if not settings.data_parallel:
            where = _share(where, rank, num_ranks)
        if not is_dummy and len(where.unit):
            selected = _select(logits, where, samples, settings)
            pieces.append((where, selected, _pick_hidden(hidden, where, settings.hidden_dtype)))
        selection_s += time.perf_counter() - start
        on_batch()
    return ScoredPart(
        positions=np.concatenate([np.zeros(0, dtype=np.int64), *(where.unit for where, _, _ in pieces)]),
        selection=Selection.concat([selected for _, selected, _ in pieces]) if pieces else None,
        hidden={name: np.concatenate([kept[name] for _, _, kept in pieces]) for name in settings.hidden if pieces},
        forward_s=forward_s,
        selection_s=selection_s,
    )


def merge_parts(samples: SampleBatch, parts: Sequence[ScoredPart]) -> TargetBatch:
    """Put the ranks' parts together in the order of the samples."""
    filled = [part for part in parts if part.selection is not None]
    positions = np.concatenate([part.positions for part in filled])
    order = np.argsort(positions, kind="stable")
    offsets = offsets_of(samples.num_supervised())
    if not np.array_equal(positions[order], np.arange(offsets[-1])):
        raise IntegrityError(f"{len(positions)} scored positions came back for {offsets[-1]} supervised ones")
    merged = Selection.concat([part.selection for part in filled if part.selection is not None])
    entries = ragged_index(offsets_of(merged.count.astype(np.int64)), order.tolist())
    owner = np.repeat(np.arange(len(samples)), np.diff(offsets))
    num_positions = np.maximum(np.diff(offsets), 1)

    def mean(values: NDArray[np.float32]) -> NDArray[np.float32]:
        sums = np.bincount(owner, weights=values[order], minlength=len(samples))
        return (sums / num_positions).astype(np.float32)

    return TargetBatch(
        offsets=offsets,
        count=merged.count[order],
        id=merged.id[entries],
        logprob=merged.logprob[entries],
        draws=None if merged.draws is None else merged.draws[:, entries],
        tail_mass=merged.tail_mass[order],
        teacher_nll=mean(merged.nll),
        teacher_entropy=mean(merged.entropy),
        hidden={layer: np.concatenate([part.hidden[layer] for part in filled])[order] for layer in filled[0].hidden},
    )


@torch.no_grad()
def _forward(model: nn.Module, inputs: ModelInputs, layers: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits [N·L, W] and the asked hidden states [N·L, width]."""
    with captured_hidden(model, layers) as found:
        output = model(
            input_ids=inputs.input_ids,
            position_ids=inputs.position_ids,
            attention_mask=inputs.attention_mask,
            use_cache=False,
        )
    return output.logits.flatten(0, 1), {layer: found[layer].flatten(0, 1) for layer in layers}


def _supervised(samples: SampleBatch, rows: Sequence[int], settings: ScoringSettings) -> _Positions:
    """Locate the supervised positions of the samples at `rows`, padded to the longest of them."""
    batch = samples.take(rows)
    logits_row, truth = predicting_rows(batch)
    named = zip(batch.ids(), batch.num_supervised().tolist(), strict=True)
    uniform = [uniforms(settings.seed, sample_id, n, settings.draw_sets) for sample_id, n in named]
    return _Positions(
        unit=ragged_index(offsets_of(samples.num_supervised()), rows),
        logits_row=logits_row,
        truth=truth,
        uniform=np.concatenate(uniform),
    )


def _share(where: _Positions, rank: int, num_ranks: int) -> _Positions:
    """Return this rank's run of positions; the shares differ by at most one position."""
    count = len(where.unit)
    part = slice(count * rank // num_ranks, count * (rank + 1) // num_ranks)
    return _Positions(where.unit[part], where.logits_row[part], where.truth[part], where.uniform[part])


def _select(logits: Tensor, where: _Positions, samples: SampleBatch, settings: ScoringSettings) -> Selection:
    rows, truth = (torch.from_numpy(array).to(logits.device) for array in (where.logits_row, where.truth))
    uniform = torch.from_numpy(where.uniform).to(logits.device)
    try:
        return select(logits, rows, truth, uniform, settings.selection)
    except NonFiniteLogitsError as error:
        offsets = offsets_of(samples.num_supervised())
        bad = np.unique(np.searchsorted(offsets, where.unit[error.positions], side="right") - 1)
        names = ", ".join(samples.ids()[int(n)].hex() for n in bad[:5])
        raise IntegrityError(
            f"the teacher's logits are NaN or infinite for {len(bad)} samples ({names}); nothing of this unit is "
            "stored: try teacher.dtype float32, or leave these samples out"
        ) from error


def _pick_hidden(hidden: Mapping[str, Tensor], where: _Positions, dtype: str) -> dict[str, NDArray[np.generic]]:
    """Return the hidden states that predict the positions, [p, width], in the stored dtype."""
    picked = {}
    for layer, states in hidden.items():
        values = states[torch.from_numpy(where.logits_row).to(states.device)].to(getattr(torch, dtype)).cpu()
        # numpy has no bfloat16: its bit patterns are kept as uint16.
        picked[layer] = values.view(torch.uint16).numpy() if dtype == "bfloat16" else values.numpy()
    return picked
