"""DistillKit's caches: decoded as DistillKit does, imported whole or not at all."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from distillkit_files import CONFIG, compress, distributions, pack_bits, rows_of, spoiled, write_cache
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models

from storage.errors import IdentityError, InputError
from storage.importers.bits import unpack_big_endian, unpack_words
from storage.importers.dataset import ImportResult, ImportSettings, import_dataset
from storage.importers.distillkit import (
    Compression,
    LegacyCompression,
    decode_legacy,
    decode_logprobs,
    index_bits,
    read_compression,
)
from storage.object_store import Store
from storage.reader import Dataset
from storage.tokenizer import Tokenizer
from storage.verify import verify_dataset

GOLDEN = json.loads((Path(__file__).parent / "golden" / "distillkit.json").read_text())


@pytest.mark.parametrize("name", ["recommended", "budget", "bins", "delta"])
def test_rows_that_distillkit_wrote_are_decoded_as_it_does(name: str) -> None:
    golden = GOLDEN[name]
    config = read_compression(json.dumps(golden["config"]).encode(), "golden")
    assert isinstance(config, Compression)
    packed = np.asarray(golden["bytepacked_indices"], dtype=np.uint8)
    np.testing.assert_array_equal(unpack_big_endian(packed, index_bits(config.d), config.k), golden["ids"])
    found = decode_logprobs(np.asarray(golden["compressed_logprobs"], dtype=np.uint8), config)
    # It adds 16-bit roundings of its own where the exact values are kept in 16 bits.
    np.testing.assert_allclose(found, golden["logprobs"], atol=1e-4 if name != "bins" else 2e-3)


def test_rows_of_the_older_layout_are_decoded_as_distillkit_does() -> None:
    golden = GOLDEN["legacy"]
    config = read_compression(json.dumps(golden["config"]).encode(), "golden")
    assert isinstance(config, LegacyCompression)
    words = np.asarray(golden["packed_indices"], dtype=np.int64)
    np.testing.assert_array_equal(unpack_words(words, index_bits(config.vocab_size), config.k), golden["ids"])
    found = decode_legacy(np.asarray(golden["exact_values"]), np.asarray(golden["coeffs"]), config)
    np.testing.assert_allclose(found, golden["logprobs"], atol=1e-4)


@given(bits=st.integers(1, 32), rows=st.integers(1, 4), count=st.integers(1, 70), seed=st.integers(0, 99))
def test_bit_packing_round_trips(bits: int, rows: int, count: int, seed: int) -> None:
    numbers = np.random.default_rng(seed).integers(0, 1 << bits, (rows, count))
    np.testing.assert_array_equal(unpack_big_endian(pack_bits(numbers, bits), bits, count), numbers)
    with pytest.raises(InputError, match="numbers of"):
        unpack_big_endian(pack_bits(numbers, bits)[:, :-1], bits, count)


@settings(max_examples=25)
@given(
    delta=st.booleans(),
    normalize=st.booleans(),
    exact_k=st.integers(0, 12),
    dtype=st.sampled_from(["float32", "float16"]),
    bits=st.integers(2, 9),
    seed=st.integers(0, 99),
)
def test_what_the_layout_holds_is_read_back_within_a_step(
    delta: bool, normalize: bool, exact_k: int, dtype: str, bits: int, seed: int
) -> None:
    left = 12 - exact_k
    bins = [{"scale_dtype": "float32", "element_bits": bits, "num_elements": left}] if left else []
    terms = [0, 1, "sqrt"] if left else None
    config = {**CONFIG, "delta_encoding": delta, "normalize_t": normalize, "exact_k": exact_k, "exact_dtype": dtype}
    config |= {"residual_bins": bins, "polynomial_terms": terms}
    ids, logprobs = distributions(np.random.default_rng(seed), 7, 500, 12)
    raw, packed = compress(ids, logprobs, config)
    found = decode_logprobs(raw, Compression.model_validate(config))
    step = 2.0 / (1 << bits) + (0.01 if dtype == "float16" else 1e-5)
    assert np.abs(found - logprobs).max() <= step * (12 if delta else 1)
    np.testing.assert_array_equal(unpack_big_endian(packed, index_bits(500), 12), ids)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    """A tokenizer of 500 ids."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    engine = tokenizers.Tokenizer(models.WordLevel({f"w{n}": n for n in range(500)}, unk_token="w0"))
    engine.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
    return Tokenizer.load(folder)


def imported(folder: Path, tokenizer: Tokenizer, name: str = "dataset", **changes: Any) -> tuple[ImportResult, Dataset]:
    asked = replace(ImportSettings(str(folder / "cache"), "a-teacher"), **changes)
    result = import_dataset(asked, tokenizer, str(folder / name))
    return result, Dataset.open(str(folder / name))


