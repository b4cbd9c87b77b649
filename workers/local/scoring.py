"""Scores samples: forward pass, selection of entries, hidden states. One rank's part of a unit, and their merge.

How the ranks of a replica share a unit depends on how the model is sharded:

* whole or tensor parallel: every rank runs every batch and selects an equal share of its positions;
* ZeRO-3: the ranks take turns at the batches; who has one less runs a dummy, since all must gather weights together.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from storage.classes import ClassifierInputs, class_rows, padded_with
from storage.errors import IntegrityError
from storage.hidden import attention_lengths, kept_positions, store_states
from storage.identity import Task
from storage.projection import Projection
from storage.samples import BoolArray, Int64Array, SampleBatch, offsets_of, ragged_index
from storage.targets import TargetBatch
from workers.local.batching import ModelInputs, model_inputs, plan_batches, predicting_rows
from workers.local.hooks import captured_attention, captured_hidden
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
    hidden_every: float | None = None
    attention: tuple[str, ...] = ()
    projection: Projection | None = None
    task: Task = "next_token"


@dataclass(frozen=True, eq=False)
class ScoredPart:
    """What one rank found out about a unit: targets of some of its supervised positions."""

    positions: Int64Array  # [p], index among the unit's supervised positions
    selection: Selection | None  # of those positions; None when there are none
    kept: BoolArray  # [p], which of them keep states and attention: K
    hidden: Mapping[str, NDArray[np.generic]]  # layer → [K, columns]
    attention: Mapping[str, NDArray[np.float16]]  # layer → [A], rows of the kept positions, joined
    attention_count: NDArray[np.int32]  # [p], length of each row, 0 where none is kept
    forward_s: float
    selection_s: float
    refused: frozenset[int] = frozenset()
    """Samples of the unit whose logits are NaN or infinite; some of their positions are not among `positions`."""


@dataclass(frozen=True, eq=False)
class _Positions:
    """Where the supervised positions of a batch lie."""

    unit: Int64Array  # [p], index among the unit's supervised positions
    logits_row: Int64Array  # [p], row of the flattened [N·L] output that predicts the position
    truth: Int64Array  # [p]
    uniform: NDArray[np.float64]  # [p, R], of R sets of draws
    kept: BoolArray  # [p], keeps hidden states and attention
    looks_back: Int64Array  # [p], tokens that the prediction may attend to

    def part(self, first: int, last: int) -> "_Positions":
        """Return the positions from `first` to `last`."""
        return self.take(slice(first, last))

    def take(self, chosen: slice | BoolArray) -> "_Positions":
        """Return some of the positions, in order."""
        return _Positions(*(getattr(self, f.name)[chosen] for f in fields(self)))


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

    Samples whose logits are NaN or infinite are named in the result, and the work goes on: the ranks stay in step.
    """
    batches = list(plan_batches(samples.lengths(), settings.batch_tokens))
    pieces: list[tuple[_Positions, Selection, dict[str, NDArray[Any]], dict[str, NDArray[Any]]]] = []
    refused: set[int] = set()
    forward_s = selection_s = 0.0
    step = num_ranks if settings.data_parallel else 1
    for first in range(0, len(batches), step):
        turn = first + rank if settings.data_parallel else first
        is_dummy = turn >= len(batches)
        rows = batches[first if is_dummy else turn]
        start = time.perf_counter()
        if settings.task == "next_token":
            seen = _forward(model, model_inputs(samples.take(rows)).to(device), settings, num_ranks)
        else:
            seen = _classify(model, samples.take(rows), device)
        forward_s += time.perf_counter() - start
        start = time.perf_counter()
        where = _supervised(samples, rows, settings)
        if not settings.data_parallel:
            where = _share(where, rank, num_ranks)
        selected = None
        if not is_dummy:
            selected, where = _select(seen.logits, where, samples, settings, refused)
        if selected is not None:
            states, weights = _pick_hidden(seen.hidden, where, settings), _pick_attention(seen.attention, where)
            pieces.append((where, selected, states, weights))
        selection_s += time.perf_counter() - start
        on_batch()
    wheres = [piece[0] for piece in pieces]
    kept = np.concatenate([np.zeros(0, dtype=np.bool_), *(where.kept for where in wheres)])
    looks_back = np.concatenate([np.zeros(0, dtype=np.int64), *(where.looks_back for where in wheres)])
    return ScoredPart(
        positions=np.concatenate([np.zeros(0, dtype=np.int64), *(where.unit for where in wheres)]),
        selection=Selection.concat([piece[1] for piece in pieces]) if pieces else None,
        kept=kept,
        hidden={name: np.concatenate([piece[2][name] for piece in pieces]) for name in settings.hidden if pieces},
        attention={name: np.concatenate([piece[3][name] for piece in pieces]) for name in settings.attention if pieces},
        attention_count=np.where(kept, looks_back, 0).astype(np.int32),
        forward_s=forward_s,
        selection_s=selection_s,
        refused=frozenset(refused),
    )


