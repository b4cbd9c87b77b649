"""Prepared samples: what is written, when it is written again, how it is read, what goes wrong."""

import json
import multiprocessing
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny_tokenizers import CHAT, write_tokenizer

from storage import sample_writer
from storage.config import DataConfig
from storage.errors import InputError, IntegrityError
from storage.sample_set import SampleSet, prepare_samples
from storage.samples import Sample
from storage.tokenizer import Tokenizer

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer.load(write_tokenizer(tmp_path / "tokenizer"))


def prose(num_documents: int, words: int = 12, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, words)) + f" {seed}.{n}" for n in range(num_documents)]


def write_rows(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row if isinstance(row, dict) else {"text": row}) + "\n" for row in rows))
    return str(path)


def config(window_tokens: int = 64, heldout_fraction: float = 0.2, **paths: Any) -> DataConfig:
    sources = [
        {"name": name, **(path if isinstance(path, dict) else {"path": path})} for name, path in paths.items() if path
    ]
    return DataConfig.model_validate(
        {"sources": sources, "window_tokens": window_tokens, "heldout_fraction": heldout_fraction}
    )


def decoded(samples: SampleSet, tokenizer: Tokenizer, **which: str) -> list[str]:
    """The documents of some samples, pieces as they are."""
    batch = samples.read(samples.rows(**which))
    found = []
    for n in range(len(batch)):
        one = batch.sample(n)
        borders = np.flatnonzero(np.diff(one.document)) + 1
        found += [tokenizer.decode(part) for part in np.split(one.tokens, borders)]
    return found


def test_samples_are_the_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = {name: prose(40, words=4, seed=seed) for seed, name in enumerate(("general", "domain"))}
    paths = {name: write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in texts.items()}
    samples = prepare_samples(config(window_tokens=128, **paths), tokenizer, tmp_path / "samples")
    assert samples.source_names == ["general", "domain"]
    for name, rows in texts.items():
        train, heldout = (decoded(samples, tokenizer, split=split, source=name) for split in ("train", "heldout"))
        assert sorted(train + heldout) == sorted(row + "<|end|>" for row in rows)
        assert len(heldout) in range(1, 20)
        assert samples.counters[name] == {"documents": 40, "bad_rows": 0, "duplicates": 0, "duplicate_windows": 0}
    everything = samples.read(samples.rows())
    assert everything.ids() == samples.ids(samples.rows())
    assert everything.source == samples.source
    assert everything.lengths().tolist() == samples.num_tokens.tolist()
    assert everything.num_supervised().tolist() == samples.num_supervised.tolist()
    assert samples.num_tokens.max() <= samples.window_tokens == 128
    for n in range(len(everything)):
        assert everything.sample(n).sample_id == everything.ids()[n]
    summary = samples.summary()["domain"]["train"]
    assert summary["tokens"] == samples.num_tokens[samples.rows("train", "domain")].sum()
    assert len(samples.rows("train")) + len(samples.rows("heldout")) == len(samples) == samples.num_samples
    assert set(samples.split) == {"train", "heldout"}