def test_a_cache_becomes_a_sound_dataset_with_an_honest_identity(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = rows_of(10)
    write_cache(tmp_path / "cache", [*rows, rows[0]], CONFIG)
    result, dataset = imported(tmp_path, tokenizer)
    assert (result.rows, result.samples, result.repeated_rows, result.bad_rows) == (11, 10, 1, [])
    assert verify_dataset(dataset.store.url).ok
    identity = dataset.identity
    assert (identity.teacher.name, identity.teacher.architecture) == ("a-teacher", "unknown")
    assert identity.teacher.weights.startswith("imported:")
    assert (identity.capture.kind, identity.capture.top_k, identity.precision) == ("topk", 12, "unknown")
    samples, targets = dataset.read(dataset.catalog.sample_ids)
    for n, row in enumerate(rows):
        np.testing.assert_array_equal(samples.sample(n).tokens, row["input_ids"])
        mask = np.asarray(row["attention_mask"])
        within = np.flatnonzero(mask[1:] == mask[:-1])
        np.testing.assert_array_equal(np.flatnonzero(samples.sample(n).supervised), within + 1)
        own = targets.take([n])
        np.testing.assert_array_equal(own.id.reshape(-1, 12)[:, :4], row["ids"][within][:, :4])
        np.testing.assert_allclose(own.logprob.reshape(-1, 12), row["logprobs"][within], atol=0.05)
        np.testing.assert_allclose(own.tail_mass, 1 - np.exp(row["logprobs"][within]).sum(1), atol=0.02)


def test_importing_again_stores_nothing_and_another_cache_is_another_identity(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    write_cache(tmp_path / "cache", rows_of(5), CONFIG)
    first, dataset = imported(tmp_path, tokenizer)
    again, same = imported(tmp_path, tokenizer)
    assert (first.new_units, again.new_units) == (1, 0)
    assert len(same.catalog) == len(dataset.catalog) == 5
    write_cache(tmp_path / "cache", rows_of(5, seed=1), CONFIG)
    with pytest.raises(IdentityError, match=r"teacher\.weights is 'imported:"):
        imported(tmp_path, tokenizer)


def test_padding_and_unlabelled_tokens_are_not_supervised(tmp_path: Path, tokenizer: Tokenizer) -> None:
    row = rows_of(1)[0]
    length = len(row["input_ids"])
    row["attention_mask"] = [1] * (length - 2) + [0, 0]
    row["labels"] = [-100, -100, -100, *row["input_ids"][3:]]
    write_cache(tmp_path / "cache", [row], CONFIG)
    _, dataset = imported(tmp_path, tokenizer)
    sample = dataset.read(dataset.catalog.sample_ids)[0].sample(0)
    assert sample.tokens.tolist() == row["input_ids"][:-2]
    assert np.flatnonzero(sample.supervised).tolist() == list(range(3, length - 2))


@pytest.mark.parametrize(
    "kind,reason",
    [
        ("heavy", "do not add up to 1 within 0.02"),
        ("logits", "above 0; logits without their normaliser"),
        ("nan", "position 1 holds NaN or infinite log-probabilities"),
        ("twice", "one token id twice at a position"),
        ("outside", "target ids outside the vocabulary of 500"),
        ("short", "targets for"),
        ("token", "token ids outside the vocabulary of 500"),
    ],
)
def test_rows_out_of_contract_are_named_and_nothing_is_imported(
    tmp_path: Path, tokenizer: Tokenizer, kind: str, reason: str
) -> None:
    config = {**CONFIG, "exact_k": 12, "polynomial_terms": None, "residual_bins": []}
    write_cache(tmp_path / "cache", [*rows_of(6), spoiled(kind)], config)
    with pytest.raises(InputError, match=rf"1 of 7 rows are out of contract(.|\n)*data_1\.parquet row 2: .*{reason}"):
        imported(tmp_path, tokenizer)
    assert Store(tmp_path / "dataset").list() == []
    result, dataset = imported(tmp_path, tokenizer, skip_bad_rows=True)
    assert len(result.bad_rows) == 1 and len(dataset.catalog) == 6


def test_a_config_that_does_not_fit_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(InputError, match=r"holds no \*\.parquet file"):
        imported(tmp_path, tokenizer)
    write_cache(cache, rows_of(4), CONFIG)
    (cache / "compression_config.yaml").write_text(json.dumps({**CONFIG, "exact_k": 5}))
    with pytest.raises(InputError, match=r"4 of 4 rows are out of contract(.|\n)*bytes for a position"):
        imported(tmp_path, tokenizer)
    for broken, message in (
        ({**CONFIG, "d": 90}, "made for 90 token ids, the tokenizer has 500"),
        ({**CONFIG, "colour": 3}, "no compression config of DistillKit: colour: Extra inputs"),
    ):
        (cache / "compression_config.yaml").write_text(json.dumps(broken))
        with pytest.raises(InputError, match=message):
            imported(tmp_path, tokenizer)
    (cache / "compression_config.yaml").unlink()
    with pytest.raises(InputError, match="--format-config"):
        imported(tmp_path, tokenizer)
    (tmp_path / "own.yaml").write_text(json.dumps(CONFIG))
    assert imported(tmp_path, tokenizer, config=str(tmp_path / "own.yaml"))[0].samples == 4
