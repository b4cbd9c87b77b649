"""A dataset through Ray Data and through `datasets`: every sample once, its columns as the reader gives them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage.errors import InputError, IntegrityError
from storage.reader import Dataset
from storage.samples import SampleBatch
from storage.targets import TargetBatch
from storage.writer import DatasetWriter

Unit = tuple[SampleBatch, TargetBatch]


def write(url: str, identity: Any, make_unit: Callable[..., Unit], codec: str = "plain") -> list[Unit]:
    """Write three units; the third holds two samples of the first again."""
    units = [make_unit(identity, 5, seed) for seed in range(2)]
    again = units[0][0].take([1, 2]), units[0][1].take([1, 2])
    writer = DatasetWriter.create(url, identity, codec=codec)
    for n, unit in enumerate([*units, again]):
        writer.commit(f"u{n}", *unit, attempt=1)
    return units


@pytest.mark.parametrize("codec", ["plain", "compact"])
@pytest.mark.parametrize("parallelism", [1, 2, 7])
def test_ray_tasks_give_every_sample_once(
    tmp_path: Path, codec: str, parallelism: int, make_identity: Any, make_unit: Callable[..., Unit]
) -> None:
    from storage.ray_source import TargetSource

    identity = make_identity()
    units = write(str(tmp_path), identity, make_unit, codec)
    source = TargetSource(str(tmp_path))
    tasks = source.get_read_tasks(parallelism)
    assert len(tasks) <= parallelism
    rows = {row["sample_id"]: row for task in tasks for table in task() for row in table.to_pylist()}
    assert sum(task.metadata.num_rows for task in tasks) == len(rows) == 10
    for samples, targets in units:
        for n, sample_id in enumerate(samples.ids()):
            own = targets.take([n])
            assert rows[sample_id]["tokens"] == samples.sample(n).tokens.tolist()
            assert rows[sample_id]["target_id"] == Dataset.open(str(tmp_path)).read([sample_id])[1].id.tolist()
            assert rows[sample_id]["target_count"] == own.count.tolist()


def test_ray_tasks_take_the_wanted_columns_and_check_the_file(
    tmp_path: Path, make_identity: Any, make_unit: Callable[..., Unit]
) -> None:
    from storage.ray_source import TargetSource

    write(str(tmp_path), make_identity(), make_unit)
    (task,) = TargetSource(str(tmp_path), columns=["tokens", "sample_id"]).get_read_tasks(1)
    assert {tuple(table.column_names) for table in task()} == {("tokens", "sample_id")}
    (task,) = TargetSource(str(tmp_path), columns=["token"]).get_read_tasks(1)
    with pytest.raises(InputError, match="has no column 'token'; it has sample_id, source, tokens"):
        list(task())
    (task,) = TargetSource(str(tmp_path)).get_read_tasks(1)
    for path in (tmp_path / "data").iterdir():
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(IntegrityError, match="SHA-256"):
        list(task())


def test_the_documented_load_dataset_reads_the_committed_files(
    tmp_path: Path, make_identity: Any, make_unit: Callable[..., Unit], monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets", reason="in the extra `bench`")
    identity = make_identity()
    folder = tmp_path / "dataset"
    units = write(str(folder), identity, make_unit)
    (folder / "data" / "u9-orphan.parquet").write_bytes(b"left by an interrupted attempt")
    # As docs/loading.md has it.
    records = [json.loads(path.read_bytes()) for path in (folder / "manifest").glob("*.json")]
    files = [str(folder / record["data_key"]) for record in records]
    rows = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == 12  # a sample in two units is there twice
    found = {row["sample_id"]: row for row in rows.with_format("numpy")}
    for samples, targets in units:
        for n, sample_id in enumerate(samples.ids()):
            own = targets.take([n])
            np.testing.assert_array_equal(found[sample_id]["tokens"], samples.sample(n).tokens)
            np.testing.assert_array_equal(found[sample_id]["target_id"], own.id)
            np.testing.assert_array_equal(found[sample_id]["target_logprob"], own.logprob)
