"""Readers: formats, places, bad rows, and that nothing is read whole."""

import bz2
import errno
import gzip
import json
import os
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from storage.config import SourceConfig
from storage.corpus import TEXT_CHARS, Document, read_documents
from storage.errors import InputError
from storage.inputs import resolve_inputs


def source(path: str | Path | list[str], **fields: Any) -> SourceConfig:
    paths = path if isinstance(path, list) else str(path)
    return SourceConfig(name="s", path=paths, **fields)


def read(path: str | Path | list[str], **fields: Any) -> list[Document]:
    return list(read_documents(source(path, **fields), "fail", Counter()))


def texts(path: str | Path | list[str], **fields: Any) -> list[str | None]:
    return [document.text for document in read(path, **fields)]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_jsonl_rows_become_documents_of_their_kind(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "name": None}]
    path = write_jsonl(
        tmp_path / "a.jsonl",
        [{"text": "one", "more": 1}, {"prompt": "p", "completion": "c"}, {"messages": messages, "text": None}],
    )
    path.write_text("\ufeff" + path.read_text() + "\n   \n")
    one, pair, chat = read(path)
    assert one == Document(f"{path}:1", text="one")
    assert (pair.prompt, pair.completion, pair.text, pair.where) == ("p", "c", None, f"{path}:2")
    assert chat.messages == (messages[0], {"role": "assistant", "content": "a"})


def test_fields_can_be_renamed(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "a.json", [{"body": "x"}, {"q": "p", "a": "c"}, {"chat": [{"role": "u", "content": "m"}]}]
    )
    names = {"text_field": "body", "prompt_field": "q", "completion_field": "a", "messages_field": "chat"}
    one, pair, chat = read(path, **names)
    assert one.text == "x" and pair.prompt == "p" and pair.completion == "c" and chat.messages is not None


BAD = [
    ("{broken", "not a JSON object on one line"),
    ("[1, 2]", "expected a JSON object, found list"),
    ('"text"', "expected a JSON object, found str"),
    ('{"other": "x"}', r"no field 'text', 'messages', or 'prompt' with 'completion'; it has \['other'\]"),
    ('{"prompt": "only"}', "no field 'text'"),
    ('{"text": 3}', "'text' must be text, found int"),
    ('{"text": null}', "no field 'text'"),
    ('{"text": "\\ud800"}', "half of a surrogate pair"),
    ('{"prompt": "p", "completion": ["c"]}', "'completion' must be text, found list"),
    ('{"messages": []}', "'messages' must be a list of messages, found an empty list"),
    ('{"messages": "hi"}', "'messages' must be a list of messages, found str"),
    ('{"messages": [{"content": "no role"}]}', r"messages\[0\] must be an object with a role"),
    ('{"messages": [{"role": "user"}]}', r"messages\[0\]\.content must be text, found nothing"),
    ('{"messages": [{"role": "user", "content": "\\udfff"}]}', "half of a surrogate pair"),
    ("[" * 100_000, "not usable JSON|not a JSON object"),
    ("9" * 5000, "not usable JSON"),
]


@pytest.mark.parametrize(("line", "reason"), BAD)
def test_a_bad_row_is_named_or_counted(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + '\n{"text": "also good"}\n')
    with pytest.raises(InputError, match=rf"a\.jsonl:3: .*({reason}).*on_bad_row=skip"):
        read(path)
    counters: Counter[str] = Counter()
    kept = list(read_documents(source(path), "skip", counters))
    assert [document.text for document in kept] == ["good", "also good"]
    assert counters["bad_rows"] == 1


def test_bytes_that_are_not_utf8_are_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl:2: not UTF-8"):
        read(path)


def test_tool_calls_need_no_content(tmp_path: Path) -> None:
    message = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": [message]}])
    assert read(path)[0].messages == ({"role": "assistant", "tool_calls": [{"name": "f"}]},)


