"""Copies in plain Parquet and the dataset's card."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.dataset as ds
import pytest
import torch
import yaml

from storage.card import CARD_KEY, render_card, write_card
from storage.columns import column_bytes, column_note
from storage.config import Codec
from storage.errors import IdentityError, InputError
from storage.export import export_dataset
from storage.heads import Head, load_head, save_head
from storage.identity import DatasetIdentity
from storage.reader import Dataset
from storage.samples import SampleBatch
from storage.targets import TargetBatch
from storage.verify import verify_dataset
from storage.writer import DatasetWriter

Unit = tuple[SampleBatch, TargetBatch]
MakeIdentity = Callable[..., DatasetIdentity]
MakeUnit = Callable[..., Unit]
SameUnit = Callable[[Unit, Unit], None]


def write(url: str, identity: DatasetIdentity, make_unit: MakeUnit, codec: Codec = "plain") -> Dataset:
    """Make a dataset of three units of which the last repeats three samples of the first; with its head."""
    writer = DatasetWriter.create(url, identity, 512, codec)
    first, second = make_unit(identity, 6, 0), make_unit(identity, 5, 1)
    writer.commit("u0", *first, attempt=1)
    writer.commit("u1", *second, attempt=1)
    more = make_unit(identity, 4, 2)
    third = SampleBatch.concat([first[0].take([0, 2, 4]), more[0]])
    writer.commit("u2", third, TargetBatch.concat([first[1].take([0, 2, 4]), more[1]]), attempt=1)
    if "final" in identity.capture.hidden:
        save_head(writer.store, Head(torch.randn(512, 8), None, 500), identity.fingerprint)
    return Dataset.open(url)


@pytest.mark.parametrize(
    "kind,codec", [("topk", "plain"), ("hybrid", "compact"), ("sampled", "compact"), ("text", "plain")]
)
def test_a_copy_holds_every_sample_once_and_is_sound(
    tmp_path: Path,
    kind: str,
    codec: Codec,
    make_identity: MakeIdentity,
    make_unit: MakeUnit,
    assert_same_unit: SameUnit,
) -> None:
    source = write(str(tmp_path / "a"), make_identity(kind, hidden=["final"]), make_unit, codec)
    assert source.info.codec == codec and source.catalog.num_duplicates == 3
    found = export_dataset(source, str(tmp_path / "b"))
    copy = Dataset.open(str(tmp_path / "b"), source.identity)
    assert (found.samples, found.units, found.new_units) == (15, 3, 3)
    assert (copy.catalog.num_duplicates, copy.info.codec) == (0, "plain")
    assert copy.info.tokenizer.padded_vocab_size == 512
    np.testing.assert_array_equal(copy.catalog.sample_ids, source.catalog.sample_ids)
    ids = source.catalog.sample_ids
    assert_same_unit(copy.read(ids), source.read(ids))
    assert verify_dataset(copy.store.url).ok
    head = load_head(source.store, source.info.fingerprint)
    assert torch.equal(load_head(copy.store, copy.info.fingerprint).weight, head.weight)
    files = [str(tmp_path / "b" / record.data_key) for record in copy.manifests]
    assert ds.dataset(files, format="parquet").count_rows() == 15
    frame = pd.concat(pd.read_parquet(file) for file in files)
    assert [len(tokens) for tokens in frame["tokens"]] == source.read(ids)[0].lengths().tolist()


def test_an_export_that_was_cut_off_goes_on_and_never_mixes(
    tmp_path: Path, make_identity: MakeIdentity, make_unit: MakeUnit
) -> None:
    source = write(str(tmp_path / "a"), make_identity(), make_unit)
    target = str(tmp_path / "b")

    def stop(done: int, _total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_dataset(source, target, stop)
    found = export_dataset(source, target)
    assert (found.units, found.new_units, found.samples) == (3, 1, 15)
    packed = write(str(tmp_path / "packed"), source.identity, make_unit, "compact")
    with pytest.raises(InputError, match="holds a dataset of codec compact"):
        export_dataset(source, packed.store.url)
    assert "`lectern export` gives a copy in plain Parquet" in render_card(packed)
    with pytest.raises(InputError, match="is the dataset itself"):
        export_dataset(source, str(tmp_path / "a"))
    other = write(str(tmp_path / "c"), make_identity(top_k=7), make_unit)
    with pytest.raises(IdentityError, match=r"capture\.top_k"):
        export_dataset(other, target)


def test_the_card_says_what_the_dataset_holds(tmp_path: Path, make_identity: MakeIdentity, make_unit: MakeUnit) -> None:
    layers = ["final", "model.layers.1", "model.layers.2"]
    dataset = write(str(tmp_path / "a"), make_identity(hidden=layers, name="owner/model"), make_unit)
    key = write_card(dataset)
    text = dataset.store.read(key).decode()
    _, front, body = text.split("---\n", 2)
    fields = yaml.safe_load(front)
    assert fields["configs"] == [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}
    ]
    assert fields["size_categories"] == ["n<1K"] and "hybrid" in fields["tags"]
    totals = dataset.totals()
    for part in (
        "Soft targets of owner/model",
        f"| samples | {totals.samples:,} |",
        f"{totals.supervised:,} of them supervised",
        f"{totals.bytes:,} bytes",
        "hybrid, top_k 6, draws 5",
        "hidden final + model.layers.1 + model.layers.2",
        "| `hidden_model.layers.2` |",
        dataset.info.fingerprint,
        'load_dataset("THIS FOLDER", split="train")',
    ):
        assert part in body
    names = [name for name, _ in column_bytes(dataset)]
    assert all(f"| `{name}` |" in body and column_note(name) != "packed by the codec" for name in names)
    assert render_card(Dataset.open(dataset.store.url)) == text


@pytest.mark.parametrize(
    "name",
    [
        "/home/someone/private/models/big",
        "s3://AKIAKEY:hunter2@bucket/big?token=abc123",
        "C:\\Users\\someone\\big",
        "../big",
    ],
)
def test_no_folder_and_no_secret_reaches_the_card(
    tmp_path: Path, name: str, make_identity: MakeIdentity, make_unit: MakeUnit
) -> None:
    text = render_card(write(str(tmp_path / "a"), make_identity(name=name), make_unit))
    assert "Soft targets of big" in text
    for secret in ("someone", "private", "AKIAKEY", "hunter2", "token=", "abc123", "bucket", str(tmp_path)):
        assert secret not in text


def test_the_card_is_no_part_of_the_data(tmp_path: Path, make_identity: MakeIdentity, make_unit: MakeUnit) -> None:
    dataset = write(str(tmp_path / "a"), make_identity(), make_unit)
    write_card(dataset)
    assert CARD_KEY in dataset.store.list()
    assert verify_dataset(dataset.store.url).ok
    assert len(Dataset.open(dataset.store.url).catalog) == 15
