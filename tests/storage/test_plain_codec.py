"""The plain codec: exact round trips, the columns of the design, and refusal of rows out of contract."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.codecs import plain
from storage.errors import InputError, IntegrityError
from storage.identity import DatasetIdentity
from storage.samples import Sample, SampleBatch
from storage.schema import file_metadata, from_parquet, max_entries, to_parquet
from storage.targets import TargetBatch

MakeIdentity = Callable[..., DatasetIdentity]
Unit = tuple[SampleBatch, TargetBatch]
MakeUnit = Callable[..., Unit]
SameUnit = Callable[[Unit, Unit], None]

SAMPLE_COLUMNS = ["sample_id", "source", "tokens", "supervised", "document"]
TARGET_COLUMNS = ["target_count", "target_id", "target_logprob"]
LAST_COLUMNS = ["tail_mass", "teacher_nll", "teacher_entropy"]


@settings(max_examples=40)
@given(
    kind=st.sampled_from(["topk", "hybrid", "hybrid_counts", "sampled", "dense", "text"]),
    draw_sets=st.integers(1, 3),
    hidden=st.sampled_from([[], ["final"], ["final", "model.layers.3"]]),
    hidden_dtype=st.sampled_from(["float16", "bfloat16"]),
    vocab_size=st.integers(2, 400),
    num_samples=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip_through_parquet_is_exact(
    make_identity: MakeIdentity,
    make_unit: MakeUnit,
    assert_same_unit: SameUnit,
    kind: str,
    draw_sets: int,
    hidden: list[str],
    hidden_dtype: str,
    vocab_size: int,
    num_samples: int,
    seed: int,
) -> None:
    identity = make_identity(kind, vocab_size, hidden, hidden_dtype=hidden_dtype, draw_sets=draw_sets)
    unit = make_unit(identity, num_samples, seed)
    table = from_parquet(to_parquet(plain.encode(*unit, identity)))
    assert_same_unit(plain.decode(table), unit)
    # Slices and chunks of a table have offsets of their own.
    first, last = num_samples // 3, num_samples - num_samples // 4
    sliced = pa.concat_tables([table.slice(first, 1), table.slice(first + 1, last - first - 1)])
    rows = list(range(first, last))
    assert_same_unit(plain.decode(sliced), (unit[0].take(rows), unit[1].take(rows)))


@pytest.mark.parametrize(
    ("kind", "extra"),
    [("topk", []), ("hybrid", ["target_draws", "target_draws_1"]), ("dense", [])],
    ids=["topk", "hybrid", "dense"],
)
def test_columns_are_those_of_the_design(
    make_identity: MakeIdentity, make_unit: MakeUnit, kind: str, extra: list[str]
) -> None:
    identity = make_identity(kind, hidden=["final"], draw_sets=2)
    table = from_parquet(to_parquet(plain.encode(*make_unit(identity), identity)))
    assert table.column_names == [*SAMPLE_COLUMNS, *TARGET_COLUMNS, *extra, *LAST_COLUMNS, "hidden_final"]
    types = {name: table.schema.field(name).type for name in table.column_names}
    assert types["sample_id"] == pa.binary(16)
    assert types["source"] == pa.dictionary(pa.int32(), pa.string())
    values = {name: kind.value_type for name, kind in types.items() if pa.types.is_list(kind)}
    count = pa.uint16() if kind == "dense" else pa.uint8()
    expected = {"tokens": pa.int32(), "supervised": pa.bool_(), "document": pa.int16(), "target_count": count}
    expected |= {"target_id": pa.int32(), "target_logprob": pa.float16(), "tail_mass": pa.float16()}
    expected |= dict.fromkeys(extra, pa.uint8())
    assert values == expected
    assert types["teacher_nll"] == types["teacher_entropy"] == pa.float32()
    assert types["hidden_final"] == pa.binary()
    metadata = file_metadata(table.schema)
    assert (metadata.fingerprint, metadata.kind) == (identity.fingerprint, kind)
    assert metadata.hidden["final"].model_dump() == {"dtype": "float16", "width": 8}


def test_sampled_and_text_keep_what_they_need(make_identity: MakeIdentity, make_unit: MakeUnit) -> None:
    for kind, columns in (("sampled", ["target_count", "target_id", "target_draws"]), ("text", [])):
        identity = make_identity(kind)
        table = plain.encode(*make_unit(identity), identity)
        assert table.column_names == [*SAMPLE_COLUMNS, *columns, *LAST_COLUMNS[1:]]


def test_never_drawn_entries_of_a_sample_are_refused(make_identity: MakeIdentity, make_unit: MakeUnit) -> None:
    identity = make_identity("sampled")
    samples, targets = make_unit(identity)
    first, second = int(targets.entry_offsets[0]), int(targets.entry_offsets[1])
    draws = targets.draws.copy()
    draws[0, first:second] = 0
    with pytest.raises(IntegrityError, match="draws that do not add up to 5"):
        plain.encode(samples, replace(targets, draws=draws), identity)
    draws[0, first] = 5
    with pytest.raises(IntegrityError, match="entries that were never drawn"):
        plain.encode(samples, replace(targets, draws=draws), identity)


def test_document_is_null_where_there_is_one(make_identity: MakeIdentity, make_unit: MakeUnit) -> None:
    identity = make_identity()
    samples, targets = make_unit(identity, 12)
    packed = [bool(samples.sample(n).document.any()) for n in range(len(samples))]
    assert len(set(packed)) == 2
    column = plain.encode(samples, targets, identity).column("document")
    assert [value is not None for value in column.to_pylist()] == packed


def test_file_without_document_column_is_one_document(make_identity: MakeIdentity, make_unit: MakeUnit) -> None:
    identity = make_identity()
    table = plain.encode(*make_unit(identity), identity)
    samples, _ = plain.decode(table.drop_columns(["document"]))
    assert not samples.document.any()


def test_parquet_settings(make_identity: MakeIdentity, make_unit: MakeUnit) -> None:
    import pyarrow.parquet as pq

    identity = make_identity()
    file = pq.ParquetFile(pa.BufferReader(to_parquet(plain.encode(*make_unit(identity), identity))))
    group = file.metadata.row_group(0)
    columns = {group.column(n).path_in_schema: group.column(n) for n in range(group.num_columns)}
    assert {column.compression for column in columns.values()} == {"ZSTD"}
    assert "BYTE_STREAM_SPLIT" in columns["target_id.list.element"].encodings
    assert "RLE_DICTIONARY" in columns["target_draws.list.element"].encodings
    assert all(column.has_offset_index for column in columns.values())


def test_largest_counts(make_identity: MakeIdentity) -> None:
    assert max_entries(make_identity("topk", 100, top_k=300)) == 100
    assert max_entries(make_identity("hybrid", 152_000, top_k=300, draws=20)) == 320
    with pytest.raises(InputError, match="kind dense would keep 151936 entries"):
        max_entries(make_identity("dense", 151_936))


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
    table = from_parquet(to_parquet(plain.encode(samples, targets, identity)))
    assert_same_unit(plain.decode(table), (samples, targets))


def _set(values: Any, at: int, value: float) -> Any:
    changed = values.copy()
    changed[at] = value
    return changed


TARGET_FAULTS: dict[str, tuple[Callable[[TargetBatch], dict[str, Any]], str]] = {
    "nan": (lambda t: {"logprob": _set(t.logprob, 0, np.nan)}, "NaN or infinite values from the teacher: sample "),
    "minus infinity": (lambda t: {"logprob": _set(t.logprob, 3, -np.inf)}, "NaN or infinite"),
    "nan tail": (lambda t: {"tail_mass": _set(t.tail_mass, 0, np.nan)}, "NaN or infinite"),
    "nan nll": (lambda t: {"teacher_nll": _set(t.teacher_nll, 1, np.nan)}, "NaN or infinite"),
    "infinite entropy": (lambda t: {"teacher_entropy": _set(t.teacher_entropy, 0, np.inf)}, "NaN or infinite"),
    "nan hidden": (lambda t: {"hidden": {"final": _set(t.hidden["final"], 1, np.nan)}}, "in hidden state final"),
    "id too large": (lambda t: {"id": _set(t.id, 0, 500)}, "target ids outside the vocabulary of 500"),
    "negative id": (lambda t: {"id": _set(t.id, 2, -1)}, "target ids outside the vocabulary of 500"),
    "id twice": (lambda t: {"id": _set(t.id, 1, t.id[0])}, "one token id twice"),
    "positive": (lambda t: {"logprob": _set(t.logprob, 0, 0.1)}, "log-probabilities above 0"),
    "negative tail": (lambda t: {"tail_mass": _set(t.tail_mass, 0, -0.01)}, "a tail mass outside 0 to 1"),
    "tail above 1": (lambda t: {"tail_mass": _set(t.tail_mass, 0, 1.1)}, "a tail mass outside 0 to 1"),
    "wrong tail": (lambda t: {"tail_mass": np.float16(1) - t.tail_mass}, "do not add up to 1"),
    "draws short": (
        lambda t: {"draws": _set(t.draws[0], int(np.flatnonzero(t.draws[0])[0]), 0)[None]},
        "draws that do not add",
    ),
    "a set too many": (lambda t: {"draws": np.repeat(t.draws, 2, axis=0)}, "2 sets of draws came where 1 belong"),
    "no entries": (
        lambda t: {"count": _set(_set(t.count, 0, 0), 1, t.count[0] + t.count[1])},
        "positions without 1 to 11",
    ),
    "row missing": (lambda t: {"offsets": t.offsets - (t.offsets == t.offsets[-1])}, "must be exactly one for each"),
    "values missing": (lambda t: {"logprob": t.logprob[:-1]}, r"targets\.logprob holds \d+ values where \d+ belong"),
    "no draws": (lambda t: {"draws": None}, "kind hybrid needs target draws"),
    "hidden missing": (lambda t: {"hidden": {}}, r"hidden states \[\] came where \['final'\] belong"),
    "hidden dtype": (lambda t: {"hidden": {"final": t.hidden["final"].view(np.uint16)}}, "uint16"),
}


@pytest.mark.parametrize("fault", TARGET_FAULTS)
def test_targets_out_of_contract_are_refused(make_identity: MakeIdentity, make_unit: MakeUnit, fault: str) -> None:
    identity = make_identity(hidden=["final"])
    samples, targets = make_unit(identity)
    change, message = TARGET_FAULTS[fault]
    with pytest.raises(IntegrityError, match=message):
        plain.encode(samples, replace(targets, **change(targets)), identity)


def test_refusal_names_the_sample(make_identity: MakeIdentity, make_unit: MakeUnit) -> None:
    identity = make_identity()
    samples, targets = make_unit(identity)
    entry = int(targets.entry_offsets[targets.offsets[4]])
    with pytest.raises(IntegrityError) as caught:
        plain.encode(samples, replace(targets, logprob=_set(targets.logprob, entry, np.nan)), identity)
    named = [i.hex() for i in samples.ids() if i.hex() in str(caught.value)]
    assert named == [samples.ids()[4].hex()]


def test_nan_in_bfloat16_hidden_states_is_refused(make_identity: MakeIdentity, make_unit: MakeUnit) -> None:
    identity = make_identity(hidden=["final"], hidden_dtype="bfloat16")
    samples, targets = make_unit(identity)
    for bits in (0x7F80, 0xFF80, 0x7FC1):
        values = targets.hidden["final"].copy()
        values[2, 3] = bits
        with pytest.raises(IntegrityError, match="NaN or infinite values from the teacher in hidden state final"):
            plain.encode(samples, replace(targets, hidden={"final": values}), identity)


SAMPLE_FAULTS: dict[str, tuple[Callable[[SampleBatch], dict[str, Any]], str]] = {
    "token too large": (lambda s: {"tokens": _set(s.tokens, 0, 500)}, "token ids outside the vocabulary of 500"),
    "other token": (lambda s: {"tokens": _set(s.tokens, 0, (s.tokens[0] + 1) % 500)}, "not those of their tokens"),
    "document from 1": (lambda s: {"document": s.document + np.int16(1)}, "do not start at 0"),
    "document jumps": (lambda s: {"document": s.document * np.int16(2)}, "do not go up by one"),
    "first supervised": (lambda s: {"supervised": _set(s.supervised, 0, True)}, "supervised first token"),
    "sample twice": (lambda s: vars(s.take([0, 1, 0, 1, 0, 1])), "one sample twice"),
    "mask short": (lambda s: {"supervised": s.supervised[:-1]}, "sample arrays disagree"),
}


@pytest.mark.parametrize("fault", SAMPLE_FAULTS)
def test_samples_out_of_contract_are_refused(make_identity: MakeIdentity, make_unit: MakeUnit, fault: str) -> None:
    identity = make_identity()
    samples, targets = make_unit(identity)
    change, message = SAMPLE_FAULTS[fault]
    with pytest.raises(IntegrityError, match=message):
        plain.encode(replace(samples, **change(samples)), targets, identity)


def test_all_but_the_first_token_supervised_needs_one_row_less(
    make_identity: MakeIdentity, make_unit: MakeUnit
) -> None:
    identity = make_identity("topk", 10, top_k=10)
    tokens = np.arange(8, dtype=np.int32)
    samples = SampleBatch.of([Sample("a", tokens, tokens > 0, np.zeros(8, dtype=np.int16))])

    def rows(num: int) -> TargetBatch:
        return TargetBatch(
            offsets=np.asarray([0, num]),
            count=np.ones(num, dtype=np.int32),
            id=np.ones(num, dtype=np.int32),
            logprob=np.zeros(num, dtype=np.float16),
            draws=None,
            tail_mass=np.zeros(num, dtype=np.float16),
            teacher_nll=np.ones(1, dtype=np.float32),
            teacher_entropy=np.ones(1, dtype=np.float32),
        )

    assert plain.encode(samples, rows(7), identity).num_rows == 1
    for num in (6, 8):
        with pytest.raises(IntegrityError, match=f"7 supervised positions but {num} target rows"):
            plain.encode(samples, rows(num), identity)


def test_empty_unit_is_refused(make_identity: MakeIdentity, make_unit: MakeUnit) -> None:
    identity = make_identity()
    samples, targets = make_unit(identity)
    with pytest.raises(IntegrityError, match="a unit without samples"):
        plain.encode(samples.take([]), targets.take([]), identity)
    with pytest.raises(IntegrityError, match="6 samples came with the targets of 2"):
        plain.encode(samples, targets.take([0, 1]), identity)


@pytest.mark.parametrize(
    "column", ["tokens", "target_count", "target_id", "target_logprob", "tail_mass", "hidden_final"]
)
def test_decode_refuses_a_missing_column(make_identity: MakeIdentity, make_unit: MakeUnit, column: str) -> None:
    identity = make_identity(hidden=["final"])
    table = plain.encode(*make_unit(identity), identity)
    with pytest.raises(IntegrityError, match="cannot be read"):
        plain.decode(table.drop_columns([column]))


def test_decode_refuses_columns_that_disagree(make_identity: MakeIdentity, make_unit: MakeUnit) -> None:
    identity = make_identity(hidden=["final"])
    table, other = (plain.encode(*make_unit(identity, seed=seed), identity) for seed in (0, 1))
    for name in table.column_names[2:]:
        if name in {"teacher_nll", "teacher_entropy", "document"}:
            continue
        mixed = table.set_column(table.column_names.index(name), table.schema.field(name), other.column(name))
        with pytest.raises(IntegrityError):
            plain.decode(mixed)


def test_foreign_parquet_is_refused() -> None:
    with pytest.raises(IntegrityError, match="not a data file of a Lectern dataset"):
        plain.decode(pa.table({"a": [1]}))
    with pytest.raises(IntegrityError, match="not a readable Parquet file"):
        from_parquet(b"PAR1 no PAR1")
