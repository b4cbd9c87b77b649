"""Asks an endpoint. Before each attempt its worst case is in the ledger; after it what it came to, or all of it."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

import httpx2
import openai
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt

from storage.errors import BudgetError, InputError, LecternError
from workers.api.config import ApiConfig
from workers.api.key import read_key
from workers.api.limiter import Limiter
from workers.api.prices import Prices
from workers.api.reply import BrokenReplyError, CountTokens, Reply, Request, read_reply, request_body
from workers.api.stream import collect_stream
from workers.api.verdicts import Action, Verdict, judge_status, scrub
from workers.ledger.amounts import NOTHING
from workers.ledger.client import LedgerClient

_NOT_SENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout, httpx2.UnsupportedProtocol)
"""Failures before a request went out: nothing can have been billed."""


T = TypeVar("T")


class SetAsideError(Exception):
    """The endpoint will never answer this request; the message says why."""


class RefusedRequestError(InputError):
    """The endpoint does not take requests of this sort."""


class GivenUpError(Exception):
    """All attempts at a request failed; a later run tries again."""


class _TryAgainError(Exception):
    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.reason)
        self.verdict = verdict


Keep = Callable[[Reply], Awaitable[None]]
"""Puts an answer on disk; returns when it is there."""


@dataclass
class Counters:
    """What a client did."""

    attempts: int = 0
    answered: int = 0
    retried: dict[str, int] = field(default_factory=dict)
    """Reason → attempts that failed for it."""
    unknown: int = 0
    """Attempts whose whole reservation was kept."""


class ApiClient:
    """An endpoint as one process sees it; belongs to one event loop.

    The key lives in here alone. No error that leaves this class holds it, nor any request or header.
    """

    def __init__(
        self,
        api: ApiConfig,
        ledger: LedgerClient,
        prices: Prices | None = None,
        count_tokens: CountTokens | None = None,
    ) -> None:
        """Read the key from the environment; InputError when it is not there, or no endpoint is named.

        `count_tokens` counts by the teacher's tokenizer: an endpoint that reports less than it sent is not believed.
        """
        if api.base_url is None or api.model is None:
            raise InputError("an endpoint needs teacher.api.base_url and teacher.api.model")
        self.api = api
        self.ledger = ledger
        self.prices = prices or Prices(api.prices)
        self.count_tokens = count_tokens
        self.limiter = Limiter(api.concurrency, api.requests_per_minute, api.tokens_per_minute)
        self.counters = Counters()
        self._key = read_key(api)
        # aiohttp's transport takes a fraction of the time of the default one at hundreds of requests in flight.
        limits = httpx2.Limits(max_connections=api.concurrency, max_keepalive_connections=api.concurrency)
        http = openai.DefaultAioHttpClient(timeout=httpx2.Timeout(None), limits=limits)
        self._client = openai.AsyncOpenAI(
            api_key=self._key, base_url=api.base_url, max_retries=0, http_client=http, timeout=None
        )

    async def close(self) -> None:
        """Let go of the connections and wait for the ledger."""
        await self._client.close()
        await self.ledger.close()

    async def ask(self, request: Request, keep: Keep | None = None) -> Reply:
        """Return the endpoint's answer, once `keep` has put it on disk.

        An answer is kept before its reservation is settled: whatever dies in between, an answer that is lost was in
        flight by the ledger too.

        Raises:
            SetAsideError: the endpoint refuses this request for good.
            GivenUpError: every attempt failed.
            BudgetError: a cap, or no balance at the provider.
            InputError: key, model or request are wrong for all requests alike.
            StorageError: the ledger cannot be written.
        """
        most = self.api.context_tokens
        if most is not None and request.least_input + request.most_output > most:
            raise SetAsideError(
                f"a prompt of at least {request.least_input} tokens and max_tokens {request.most_output} exceed the "
                f"context of {most} tokens"
            )
        retrying = AsyncRetrying(
            stop=stop_after_attempt(self.api.max_attempts),
            wait=self._wait,
            retry=retry_if_exception_type(_TryAgainError),
            reraise=True,
        )
        try:
            return await retrying(self._attempt, request, keep)
        except _TryAgainError as error:
            raise GivenUpError(f"{error} ({self.api.max_attempts} attempts)") from None

    @property
    def key(self) -> str:
        """The key, for those who must keep it out of messages."""
        return self._key

    async def perform(self, call: Callable[[openai.AsyncOpenAI], Awaitable[T]], repeatable: bool = True) -> T:
        """Make a call that is not billed by itself.

        Raises:
            GivenUpError: every attempt failed; of a call that is not `repeatable` nobody knows whether it was done.
            InputError, BudgetError: the endpoint refuses it.
        """
        retrying = AsyncRetrying(
            stop=stop_after_attempt(self.api.max_attempts if repeatable else 1),
            wait=self._wait,
            retry=retry_if_exception_type(_TryAgainError),
            reraise=True,
        )

        async def once() -> T:
            try:
                async with asyncio.timeout(self.api.attempt_timeout_s):
                    return await call(self._client)
            except openai.APIStatusError as error:
                raise await self._failed(self._judge(error), "") from None
            except (openai.APIConnectionError, httpx2.HTTPError, TimeoutError, OSError) as error:
                raise _TryAgainError(Verdict(Action.RETRY, False, type(error.__cause__ or error).__name__)) from None

        try:
            return await retrying(once)
        except _TryAgainError as error:
            raise GivenUpError(str(error)) from None

    async def models(self) -> list[dict[str, Any]]:
        """Return what the endpoint lists under /models, an empty list where it has no such thing."""
        try:
            async with asyncio.timeout(self.api.attempt_timeout_s):
                response = await self._client.get("/models", cast_to=httpx2.Response)
            data = response.json()["data"]
            return [item for item in data if isinstance(item, dict)]
        except openai.APIStatusError as error:
            if error.status_code == 401:
                raise await self._stopped(self._judge(error)) from None
            return []
        except openai.APIConnectionError as error:
            raise InputError(self._unreachable(error)) from None
        except (ValueError, KeyError, TypeError, TimeoutError):
            return []

    async def _attempt(self, request: Request, keep: Keep | None) -> Reply:
        worst = self.prices.worst(request.most_input, request.most_output)
        await self.limiter.acquire(worst.tokens)
        place = _Place(self.limiter)
        try:
            name = await self.ledger.reserve(worst)
            # From here on only `settle` and `keep` say what became of the reservation.
            return await self._send(request, name, place, keep)
        finally:
            place.release()

    async def _send(self, request: Request, reservation: str, place: "_Place", keep: Keep | None) -> Reply:
        self.counters.attempts += 1
        began = datetime.now(UTC)
        try:
            async with asyncio.timeout(self.api.attempt_timeout_s):
                data = await self._post(request)
            # The endpoint has a place free while the disk is written.
            place.release()
            ended = datetime.now(UTC)
            reply = read_reply(data, request, self.count_tokens)
            if keep is not None:
                await keep(reply)
        except openai.APIStatusError as error:
            raise await self._failed(self._judge(error), reservation) from None
        except BrokenReplyError as error:
            if error.usage is not None:
                self.ledger.settle(reservation, self.prices.settled(error.usage, began, datetime.now(UTC)))
                reservation = ""
            raise await self._failed(Verdict(Action.RETRY, True, str(error)), reservation) from None
        except (openai.APIConnectionError, httpx2.HTTPError, TimeoutError, OSError) as error:
            cause = error.__cause__ if isinstance(error, openai.APIConnectionError) else error
            reason = type(cause or error).__name__
            if isinstance(error, TimeoutError | openai.APITimeoutError):
                reason = f"no whole answer within teacher.api.attempt_timeout_s = {self.api.attempt_timeout_s:g}"
            verdict = Verdict(Action.RETRY, not isinstance(cause, _NOT_SENT), reason)
            raise await self._failed(verdict, reservation) from None
        except BaseException:
            # Cancelled, a full disk, or a defect: the request was out.
            self._keep(reservation)
            raise
        if reply.usage is None:
            self._keep(reservation)
        else:
            self.ledger.settle(reservation, self.prices.settled(reply.usage, began, ended))
        self.counters.answered += 1
        self.limiter.answered()
        if reply.finish_reason == "content_filter":
            raise SetAsideError("the provider's content filter ended the answer")
        return reply

    async def _post(self, request: Request) -> bytes | dict[str, Any]:
        body = request_body(request, self.api.extra_body)
        if self.api.stream and not request.wants_logprobs:
            return await collect_stream(self._client, request.path, body)
        response = await self._client.post(request.path, cast_to=httpx2.Response, body=body)
        return response.content

    async def _failed(self, verdict: Verdict, reservation: str) -> Exception:
        """Settle a failed attempt and return the exception that it ends with."""
        if reservation:
            if verdict.billed:
                self._keep(reservation)
            else:
                self.ledger.settle(reservation, NOTHING)
        if verdict.throttled:
            self.limiter.throttled(verdict.retry_after_s)
        if verdict.action is Action.RETRY:
            short = verdict.reason[:60]
            self.counters.retried[short] = self.counters.retried.get(short, 0) + 1
            return _TryAgainError(verdict)
        if verdict.action is Action.SET_ASIDE:
            return SetAsideError(verdict.reason)
        return await self._stopped(verdict)

    def _keep(self, reservation: str) -> None:
        self.counters.unknown += 1
        self.ledger.keep(reservation)

    async def _stopped(self, verdict: Verdict) -> LecternError:
        where = f"{self.api.base_url}, model {self.api.model}"
        if verdict.action is Action.NO_BALANCE:
            return BudgetError(
                f"{where}: the provider wants to be paid first ({verdict.reason}); top up the account and run the same "
                "command again: everything paid for is kept"
            )
        if verdict.reason.startswith(("401", "403")):
            return InputError(
                f"{where}: the key in {self.api.key_env} is not accepted ({verdict.reason}); set the right one"
            )
        if verdict.action is Action.UNKNOWN_MODEL or verdict.reason.startswith("404"):
            names: list[str] = []
            with suppress(LecternError):
                names = [str(item.get("id")) for item in await self.models()]
            offers = f"it offers {', '.join(sorted(names)[:20])}" if names else "it does not list its models"
            return InputError(f"{where}: {verdict.reason}; {offers}; set teacher.api.model or teacher.api.base_url")
        return RefusedRequestError(
            f"{where} refuses the request ({verdict.reason}); mend teacher.api or the request's settings"
        )

    def _judge(self, error: openai.APIStatusError) -> Verdict:
        body: Any = error.body if error.body is not None else error.response.text
        return judge_status(error.status_code, body, error.response.headers, self._key)

    def _unreachable(self, error: Exception) -> str:
        cause = scrub(str(error.__cause__ or error), self._key)
        return f"teacher.api.base_url {self.api.base_url} cannot be reached ({cause}); is the server up?"

    def _wait(self, state: RetryCallState) -> float:
        """Seconds until the next attempt: what `Retry-After` asks for, else exponential with jitter."""
        error = state.outcome.exception() if state.outcome is not None else None
        asked = error.verdict.retry_after_s if isinstance(error, _TryAgainError) else 0.0
        own = min(self.api.max_wait_s, 0.5 * 2 ** (state.attempt_number - 1))
        return asked + random.uniform(0.1, 0.3) if asked else random.uniform(own / 2, own)


class _Place:
    """A place among the requests in flight, given back once."""

    def __init__(self, limiter: Limiter) -> None:
        self._limiter: Limiter | None = limiter

    def release(self) -> None:
        limiter, self._limiter = self._limiter, None
        if limiter is not None:
            limiter.release()