def test_parquet_reads_only_the_columns_it_uses(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    bulky = [os.urandom(1000) for _ in range(3000)]
    table = pa.table({"text": [f"t{n}" for n in range(3000)], "bulky": bulky})
    pq.write_table(table, path, row_group_size=1000)
    before = pa.total_allocated_bytes()
    documents = read_documents(source(path), "fail", Counter())
    assert next(documents) == Document(f"{path}:1", text="t0")
    assert pa.total_allocated_bytes() - before < 1_000_000
    assert [document.where for document in documents][-1] == f"{path}:3000"


def test_parquet_chats_and_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    chat = [{"role": "user", "content": "q", "name": None}, {"role": "assistant", "content": "a", "name": "bot"}]
    pq.write_table(pa.table({"messages": [chat, None], "text": [None, None]}), path)
    counters: Counter[str] = Counter()
    (document,) = read_documents(source(path), "skip", counters)
    assert document.messages == ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "name": "bot"})
    assert counters["bad_rows"] == 1
    with pytest.raises(InputError, match=r"a\.parquet:2: no field 'text'"):
        read(path)


def test_parquet_problems_are_explained(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_text("no parquet")
    with pytest.raises(InputError, match=r"a\.parquet is not a Parquet file"):
        read(path)
    pq.write_table(pa.table({"body": ["x"]}), path)
    with pytest.raises(InputError, match=r"none of the columns \['messages', .*'text'\]; it has \['body'\]"):
        read(path)
    pq.write_table(pa.table({"text": ["x" * 50] * 5000}), path, compression="none", use_dictionary=False)
    damaged = bytearray(path.read_bytes())
    damaged[4:400] = bytes(396)
    path.write_bytes(damaged)
    with pytest.raises(InputError, match=r"cannot read .*a\.parquet"):
        read(path)


def test_plain_text_is_one_document_until_it_is_large(tmp_path: Path) -> None:
    small, large, solid = tmp_path / "a.txt", tmp_path / "b.md", tmp_path / "c"
    small.write_text("\ufeffone\n\ntwo\n")
    assert texts(small) == ["one\n\ntwo"]
    paragraph = "word " * 1000
    large.write_text("\n\n".join([paragraph] * 20))
    parts = texts(large)
    assert len(parts) > 2 and max(len(part or "") for part in parts) <= TEXT_CHARS
    assert all(part == "\n\n".join([paragraph] * (len(part) // len(paragraph))) for part in parts if part)
    solid.write_text("x" * (2 * TEXT_CHARS + 7))
    assert [len(part or "") for part in texts(solid)] == [TEXT_CHARS, TEXT_CHARS, 7]
    small.write_text(" \n\n")
    assert texts(small) == []
    small.write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"a\.txt is not UTF-8"):
        read(small)


def test_html_is_not_cut_where_a_script_would_become_text(tmp_path: Path) -> None:
    page = tmp_path / "a.html"
    page.write_text("<script>" + "var x;\n\n" * TEXT_CHARS + "</script>seen")
    assert len(read(page, clean={"strip_html": True})) == 1


def test_globs_lists_and_files_are_sorted_and_read_once(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": name}])
    write_jsonl(tmp_path / "[x].jsonl", [{"text": "literal"}])
    (tmp_path / "folder.jsonl").mkdir()
    assert texts(f"{tmp_path}/[a-z].jsonl") == ["a", "b", "c"]
    assert texts([f"file://{tmp_path}/c.jsonl", f"{tmp_path}/?.jsonl"]) == ["a", "b", "c"]
    assert texts(f"{tmp_path}/[x].jsonl") == ["literal"]
    assert texts(f"{tmp_path}/*.jsonl", max_documents=2) == ["literal", "a"]


@pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip.compress), ("bz2", bz2.compress)])
def test_compressed_files_are_read(tmp_path: Path, suffix: str, compress: Any) -> None:
    path = tmp_path / f"a.jsonl.{suffix}"
    content = compress(b'{"text": "packed"}\n' * 5000)
    path.write_bytes(content)
    assert texts(path)[0] == "packed"
    path.write_bytes(content[:-12])
    with pytest.raises(InputError, match=rf"a\.jsonl\.{suffix}"):
        read(path)


def test_other_filesystems_are_read(s3_url: str) -> None:
    bucket = s3_url.rsplit("/", 1)[0]
    for name in ("b", "a"):
        with fsspec.open(f"{bucket}/in/{name}.jsonl", "w") as file:
            file.write(json.dumps({"text": name}))
    assert texts(f"{bucket}/in/*.jsonl") == ["a", "b"]
    with pytest.raises(InputError, match=rf"{bucket}/in/zz\.jsonl.*missing"):
        read(f"{bucket}/in/zz.jsonl")
    first, _ = resolve_inputs(source(f"{bucket}/in/*.jsonl"))
    assert first.url == f"{bucket}/in/a.jsonl" and first.size == 13 and "ETag" in first.stamp


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.jsonl: it is missing"):
        read(tmp_path / "nowhere.jsonl")
    with pytest.raises(InputError, match=r"\*\.jsonl matches no file; check data\.sources\[s\]\.path"):
        read(f"{tmp_path}/*.jsonl")
    with pytest.raises(InputError, match=r"is a folder; name its files, e\.g\. .*/\*\.jsonl"):
        read(tmp_path)
    with pytest.raises(InputError, match="cannot read nope://x/y"):
        read("nope://x/y")
    with pytest.raises(InputError, match=r"path is empty"):
        read([])
    with pytest.raises(InputError, match="embedded:general or embedded:domain"):
        read("embedded:nothing")


class DeniedFileSystem(MemoryFileSystem):
    """A store whose every object may be listed and not read."""

    protocol = "denied"

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return {"name": path, "type": "file", "size": 3}

    def _open(self, path: str, *_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, "Access Denied", path)


def test_no_permission_is_told() -> None:
    fsspec.register_implementation("denied", DeniedFileSystem, clobber=True)
    with pytest.raises(InputError, match=r"cannot read denied://me/a\.jsonl: permission denied"):
        read("denied://me/a.jsonl")


def test_embedded_corpora_are_sources() -> None:
    documents = read("embedded:general", max_documents=3)
    assert [document.where for document in documents] == [f"embedded:general:{n}" for n in (1, 2, 3)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.txt.gz"])
def test_files_are_streamed(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    line = json.dumps({"text": "streaming " * 100}) + "\n\n"
    with fsspec.open(str(path), "wt", compression="infer") as file:
        for _ in range(20_000):
            file.write(line)
    tracemalloc.start()
    size = sum(len(document.text or "") for document in read_documents(source(path), "fail", Counter()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 19_000_000
    assert peak < 2_000_000


def test_tokens_are_taken_as_they_are(tmp_path: Path) -> None:
    rows = [
        {"tokens": [1, 2, 3], "supervised": [False, False, True], "text": "not this"},
        {"tokens": None, "supervised": None, "text": "but this"},
        {"tokens": [1, 2], "supervised": [True], "text": "x"},
        {"tokens": [1, "2"], "supervised": [True, True], "text": "x"},
        {"tokens": [1, 2], "supervised": None, "text": "x"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    counters: Counter[str] = Counter()
    found = list(read_documents(SourceConfig(name="s", path=str(path), tokens_field="tokens"), "skip", counters))
    assert [(d.tokens, d.supervised, d.text) for d in found] == [
        ((1, 2, 3), (False, False, True), None),
        (None, (), "but this"),
    ]
    assert counters["bad_rows"] == 3
    plain = list(read_documents(SourceConfig(name="s", path=str(path)), "fail", counters))
    assert [document.tokens for document in plain] == [None] * 5
    with pytest.raises(InputError, match=r"rows\.jsonl:3: 'tokens' holds 2 ids, 'supervised' 1 values"):
        list(read_documents(SourceConfig(name="s", path=str(path), tokens_field="tokens"), "fail", counters))
    table = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"tokens": [[5, 6]], "supervised": [[False, True]]}), table)
    (document,) = read_documents(SourceConfig(name="s", path=str(table), tokens_field="tokens"), "fail", counters)
    assert (document.tokens, document.supervised) == ((5, 6), (False, True))


def test_a_setting_that_is_not_used_changes_no_key(tmp_path: Path) -> None:
    assert "tokens_field" not in SourceConfig(name="s", path="x").model_dump(mode="json")
