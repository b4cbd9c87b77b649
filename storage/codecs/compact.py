"""The compact codec: the targets of a row packed into one binary value, exact but for rounding within stated bounds.

Columns of samples, hidden states and means are as in the plain codec. `target_packed` holds a row's targets,
`target_codebook` what the rows of a file share (the same value in all of them, stored once). Ids and draws come back
as they were; log-probabilities within `steps.LOGPROB_ERROR`, and tail masses within 1.1% of themselves.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from storage.codecs import plain
from storage.codecs.codebook import VERSION, Codebook, Ranking, Ranks
from storage.codecs.entries import (
    DRAWN,
    HEAD,
    Group,
    Places,
    arrange,
    code_drawn_logprobs,
    code_draws,
    code_group,
    code_head_logprobs,
    code_lists,
    code_tail,
    kinds_of,
    least_of,
)
from storage.codecs.integers import Coder, Layout, Recorder, Unpacker
from storage.codecs.lists import choose_lists
from storage.codecs.steps import logprob_of, steps_of, tail_mass_of, tail_steps_of
from storage.contract import check_contract
from storage.draws import drawn_logprob, mass_drawn_from
from storage.errors import IntegrityError
from storage.identity import COUNTED_KINDS, DRAWN_KINDS, DatasetIdentity
from storage.samples import Int32Array, Int64Array, SampleBatch, UInt8Array, offsets_of
from storage.targets import Float16Array, TargetBatch

LANE_POSITIONS = 64
"""Positions that share a lane."""
LEAST_MASS = 1e-7
"""Least mass that draws share: what has none was not drawn from."""


@dataclass(frozen=True, eq=False)
class Entries:
    """Targets in whole numbers, as they are coded."""

    lists: Int64Array  # [P], which list a position takes, −1 for none
    head: Group
    drawn: Group
    steps: Int64Array  # cells of log p, of the head's entries of all positions, then of the drawn ones where stored
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
    head = ~targets.drawn
    steps = np.zeros(len(owner), np.int64) if kind == "sampled" else steps_of(targets.logprob)
    order = np.lexsort((targets.id, np.where(head, steps, 0), ~head, owner))
    draws = None if targets.draws is None else targets.draws[:, order]
    logprob, tail_mass = _probabilities(
        kind, logprob_of(steps[order], VERSION), _tail_steps(targets, kind), draws, targets.count
    )
    return replace(targets, id=targets.id[order], logprob=logprob, draws=draws, tail_mass=tail_mass)


def _probabilities(
    kind: str, logprob: Float16Array, tail: Int64Array, draws: UInt8Array | None, count: Int32Array
) -> tuple[Float16Array, Float16Array]:
    """Return log-probabilities [E] and tail masses [P], given the tail in steps; what is given of the drawn does not
    count where these are known by their number alone."""
    mass = tail_mass_of(tail)
    if kind not in COUNTED_KINDS:
        return logprob, mass.astype(np.float16)
    assert draws is not None
    drawn = drawn_logprob(draws, count, None if kind == "sampled" else mass)
    return np.where(draws.any(axis=0), drawn, logprob), np.zeros(len(count), np.float16)


def pack(samples: SampleBatch, targets: TargetBatch, kind: str, vocab_size: int) -> tuple[bytes, list[bytes]]:
    """Return the codebook and the packed value of each sample; targets of any kind with a few entries."""
    layout, before, label = _positions(samples)
    owner = np.repeat(np.arange(targets.num_positions), targets.count)
    lists = choose_lists(before, owner, targets.id, vocab_size)
    ranks = Ranks.of(lists, before, targets.id, vocab_size)
    ranking = Ranking(ranks)
    places = Places(layout.lane, label, ranks.list_of(before))
    entries = _entries(targets, replace(places, lists=lists.of_position), ranking, kind)
    draws, sets = 0, 0
    if targets.draws is not None:
        sets = len(targets.draws)
        draws = int(np.bincount(owner, weights=targets.draws[0]).max(initial=0))
    most = int(entries.head.count.max(initial=0))
    codebook = Codebook(VERSION, draws, sets, most, ranks, _shares(entries, places, ranking))
    recorder = Recorder()
    _code(recorder, places, ranking, kind, codebook, entries)
    tables, rows = recorder.pack(layout)
    return codebook.to_bytes(tables), rows


def unpack(samples: SampleBatch, kind: str, codebook: bytes, rows: list[memoryview]) -> dict[str, Any]:
    """Return count, id, logprob, draws and tail_mass of the targets; IntegrityError where anything is damaged."""
    book, tables = Codebook.from_bytes(codebook)
    vocab_size = len(book.ranks.classes)
    if ((samples.tokens < 0) | (samples.tokens >= vocab_size)).any():
        raise IntegrityError(f"a row holds token ids outside its codebook's vocabulary of {vocab_size}")
    layout, before, label = _positions(samples)
    places = Places(layout.lane, label, book.ranks.list_of(before))
    unpacker = Unpacker(tables, layout, rows)
    entries = _code(unpacker, places, Ranking(book.ranks), kind, book, None)
    unpacker.finish()
    return _fields(entries, kind, book.version)


def _code(coder: Coder, places: Places, ranking: Ranking, kind: str, book: Codebook, known: Entries | None) -> Entries:
    """Code all entries in one direction; places have the usual lists."""
    size = len(places.lane)
    if book.version > 1:
        places = code_lists(coder, places, ranking.num_lists, known.lists if known else None)
    head = drawn = Group.empty(size)
    everywhere = np.ones(size, dtype=np.bool_)
    if kind != "sampled":
        head = code_group(coder, places, ranking, known.head if known else None, HEAD, everywhere, book.most)
    if kind in DRAWN_KINDS:
        drawn = code_group(coder, places, ranking, known.drawn if known else None, DRAWN, ~head.has_label)
    steps = np.zeros(0, dtype=np.int64)
    draws = np.zeros((max(book.sets, 1), 0), dtype=np.int64)
    tail = np.zeros(size, dtype=np.int64)
    split = len(head.id)
    if kind != "sampled":
        level, above = code_head_logprobs(coder, places, ranking, head, book, known.steps[:split] if known else None)
        steps, owner = above, head.owner
        if kind == "hybrid":
            below = code_drawn_logprobs(coder, places, drawn, level, known.steps[split:] if known else None)
            steps, owner = np.concatenate([above, below]), np.concatenate([owner, drawn.owner])
        tail = code_tail(coder, places, owner, steps, book.version, known.tail if known else None)
    if kind in DRAWN_KINDS:
        draws = code_draws(coder, places, drawn, (book.draws, book.sets), known.draws if known else None)
    return Entries(places.lists, head, drawn, steps, draws, tail)


def _positions(samples: SampleBatch) -> tuple[Layout, Int64Array, Int64Array]:
    """Return how the positions lie in lanes, the token before each and the token that stands there."""
    at = np.flatnonzero(samples.supervised)
    if len(at) and at[0] == 0:
        raise IntegrityError("the first token of a file cannot be supervised")
    tokens = samples.tokens.astype(np.int64)
    return Layout.of(samples.num_supervised(), LANE_POSITIONS), tokens[at - 1], tokens[at]


def _entries(targets: TargetBatch, places: Places, ranking: Ranking, kind: str) -> Entries:
    owner = np.repeat(np.arange(targets.num_positions), targets.count)
    is_head = ~targets.drawn
    groups, picked = [], []
    for inside in (is_head, ~is_head):
        at = np.flatnonzero(inside)
        count = np.bincount(owner[at], minlength=targets.num_positions)
        group, order = arrange(places, ranking, count, targets.id[at].astype(np.int64))
        groups.append(group)
        picked.append(at[order])
    stored = {"sampled": [], "hybrid_counts": picked[:1]}.get(kind, picked)
    steps = steps_of(targets.logprob)[np.concatenate([np.zeros(0, np.int64), *stored])]
    draws = np.zeros((1, 0), np.int64) if targets.draws is None else targets.draws[:, picked[1]].astype(np.int64)
    return Entries(places.lists, groups[0], groups[1], steps, draws, _tail_steps(targets, kind))


def _shares(entries: Entries, places: Places, ranking: Ranking) -> UInt8Array:
    """Return how far above the least each kind of entry lies, see `Ranking.shares`."""
    head, steps = entries.head, entries.steps[: len(entries.head.id)]
    level = least_of(head, steps)[head.owner]
    return ranking.shares(kinds_of(replace(places, lists=entries.lists), ranking, head), level, level - steps)


def _fields(entries: Entries, kind: str, version: int) -> dict[str, Any]:
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
    logprob, tail_mass = _probabilities(kind, logprob_of(steps[order], version), entries.tail, draws, count)
    return {
        "count": count,
        "id": ids[order].astype(np.int32),
        "logprob": logprob,
        "draws": draws,
        "tail_mass": tail_mass,
    }


def _tail_steps(targets: TargetBatch, kind: str) -> Int64Array:
    """Return the steps of the mass outside what has log-probabilities of its own, [P]."""
    if kind == "hybrid_counts":
        mass = mass_drawn_from(targets).astype(np.float64)
        return tail_steps_of(np.where(mass > 0, np.maximum(mass, LEAST_MASS), 0))
    return tail_steps_of(targets.tail_mass)
