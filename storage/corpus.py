"""Documents from corpora: plain text, JSONL and Parquet rows, read as a stream from any fsspec URL."""

import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from storage.config import SourceConfig
from storage.embedded_text import EMBEDDED_PREFIX, embedded_documents
from storage.errors import InputError
from storage.inputs import InputFile, open_input, reading, resolve_inputs
from storage.samples import NO_LABEL
from storage.splitting import blocks_of, group_blocks

TEXT_CHARS = 32_768
"""Longest document of a plain-text file; a longer file is split at blank lines."""
PAGE_CHARS = 4_194_304
"""The same where HTML is stripped: markup cut in two could not be told from text."""
LINE_BYTES = 64 << 20
"""Longest line of a JSONL file."""
READ_BYTES = 1 << 20
"""Bytes of a JSONL file read at a time."""
SUPERVISED_FIELD = "supervised"
"""Beside a source's `tokens_field`: which of the tokens are to be learnt."""
PARQUET_ROWS = 256
"""Rows of a Parquet file held in memory at a time."""

OnBadRow = Literal["fail", "skip"]
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Document:
    """One document: `text`, chat `messages`, a `prompt` with its `completion`, or `tokens`; the others are None."""

    where: str
    """File and line or row, for messages."""
    text: str | None = None
    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    completion: str | None = None
    tokens: tuple[int, ...] | None = None
    supervised: tuple[bool, ...] = ()
    """Of `tokens`: which are to be learnt."""
    label: int | tuple[int, ...] | None = None
    """Class of the text, or of each of `tokens`; None where nobody says."""


def num_chars(document: Document) -> int:
    """Return how much text a document holds, in characters."""
    strings = [document.text, document.prompt, document.completion]
    strings += [value for message in document.messages or () for value in message.values() if isinstance(value, str)]
    return sum(len(text) for text in strings if text is not None) + len(document.tokens or ())


class BadRowError(Exception):
    """A row that holds no usable document; the message says why."""


def read_documents(source: SourceConfig, on_bad_row: OnBadRow, counters: Counter[str]) -> Iterator[Document]:
    """Yield the documents of a source in the order of its sorted files, at most `source.max_documents`.

    Args:
        source: which files, fields and format; cleaning is not applied here.
        on_bad_row: `fail` raises at the first malformed row, `skip` counts it.
        counters: `bad_rows` is raised by one for each row left out.

    Raises:
        InputError: a file is missing, unreadable or not of its format, or a row is malformed (file and line named).
    """
    documents = (document for file in resolve_inputs(source) for document in _read(file, source, on_bad_row, counters))
    return islice(documents, source.max_documents)


def refuse_row(where: str, reason: str, on_bad_row: OnBadRow, counters: Counter[str]) -> None:
    """Do with a bad row what the config says: raise an InputError that names it, or count it."""
    if on_bad_row == "fail":
        raise InputError(f"{where}: {reason}; mend the row, or set data.on_bad_row=skip to leave such rows out")
    counters["bad_rows"] += 1


def _read(file: InputFile, source: SourceConfig, on_bad_row: OnBadRow, counters: Counter[str]) -> Iterator[Document]:
    if file.format == "embedded":
        for number, text in enumerate(embedded_documents(file.url.removeprefix(EMBEDDED_PREFIX)), start=1):
            yield Document(f"{file.url}:{number}", text=text)
        return
    if file.format == "text":
        yield from _read_text(file, PAGE_CHARS if source.clean.strip_html else TEXT_CHARS)
        return
    rows = _parquet_rows(file, source) if file.format == "parquet" else _json_rows(file)
    for where, row in rows:
        try:
            document = _document(where, row(), source)
        except BadRowError as problem:
            refuse_row(where, str(problem), on_bad_row, counters)
        else:
            yield document


def _read_text(file: InputFile, limit_chars: int) -> Iterator[Document]:
    with reading(file.shown), open_input(file) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as text:
        lines = iter(lambda: text.readline(limit_chars), "")
        for number, document in enumerate(group_blocks(blocks_of(lines, limit_chars), limit_chars), start=1):
            yield Document(f"{file.shown} (part {number})", text=document)


RowSource = tuple[str, Callable[[], Any]]


def _json_rows(file: InputFile) -> Iterator[RowSource]:
    """Yield (file:line, parser) for each line that is not blank."""
    with reading(file.shown), open_input(file) as raw, io.BufferedReader(raw, READ_BYTES) as lines:
        for number, line in enumerate(iter(lambda: lines.readline(LINE_BYTES), b""), start=1):
            if len(line) == LINE_BYTES and not line.endswith(b"\n"):
                raise InputError(f"{file.shown}:{number}: longer than {LINE_BYTES} bytes; one JSON object per line")
            if line.strip():
                yield f"{file.shown}:{number}", partial(_parse_json, line)


