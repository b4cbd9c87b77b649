"""The compact codec: the targets of a row packed into one binary value, exact but for rounding within stated bounds.

Columns of samples, hidden states and means are as in the plain codec. `target_packed` holds a row's targets,
`target_codebook` what the rows of a file share (the same value in all of them, stored once). Ids and draws come back
as they were; log-probabilities within LOGPROB_ERROR, and tail masses within 1.1% of themselves.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from storage.codecs import plain
from storage.codecs.codebook import Codebook, Ranking, Ranks
from storage.codecs.entries import (
    DRAWN,
    HEAD,
    LOGPROB_STEP,
    Group,
    Places,
    arrange,
    code_drawn_logprobs,
    code_draws,
    code_group,
    code_head_logprobs,
    code_tail,
)
from storage.codecs.integers import Coder, Layout, Recorder, Unpacker
from storage.contract import check_contract
from storage.draws import drawn_logprob, mass_drawn_from
from storage.errors import IntegrityError
from storage.identity import COUNTED_KINDS, DRAWN_KINDS, DatasetIdentity
from storage.samples import BoolArray, Int32Array, Int64Array, SampleBatch, UInt8Array, offsets_of
from storage.targets import Float16Array, TargetBatch

LOGPROB_ERROR = 0.01
"""Bound of what rounding to steps and to float16 changes, in nats, for log-probabilities above −16."""
LANE_POSITIONS = 64
"""Positions that share a lane."""
LEAST_MASS = 1e-7
"""Least mass that draws share: what has none was not drawn from."""
MAX_STEPS = 1 << 22
"""No float16 lies further below 0 than this many steps."""


@dataclass(frozen=True, eq=False)
class Entries:
    """Targets in whole numbers, as they are coded."""

    head: Group
    drawn: Group
    steps: Int64Array  # −log p in steps, of the head's entries of all positions, then of the drawn ones where stored
    draws: Int64Array  # [R, entries drawn]
    tail: Int64Array  # [P], mass outside what has steps; 0 where there is none, else 1 + −log of it in steps


def encode(samples: SampleBatch, targets: TargetBatch, identity: DatasetIdentity) -> pa.Table:
    """Return the table of a data file; refuses rows out of contract with IntegrityError.

    What will be read back is held to the contract as well as what was given.
    """
    check_contract(samples, targets, identity)
    kind = identity.capture.kind
    kept = quantised(targets, kind)
    check_contract(samples, kept, identity)
    codebook, rows = pack(samples, kept, kind, identity.tokenizer.vocab_size)
    shared = pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(rows), np.int32)), pa.array([codebook], pa.binary()))
    columns = {"target_packed": pa.array(rows, pa.binary()), "target_codebook": shared}
    return plain.build_table(samples, targets, identity, "compact", columns)


def read_entries(table: pa.Table, kind: str, samples: SampleBatch) -> dict[str, Any]:
    """Return the fields of a TargetBatch that the packed columns hold."""
    books = {book for chunk in table.column("target_codebook").chunks for book in chunk.unique().to_pylist()}
    if len(books) != 1:
        raise IntegrityError(f"the rows of a data file share one codebook; there are {len(books)}")
    rows = [memoryview(value.as_buffer()) for value in table.column("target_packed")]
    return {"offsets": offsets_of(samples.num_supervised()), **unpack(samples, kind, books.pop(), rows)}


def quantised(targets: TargetBatch, kind: str) -> TargetBatch:
    """Return the targets as they come back from the codec, in its order of entries.

    That is the head by falling probability, equal ones by rising id, then the drawn entries by rising id.
    """
    owner = np.repeat(np.arange(targets.num_positions), targets.count)
    head = _is_head(targets)
    steps = np.zeros(len(owner), np.int64) if kind == "sampled" else _steps(targets.logprob)
    order = np.lexsort((targets.id, np.where(head, steps, 0), ~head, owner))
    draws = None if targets.draws is None else targets.draws[:, order]
    logprob, tail_mass = _probabilities(kind, steps[order], _tail_steps(targets, kind), draws, targets.count)
    return replace(targets, id=targets.id[order], logprob=logprob, draws=draws, tail_mass=tail_mass)


def _probabilities(
    kind: str, steps: Int64Array, tail: Int64Array, draws: UInt8Array | None, count: Int32Array
) -> tuple[Float16Array, Float16Array]:
    """Return log-probabilities [E] and tail masses [P], given both in steps; steps of the drawn do not count where
    these are known by their number alone."""
    mass = np.where(tail > 0, np.exp(-(tail - 1) * LOGPROB_STEP), 0).astype(np.float32)
    if kind not in COUNTED_KINDS:
        return _logprob(steps), mass.astype(np.float16)
    assert draws is not None
    drawn = drawn_logprob(draws, count, None if kind == "sampled" else mass)
    return np.where(draws.any(axis=0), drawn, _logprob(steps)), np.zeros(len(count), np.float16)


def pack(samples: SampleBatch, targets: TargetBatch, kind: str, vocab_size: int) -> tuple[bytes, list[bytes]]:
    """Return the codebook and the packed value of each sample; targets of any kind with a few entries."""
    layout, before, label = _positions(samples)
    owner = np.repeat(np.arange(targets.num_positions), targets.count)
    ranks = Ranks.count(before, owner, targets.id, vocab_size)
    places = Places(layout.lane, label, ranks.list_of(before))
    ranking = Ranking(ranks)
    draws, sets = 0, 0
    if targets.draws is not None:
        sets = len(targets.draws)
        draws = int(np.bincount(owner, weights=targets.draws[0]).max(initial=0))
    recorder = Recorder()
    _code(recorder, places, ranking, kind, (draws, sets), _entries(targets, places, ranking, kind))
    tables, rows = recorder.pack(layout)
    return Codebook(draws, sets, ranks, tables).to_bytes(), rows


def unpack(samples: SampleBatch, kind: str, codebook: bytes, rows: list[memoryview]) -> dict[str, Any]:
    """Return count, id, logprob, draws and tail_mass of the targets; IntegrityError where anything is damaged."""
    book = Codebook.from_bytes(codebook)
    vocab_size = len(book.ranks.classes)
    if ((samples.tokens < 0) | (samples.tokens >= vocab_size)).any():
        raise IntegrityError(f"a row holds token ids outside its codebook's vocabulary of {vocab_size}")
    layout, before, label = _positions(samples)
    places = Places(layout.lane, label, book.ranks.list_of(before))
    unpacker = Unpacker(book.tables, layout, rows)
    entries = _code(unpacker, places, Ranking(book.ranks), kind, (book.draws, book.sets), None)
    unpacker.finish()
    return _fields(entries, kind)


def _code(
    coder: Coder, places: Places, ranking: Ranking, kind: str, deal: tuple[int, int], known: Entries | None
) -> Entries:
    """Code all entries in one direction; `deal` is the number of draws in a set and of sets."""
    size = len(places.lane)
    head = drawn = Group.empty(size)
    everywhere = np.ones(size, dtype=np.bool_)
    if kind != "sampled":
        head = code_group(coder, places, ranking, known.head if known else None, HEAD, everywhere)
    if kind in DRAWN_KINDS:
        drawn = code_group(coder, places, ranking, known.drawn if known else None, DRAWN, ~head.has_label)
    steps = np.zeros(0, dtype=np.int64)
    draws = np.zeros((max(deal[1], 1), 0), dtype=np.int64)
    tail = np.zeros(size, dtype=np.int64)
    split = len(head.id)
    if kind != "sampled":
        level, above = code_head_logprobs(coder, places, head, known.steps[:split] if known else None)
        steps, owner = above, head.owner
        if kind == "hybrid":
            below = code_drawn_logprobs(coder, places, drawn, level, known.steps[split:] if known else None)
            steps, owner = np.concatenate([above, below]), np.concatenate([owner, drawn.owner])
        tail = code_tail(coder, places, owner, steps, known.tail if known else None)
    if kind in DRAWN_KINDS:
        draws = code_draws(coder, places, drawn, deal, known.draws if known else None)
    return Entries(head, drawn, steps, draws, tail)


def _positions(samples: SampleBatch) -> tuple[Layout, Int64Array, Int64Array]:
    """Return how the positions lie in lanes, the token before each and the token that stands there."""
    at = np.flatnonzero(samples.supervised)
    if len(at) and at[0] == 0:
        raise IntegrityError("the first token of a file cannot be supervised")
    tokens = samples.tokens.astype(np.int64)
    return Layout.of(samples.num_supervised(), LANE_POSITIONS), tokens[at - 1], tokens[at]


def _is_head(targets: TargetBatch) -> BoolArray:
    return np.ones(len(targets.id), np.bool_) if targets.draws is None else np.asarray(~targets.draws.any(axis=0))


def _entries(targets: TargetBatch, places: Places, ranking: Ranking, kind: str) -> Entries:
    owner = np.repeat(np.arange(targets.num_positions), targets.count)
    is_head = _is_head(targets)
    groups, picked = [], []
    for inside in (is_head, ~is_head):
        at = np.flatnonzero(inside)
        count = np.bincount(owner[at], minlength=targets.num_positions)
        group, order = arrange(places, ranking, count, targets.id[at].astype(np.int64))
        groups.append(group)
        picked.append(at[order])
    stored = {"sampled": [], "hybrid_counts": picked[:1]}.get(kind, picked)
    steps = _steps(targets.logprob)[np.concatenate([np.zeros(0, np.int64), *stored])]
    draws = np.zeros((1, 0), np.int64) if targets.draws is None else targets.draws[:, picked[1]].astype(np.int64)
    return Entries(groups[0], groups[1], steps, draws, _tail_steps(targets, kind))


def _fields(entries: Entries, kind: str) -> dict[str, Any]:
    """Return the fields of a TargetBatch, its entries in the order of `quantised`."""
    ids = np.concatenate([entries.head.id, entries.drawn.id])
    owner = np.concatenate([entries.head.owner, entries.drawn.owner])
    is_drawn = np.arange(len(ids)) >= len(entries.head.id)
    steps = np.zeros(len(ids), np.int64)
    steps[: len(entries.steps)] = entries.steps
    order = np.lexsort((ids, np.where(is_drawn, 0, steps), is_drawn, owner))
    count = (entries.head.count + entries.drawn.count).astype(np.int32)
    draws = None
    if kind in DRAWN_KINDS:
        padded = [np.zeros((len(entries.draws), len(entries.head.id)), np.int64), entries.draws]
        if entries.draws.max(initial=0) > 255:
            raise IntegrityError("a packed stream draws an entry more than 255 times")
        draws = np.concatenate(padded, axis=1)[:, order].astype(np.uint8)
    logprob, tail_mass = _probabilities(kind, steps[order], entries.tail, draws, count)
    return {
        "count": count,
        "id": ids[order].astype(np.int32),
        "logprob": logprob,
        "draws": draws,
        "tail_mass": tail_mass,
    }


def _steps(logprob: NDArray[np.floating[Any]]) -> Int64Array:
    return np.rint(np.maximum(-logprob.astype(np.float64), 0) / LOGPROB_STEP).astype(np.int64)


def _logprob(steps: Int64Array) -> Float16Array:
    if len(steps) and not 0 <= steps.min() <= steps.max() < MAX_STEPS:
        raise IntegrityError("a packed stream holds a log-probability that is out of range")
    return (-steps * LOGPROB_STEP).astype(np.float16) + np.float16(0)


def _tail_steps(targets: TargetBatch, kind: str) -> Int64Array:
    """Return the steps of the mass outside what has log-probabilities of its own, [P]."""
    if kind == "hybrid_counts":
        mass = mass_drawn_from(targets).astype(np.float64)
        mass = np.where(mass > 0, np.maximum(mass, LEAST_MASS), 0)
    else:
        mass = targets.tail_mass.astype(np.float64)
    return np.where(mass > 0, 1 + _steps(np.log(np.where(mass > 0, mass, 1))), 0)
