"""What a teacher behind an API would cost, before anything is asked."""

from typing import Any

from cluster.budget import check_api, token_counter
from cluster.config import RunConfig
from storage.object_store import Store
from workers.api.answers import AnswerStore
from workers.api.generation import Author, keyed_requests
from workers.api.prices import Prices
from workers.api.prompts import read_prompts
from workers.ledger.amounts import Amount

ASSUMED_OUTPUT = 0.5
"""Share of `generate.max_tokens` that a completion is taken to have while none is on disk."""


def api_plan(config: RunConfig, missing_samples: int, missing_tokens: int) -> dict[str, Any]:
    """Return what capture and generation would ask and cost, as JSON values; money in units of the currency.

    `expected` takes every request as answered at its first attempt, at the standard price, with nothing cached; `worst`
    as answered at the dearest hour with `max_tokens` each. Repeated attempts come on top of both; the caps bound all.

    Raises InputError as `capture` and `generate` would: endpoint, prices and caps do not fit, prompts are wrong.
    """
    check_api(config)
    prices = Prices(config.teacher.api.prices)
    parts: dict[str, dict[str, Any]] = {}
    if config.cache.kind != "text" and missing_samples:
        expected = prices.expected(missing_tokens, missing_samples, missing_samples)
        worst = prices.worst(missing_tokens, missing_samples)
        parts["capture"] = _facts(missing_samples, 0, expected, worst)
    if config.generate.prompts:
        batch = config.teacher.api.batch
        of_batch = prices if batch is None else Prices(config.teacher.api.prices, batch.price)
        parts["generate"] = _generation(config, of_batch)
    return {
        "currency": config.budget.currency,
        "expected": round(sum(part["expected"] for part in parts.values()), 6),
        "worst": round(sum(part["worst"] for part in parts.values()), 6),
        "cap": config.budget.cap,
        "priced": config.teacher.api.prices is not None,
        "parts": parts,
    }


def awaits_completions(config: RunConfig) -> bool:
    """Tell whether a source of the run is what `generate` will write and has not yet: only its cost can be told."""
    own = config.generate
    if not own.prompts or own.url is None or config.teacher.kind == "mixed":
        return False
    paths = [path for s in config.data.sources for path in ([s.path] if isinstance(s.path, str) else s.path)]
    waits = any(path.startswith(f"{own.url.rstrip('/')}/") for path in paths)
    return waits and not any(key.startswith("kept-") for key in Store(own.url).list())


def local_generation(config: RunConfig) -> dict[str, Any]:
    """Return what a teacher that is run here would write: `{prompts, completions, most_tokens}`."""
    own = config.generate
    prompts = sum(1 for _ in read_prompts(own))
    completions = prompts * own.samples
    return {"prompts": prompts, "completions": completions, "most_tokens": completions * own.max_tokens}


def _generation(config: RunConfig, prices: Prices) -> dict[str, Any]:
    own, api = config.generate, config.teacher.api
    count = token_counter(config)
    answers = AnswerStore(Store(config.cache.url))
    requests = reused = sent = most_sent = 0
    for key, request in keyed_requests(read_prompts(own), own, Author.of_api(api), count):
        if key in answers:
            reused += 1
            continue
        requests += 1
        sent += request.least_input if count is not None else request.most_input
        most_sent += request.most_input
    written = round(requests * own.max_tokens * ASSUMED_OUTPUT)
    worst = prices.worst(most_sent, requests * own.max_tokens)
    return _facts(requests, reused, prices.expected(sent, written, requests), worst)


def _facts(requests: int, reused: int, expected: Amount, worst: Amount) -> dict[str, Any]:
    return {
        "requests": requests,
        "reused": reused,
        "expected_tokens": expected.tokens,
        "expected": expected.currency,
        "worst_tokens": worst.tokens,
        "worst": worst.currency,
    }
