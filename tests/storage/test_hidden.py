"""Stored formats of hidden states, which positions keep them, and their columns with those of attention."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from storage.codecs import plain
from storage.errors import IntegrityError
from storage.hidden import attention_lengths, bad_states, kept_positions, read_states, states_tensor, store_states
from storage.identity import CaptureIdentity, DatasetIdentity
from storage.samples import SampleBatch
from storage.schema import file_metadata, from_parquet, to_parquet
from storage.targets import TargetBatch

Unit = tuple[SampleBatch, TargetBatch]
MakeIdentity = Callable[..., DatasetIdentity]
MakeUnit = Callable[..., Unit]
WIDTH = 8

floats = st.floats(-1e4, 1e4, width=32)
matrices = hnp.arrays(np.float32, st.tuples(st.integers(0, 6), st.integers(1, 9)), elements=floats)


def with_states(make_identity: MakeIdentity, make_unit: MakeUnit, seed: int = 0, **capture: Any) -> tuple[Any, Unit]:
    """Return an identity that keeps states and attention as asked, and a unit under it."""
    base = make_identity()
    fields = {**base.capture.model_dump(), "hidden": ["final"], "hidden_dtype": "float16", **capture}
    identity = base.model_copy(update={"capture": CaptureIdentity.model_validate(fields)})
    samples, targets = make_unit(base, 9, seed)
    rng = np.random.default_rng(seed)
    kept = kept_positions(samples.sample_id, samples.num_supervised(), identity.capture.hidden_every)
    states = rng.normal(size=(int(kept.sum()), WIDTH)).astype(np.float32)
    count = np.where(kept, attention_lengths(samples), 0).astype(np.int32)
    weights = {layer: rng.random(int(count.sum())).astype(np.float16) for layer in identity.capture.attention}
    return identity, (
        samples,
        replace(
            targets,
            hidden={layer: store_states(states, fields["hidden_dtype"]) for layer in identity.capture.hidden},
            hidden_kept=None if identity.capture.hidden_every is None else kept,
            attention=weights,
            attention_count=count if weights else None,
        ),
    )


def check_same_states(left: TargetBatch, right: TargetBatch) -> None:
    assert set(left.hidden) == set(right.hidden) and set(left.attention) == set(right.attention)
    for mine, theirs in ((left.hidden, right.hidden), (left.attention, right.attention)):
        for layer, values in mine.items():
            assert values.dtype == theirs[layer].dtype
            np.testing.assert_array_equal(values, theirs[layer])
    for name in ("hidden_kept", "attention_count"):
        mine, theirs = getattr(left, name), getattr(right, name)
        assert (mine is None) == (theirs is None)
        np.testing.assert_array_equal(mine, theirs)


@given(matrices)
def test_int8_is_within_half_a_step_of_each_rows_own_scale(values: np.ndarray) -> None:
    stored = store_states(values, "int8")
    assert stored.shape == (len(values), values.shape[1] + 4) and not bad_states(stored).any()
    bound = np.abs(values).max(axis=1, initial=0.0) / 254 * (1 + 1e-5) + 1e-37
    assert (np.abs(read_states(stored) - values) <= bound[:, None]).all()


@given(matrices)
def test_bfloat16_rounds_as_torch_does_and_float32_is_exact(values: np.ndarray) -> None:
    expected = torch.from_numpy(values).bfloat16()
    assert torch.equal(states_tensor(store_states(values, "bfloat16")), expected)
    np.testing.assert_array_equal(read_states(store_states(values, "bfloat16")), expected.float().numpy())
    np.testing.assert_array_equal(read_states(store_states(values, "float32")), values)
    np.testing.assert_array_equal(read_states(store_states(values, "float16")), values.astype(np.float16))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_stays_visible(dtype: str, bad: float) -> None:
    values = np.ones((3, 4), dtype=np.float32)
    values[1, 2] = bad
    assert bad_states(store_states(values, dtype)).tolist() == [False, True, False]


@given(
    every=st.floats(0.01, 40), seed=st.integers(0, 999), lengths=st.lists(st.integers(0, 90), min_size=1, max_size=6)
)
def test_kept_positions_depend_on_sample_and_position_alone_and_are_evenly_spaced(
    every: float, seed: int, lengths: list[int]
) -> None:
    ids = np.random.default_rng(seed).integers(0, 256, (len(lengths), 16)).astype(np.uint8)
    kept = kept_positions(ids, np.asarray(lengths), every)
    rate = 1 / every if every >= 1 else every
    for n, part in enumerate(np.split(kept, np.cumsum(lengths)[:-1])):
        np.testing.assert_array_equal(kept_positions(ids[n : n + 1], np.asarray(lengths[n : n + 1]), every), part)
        assert abs(part.sum() - lengths[n] * rate) < 1
        gaps = np.diff(np.flatnonzero(part))
        assert ((gaps >= np.floor(1 / rate)) & (gaps <= np.ceil(1 / rate) + 1)).all()


def test_one_position_in_three_is_every_third_one() -> None:
    ids = np.arange(160, dtype=np.uint8).reshape(10, 16)
    for n in range(10):
        found = np.flatnonzero(kept_positions(ids[n : n + 1], np.asarray([30]), 3))
        assert np.diff(found).tolist() == [3] * 9


@settings(max_examples=30)
@given(
    dtype=st.sampled_from(["float32", "float16", "bfloat16", "int8"]),
    every=st.sampled_from([None, 3.0, 0.4]),
    attention=st.sampled_from([[], ["model.layers.1"], ["a", "b"]]),
    seed=st.integers(0, 999),
)
def test_round_trip_through_parquet_and_take_are_exact(
    make_identity: MakeIdentity, make_unit: MakeUnit, dtype: str, every: float | None, attention: list[str], seed: int
) -> None:
    identity, (samples, targets) = with_states(
        make_identity, make_unit, seed, hidden_dtype=dtype, hidden_every=every, attention=attention
    )
    table = from_parquet(to_parquet(plain.encode(samples, targets, identity)))
    found = plain.decode(table)[1]
    check_same_states(found, targets)
    rows = [7, 2, 2, 5]
    taken = targets.take(rows)
    check_same_states(plain.decode(table.take(rows))[1], taken)
    check_same_states(TargetBatch.concat([targets.take([n]) for n in rows]), taken)
    assert file_metadata(table.schema).hidden_every == every


def test_rows_that_do_not_fit_the_identity_are_refused(make_identity: MakeIdentity, make_unit: MakeUnit) -> None:
    asked = {"hidden_every": 2.0, "attention": ["a"], "hidden_dtype": "int8"}
    identity, (samples, targets) = with_states(make_identity, make_unit, **asked)
    assert targets.hidden_kept is not None and targets.attention_count is not None
    heavy = targets.attention["a"].copy()
    heavy[3] = 1.5
    broken = targets.hidden["final"].copy()
    broken[1, :4] = np.asarray([np.inf], dtype="<f4").view(np.uint8)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"hidden_kept": ~targets.hidden_kept}, "kept at other positions than hidden_every 2.0"),
        ({"hidden": {"final": targets.hidden["final"][:-1]}}, "targets.hidden final holds"),
        ({"hidden": {"final": targets.hidden["final"].astype(np.float16)}}, "of uint8 belongs"),
        ({"hidden": {"final": broken}}, "NaN or infinite values from the teacher in hidden state final"),
        ({"attention": {"a": heavy}}, "attention weights of a outside 0 to 1"),
        ({"attention": {}}, r"attention of \[\] came where \['a'\] belongs"),
        ({"attention_count": targets.attention_count[::-1].copy()}, "not as long as what their positions look back on"),
    ]
    for change, message in cases:
        with pytest.raises(IntegrityError, match=message):
            plain.encode(samples, replace(targets, **change), identity)


def test_neutral_settings_leave_the_fingerprint_alone_and_others_change_it(
    make_identity: MakeIdentity, make_unit: MakeUnit
) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"hidden_every": 2.0},
        {"attention": ["a"]},
        {"hidden_dtype": "int8"},
        {"hidden_projection": 4, "projection": "ab" * 16},
    ]
    found = [with_states(make_identity, make_unit, **change)[0].fingerprint for change in changes]
    assert len(set(found)) == len(changes)
    assert found[0] == make_identity(hidden=["final"]).fingerprint