def _parse_json(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRowError(f"not UTF-8 (byte {error.start} of the line)") from error
    except json.JSONDecodeError as error:
        raise BadRowError(f"not a JSON object on one line ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise BadRowError(f"not usable JSON ({error})") from error


def _parquet_rows(file: InputFile, source: SourceConfig) -> Iterator[RowSource]:
    """Yield (file:row, getter) for each row, reading only the columns that are used."""
    with reading(file.shown), open_input(file, compression=None) as raw:
        try:
            parquet = pq.ParquetFile(raw)
        except pa.ArrowInvalid as error:
            raise InputError(f"{file.shown} is not a Parquet file, or is damaged: {error}") from error
        columns = [name for name in _fields(source) if name in parquet.schema_arrow.names]
        if not columns:
            raise InputError(
                f"{file.shown} has none of the columns {_fields(source)}; it has {parquet.schema_arrow.names}"
            )
        number = 0
        for batch in parquet.iter_batches(batch_size=PARQUET_ROWS, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield f"{file.shown}:{number}", partial(dict, row)


def _fields(source: SourceConfig) -> list[str]:
    fields = [source.messages_field, source.prompt_field, source.completion_field, source.text_field]
    if source.tokens_field is not None:
        fields += [source.tokens_field, SUPERVISED_FIELD]
    return fields if source.label_field is None else [*fields, source.label_field]


def _document(where: str, row: Any, source: SourceConfig) -> Document:
    """Return a row's document, with its label where there is one."""
    if not isinstance(row, dict):
        raise BadRowError(f"expected a JSON object, found {type(row).__name__}")
    document = _content(where, row, source)
    if source.label_field is None or row.get(source.label_field) is None:
        return document
    return replace(document, label=_label(row[source.label_field], document, source.label_field))


def _label(value: Any, document: Document, name: str) -> int | tuple[int, ...]:
    each = value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and (i >= 0 or i == NO_LABEL) for i in each):
        raise BadRowError(f"{name!r} must be the number of a class, from 0 on, or {NO_LABEL} for none; found {value!r}")
    if not isinstance(value, list):
        return int(value)
    if document.tokens is None or len(value) != len(document.tokens):
        there = "no token ids" if document.tokens is None else f"{len(document.tokens)} token ids"
        raise BadRowError(f"{name!r} holds {len(value)} classes beside {there}; a list needs one for each")
    return tuple(value)


def _content(where: str, row: Mapping[str, Any], source: SourceConfig) -> Document:
    """Return what a row says: its tokens, else messages, else prompt and completion, else text."""
    if source.tokens_field is not None and row.get(source.tokens_field) is not None:
        return _tokens(where, row[source.tokens_field], row.get(SUPERVISED_FIELD), source.tokens_field)
    if row.get(source.messages_field) is not None:
        return Document(where, messages=_messages(row[source.messages_field], source.messages_field))
    if row.get(source.completion_field) is not None and row.get(source.prompt_field) is not None:
        prompt, completion = (_string(row, name) for name in (source.prompt_field, source.completion_field))
        return Document(where, prompt=prompt, completion=completion)
    if row.get(source.text_field) is not None:
        return Document(where, text=_string(row, source.text_field))
    raise BadRowError(
        f"no field {source.text_field!r}, {source.messages_field!r}, or {source.prompt_field!r} with "
        f"{source.completion_field!r}; it has {sorted(row)[:12]}"
    )


def _tokens(where: str, tokens: Any, supervised: Any, name: str) -> Document:
    if not isinstance(tokens, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in tokens):
        raise BadRowError(f"{name!r} must be a list of token ids, found {_kind(tokens)}")
    if not isinstance(supervised, list) or not all(isinstance(flag, bool) for flag in supervised):
        raise BadRowError(f"{SUPERVISED_FIELD!r} must be a list of true and false beside {name!r}")
    if len(tokens) != len(supervised):
        raise BadRowError(f"{name!r} holds {len(tokens)} ids, {SUPERVISED_FIELD!r} {len(supervised)} values")
    return Document(where, tokens=tuple(tokens), supervised=tuple(supervised))


def _messages(value: Any, name: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise BadRowError(f"{name!r} must be a list of messages, found {_kind(value)}")
    messages = []
    for number, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRowError(f"{name}[{number}] must be an object with a role and a content")
        kept = {key: item for key, item in message.items() if item is not None}
        if not isinstance(kept.get("content", "" if kept.get("tool_calls") else None), str):
            raise BadRowError(f"{name}[{number}].content must be text, found {_kind(message.get('content'))}")
        _check_unicode(json.dumps(kept, ensure_ascii=False, default=str), name)
        messages.append(kept)
    return tuple(messages)


def _string(row: Mapping[str, Any], name: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise BadRowError(f"{name!r} must be text, found {_kind(value)}")
    _check_unicode(value, name)
    return value


def _check_unicode(text: str, name: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRowError(f"{name!r} holds half of a surrogate pair at character {error.start}") from error


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"an empty {type(value).__name__}" if value == [] else type(value).__name__
