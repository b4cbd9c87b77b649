"""Prompts from JSONL and Parquet files, read as a stream."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.config import SourceConfig
from storage.errors import InputError
from storage.inputs import InputFile, open_input, reading, resolve_inputs
from storage.samples import Int32Array
from storage.tokenizer import Tokenizer
from workers.api.config import GenerateConfig

_PARQUET_ROWS = 256


@dataclass(frozen=True)
class Prompt:
    """What the teacher is asked."""

    messages: tuple[Mapping[str, Any], ...]
    reference: Any = None
    row: Mapping[str, Any] = field(default_factory=dict)
    """All fields of the prompt's row, for a checker of one's own."""

    @property
    def text(self) -> str:
        """The last user message."""
        return next((str(m["content"]) for m in reversed(self.messages) if m["role"] == "user"), "")


def read_prompts(config: GenerateConfig) -> Iterator[Prompt]:
    """Yield the prompts in the order of the sorted files, at most `max_prompts`.

    Raises InputError, naming file and line, when there are none or a row holds no prompt.
    """
    if not config.prompts:
        raise InputError("generate.prompts is not set; name a JSONL or Parquet file with a field `prompt`")
    source = SourceConfig(name="prompts", path=config.prompts)
    rows = (row for file in resolve_inputs(source) for row in _rows(file))
    prompts = (_prompt(where, row, config) for where, row in rows)
    return islice(prompts, config.max_prompts)


def prompt_ids(prompt: Prompt, tokenizer: Tokenizer) -> Int32Array:
    """Return the tokens that a prompt is for a model: under the chat template, or as plain text where there is none.

    Raises:
        InputError: there is no template, and the prompt is more than one text.
    """
    if tokenizer.chat_template is not None:
        return tokenizer.encode_batch([tokenizer.render_chat(prompt.messages, add_generation_prompt=True)])[0]
    if [message["role"] for message in prompt.messages] != ["user"]:
        raise InputError(
            f"the tokenizer in {tokenizer.folder} has no chat template, so a prompt of several messages "
            f"({', '.join(str(message['role']) for message in prompt.messages)}) cannot be put to it; set "
            "data.chat_template, or give prompts as plain text, without generate.system"
        )
    text, bos = str(prompt.messages[0]["content"]), tokenizer.bos_id
    ids = tokenizer.encode_batch([text])[0]
    return ids if bos is None else np.concatenate([np.array([bos], dtype=np.int32), ids])


def _rows(file: InputFile) -> Iterator[tuple[str, Any]]:
    if file.format not in {"jsonl", "parquet"}:
        raise InputError(f"generate.prompts: {file.shown} must be JSONL or Parquet (.jsonl, .json, .parquet)")
    with reading(file.shown), open_input(file, compression="infer" if file.format == "jsonl" else None) as raw:
        if file.format == "jsonl":
            for number, line in enumerate(raw, start=1):
                if line.strip():
                    yield f"{file.shown}:{number}", _json(line, f"{file.shown}:{number}")
            return
        try:
            parquet = pq.ParquetFile(raw)
        except pa.ArrowInvalid as error:
            raise InputError(f"{file.shown} is not a Parquet file, or is damaged: {error}") from error
        number = 0
        for batch in parquet.iter_batches(batch_size=_PARQUET_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield f"{file.shown}:{number}", row


def _json(line: bytes, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not a JSON object on one line ({error})") from error


def _prompt(where: str, row: Any, config: GenerateConfig) -> Prompt:
    row = row if isinstance(row, dict) else {}
    messages = row.get(config.messages_field)
    text = row.get(config.prompt_field)
    if isinstance(messages, list) and messages:
        if not all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in messages):
            raise InputError(f"{where}: {config.messages_field!r} must be a list of messages with role and content")
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
    elif isinstance(text, str) and text:
        messages = [{"role": "user", "content": text}]
    else:
        raise InputError(
            f"{where}: no prompt in {config.prompt_field!r} nor messages in {config.messages_field!r}; it has "
            f"{sorted(row)[:12]}"
        )
    if config.system is not None:
        messages = [{"role": "system", "content": config.system}, *messages]
    return Prompt(tuple(messages), row.get(config.reference_field), row)
