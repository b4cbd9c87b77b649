"""From samples and targets in memory to the padded tensors of one forward pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from storage.classes import ClassifierInputs
from storage.draws import estimate
from storage.errors import IntegrityError
from storage.hidden import states_tensor
from storage.samples import BoolArray, Int64Array, SampleBatch, offsets_of
from storage.targets import TargetBatch
from trainer.losses import SparseTargets
from trainer.losses.across import AcrossTargets


@dataclass(frozen=True, eq=False)
class Batch:
    """N samples padded to L tokens, with the targets of their P supervised positions."""

    ids: list[bytes]  # [N]
    sources: list[str]  # [N]
    input_ids: Tensor  # int64 [N, L]; padding is token 0
    position_ids: Tensor | None  # int64 [N, L], restarting at each document; none where no window is packed
    attention: Tensor | None  # bool [N, 1, L, L], true where attended; none where plain causal attention is right
    predictor: Tensor  # int64 [P], flat index n·L + i of the state that predicts a supervised token
    targets: SparseTargets
    hidden: Mapping[str, Tensor]  # dataset layer → float [K, width]
    hidden_rows: Tensor | None  # int64 [K], the positions whose states were kept; none where all were
    maps: Mapping[str, Tensor] = field(default_factory=dict)  # dataset layer → float16 [A], rows of teacher attention
    map_count: Tensor | None = None  # int64 [P], entries of each position's row
    across: AcrossTargets | None = None  # what the teacher said in tokens of its own; `targets` then holds labels alone
    classifier: ClassifierInputs | None = None  # what a classifier is called with; its `predictor` picks rows of output

    @property
    def num_supervised(self) -> int:
        """Supervised positions, P."""
        return len(self.predictor)

    def to(self, device: torch.device | str) -> "Batch":
        """Return the same batch on a device."""
        return Batch(
            self.ids,
            self.sources,
            self.input_ids.to(device, non_blocking=True),
            None if self.position_ids is None else self.position_ids.to(device, non_blocking=True),
            None if self.attention is None else self.attention.to(device, non_blocking=True),
            self.predictor.to(device, non_blocking=True),
            self.targets.to(device),
            {layer: states.to(device, non_blocking=True) for layer, states in self.hidden.items()},
            None if self.hidden_rows is None else self.hidden_rows.to(device, non_blocking=True),
            {layer: rows.to(device, non_blocking=True) for layer, rows in self.maps.items()},
            None if self.map_count is None else self.map_count.to(device, non_blocking=True),
            None if self.across is None else self.across.to(device),
            None if self.classifier is None else self.classifier.to(device),
        )


def make_batch(
    samples: SampleBatch, targets: TargetBatch, kind: str, layers: tuple[str, ...] = (), maps: tuple[str, ...] = ()
) -> Batch:
    """Pad a batch of samples and lay out its targets.

    Args:
        samples: N samples.
        targets: their targets, in the same order.
        kind: kind of the targets.
        layers: dataset layers whose hidden states are wanted.
        maps: dataset layers whose attention is wanted.

    Raises:
        IntegrityError: the targets do not belong to the samples.
    """
    if not np.array_equal(samples.num_supervised(), np.diff(targets.offsets)):
        raise IntegrityError(
            "the targets of a batch do not match its supervised positions; verify the dataset with `lectern verify`"
        )
    layout = lay_out(samples)
    count = targets.attention_count if maps else None
    return Batch(
        ids=samples.ids(),
        sources=samples.source,
        input_ids=layout.input_ids,
        position_ids=layout.position_ids,
        attention=layout.attention,
        predictor=layout.predictor,
        targets=sparse_targets(targets, learnt_tokens(samples), kind),
        hidden={layer: states_tensor(targets.hidden[layer]) for layer in layers},
        hidden_rows=None if targets.hidden_kept is None else torch.from_numpy(np.flatnonzero(targets.hidden_kept)),
        maps={layer: torch.from_numpy(targets.attention[layer]) for layer in maps},
        map_count=None if count is None else torch.from_numpy(count.astype(np.int64)),
    )


@dataclass(frozen=True, eq=False)
class Layout:
    """Samples as a padded rectangle; see the fields of `Batch`."""

    input_ids: Tensor
    position_ids: Tensor | None
    attention: Tensor | None
    predictor: Tensor


def lay_out(samples: SampleBatch) -> Layout:
    """Pad samples to the longest."""
    lengths = samples.lengths()
    width = int(lengths.max())
    rows = np.repeat(np.arange(len(samples)), lengths)
    columns = np.arange(samples.num_tokens) - np.repeat(samples.offsets[:-1], lengths)
    flat = rows * width + columns
    input_ids = _padded(samples.tokens, flat, len(samples), width)
    supervised = np.flatnonzero(samples.supervised)
    packed = bool((samples.document != np.repeat(samples.document[samples.offsets[:-1]], lengths)).any())
    position_ids, attention = _packed_attention(samples, flat, width) if packed else (None, None)
    return Layout(torch.from_numpy(input_ids), position_ids, attention, torch.from_numpy(flat[supervised] - 1))


def learnt_tokens(samples: SampleBatch) -> Int64Array:
    """Return the supervised tokens, int64 [P]."""
    return samples.tokens[samples.supervised].astype(np.int64)


def sparse_targets(targets: TargetBatch, label: Int64Array, kind: str) -> SparseTargets:
    """Return the targets as tensors, with the estimate t̂ that the kind calls for; see `storage.targets`."""
    entropy = np.repeat(targets.teacher_entropy, np.diff(targets.offsets))
    return SparseTargets(
        kind=kind,
        label=torch.from_numpy(label),
        entry_offsets=torch.from_numpy(targets.entry_offsets),
        id=torch.from_numpy(targets.id.astype(np.int64)),
        estimate=torch.from_numpy(estimate(targets, kind)),
        logprob=torch.from_numpy(targets.logprob.astype(np.float32)),
        drawn=torch.from_numpy(targets.drawn),
        tail_mass=torch.from_numpy(targets.tail_mass.astype(np.float32)),
        entropy=torch.from_numpy(entropy),
    )


def position_groups(batch: Batch) -> Tensor:
    """Return sample and document, within it, of each supervised position, int64 [P, 2]; both rise."""
    width = batch.input_ids.shape[1]
    sample = batch.predictor // width
    if batch.position_ids is None:
        return torch.stack([sample, torch.zeros_like(sample)], dim=1)
    document = (batch.position_ids == 0).cumsum(1).reshape(-1).index_select(0, batch.predictor)
    return torch.stack([sample, document], dim=1)


def join_batches(batches: Sequence[Batch]) -> Batch:
    """Join batches whose targets may be of several kinds, keeping their order."""
    if len(batches) == 1:
        return batches[0]
    width = max(batch.input_ids.shape[1] for batch in batches)
    first_row = offsets_of([len(batch.ids) for batch in batches])
    first_position = offsets_of([batch.num_supervised for batch in batches])
    packed = any(batch.attention is not None for batch in batches)
    predictors, rows = [], []
    for batch, row, position in zip(batches, first_row.tolist(), first_position.tolist(), strict=False):
        own = batch.input_ids.shape[1]
        predictors.append((batch.predictor // own + row) * width + batch.predictor % own)
        kept = torch.arange(batch.num_supervised) if batch.hidden_rows is None else batch.hidden_rows
        rows.append(kept + position)
    counts = [batch.map_count for batch in batches if batch.map_count is not None]
    return Batch(
        ids=[sample_id for batch in batches for sample_id in batch.ids],
        sources=[source for batch in batches for source in batch.sources],
        input_ids=torch.cat([pad(batch.input_ids, (0, width - batch.input_ids.shape[1])) for batch in batches]),
        position_ids=torch.cat([_positions(batch, width) for batch in batches]) if packed else None,
        attention=torch.cat([_attention(batch, width) for batch in batches]) if packed else None,
        predictor=torch.cat(predictors),
        targets=join_targets([batch.targets for batch in batches]),
        hidden={layer: torch.cat([batch.hidden[layer] for batch in batches]) for layer in batches[0].hidden},
        hidden_rows=None if all(batch.hidden_rows is None for batch in batches) else torch.cat(rows),
        maps={layer: torch.cat([batch.maps[layer] for batch in batches]) for layer in batches[0].maps},
        map_count=torch.cat(counts) if counts else None,
    )


def join_targets(parts: Sequence[SparseTargets]) -> SparseTargets:
    """Join targets, keeping their order; of kind `mixed` where their kinds differ."""
    kinds = {part.kind for part in parts}
    ends = offsets_of([part.num_positions for part in parts])[1:].tolist()
    entries = offsets_of([len(part.id) for part in parts]).tolist()
    offsets = [part.entry_offsets[:-1] + first for part, first in zip(parts, entries, strict=False)]
    names = ("label", "id", "estimate", "logprob", "drawn", "tail_mass", "entropy")
    return SparseTargets(
        kind=parts[0].kind if len(kinds) == 1 else "mixed",
        entry_offsets=torch.cat([*offsets, torch.tensor(entries[-1:])]),
        runs=() if len(kinds) == 1 else tuple((part.kind, end) for part, end in zip(parts, ends, strict=True)),
        **{name: torch.cat([getattr(part, name) for part in parts]) for name in names},
    )


def _positions(batch: Batch, width: int) -> Tensor:
    if batch.position_ids is None:
        return torch.arange(width).expand(len(batch.ids), width)
    return pad(batch.position_ids, (0, width - batch.position_ids.shape[1]))


def _attention(batch: Batch, width: int) -> Tensor:
    """Return which tokens see which; padding sees itself, so that no row of the attention is empty."""
    own = batch.input_ids.shape[1]
    seen = torch.eye(width, dtype=torch.bool).repeat(len(batch.ids), 1, 1, 1)
    seen[:, :, :own, :own] = torch.ones(own, own).tril().bool() if batch.attention is None else batch.attention
    return seen


def take_microbatches(num_samples: int, micro_batch_size: int) -> list[range]:
    """Return the rows of each micro-batch of a rank's part of a step."""
    return [
        range(first, min(first + micro_batch_size, num_samples)) for first in range(0, num_samples, micro_batch_size)
    ]


def _packed_attention(samples: SampleBatch, flat: Int64Array, width: int) -> tuple[Tensor, Tensor]:
    """Return positions that restart at each document, and attention that stays inside it."""
    document = _padded(samples.document, flat, len(samples), width, fill=-1)
    starts = np.ones(document.shape, dtype=bool)
    starts[:, 1:] = document[:, 1:] != document[:, :-1]
    column = np.arange(width)
    first = np.maximum.accumulate(np.where(starts, column, 0), axis=1)
    same: BoolArray = document[:, None, :, None] == document[:, None, None, :]
    causal = column[:, None] >= column[None, :]
    return torch.from_numpy(column - first), torch.from_numpy(same & causal)


def _padded(
    values: NDArray[np.generic], flat: Int64Array, num_rows: int, width: int, fill: int = 0
) -> NDArray[np.int64]:
    out = np.full(num_rows * width, fill, dtype=np.int64)
    out[flat] = values
    return out.reshape(num_rows, width)
