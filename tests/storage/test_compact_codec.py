"""The compact codec: what comes back, within which error; every damage is noticed."""

from collections.abc import Callable
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from zlib import crc32

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.codecs import compact, plain
from storage.codecs.codebook import VERSION, Codebook
from storage.codecs.compact import quantised
from storage.codecs.integers import Layout, Recorder, Unpacker, bucket_of
from storage.codecs.lists import choose_lists
from storage.codecs.steps import LOGPROB_ERROR, logprob_of, steps_of
from storage.codecs.table import decode, encode, to_plain
from storage.config import CacheConfig, Codec
from storage.draws import mass_drawn_from
from storage.errors import IntegrityError
from storage.identity import DatasetIdentity
from storage.reader import Dataset
from storage.samples import Sample, SampleBatch
from storage.schema import from_parquet, to_parquet
from storage.targets import TargetBatch
from storage.verify import verify_dataset
from storage.writer import DatasetWriter

Unit = tuple[SampleBatch, TargetBatch]
MakeIdentity = Callable[..., DatasetIdentity]
MakeUnit = Callable[..., Unit]
SameUnit = Callable[[Unit, Unit], None]
KINDS = ["topk", "hybrid", "hybrid_counts", "sampled"]


@settings(max_examples=12)
@given(
    kind=st.sampled_from(KINDS),
    draw_sets=st.integers(1, 3),
    vocab_size=st.integers(2, 400),
    num_samples=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip_is_exact_but_for_the_stated_rounding(
    make_identity: MakeIdentity,
    make_unit: MakeUnit,
    assert_same_unit: SameUnit,
    kind: str,
    draw_sets: int,
    vocab_size: int,
    num_samples: int,
    seed: int,
) -> None:
    identity = make_identity(kind, vocab_size, ["final"], draw_sets=draw_sets)
    samples, targets = make_unit(identity, num_samples, seed)
    table = from_parquet(to_parquet(encode(samples, targets, identity, "compact")))
    kept = quantised(targets, kind)
    assert_same_unit(decode(table), (samples, kept))
    assert_within_bounds(targets, kept)
    # A row by itself holds all that it takes to read it.
    last = len(samples) - 1
    assert_same_unit(decode(table.slice(last, 1)), (samples.take([last]), kept.take([last])))
    assert to_plain(table, identity).equals(plain.encode(samples, kept, identity))


@pytest.mark.parametrize("codec", ["plain", "compact"])
def test_files_are_decoded_piece_by_piece(
    codec: Codec,
    make_identity: MakeIdentity,
    make_unit: MakeUnit,
    assert_same_unit: SameUnit,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    identity = make_identity("hybrid", hidden=["final"], draw_sets=2)
    file = to_parquet(encode(*make_unit(identity, 9), identity, codec))
    whole = from_parquet(file)
    assert whole.column("tokens").num_chunks == 1
    monkeypatch.setattr("storage.schema._PIECE_BYTES", 1)
    pieces = from_parquet(file)
    assert pieces.column("tokens").num_chunks == 9
    assert pieces.schema.equals(whole.schema, check_metadata=True)
    assert_same_unit(decode(pieces), decode(whole))


def assert_within_bounds(targets: TargetBatch, kept: TargetBatch) -> None:
    owner = np.repeat(np.arange(targets.num_positions), targets.count)
    by_id, kept_by_id = np.lexsort((targets.id, owner)), np.lexsort((kept.id, owner))
    np.testing.assert_array_equal(targets.id[by_id], kept.id[kept_by_id])
    error = np.abs(targets.logprob[by_id].astype(np.float64) - kept.logprob[kept_by_id].astype(np.float64))
    # Without log-probabilities of their own, drawn entries follow the rounding of the mass that they share.
    stated = np.where(targets.tail_mass.any() | (targets.draws is None), LOGPROB_ERROR, 2 * LOGPROB_ERROR)
    assert error[targets.logprob[by_id] > -16].max(initial=0) <= stated
    if targets.draws is not None:
        np.testing.assert_array_equal(targets.draws[:, by_id], kept.draws[:, kept_by_id])
    tail = targets.tail_mass.astype(np.float64)
    assert (np.abs(kept.tail_mass.astype(np.float64) - tail) <= 0.011 * tail + 1e-7).all()


def test_a_small_mass_that_draws_share_comes_back(make_identity: MakeIdentity, make_unit: MakeUnit) -> None:
    _, targets = make_unit(make_identity("hybrid_counts"))
    drawn = targets.draws.any(axis=0)
    small = replace(targets, logprob=np.where(drawn, targets.logprob - np.float16(9), targets.logprob))
    mass = mass_drawn_from(small)
    assert 1e-7 < mass[mass > 0].min() < mass.max() < 1e-3
    np.testing.assert_allclose(mass_drawn_from(quantised(small, "hybrid_counts")), mass, rtol=0.02)


def test_every_float16_logprob_is_within_the_bound() -> None:
    every = np.arange(0x8000, 0xCC00, dtype=np.uint16).view(np.float16)  # −0 to −16
    back = logprob_of(steps_of(every), VERSION)
    error = np.abs(back.astype(np.float64) - every.astype(np.float64))
    assert error.max() <= LOGPROB_ERROR
    assert (back[:2] == 0).all() and not np.signbit(back[0])
    far = np.arange(0xCC00, 0xD000, dtype=np.uint16).view(np.float16)  # −16 to −32
    assert np.abs(logprob_of(steps_of(far), VERSION).astype(np.float64) - far.astype(np.float64)).max() <= 1 / 64
    rest = np.arange(0xD000, 0xFC00, dtype=np.uint16).view(np.float16)  # −32 to −65504
    np.testing.assert_array_equal(logprob_of(steps_of(rest), VERSION), rest)
    everything = np.concatenate([every, far, rest])
    assert set(np.diff(steps_of(everything)).tolist()) == {0, 1}
    with pytest.raises(IntegrityError, match="out of range"):
        logprob_of(steps_of(everything).max(keepdims=True) + 1, VERSION)


def test_cells_are_as_wide_as_float16_lets_them_be() -> None:
    for highest, width in ((-1, 21 / 1024), (-2, 11 / 512), (-4, 5 / 256), (-8, 3 / 128), (-16, 3 / 64)):
        octave = (-np.arange(1024, 2048) / 1024 * -highest).astype(np.float16)
        assert len(np.unique(steps_of(octave))) == pytest.approx(-highest / width, abs=2)


def test_ids_above_131072_survive(make_identity: MakeIdentity, assert_same_unit: SameUnit) -> None:
    identity = make_identity("topk", 300_000, top_k=3)
    tokens = np.asarray([7, 299_999, 131_072], dtype=np.int32)
    samples = SampleBatch.of([Sample("a", tokens, tokens != 7, np.zeros(3, dtype=np.int16))])
    targets = TargetBatch(
        offsets=np.asarray([0, 2]),
        count=np.asarray([3, 1], dtype=np.int32),
        id=np.asarray([299_999, 131_072, 131_071, 262_144], dtype=np.int32),
        logprob=np.log([0.5, 0.25, 0.125, 0.5]).astype(np.float16),
        draws=None,
        tail_mass=np.asarray([0.125, 0.5], dtype=np.float16),
        teacher_nll=np.ones(1, dtype=np.float32),
        teacher_entropy=np.ones(1, dtype=np.float32),
    )
    kept = quantised(targets, "topk")
    assert kept.id.tolist() == targets.id.tolist()
    assert_same_unit(decode(encode(samples, targets, identity, "compact")), (samples, kept))


@settings(max_examples=30)
@given(
    rows=st.lists(st.integers(0, 200), min_size=1, max_size=5),
    largest=st.sampled_from([0, 3, 17, 300, 2**17 + 5, 2**30]),
    seed=st.integers(0, 2**32 - 1),
)
def test_integers_of_any_size_come_back_call_by_call(rows: list[int], largest: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    layout = Layout.of(np.asarray(rows), 64)
    calls = []
    for field in range(3):
        part = np.sort(rng.choice(len(layout.lane), len(layout.lane) // (field + 1), replace=False))
        values = rng.integers(0, largest + 1, len(part)) >> rng.integers(0, 31, len(part))
        calls.append((field, rng.integers(0, 4, len(part)), layout.lane[part], values))
    recorder = Recorder()
    for call in calls:
        recorder.integers(*call)
    tables, packed = recorder.pack(layout)
    unpacker = Unpacker(tables, layout, [memoryview(row) for row in packed])
    for field, context, lane, values in calls:
        np.testing.assert_array_equal(unpacker.integers(field, context, lane, None), values)
    unpacker.finish()


def test_buckets_cover_the_integers_without_gaps() -> None:
    values = np.unique(np.concatenate([np.arange(5000), 2 ** np.arange(31), 2 ** np.arange(1, 31) - 1]))
    bucket, width = bucket_of(values)
    assert (np.diff(bucket) >= 0).all() and (width[values < 16] == 0).all()
    assert set(np.diff(bucket[:5000]).tolist()) <= {0, 1}


def test_any_flipped_bit_is_noticed(make_identity: MakeIdentity, make_unit: MakeUnit) -> None:
    identity = make_identity("hybrid")
    samples, targets = make_unit(identity)
    table = encode(samples, targets, identity, "compact")
    book = table.column("target_codebook")[0].as_py()
    rows = table.column("target_packed").to_pylist()
    rng = np.random.default_rng(0)
    for _ in range(150):
        damaged_book, damaged_rows = bytearray(book), [bytearray(row) for row in rows]
        where = damaged_book if rng.random() < 0.3 else damaged_rows[int(rng.integers(len(rows)))]
        where[int(rng.integers(len(where)))] ^= 1 << int(rng.integers(8))
        with pytest.raises(IntegrityError):
            compact.unpack(samples, "hybrid", bytes(damaged_book), [memoryview(row) for row in damaged_rows])


def test_rows_that_changed_places_are_noticed(make_identity: MakeIdentity, make_unit: MakeUnit) -> None:
    identity = make_identity("topk")
    samples, targets = make_unit(identity, 8)
    book, rows = compact.pack(samples, quantised(targets, "topk"), "topk", 500)
    with pytest.raises(IntegrityError):
        compact.unpack(samples, "topk", book, [memoryview(rows[n]) for n in (1, 0, *range(2, 8))])


GOLDEN = Path(__file__).parent / "golden" / "compact1"
VERSION_1 = {
    "topk": "989207db7e414eef8eebe10dbfa212a7",
    "hybrid": "695bfcc4d4366a1bc33f45701e829b65",
    "sampled": "973bfb98c7803cc4baf6e5eb9b2d462c",
}


@pytest.mark.parametrize("kind", sorted(VERSION_1))
def test_version_1_is_read_value_for_value(kind: str) -> None:
    table = from_parquet((GOLDEN / f"{kind}.parquet").read_bytes())
    book, _ = Codebook.from_bytes(table.column("target_codebook")[0].as_py())
    assert (book.version, len(book.ranks.tokens)) == (1, 10)
    _, targets = decode(table)
    digest = blake2b(digest_size=16)
    for values in (targets.offsets, targets.count, targets.id, targets.logprob, targets.draws, targets.tail_mass):
        if values is not None:
            digest.update(str(values.dtype).encode() + values.tobytes())
    assert digest.hexdigest() == VERSION_1[kind]


def test_a_later_version_is_refused(make_identity: MakeIdentity, make_unit: MakeUnit) -> None:
    table = encode(*make_unit(make_identity("topk")), make_identity("topk"), "compact")
    body = bytearray(table.column("target_codebook")[0].as_py())[4:]
    body[3] = VERSION + 1
    with pytest.raises(IntegrityError, match=f"has version {VERSION + 1}; this release reads up to {VERSION}"):
        Codebook.from_bytes(crc32(body).to_bytes(4, "little") + body)


def alike(rng: np.random.Generator, topics: int, positions: int, vocab_size: int) -> tuple[SampleBatch, TargetBatch]:
    """Return a sample in which each token speaks of one topic, and what is kept after it are ids of that topic."""
    tokens = rng.integers(0, vocab_size, positions + 1).astype(np.int32)
    samples = SampleBatch.of([Sample("a", tokens, np.arange(positions + 1) > 0, np.zeros(positions + 1, np.int16))])
    favoured = np.stack([rng.permutation(vocab_size) for _ in range(topics)])
    chosen = np.argsort(rng.random((positions, 16)), axis=1)[:, :8]
    logprob = -np.sort(rng.uniform(3, 9, (positions, 8))).astype(np.float16)
    return samples, TargetBatch(
        offsets=np.asarray([0, positions]),
        count=np.full(positions, 8, dtype=np.int32),
        id=np.take_along_axis(favoured[tokens[:-1] % topics], chosen, axis=1).reshape(-1).astype(np.int32),
        logprob=logprob.reshape(-1),
        draws=None,
        tail_mass=(1 - np.exp(logprob.astype(np.float64)).sum(axis=1)).astype(np.float16),
        teacher_nll=np.ones(1, dtype=np.float32),
        teacher_entropy=np.ones(1, dtype=np.float32),
    )


@settings(max_examples=8)
@given(topics=st.integers(1, 5), positions=st.integers(1, 900), seed=st.integers(0, 2**32 - 1))
def test_round_trip_with_lists(
    make_identity: MakeIdentity, assert_same_unit: SameUnit, topics: int, positions: int, seed: int
) -> None:
    samples, targets = alike(np.random.default_rng(seed), topics, positions, 300)
    table = encode(samples, targets, make_identity("topk", 300, top_k=8), "compact")
    assert_same_unit(decode(table), (samples, quantised(targets, "topk")))


def test_positions_that_are_alike_share_a_list_whatever_token_stands_before() -> None:
    # 900 positions after 300 tokens, of which hardly one is frequent enough to have a list of its own.
    rng = np.random.default_rng(0)
    samples, targets = alike(rng, 3, 3000, 150)
    before, owner = samples.tokens[:-1].astype(np.int64), np.repeat(np.arange(3000), 8)
    lists = choose_lists(before, owner, targets.id, 150)
    assert len(lists.offsets) - 1 >= 3
    # Every list is of one topic, and all positions have one.
    topic = before % 3
    assert (lists.of_position >= 0).mean() > 0.99
    for number in range(len(lists.offsets) - 1):
        assert len(np.unique(topic[lists.of_position == number])) == 1
    tokens, numbers = lists.usual(before)
    assert len(tokens) > 140 and (np.diff(tokens) > 0).all()
    assert numbers.max() < len(lists.offsets) - 1


def test_ids_that_follow_no_context_get_no_lists() -> None:
    rng = np.random.default_rng(0)
    before = rng.integers(0, 20, 2000)
    ids = np.argsort(rng.random((2000, 400)), axis=1)[:, :8].reshape(-1).astype(np.int32)
    lists = choose_lists(before, np.repeat(np.arange(2000), 8), ids, 400)
    assert lists.offsets.tolist() == [0] and (lists.of_position == -1).all()


def test_two_codebooks_in_one_table_are_refused(make_identity: MakeIdentity, make_unit: MakeUnit) -> None:
    identity = make_identity("sampled")
    tables = [encode(*make_unit(identity, seed=seed), identity, "compact") for seed in (0, 1)]
    with pytest.raises(IntegrityError, match="share one codebook; there are 2"):
        decode(pa.concat_tables(tables))


def test_what_would_be_read_back_is_held_to_the_contract(make_identity: MakeIdentity, make_unit: MakeUnit) -> None:
    identity = make_identity("topk", top_k=500)
    samples, targets = make_unit(identity)
    owner = np.repeat(np.arange(targets.num_positions), targets.count)
    # 500 probabilities add up to 1.0198 as given, and to 1.028 once they are rounded.
    logprob = np.full(len(owner), -1586 / 256, dtype=np.float16)
    assert logprob_of(steps_of(logprob[:1]), VERSION)[0] == np.float16(-1584 / 256)
    high = replace(targets, logprob=logprob, tail_mass=np.zeros_like(targets.tail_mass))
    plain.encode(samples, high, identity)
    with pytest.raises(IntegrityError, match="do not add up to 1"):
        encode(samples, high, identity, "compact")


@pytest.mark.parametrize("kind", [*KINDS, "text"])
def test_a_dataset_keeps_the_codec_that_it_was_made_with(
    make_identity: MakeIdentity, make_unit: MakeUnit, tmp_path: Path, kind: str
) -> None:
    identity = make_identity(kind)
    DatasetWriter.create(str(tmp_path), identity, codec="compact").commit("a", *make_unit(identity), attempt=1)
    writer = DatasetWriter.create(str(tmp_path), identity)
    assert writer.info.codec == "compact"
    samples, targets = make_unit(identity, seed=1)
    writer.commit("b", samples, targets, attempt=1)
    assert verify_dataset(str(tmp_path)).ok
    _, got = Dataset.open(str(tmp_path), identity).read(samples.ids())
    kept = targets if kind == "text" else quantised(targets, kind)
    np.testing.assert_array_equal(got.id, kept.id)
    np.testing.assert_array_equal(got.logprob, kept.logprob)


def test_dense_is_refused_by_the_config() -> None:
    with pytest.raises(ValueError, match="codec `plain`"):
        CacheConfig(url="x", kind="dense", codec="compact")
