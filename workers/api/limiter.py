"""How many requests are in flight and how fast they begin, adapting to what the endpoint says."""

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable

DECREASE = 0.7
"""Factor on concurrency and rate after a 429."""
BACKOFF_EVERY_S = 1.0
"""Answers of one burst count once."""


class Limiter:
    """Additive increase, multiplicative decrease, and pauses as long as `Retry-After` asks for. One event loop.

    Attributes:
        limit: most requests in flight at present.
    """

    def __init__(
        self,
        concurrency: int,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.most = concurrency
        self.limit = float(concurrency)
        self.in_flight = 0
        self._clock = clock
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._paused_until = 0.0
        self._backed_off_at = float("-inf")
        self._buckets = [_Bucket(rate, clock) for rate in (requests_per_minute, tokens_per_minute)]

    async def acquire(self, tokens: int) -> None:
        """Wait for a place in flight, for the end of a pause and for the rates; then count the request as begun."""
        if self.in_flight >= int(self.limit) or self._waiters:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(future)
            try:
                await future
            except asyncio.CancelledError:
                if future.done() and not future.cancelled():
                    self.release()
                raise
        else:
            self.in_flight += 1
        try:
            await self._wait_for_rates(tokens)
        except asyncio.CancelledError:
            self.release()
            raise

    def release(self) -> None:
        """Count a request as ended."""
        self.in_flight -= 1
        self._admit()

    def answered(self) -> None:
        """A request went well: let one more in flight per round of answers."""
        if self.limit < self.most:
            self.limit = min(self.most, self.limit + 1 / self.limit)
            self._admit()
        for bucket in self._buckets:
            bucket.speed_up()

    def throttled(self, retry_after_s: float) -> None:
        """The endpoint wants less: begin nothing for so long, and go on with less."""
        now = self._clock()
        self._paused_until = max(self._paused_until, now + retry_after_s)
        if now - self._backed_off_at >= BACKOFF_EVERY_S:
            self._backed_off_at = now
            self.limit = max(1.0, self.limit * DECREASE)
            for bucket in self._buckets:
                bucket.slow_down()

    def _admit(self) -> None:
        while self._waiters and self.in_flight < int(self.limit):
            future = self._waiters.popleft()
            if not future.done():
                self.in_flight += 1
                future.set_result(None)

    async def _wait_for_rates(self, tokens: int) -> None:
        while (pause := self._paused_until - self._clock()) > 0:
            # All that waited would begin at the same instant otherwise.
            await asyncio.sleep(pause + random.uniform(0, min(1.0, pause)) * 0.2)
        for bucket, amount in zip(self._buckets, (1, tokens), strict=True):
            if (pause := bucket.take(amount)) > 0:
                await asyncio.sleep(pause)


class _Bucket:
    """A rate per minute, kept by telling each taker how long to wait; None lets all pass."""

    def __init__(self, per_minute: float | None, clock: Callable[[], float]) -> None:
        self._most = self._rate = None if per_minute is None else per_minute / 60
        self._clock = clock
        self._free_at = clock()

    def take(self, amount: float) -> float:
        if self._rate is None:
            return 0.0
        now = self._clock()
        # A second's worth may begin at once.
        start = max(self._free_at, now - 1.0)
        self._free_at = start + amount / self._rate
        return max(0.0, start - now)

    def slow_down(self) -> None:
        if self._rate is not None:
            self._rate *= DECREASE

    def speed_up(self) -> None:
        if self._rate is not None and self._most is not None:
            self._rate = min(self._most, self._rate * 1.01)
