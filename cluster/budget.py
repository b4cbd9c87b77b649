"""The money side of a run with a teacher behind an API: what must be right before the first request."""

from cluster.config import RunConfig
from storage.errors import InputError
from storage.tokenizer import Tokenizer
from workers.api.reply import CountTokens
from workers.ledger.ledger import Standing
from workers.model_folder import resolve_model


def check_api(config: RunConfig) -> None:
    """Check endpoint, prices and caps against each other; InputError for what could overspend or cannot be kept."""
    api, budget, cache = config.teacher.api, config.budget, config.cache
    for name in ("base_url", "model"):
        if getattr(api, name) is None:
            raise InputError(f"teacher.api.{name} is not set; a teacher behind an API needs it")
    if config.teacher.kind != "local" and (cache.kind not in {"topk", "text"} or cache.hidden):
        raise InputError(
            f"cache.kind {cache.kind} needs the teacher's whole distribution, and hidden states need its weights; an "
            "endpoint gives its best entries at most: set cache.kind to topk (or text) and cache.hidden to []"
        )
    if config.teacher.kind == "mixed" and (cache.kind == "text" or cache.attention):
        raise InputError("teacher.kind mixed scores text here and through an endpoint: set cache.kind to topk alone")
    money = budget.cap is not None or budget.dataset.cap is not None
    if money and api.prices is None:
        raise InputError(
            "budget.cap is a cap in money, and teacher.api.prices is not set: without prices nobody can tell what an "
            "attempt may cost. Set input and output per million tokens from the provider's price list, or cap with "
            "budget.cap_tokens or budget.cap_requests"
        )
    counts = (budget.cap_tokens, budget.cap_requests, budget.dataset.cap_tokens, budget.dataset.cap_requests)
    if api.prices is not None and not money and all(count is None for count in counts):
        raise InputError(
            "teacher.api.prices says that the teacher costs money, and nothing is capped; set budget.cap (in "
            f"{budget.currency}), budget.cap_tokens or budget.cap_requests"
        )


def token_counter(config: RunConfig) -> CountTokens | None:
    """Return a counter by the teacher's tokenizer, or None where `teacher.name` names none."""
    if config.teacher.name == "embedded":
        return None
    folder = resolve_model(config.teacher.name, config.teacher.revision, weights=False)
    tokenizer = Tokenizer.load(folder, config.data.chat_template)
    return lambda text: len(tokenizer.encode_with_spans(text)[0])


def standing_text(standing: Standing, done: int) -> str:
    """Return spent, reserved and left, and what the rest will buy at the price so far."""
    parts = [f"{standing.spent:.4g} {standing.currency} spent", f"{standing.reserved:.4g} reserved"]
    if standing.left is not None:
        parts.append(f"{standing.left:.4g} left")
        if done and standing.spent > 0:
            parts.append(f"buys {standing.left / (standing.spent / done):,.0f} more")
    return ", ".join(parts)
