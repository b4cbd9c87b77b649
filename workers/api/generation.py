"""Asks for completions of prompts, as many at once as the endpoint takes, with memory that does not grow with them.

Asking and writing are two passes. The first brings every answer on disk; it may end anywhere, by a cap or a crash. The
second reads the prompts again, in order, and writes what there is: the same prompts and answers give the same files.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self

from storage.errors import BudgetError
from workers.api.answers import Answer, AnswerStore, request_key
from workers.api.bounds import chat_bounds
from workers.api.client import ApiClient, GivenUpError, SetAsideError
from workers.api.config import ApiConfig, GenerateConfig
from workers.api.prompts import Prompt
from workers.api.reply import CountTokens, Reply, Request


@dataclass
class AskResult:
    """What a pass of asking came to."""

    requests: int = 0
    """Completions wanted."""
    reused: int = 0
    """Of these, on disk before."""
    answered: int = 0
    set_aside: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    """Reason → requests that got no answer; a later run asks them again."""
    stopped: BudgetError | None = None
    """The cap that ended the pass."""


@dataclass(frozen=True)
class Author:
    """Who writes completions."""

    model: str
    """As the completions' rows name it."""
    place: str
    """Likewise: the endpoint, or `local`."""
    version: str
    """What decides its answers besides the request itself."""

    @classmethod
    def of_api(cls, api: ApiConfig) -> Self:
        """Return the model behind an endpoint."""
        return cls(str(api.model), str(api.base_url), endpoint_name(api))

    @classmethod
    def of_local(cls, name: str, weights: str, precision: str) -> Self:
        """Return a model that is run here; `weights` is their digest."""
        return cls(name, "local", f"local {weights} {precision}")


def chat_request(prompt: Prompt, config: GenerateConfig, model: str, count: CountTokens | None) -> Request:
    """Return the request for one completion of a prompt."""
    bounds = chat_bounds(prompt.messages, count)
    body: dict[str, Any] = {
        "model": model,
        "messages": [dict(message) for message in prompt.messages],
        "max_tokens": config.max_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
    }
    if config.stop:
        body["stop"] = list(config.stop)
    if config.logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": config.logprobs}
    wants = config.logprobs is not None
    return Request("/chat/completions", body, bounds.most, config.max_tokens, bounds.least, wants_logprobs=wants)


def endpoint_name(api: ApiConfig) -> str:
    """Return what of an endpoint decides its answers, besides the request itself."""
    return f"{api.base_url} {sorted(api.extra_body.items())}"


def keyed_requests(
    prompts: Iterable[Prompt], config: GenerateConfig, author: Author, count: CountTokens | None
) -> Iterator[tuple[bytes, Request]]:
    """Yield key and request of every completion wanted, in order."""
    for prompt in prompts:
        request = chat_request(prompt, config, author.model, count)
        for index in range(config.samples):
            yield request_key(request, author.version, index), request


async def ask_all(
    keyed: Iterator[tuple[bytes, Request]],
    client: ApiClient,
    answers: AnswerStore,
    on_progress: Callable[[AskResult], None] | None = None,
) -> AskResult:
    """Bring the answers of all requests on disk; what is there already is not asked again.

    A cap ends the pass: requests in flight are waited for, `stopped` says why. Raises what makes every request fail.
    """
    result = AskResult()
    asked: set[bytes] = set()

    async def work() -> None:
        # The iterator is shared: each worker takes the next request when it is free, so that few exist at a time.
        for key, request in keyed:
            result.requests += 1
            if key in answers or key in asked:
                result.reused += 1
                continue
            asked.add(key)
            try:
                await _ask_one(key, request, client, answers, result)
            except BudgetError as error:
                result.stopped = result.stopped or error
            finally:
                asked.discard(key)
            if on_progress is not None:
                on_progress(result)
            if result.stopped is not None:
                return

    # Twice the places in flight: some of the workers wait for the disk.
    async with asyncio.TaskGroup() as group:
        for _ in range(2 * client.api.concurrency):
            group.create_task(work())
    return result


async def _ask_one(key: bytes, request: Request, client: ApiClient, answers: AnswerStore, result: AskResult) -> None:
    async def keep(reply: Reply) -> None:
        await answers.put(key, Answer(reply))

    try:
        await client.ask(request, keep)
    except SetAsideError as error:
        await answers.put(key, Answer(None, str(error)))
        result.set_aside += 1
    except GivenUpError as error:
        reason = str(error)
        result.failed[reason] = result.failed.get(reason, 0) + 1
    else:
        result.answered += 1


def run_asking(work: Callable[[], Any]) -> Any:
    """Run a coroutine function to its end; of several errors at once the first is raised by itself."""
    try:
        return asyncio.run(work())
    except BaseExceptionGroup as group:
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None
