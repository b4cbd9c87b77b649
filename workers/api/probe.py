"""Finds out by asking what an endpoint gives: token ids in and out, log-probabilities, reasoning, counts of tokens.

Each question is an ordinary request, reserved and settled. What was found is kept with the dataset.
"""

import json
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from storage.errors import InputError
from storage.object_store import Store
from storage.settings import Settings
from storage.tokenizer import Tokenizer
from workers.api.client import ApiClient, GivenUpError, RefusedRequestError, SetAsideError
from workers.api.config import ApiConfig, Signal
from workers.api.reply import Reply, Request
from workers.api.scoring import ScoringMethod, scored_positions, scoring_request

PROBE_KEY = "probe.json"
TEXT = "The quick brown fox jumps over the lazy dog, and 12 more come."
SIGNALS: tuple[Signal, ...] = ("prompt_scoring", "generation_logprobs", "text")
_CHAT_BOUND = 256
_MISMATCHES = 0.2
"""Share of a text's tokens that an endpoint may spell otherwise: parts of characters have no one spelling."""


class Capabilities(Settings):
    """What an endpoint gives."""

    base_url: str
    model: str
    scoring: ScoringMethod | None = None
    """How given tokens are scored: vLLM's `prompt_logprobs`, or `echo` with `logprobs`."""
    scored_entries: int = Field(default=0, ge=0)
    """Entries for each token of a prompt, as many as were asked for at most."""
    top_logprobs: int = Field(default=0, ge=0)
    """Entries for each generated token."""
    returns_ids: bool = False
    """Whether tokens come back as ids rather than strings."""
    reasoning_field: bool = False
    """Whether reasoning comes apart from the answer."""
    counts_usage: bool = False
    """Whether usage is reported and can be believed."""
    context_tokens: int | None = None
    """Most tokens of prompt and completion, where the endpoint says so."""
    steps_down: list[str] = Field(default_factory=list)
    """What it does not give, and what is used instead."""

    @property
    def signal(self) -> Signal:
        """The richest thing that it gives."""
        if self.scoring is not None:
            return "prompt_scoring"
        return "generation_logprobs" if self.top_logprobs else "text"


def kept_probe(store: Store, api: ApiConfig) -> Capabilities | None:
    """Return what an earlier probe of the same endpoint found, or None."""
    raw = store.read_if_exists(PROBE_KEY)
    if raw is None:
        return None
    found = Capabilities.model_validate(json.loads(raw))
    return found if (found.base_url, found.model) == (api.base_url, api.model) else None


def keep_probe(store: Store, found: Capabilities) -> None:
    """Keep a probe with the dataset."""
    store.write(PROBE_KEY, found.model_dump_json(indent=1).encode() + b"\n")


def require_signal(found: Capabilities, required: Signal | None) -> None:
    """Raise InputError when an endpoint gives less than `teacher.require` says."""
    if required is not None and SIGNALS.index(found.signal) > SIGNALS.index(required):
        reasons = "; ".join(found.steps_down)
        raise InputError(
            f"teacher.require is {required}, and {found.base_url}, model {found.model} gives {found.signal} at best "
            f"({reasons}); use another endpoint, or lower teacher.require"
        )


async def probe(client: ApiClient, tokenizer: Tokenizer, entries: int) -> Capabilities:
    """Ask an endpoint what it gives, for `entries` entries per position.

    Raises:
        InputError: key or model are wrong, or its tokens are not those of the teacher's tokenizer.
        BudgetError: a cap.
    """
    api = client.api
    assert api.base_url is not None and api.model is not None
    models = await client.models()
    context = next((m.get("max_model_len") for m in models if m.get("id") == api.model), None)
    facts: dict[str, Any] = {"base_url": api.base_url, "model": api.model, "context_tokens": context}
    steps: list[str] = []
    ids = tokenizer.encode_with_spans(TEXT)[0].tolist()
    for method in ("prompt_logprobs", "echo"):
        reply, why = await _try(client, scoring_request(ids, api.model, method, entries))
        if reply is not None:
            _check_tokens(reply, method, ids, tokenizer, api)
            return Capabilities(
                **facts,
                scoring=method,
                scored_entries=entries,
                returns_ids=True,
                counts_usage=reply.usage is not None,
                steps_down=steps,
            )
        steps.append(f"no scoring of prompts by {method}: {why}")
    reply, entries_given = None, 0
    for wanted in sorted({n for n in (entries, 20, 5, 1) if n <= min(entries, 20)}, reverse=True):
        reply, why = await _try(client, _chat(api.model, wanted))
        if reply is not None and _logprobs(reply):
            entries_given = wanted
            break
        steps.append(f"no {wanted} log-probabilities of generated tokens: {why or 'none came back'}")
    if reply is None:
        reply, why = await _try(client, _chat(api.model, 0))
        if reply is None:
            raise InputError(f"{api.base_url}, model {api.model} answers nothing that was asked: {why}")
    return Capabilities(
        **facts,
        top_logprobs=entries_given,
        returns_ids=any(str(item.get("token", "")).startswith("token_id:") for item in _logprobs(reply)),
        reasoning_field=reply.reasoning is not None,
        counts_usage=reply.usage is not None,
        steps_down=steps,
    )


async def _try(client: ApiClient, request: Request) -> tuple[Reply | None, str]:
    try:
        return await client.ask(request), ""
    except (RefusedRequestError, SetAsideError, GivenUpError) as error:
        return None, str(error)


def _chat(model: str, top_logprobs: int) -> Request:
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": "Say yes."}],
        "max_tokens": 16,
        "temperature": 0.0,
    }
    if top_logprobs:
        body |= {"logprobs": True, "top_logprobs": top_logprobs}
    return Request("/chat/completions", body, most_input=_CHAT_BOUND, most_output=16)


def _logprobs(reply: Reply) -> Sequence[dict[str, Any]]:
    content = reply.logprobs.get("content") if isinstance(reply.logprobs, dict) else None
    return content if isinstance(content, list) else []


def _check_tokens(
    reply: Reply, method: Literal["prompt_logprobs", "echo"], ids: list[int], tokenizer: Tokenizer, api: ApiConfig
) -> None:
    """Refuse an endpoint whose ids mean other tokens, as far as its answer shows."""
    spelled = scored_positions(reply, method, ids, 1).spelled
    wrong = [(i, text) for i, text in spelled.items() if text.strip() != tokenizer.decode([i]).strip()]
    if len(wrong) > _MISMATCHES * max(len(spelled), 1):
        token, text = wrong[0]
        raise InputError(
            f"{api.base_url}, model {api.model} has another tokenizer than teacher.name: token {token} is {text!r}, "
            f"here it is {tokenizer.decode([token])!r}; name the folder or hub name of the model it serves"
        )