def test_files_are_plain_parquet(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_rows(tmp_path / "a.jsonl", prose(30))
    samples = prepare_samples(config(a=path), tokenizer, tmp_path / "samples")
    table = pq.read_table(tmp_path / "samples" / "samples-00000.parquet")
    row = table.to_pylist()[0]
    assert row["sample_id"] == samples.ids([0])[0]
    assert row["source"] == "a" and row["split"] in ("train", "heldout")
    assert len(row["tokens"]) == len(row["supervised"]) == len(row["document"]) == samples.num_tokens[0]


def test_rows_come_in_the_asked_order_from_several_groups(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_writer, "GROUP_SAMPLES", 8)
    monkeypatch.setattr(sample_writer, "PART_BYTES", 6000)
    path = write_rows(tmp_path / "a.jsonl", prose(150))
    samples = prepare_samples(config(a=path), tokenizer, tmp_path / "samples")
    assert len(list((tmp_path / "samples").glob("*.parquet"))) > 1
    whole = samples.read(range(len(samples)))
    for rows in (range(5, 30), [40, 3, 3, 17, 0], np.random.default_rng(0).permutation(len(samples)), []):
        batch = samples.read(rows)
        assert batch.ids() == samples.ids(rows)
        np.testing.assert_array_equal(batch.tokens, whole.take([int(row) for row in rows]).tokens)
    with pytest.raises(InputError, match=rf"rows must lie in \[0, {len(samples)}\)"):
        samples.read([len(samples)])
    with pytest.raises(InputError, match=r"no source is called 'b'; there are \['a'\]"):
        samples.rows(source="b")


def test_only_the_needed_row_groups_are_read(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_writer, "GROUP_SAMPLES", 16)
    path = write_rows(tmp_path / "a.jsonl", prose(100))
    samples = prepare_samples(config(a=path), tokenizer, tmp_path / "samples")
    part = tmp_path / "samples" / "samples-00000.parquet"
    column = pq.read_metadata(part).row_group(2).column(3)
    assert column.path_in_schema.startswith("tokens")
    content = bytearray(part.read_bytes())
    content[column.data_page_offset + column.total_compressed_size // 2] ^= 0xFF
    part.write_bytes(content)
    damaged = SampleSet.open(tmp_path / "samples")
    assert damaged.read(range(16, 32)).ids() == samples.ids(range(16, 32))
    with pytest.raises(
        IntegrityError, match=r"samples-00000\.parquet is truncated or altered.*prepare the samples again"
    ):
        damaged.read([33])


def test_row_groups_are_bounded_in_tokens_too(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_writer, "GROUP_TOKENS", 500)
    samples = prepare_samples(config(a=write_rows(tmp_path / "a.jsonl", prose(60))), tokenizer, tmp_path / "samples")
    metadata = pq.read_metadata(tmp_path / "samples" / "samples-00000.parquet")
    assert metadata.num_row_groups >= samples.num_tokens.sum() // 564
    assert samples.read(samples.rows()).ids() == samples.ids(samples.rows())


def test_no_flipped_bit_goes_unseen(tmp_path: Path, tokenizer: Tokenizer) -> None:
    samples = prepare_samples(config(a=write_rows(tmp_path / "a.jsonl", prose(60))), tokenizer, tmp_path / "samples")
    part = tmp_path / "samples" / "samples-00000.parquet"
    content = part.read_bytes()
    column = pq.read_metadata(part).row_group(0).column(3)
    expected = samples.read(samples.rows()).tokens
    seen = 0
    for position in np.linspace(0, column.total_compressed_size - 1, 40).astype(int):
        altered = bytearray(content)
        altered[column.data_page_offset + position] ^= 1
        part.write_bytes(altered)
        try:
            np.testing.assert_array_equal(SampleSet.open(tmp_path / "samples").read(samples.rows()).tokens, expected)
        except IntegrityError:
            seen += 1
    assert seen > 30


def test_prepared_samples_are_opened_not_made_again(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = config(a=write_rows(tmp_path / "a.jsonl", prose(30)))
    events: list[dict[str, Any]] = []
    first = prepare_samples(data, tokenizer, tmp_path / "samples", events.append)
    assert events[-1]["stage"] == "prepare" and events[-1]["source"] == "a" and events[-1]["documents"] == 30
    assert events[-1]["samples"] > 0
    events.clear()
    again = prepare_samples(data, tokenizer, tmp_path / "samples", events.append)
    assert not events and again.ids(again.rows()) == first.ids(first.rows()) and again.key == first.key


def test_whatever_samples_depend_on_makes_them_anew(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "a.jsonl"
    data = config(a=write_rows(path, prose(30)))
    keys = [prepare_samples(data, tokenizer, tmp_path / "samples").key]

    def remade(data: DataConfig, tokenizer: Tokenizer) -> None:
        events: list[dict[str, Any]] = []
        keys.append(prepare_samples(data, tokenizer, tmp_path / "samples", events.append).key)
        assert events

    remade(config(window_tokens=32, a=str(path)), tokenizer)
    remade(config(heldout_fraction=0.3, a=str(path)), tokenizer)
    remade(data, Tokenizer.load(tokenizer.folder, CHAT + " "))
    remade(data, Tokenizer.load(write_tokenizer(tmp_path / "other", eos_token="<|begin|>")))
    for name, flag in (("with", True), ("without", False)):
        remade(data, Tokenizer.load(write_tokenizer(tmp_path / name, bos_token="<|begin|>", add_bos_token=flag)))
    remade(data, Tokenizer.load(write_tokenizer(tmp_path / "more", corpus=prose(50))))
    write_rows(path, prose(31))
    remade(data, tokenizer)
    assert len(set(keys)) == 9


def test_stale_files_go(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    data = config(a=write_rows(tmp_path / "a.jsonl", prose(200)))
    with monkeypatch.context() as small:
        small.setattr(sample_writer, "GROUP_SAMPLES", 8)
        small.setattr(sample_writer, "PART_BYTES", 1)
        prepare_samples(data, tokenizer, tmp_path / "samples")
    assert len(list((tmp_path / "samples").glob("*.parquet"))) > 4
    prepare_samples(config(window_tokens=65, a=str(tmp_path / "a.jsonl")), tokenizer, tmp_path / "samples")
    assert sorted(file.name for file in (tmp_path / "samples").iterdir()) == ["samples-00000.parquet", "samples.json"]


class StoppedError(Exception):
    """Stands for a kill in the middle."""


def test_an_interrupted_preparation_leaves_nothing_to_be_taken_for_whole(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "a.jsonl"
    prepare_samples(config(a=write_rows(path, prose(30))), tokenizer, tmp_path / "samples")
    data = config(a=write_rows(path, prose(900)))

    def stop(event: dict[str, Any]) -> None:
        if event["documents"] > 300:
            raise StoppedError

    with pytest.raises(StoppedError):
        prepare_samples(data, tokenizer, tmp_path / "samples", stop)
    with pytest.raises(InputError, match="no prepared samples at"):
        SampleSet.open(tmp_path / "samples")
    samples = prepare_samples(data, tokenizer, tmp_path / "samples")
    clean = prepare_samples(data, tokenizer, tmp_path / "clean")
    assert samples.ids(samples.rows()) == clean.ids(clean.rows())


def test_damage_is_told_on_opening_and_mended_by_preparing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = config(a=write_rows(tmp_path / "a.jsonl", prose(30)))
    folder = tmp_path / "samples"
    whole = prepare_samples(data, tokenizer, folder).ids(range(5))
    part, facts = folder / "samples-00000.parquet", folder / "samples.json"
    for path, content, message in (
        (part, part.read_bytes()[:-9], "truncated or altered"),
        (part, None, r"samples-00000\.parquet: it is missing"),
        (facts, b"{", r"samples\.json is malformed"),
        (facts, facts.read_bytes().replace(b'"format": 1', b'"format": 2'), r"another format \(format"),
        (facts, facts.read_bytes().replace(b"samples-00000", b"../samples"), "leads outside"),
    ):
        path.write_bytes(content) if content is not None else path.unlink()
        with pytest.raises(IntegrityError, match=message):
            SampleSet.open(folder)
        if message != "leads outside":
            assert prepare_samples(data, tokenizer, folder).ids(range(5)) == whole


def test_documents_keep_their_split_whatever_surrounds_them(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = prose(60, words=3)
    a = write_rows(tmp_path / "a.jsonl", rows)
    b = write_rows(tmp_path / "b.jsonl", [*prose(30, words=3, seed=1), *reversed(rows)])
    one = prepare_samples(config(window_tokens=128, a=a), tokenizer, tmp_path / "one")
    two = prepare_samples(config(window_tokens=90, b=b), tokenizer, tmp_path / "two")
    for split in ("train", "heldout"):
        assert set(decoded(one, tokenizer, split=split)) < set(decoded(two, tokenizer, split=split))


def test_no_window_is_in_both_splits_or_twice(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shared = "the same opening of many documents, longer than a window of forty tokens is, and on it goes: "
    rows = [shared + text for text in prose(40)]
    a = write_rows(tmp_path / "a.jsonl", [*rows, *rows[:7]])
    b = write_rows(tmp_path / "b.jsonl", [*rows, *prose(40, seed=3)])
    samples = prepare_samples(config(window_tokens=40, a=a, b=b), tokenizer, tmp_path / "samples")
    assert len(set(samples.ids(samples.rows()))) == len(samples)
    assert samples.counters["a"]["duplicate_windows"] > 0
    assert samples.counters["b"]["duplicate_windows"] > samples.counters["a"]["duplicate_windows"]


def test_duplicates_are_dropped_when_asked(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = prose(30)
    path = write_rows(tmp_path / "a.jsonl", [*rows, *[f"<p>{row}</p>" for row in rows[:10]]])
    clean = {"strip_html": True, "deduplicate": True}
    samples = prepare_samples(config(a={"path": path, "clean": clean}), tokenizer, tmp_path / "samples")
    assert samples.counters["a"]["duplicates"] == 10 and samples.counters["a"]["documents"] == 30
    assert not any("<p>" in text for text in decoded(samples, tokenizer))


def test_chats_and_completions_are_prepared_too(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}]}
        for n in range(20)
    ] + [{"prompt": f"p{n}: ", "completion": f"c{n}"} for n in range(20)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    samples = prepare_samples(config(a=path), tokenizer, tmp_path / "samples")
    batch = samples.read(samples.rows())
    learnt = tokenizer.decode(batch.tokens[batch.supervised])
    assert sorted(learnt.split("<|end|>")[:-1]) == sorted([f"a{n}" for n in range(20)] + [f"c{n}" for n in range(20)])


def failing(tmp_path: Path, tokenizer: Tokenizer, rows: list[Any], **fields: Any) -> str:
    data = config(a=write_rows(tmp_path / "a.jsonl", rows)).model_copy(update=fields)
    with pytest.raises(InputError) as raised:
        prepare_samples(data, tokenizer, tmp_path / "samples")
    assert raised.value.exit_code == 2
    with pytest.raises(InputError, match="no prepared samples"):
        SampleSet.open(tmp_path / "samples")
    return str(raised.value)


def test_bad_input_is_explained(tmp_path: Path, tokenizer: Tokenizer) -> None:
    good = prose(30)
    assert "is empty: it has no document" in failing(tmp_path, tokenizer, [])
    assert "a.jsonl:3: no supervised token" in failing(tmp_path, tokenizer, [*good[:2], "", *good])
    assert "all of its 2 rows are bad" in failing(tmp_path, tokenizer, [{"x": 1}, {"text": 2}], on_bad_row="skip")
    message = failing(tmp_path, tokenizer, good, heldout_fraction=1e-9)
    assert "no held-out sample: none of its 30 documents" in message and "data.heldout_fraction=1e-09" in message
    message = failing(tmp_path, tokenizer, good, heldout_fraction=1 - 1e-9)
    assert "no training sample: its 30 documents all fell" in message and "lower the share" in message
    question = {"messages": [{"role": "user", "content": "anyone?"}]}
    assert "a.jsonl:31: no supervised token" in failing(tmp_path, tokenizer, [*good, question])


def test_bad_rows_are_skipped_and_counted_when_asked(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "a.jsonl"
    write_rows(path, [*prose(30), "", {"text": 3}])
    path.write_text(path.read_text() + "{broken\n")
    data = config(a=str(path)).model_copy(update={"on_bad_row": "skip"})
    samples = prepare_samples(data, tokenizer, tmp_path / "samples")
    assert samples.counters["a"]["bad_rows"] == 3 and samples.counters["a"]["documents"] == 30


def test_no_heldout_share_needs_no_heldout_sample(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = config(a=write_rows(tmp_path / "a.jsonl", prose(3)), heldout_fraction=0.0)
    samples = prepare_samples(data, tokenizer, tmp_path / "samples")
    assert len(samples.rows("heldout")) == 0 and len(samples.rows("train")) > 0


def test_without_packing_each_document_has_its_own_window(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = prose(30, words=3)
    data = config(window_tokens=128, a=write_rows(tmp_path / "a.jsonl", rows)).model_copy(update={"pack": False})
    samples = prepare_samples(data, tokenizer, tmp_path / "samples")
    assert len(samples) == 30 and samples.read(samples.rows()).document.max() == 0


def read_elsewhere(samples: SampleSet, rows: list[int]) -> list[bytes]:
    """Read in another process and recompute the ids there."""
    batch = samples.read(rows)
    return [batch.sample(n).sample_id for n in range(len(batch))]


def test_other_processes_read_the_same(tmp_path: Path, tokenizer: Tokenizer) -> None:
    samples = prepare_samples(config(a=write_rows(tmp_path / "a.jsonl", prose(60))), tokenizer, tmp_path / "samples")
    assert len(pickle.dumps(samples)) < 1000
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        jobs = [pool.apply_async(read_elsewhere, (samples, rows)) for rows in ([0, 1, 2], [5, 3])]
        assert [job.get(60) for job in jobs] == [samples.ids([0, 1, 2]), samples.ids([5, 3])]


def test_samples_live_in_object_stores(tmp_path: Path, tokenizer: Tokenizer, s3_url: str) -> None:
    data = config(a=write_rows(tmp_path / "a.jsonl", prose(60)))
    there = prepare_samples(data, tokenizer, s3_url)
    here = prepare_samples(data, tokenizer, tmp_path / "samples")
    assert there.key == here.key and there.url == s3_url
    batch = SampleSet.open(s3_url).read([4, 2])
    assert batch.ids() == here.ids([4, 2])
    assert isinstance(batch.sample(0), Sample)


@pytest.mark.slow
def test_preparing_holds_little_in_memory(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(0)
    with (tmp_path / "a.jsonl").open("w") as file:
        for _ in range(2500):
            file.write(json.dumps({"text": rng.bytes(1500).hex()}) + "\n")
    data = config(window_tokens=1024, a=str(tmp_path / "a.jsonl"))
    # Once before the measurement, so that what is imported at first use does not count.
    prepare_samples(data, tokenizer, tmp_path / "before")
    tracemalloc.start()
    samples = prepare_samples(data, tokenizer, tmp_path / "samples")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert samples.num_tokens.sum() > 7_000_000
    assert peak < 5 * samples.num_tokens.sum(), "all samples together take 7 bytes a token"


@pytest.mark.slow
def test_embedded_corpora_are_prepared_in_seconds(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = config(window_tokens=256, general={"path": "embedded:general"}, domain={"path": "embedded:domain"})
    samples = prepare_samples(data, tokenizer, tmp_path / "samples")
    summary = samples.summary()
    assert summary["general"]["train"]["tokens"] > 200_000 and summary["domain"]["train"]["tokens"] > 2_000_000
    full = samples.num_tokens.mean() / 256
    assert full > 0.95, "windows should be nearly full"


def test_labels_are_kept_beside_the_samples(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = [{"text": text, "mood": n % 3 if n % 2 else None} for n, text in enumerate(prose(30, words=3))]
    long = {"path": write_rows(tmp_path / "long.jsonl", [{"text": text, "mood": 7} for text in prose(9, words=90)])}
    ids = [[5 + n, 6, 7, 8] for n in range(30)]
    tags = [{"ids": row, "supervised": [False, True, True, True], "tag": [-100, 0, -100, 2]} for row in ids]
    whole = {"path": write_rows(tmp_path / "whole.jsonl", texts), "label_field": "mood"}
    each = {"path": write_rows(tmp_path / "each.jsonl", tags), "label_field": "tag", "tokens_field": "ids"}
    data = config(whole=whole, each=each, long=long | {"label_field": "mood"}).model_copy(update={"pack": False})
    samples = prepare_samples(data, tokenizer, tmp_path / "samples")
    labels, rows = samples.labels(), samples.read(samples.rows(source="whole"))
    assert all(labels[i].tolist() == [0, -100, 2] for i in samples.ids(samples.rows(source="each")))
    moods = {row["text"]: row["mood"] for row in texts}
    found = {}
    for n in range(len(rows)):
        text = tokenizer.decode(rows.sample(n).tokens).removesuffix("<|end|>")
        label = labels.get(rows.ids()[n])
        assert label is None or (len(set(label)) == 1 and len(label) == rows.num_supervised()[n])
        found[text] = None if label is None else int(label[0])
    assert found == moods
    pieces = samples.ids(samples.rows(source="long"))
    assert len(pieces) > 20 and all(set(labels[i].tolist()) == {7} for i in pieces)
    assert prepare_samples(config(general=whole["path"]), tokenizer, tmp_path / "none").labels() == {}


@pytest.mark.parametrize(
    ("label", "text"), [(-1, "number of a class, from 0 on, or -100"), ([0, 1], "2 classes beside no token ids")]
)
def test_labels_that_are_none_are_refused(tmp_path: Path, tokenizer: Tokenizer, label: Any, text: str) -> None:
    rows = [{"text": text, "mood": label} for text in prose(10)]
    source = {"path": write_rows(tmp_path / "a.jsonl", rows), "label_field": "mood"}
    with pytest.raises(InputError, match=f"a.jsonl:1: 'mood' .*{text}"):
        prepare_samples(config(general=source), tokenizer, tmp_path / "samples")