def scored_samples(num_samples: int, parts: Sequence[ScoredPart]) -> list[int]:
    """Return which samples of a unit no rank refused, rising."""
    refused = frozenset().union(*(part.refused for part in parts))
    return [n for n in range(num_samples) if n not in refused]


def merge_parts(samples: SampleBatch, parts: Sequence[ScoredPart], settings: ScoringSettings) -> TargetBatch:
    """Put the ranks' parts together in the order of the samples, `scored_samples` of them, of which there are some."""
    filled = [part for part in parts if part.selection is not None]
    positions = np.concatenate([part.positions for part in filled])
    order = np.argsort(positions, kind="stable")
    scored = scored_samples(len(samples), parts)
    wanted = ragged_index(offsets_of(samples.num_supervised()), scored)
    if len(scored) < len(samples):
        order = order[np.isin(positions[order], wanted)]
        samples = samples.take(scored)
    offsets = offsets_of(samples.num_supervised())
    if not np.array_equal(positions[order], wanted):
        raise IntegrityError(f"{len(order)} scored positions came back for {len(wanted)} supervised ones")
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
        **_merge_states(filled, order, settings),
    )


def _merge_states(parts: Sequence[ScoredPart], order: Int64Array, settings: ScoringSettings) -> dict[str, Any]:
    """Return the fields of a `TargetBatch` about states and attention; `order` sorts the parts' positions."""
    kept = np.concatenate([part.kept for part in parts])
    rows = (np.cumsum(kept) - 1)[order[kept[order]]]
    count = np.concatenate([part.attention_count for part in parts])
    weights = ragged_index(offsets_of(count.astype(np.int64)), order.tolist())
    return {
        "hidden": {name: np.concatenate([part.hidden[name] for part in parts])[rows] for name in settings.hidden},
        "hidden_kept": None if settings.hidden_every is None else kept[order],
        "attention": {name: np.concatenate([p.attention[name] for p in parts])[weights] for name in settings.attention},
        "attention_count": count[order] if settings.attention else None,
    }


@dataclass(frozen=True, eq=False)
class _Seen:
    """What a forward pass gave; row n·L + i belongs to token i of sample n."""

    logits: Tensor  # [N·L, W]
    hidden: Mapping[str, Tensor]  # layer → [N·L, width]
    attention: Mapping[str, Tensor]  # layer → float32 [N·L, L]


@torch.no_grad()
def _classify(model: nn.Module, samples: SampleBatch, device: torch.device) -> _Seen:
    inputs = ClassifierInputs.of(samples, device)
    with padded_with(model, inputs.pad_id):
        output = model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask)
    return _Seen(output.logits.flatten(0, -2), {}, {})


