"""Several datasets read as one: the first one serves, nothing is lost, another tokenizer is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage.config import CacheConfig
from storage.errors import IdentityError, InputError
from storage.reader import Dataset
from storage.samples import SampleBatch
from storage.targets import TargetBatch
from storage.union import DatasetUnion, open_existing
from storage.writer import DatasetWriter

Unit = tuple[SampleBatch, TargetBatch]


def write(url: str, identity: Any, unit: Unit, rows: list[int]) -> str:
    writer = DatasetWriter.create(url, identity)
    writer.commit("u", unit[0].take(rows), unit[1].take(rows), attempt=1)
    return url


@pytest.fixture
def three(tmp_path: Path, make_identity: Any, make_unit: Any) -> tuple[list[str], list[Unit]]:
    """Return three datasets of three teachers and kinds over parts of the same 12 samples, and the whole units."""
    identities = [
        make_identity("hybrid"),
        make_identity("topk", weights="ba" * 32, top_k=9),
        make_identity("sampled", weights="cc" * 32),
    ]
    units = [make_unit(identity, 12, 7) for identity in identities]
    parts = [[0, 1, 2, 3, 4], [3, 4, 5, 6, 7, 8], [8, 9, 10, 2]]
    urls = [
        write(str(tmp_path / str(n)), identity, unit, rows)
        for n, (identity, unit, rows) in enumerate(zip(identities, units, parts, strict=True))
    ]
    return urls, units


def test_the_first_dataset_that_holds_a_sample_serves_it(
    three: tuple[list[str], list[Unit]], assert_same_unit: Callable[[Unit, Unit], None]
) -> None:
    urls, units = three
    ids = units[0][0].sample_id
    for order, served in (
        ([0, 1, 2], [0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, -1]),
        ([2, 1, 0], [2, 2, 0, 1, 1, 1, 1, 1, 0, 0, 0, -1]),
    ):
        union = DatasetUnion.open([urls[n] for n in order])
        assert union.serving(ids).tolist() == served
        assert union.missing(ids[[11, 0, 11]]).tolist() == [0, 2]
        asked = np.asarray([9, 3, 3, 0, 8, 6, 10, 1])
        seen = np.zeros(len(asked), dtype=int)
        for part in union.parts(ids[asked]):
            rows = asked[part.asked].tolist()
            (n,) = {order[served[row]] for row in rows}
            assert_same_unit((part.samples, part.targets), (units[n][0].take(rows), units[n][1].take(rows)))
            assert part.capture.kind == ["hybrid", "topk", "sampled"][n]
            seen[part.asked] += 1
        assert (seen == 1).all()
        whole = union.sample_ids()
        assert len(whole) == 11
        assert {bytes(row) for row in whole} == {bytes(row) for row in ids[:11]}


def test_samples_in_none_are_named_with_all_places(three: tuple[list[str], list[Unit]]) -> None:
    urls, units = three
    union = DatasetUnion.open(urls[:2])
    assert union.kinds == ["hybrid", "topk"]
    with pytest.raises(InputError, match=rf"1 of 2 samples are in none of .*/0, .*/1, the first is {'..' * 16}; run"):
        union.parts(units[0][0].sample_id[[0, 10]])


def test_another_tokenizer_is_refused(tmp_path: Path, make_identity: Any, make_unit: Any) -> None:
    urls = []
    for n, digest in enumerate(("cd" * 32, "ef" * 32)):
        identity = make_identity(tokenizer=digest)
        urls.append(write(str(tmp_path / str(n)), identity, make_unit(identity), [0]))
    with pytest.raises(IdentityError, match=r"another tokenizer \(500 ids, efefefefefef…\) than .* cache\.also"):
        DatasetUnion.open(urls)


def test_the_first_one_must_be_the_expected_one(three: tuple[list[str], list[Unit]], make_identity: Any) -> None:
    urls, _ = three
    own = make_identity("hybrid")
    assert DatasetUnion.open(urls, own).identity == own
    with pytest.raises(IdentityError):
        DatasetUnion.open(urls[::-1], own)


def test_a_config_names_them_and_its_own_one_may_not_exist_yet(
    three: tuple[list[str], list[Unit]], tmp_path: Path, make_identity: Any
) -> None:
    urls, units = three
    ids = units[0][0].sample_id
    own = make_identity("hybrid")
    assert open_existing(CacheConfig(url=str(tmp_path / "new")), own) is None
    later = open_existing(CacheConfig(url=str(tmp_path / "new"), also=urls[1:]), own)
    assert later is not None
    assert later.missing(ids).tolist() == [0, 1, 11]
    both = open_existing(CacheConfig(url=urls[0], also=urls[1:]), own)
    assert both is not None
    assert [dataset.store.url for dataset in both.datasets] == urls
    with pytest.raises(InputError, match="no dataset at"):
        open_existing(CacheConfig(url=urls[0], also=[str(tmp_path / "nowhere")]), own)


def test_memory_is_shared(three: tuple[list[str], list[Unit]]) -> None:
    union = DatasetUnion.open(three[0])
    assert (
        sum(dataset.reading.memory_bytes for dataset in union.datasets)
        <= Dataset.open(three[0][0]).reading.memory_bytes
    )
