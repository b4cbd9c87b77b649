"""Samples and targets in memory: ids, flat batches, taking and joining."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.samples import Sample, SampleBatch, compute_sample_id, offsets_of, ragged_index
from storage.targets import TargetBatch


def sample(tokens: list[int], document: list[int] | None = None, source: str = "s") -> Sample:
    numbers = np.array(document or [0] * len(tokens), dtype=np.int16)
    supervised = np.concatenate(([False], numbers[1:] == numbers[:-1]))
    return Sample(source, np.array(tokens, dtype=np.int32), supervised, numbers)


def test_id_is_the_documented_digest() -> None:
    one = sample([5, 70_000, 9, 9, 1], [0, 0, 1, 1, 1])
    content = (5).to_bytes(8, "little") + b"".join(t.to_bytes(4, "little") for t in (5, 70_000, 9, 9, 1))
    content += bytes([0b01011000]) + (1).to_bytes(4, "little")
    expected = hashlib.blake2b(content, digest_size=16, person=b"lectern.sample").digest()
    assert one.sample_id == expected


def test_id_depends_on_tokens_mask_and_borders_alone() -> None:
    base = sample([1, 2, 3, 4])
    assert sample([1, 2, 3, 4], source="other").sample_id == base.sample_id
    assert compute_sample_id(base.tokens.astype(np.int64), base.supervised, base.document + 7) == base.sample_id
    others = [
        sample([1, 2, 3, 5]),
        sample([1, 2, 3, 4, 0]),
        sample([1, 2, 3, 4], [0, 0, 1, 1]),
        Sample("s", base.tokens, np.array([False, True, True, False]), base.document),
    ]
    assert len({base.sample_id, *(other.sample_id for other in others)}) == 5


BATCHES = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=6)


@given(rows=BATCHES, data=st.data())
def test_batches_hold_what_was_put_in(rows: list[list[int]], data: st.DataObject) -> None:
    samples = [sample(tokens, source=f"s{n}") for n, tokens in enumerate(rows)]
    batch = SampleBatch.of(samples)
    assert len(batch) == len(rows) and batch.num_tokens == sum(map(len, rows))
    assert batch.lengths().tolist() == [len(tokens) for tokens in rows]
    assert batch.num_supervised().tolist() == [int(one.supervised.sum()) for one in samples]
    assert batch.ids() == [one.sample_id for one in samples]
    picked = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=8))
    taken = batch.take(picked)
    assert taken.source == [f"s{n}" for n in picked]
    for position, n in enumerate(picked):
        one = taken.sample(position)
        assert one.tokens.tolist() == rows[n] and one.sample_id == samples[n].sample_id
    joined = SampleBatch.concat([batch, taken])
    assert joined.ids() == batch.ids() + taken.ids()
    np.testing.assert_array_equal(joined.tokens, np.concatenate([batch.tokens, taken.tokens]))


def test_an_empty_batch_keeps_its_types() -> None:
    empty = SampleBatch.of([])
    assert len(empty) == 0 and empty.ids() == []
    assert (empty.tokens.dtype, empty.supervised.dtype, empty.document.dtype) == (np.int32, np.bool_, np.int16)
    assert empty.sample_id.shape == (0, 16) and empty.num_supervised().tolist() == []


def test_offsets_and_ragged_index() -> None:
    offsets = offsets_of([2, 0, 3])
    assert offsets.tolist() == [0, 2, 2, 5]
    assert ragged_index(offsets, [2, 1, 0, 2]).tolist() == [2, 3, 4, 0, 1, 2, 3, 4]
    assert offsets_of([]).tolist() == [0]


def targets(rng: np.random.Generator, positions: list[int]) -> TargetBatch:
    """Random targets; sample n has `positions[n]` supervised positions."""
    num = sum(positions)
    count = rng.integers(1, 5, num).astype(np.int32)
    entries = int(count.sum())
    return TargetBatch(
        offsets=offsets_of(positions),
        count=count,
        id=rng.integers(0, 100, entries).astype(np.int32),
        logprob=-rng.random(entries).astype(np.float16),
        draws=rng.integers(0, 3, (2, entries)).astype(np.uint8),
        tail_mass=rng.random(num).astype(np.float16),
        teacher_nll=rng.random(len(positions)).astype(np.float32),
        teacher_entropy=rng.random(len(positions)).astype(np.float32),
        hidden={"final": rng.random((num, 3)).astype(np.float16)},
    )


def entries_of(batch: TargetBatch, n: int) -> list[list[tuple[int, float, tuple[int, ...]]]]:
    """The entries of each position of sample `n`, read the slow way."""
    assert batch.draws is not None
    bounds = batch.entry_offsets
    return [
        [
            (int(batch.id[e]), float(batch.logprob[e]), tuple(batch.draws[:, e].tolist()))
            for e in range(bounds[p], bounds[p + 1])
        ]
        for p in range(batch.offsets[n], batch.offsets[n + 1])
    ]


@pytest.mark.parametrize("picked", [[0, 1, 2], [2, 0], [1], [], [2, 2, 1]])
def test_targets_are_taken_and_joined_by_sample(picked: list[int]) -> None:
    batch = targets(np.random.default_rng(0), [3, 0, 5])
    taken = batch.take(picked)
    assert len(taken) == len(picked) and taken.num_positions == sum([3, 0, 5][n] for n in picked)
    joined = TargetBatch.concat([batch, taken])
    for position, n in enumerate(picked):
        assert entries_of(taken, position) == entries_of(batch, n) == entries_of(joined, 3 + position)
        assert taken.teacher_nll[position] == batch.teacher_nll[n]
        mine = slice(taken.offsets[position], taken.offsets[position + 1])
        theirs = slice(batch.offsets[n], batch.offsets[n + 1])
        np.testing.assert_array_equal(taken.hidden["final"][mine], batch.hidden["final"][theirs])
        np.testing.assert_array_equal(taken.tail_mass[mine], batch.tail_mass[theirs])


def test_targets_without_draws_stay_without() -> None:
    batch = targets(np.random.default_rng(1), [2, 1])
    bare = TargetBatch(**{**vars(batch), "draws": None})
    assert bare.take([1]).draws is None and TargetBatch.concat([bare, bare]).draws is None