@torch.no_grad()
def _forward(model: nn.Module, inputs: ModelInputs, settings: ScoringSettings, num_ranks: int) -> _Seen:
    if settings.attention:
        inputs = inputs.additive(next(model.parameters()).dtype)
    with captured_hidden(model, settings.hidden) as hidden, captured_attention(model, settings.attention) as attention:
        output = model(
            input_ids=inputs.input_ids,
            position_ids=inputs.position_ids,
            attention_mask=inputs.attention_mask,
            use_cache=False,
        )
    if torch.distributed.is_initialized() and not settings.data_parallel and num_ranks > 1:
        for weights in attention.values():
            torch.distributed.all_reduce(weights)
            weights /= num_ranks
    return _Seen(
        output.logits.flatten(0, 1),
        {layer: hidden[layer].flatten(0, 1) for layer in settings.hidden},
        {layer: attention[layer].flatten(0, 1) for layer in settings.attention},
    )


def _supervised(samples: SampleBatch, rows: Sequence[int], settings: ScoringSettings) -> _Positions:
    """Locate the supervised positions of the samples at `rows`, padded to the longest of them."""
    batch = samples.take(rows)
    num_positions = batch.num_supervised()
    logits_row, truth = predicting_rows(batch)
    if settings.task != "next_token":
        logits_row = class_rows(batch, settings.task)
    named = zip(batch.ids(), num_positions.tolist(), strict=True)
    uniform = [uniforms(settings.seed, sample_id, n, settings.draw_sets) for sample_id, n in named]
    return _Positions(
        unit=ragged_index(offsets_of(samples.num_supervised()), rows),
        logits_row=logits_row,
        truth=truth,
        uniform=np.concatenate(uniform),
        kept=kept_positions(batch.sample_id, num_positions, settings.hidden_every),
        looks_back=attention_lengths(batch),
    )


def _share(where: _Positions, rank: int, num_ranks: int) -> _Positions:
    """Return this rank's run of positions; the shares differ by at most one position."""
    count = len(where.unit)
    return where.part(count * rank // num_ranks, count * (rank + 1) // num_ranks)


def _select(
    logits: Tensor, where: _Positions, samples: SampleBatch, settings: ScoringSettings, refused: set[int]
) -> tuple[Selection | None, _Positions]:
    """Select entries at the positions of samples whose logits are finite, and return these positions.

    The other samples are added to `refused`.
    """
    owner = np.searchsorted(offsets_of(samples.num_supervised()), where.unit, side="right") - 1
    while len(where.unit):
        rows, truth = (torch.from_numpy(array).to(logits.device) for array in (where.logits_row, where.truth))
        uniform = torch.from_numpy(where.uniform).to(logits.device)
        if settings.task != "next_token":  # which class is right nobody says: the likeliest one stands in for it
            truth = logits[rows, : settings.selection.vocab_size].argmax(-1)
        try:
            return select(logits, rows, truth, uniform, settings.selection), where
        except NonFiniteLogitsError as error:
            bad = np.unique(owner[error.positions])
            refused.update(bad.tolist())
            finite = ~np.isin(owner, bad)
            where, owner = where.take(finite), owner[finite]
    return None, where


def _pick_hidden(
    hidden: Mapping[str, Tensor], where: _Positions, settings: ScoringSettings
) -> dict[str, NDArray[np.generic]]:
    """Return the hidden states that predict the kept positions, [K, columns], in the stored format."""
    rows = torch.from_numpy(where.logits_row[where.kept])
    picked = {layer: states[rows.to(states.device)].float().cpu().numpy() for layer, states in hidden.items()}
    if settings.projection is not None:
        picked = {layer: settings.projection.project(layer, values) for layer, values in picked.items()}
    return {layer: store_states(values, settings.hidden_dtype) for layer, values in picked.items()}


def _pick_attention(attention: Mapping[str, Tensor], where: _Positions) -> dict[str, NDArray[np.float16]]:
    """Return what each kept prediction attends to, first token of its document to the last before it, joined [A]."""
    picked = {}
    for layer, weights in attention.items():
        rows, count = where.logits_row[where.kept], where.looks_back[where.kept]
        chosen = weights[torch.from_numpy(rows).to(weights.device)].half().cpu().numpy()
        column, query = np.arange(chosen.shape[1]), rows % chosen.shape[1]
        picked[layer] = chosen[(column > (query - count)[:, None]) & (column <= query[:, None])]
    return picked
