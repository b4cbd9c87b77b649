"""Writes completions as Parquet: the kept ones, the filtered ones with the filter's name, and the counts of both."""

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from storage.object_store import Store
from storage.tokenizer import Tokenizer
from workers.api.answers import AnswerStore, request_key
from workers.api.config import GenerateConfig
from workers.api.filters import Completion, Filters, split_reasoning
from workers.api.generated import GeneratedTokens, TokenNames
from workers.api.generation import Author, chat_request
from workers.api.prompts import Prompt, prompt_ids
from workers.api.reply import CountTokens, Reply

SUMMARY_KEY = "generate.json"
PART_ROWS = 2000

_MESSAGE = pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())])
SCHEMA = pa.schema(
    [
        pa.field("completion_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("completion", pa.string(), nullable=False),
        pa.field("messages", pa.list_(_MESSAGE), nullable=False),
        pa.field("reasoning", pa.string()),
        pa.field("answer", pa.string(), nullable=False),
        pa.field("reference", pa.string()),
        pa.field("sample", pa.int32(), nullable=False),
        pa.field("model", pa.string(), nullable=False),
        pa.field("endpoint", pa.string(), nullable=False),
        pa.field("temperature", pa.float32(), nullable=False),
        pa.field("top_p", pa.float32(), nullable=False),
        pa.field("finish_reason", pa.string()),
        pa.field("prompt_tokens", pa.int32()),
        pa.field("completion_tokens", pa.int32()),
        pa.field("filtered_by", pa.string()),
    ]
)
TOKEN_FIELDS = [pa.field("tokens", pa.list_(pa.int32())), pa.field("supervised", pa.list_(pa.bool_()))]
"""With `generate.logprobs`: prompt and completion as the teacher's own tokens, null where one has no exact name."""


def write_completions(
    store: Store,
    prompts: Iterable[Prompt],
    config: GenerateConfig,
    author: Author,
    answers: AnswerStore,
    count: CountTokens | None = None,
    tokenizer: Tokenizer | None = None,
) -> dict[str, Any]:
    """Write `kept-NNNNN.parquet`, `filtered-NNNNN.parquet` and `generate.json` from the answers on disk.

    `tokenizer`, the teacher's, is needed with `generate.logprobs`. Returns the summary: `{kept, filtered: {filter: n},
    set_aside: {reason: n}, missing}`.
    """
    filters = Filters(config.filters)
    names = TokenNames(tokenizer) if config.logprobs is not None and tokenizer is not None else None
    schema = SCHEMA if names is None else pa.schema([*SCHEMA, *TOKEN_FIELDS])
    kept, dropped = _Parts(store, "kept", schema), _Parts(store, "filtered", schema)
    reasons: Counter[str] = Counter()
    aside: Counter[str] = Counter()
    missing = 0
    for prompt in prompts:
        request = chat_request(prompt, config, author.model, count)
        filters.next_prompt()
        for index in range(config.samples):
            key = request_key(request, author.version, index)
            answer = answers.get(key)
            if answer is None:
                missing += 1
            elif answer.reply is None:
                aside[str(answer.set_aside)] += 1
            else:
                row, reason = _row(key, prompt, index, answer.reply, config, author, filters)
                if names is not None and tokenizer is not None:
                    row |= _tokens(prompt, answer.reply, names, tokenizer)
                    if row["tokens"] is None and reason is None:
                        row["filtered_by"] = reason = "tokens"
                (kept if reason is None else dropped).add(row)
                reasons.update([reason] if reason is not None else [])
    kept.close()
    dropped.close()
    summary = {"kept": kept.rows, "filtered": dict(reasons), "set_aside": dict(aside), "missing": missing}
    store.write(SUMMARY_KEY, json.dumps(summary, indent=1).encode() + b"\n")
    return summary


def _row(
    key: bytes, prompt: Prompt, index: int, reply: Reply, config: GenerateConfig, author: Author, filters: Filters
) -> tuple[dict[str, Any], str | None]:
    answer, reasoning = split_reasoning(_encodable(reply.text), _encodable(reply.reasoning))
    reason = filters.reason(Completion(answer, reasoning, reply.finish_reason), prompt.reference, prompt.row)
    text = answer
    if reasoning:
        text = config.completion_format.replace("{reasoning}", reasoning).replace("{answer}", answer)
    said = [{"role": str(m["role"]), "content": str(m["content"])} for m in prompt.messages]
    row = {
        "completion_id": key.hex(),
        "prompt": prompt.text,
        "completion": text,
        "messages": [*said, {"role": "assistant", "content": text}],
        "reasoning": reasoning,
        "answer": answer,
        "reference": None if prompt.reference is None else str(prompt.reference),
        "sample": index,
        "model": author.model,
        "endpoint": author.place,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "finish_reason": reply.finish_reason,
        "prompt_tokens": reply.usage.input if reply.usage is not None else None,
        "completion_tokens": reply.usage.output if reply.usage is not None else None,
        "filtered_by": reason,
    }
    return row, reason


def _tokens(prompt: Prompt, reply: Reply, names: TokenNames, tokenizer: Tokenizer) -> dict[str, Any]:
    generated = GeneratedTokens.of(reply, names)
    if generated is None:
        return {"tokens": None, "supervised": None}
    before = prompt_ids(prompt, tokenizer).tolist()
    supervised = [False] * len(before) + [True] * len(generated.ids)
    return {"tokens": [*before, *generated.ids], "supervised": supervised}


class _Parts:
    """Parquet files of a bounded number of rows, each written whole; older ones beyond the last are removed."""

    def __init__(self, store: Store, name: str, schema: pa.Schema) -> None:
        self._store, self._name, self._schema = store, name, schema
        self._pending: list[dict[str, Any]] = []
        self._written: list[str] = []
        self.rows = 0

    def add(self, row: dict[str, Any]) -> None:
        self._pending.append(row)
        self.rows += 1
        if len(self._pending) >= PART_ROWS:
            self._flush()

    def close(self) -> None:
        if self._pending:
            self._flush()
        for key in self._store.list(f"{self._name}-"):
            if key not in self._written:
                self._store.delete(key)

    def _flush(self) -> None:
        key = f"{self._name}-{len(self._written):05d}.parquet"
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(self._pending, self._schema), sink, compression="zstd")
        self._store.write(key, sink.getvalue().to_pybytes())
        self._written.append(key)
        self._pending = []


def _encodable(text: Any) -> Any:
    """Parquet text is UTF-8: half a surrogate pair, which JSON may hold, becomes a question mark."""
    return text.encode("utf-8", "replace").decode() if isinstance(text, str) else text
