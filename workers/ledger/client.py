"""Group commit: many concurrent attempts share one append to the journal.

While an append is under way, what comes meanwhile is collected for the next one, so that 256 requests at once wait for
one or two objects, not for 256.
"""

import asyncio
import contextlib
import uuid
from collections.abc import Awaitable, Callable

from workers.ledger.amounts import Amount
from workers.ledger.ledger import Batch, Ledger, refused

Transact = Callable[[Batch], Awaitable[list[str | None]]]
"""`Ledger.transact` of the owner: in a thread of this process, or in the owner's actor."""


class LedgerClient:
    """One process's access to the owner of the ledger; belongs to one event loop."""

    def __init__(self, transact: Transact) -> None:
        self._transact = transact
        self._holder = uuid.uuid4().hex[:12]
        self._count = 0
        self._settled: list[tuple[str, Amount]] = []
        self._kept: list[str] = []
        self._asked: dict[str, tuple[Amount, asyncio.Future[str]]] = {}
        self._open: set[str] = set()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._pump: asyncio.Task[None] | None = None
        self.error: Exception | None = None
        """Why no more can be reserved, once the owner failed."""

    @classmethod
    def of(cls, ledger: Ledger) -> "LedgerClient":
        """Return a client of an owner in this process, whose appends run in a thread."""
        return cls(lambda batch: asyncio.to_thread(ledger.transact, batch))

    async def reserve(self, amount: Amount) -> str:
        """Reserve an amount and return the reservation's id, once it is in the journal.

        Waits while open reservations of this process may still give something back. Raises BudgetError when it does
        not fit then, and what the owner raised when the store failed.
        """
        if self.error is not None:
            raise self.error
        self._count += 1
        name = f"{self._holder}-{self._count}"
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._asked[name] = (amount, future)
        self._stir()
        try:
            return await future
        except asyncio.CancelledError:
            self._give_up(name, future)
            raise

    def settle(self, name: str, amount: Amount) -> None:
        """Put what an attempt came to in place of its reservation; journalled with the next append."""
        self._open.discard(name)
        self._settled.append((name, amount))
        self._stir()

    def keep(self, name: str) -> None:
        """Keep the whole reservation, since the outcome is unknown; journalled with the next append."""
        self._open.discard(name)
        self._kept.append(name)
        self._stir()

    async def settled(self) -> None:
        """Wait until all that was settled so far is in the journal; raises what the owner raised."""
        while self._settled or self._kept:
            await asyncio.sleep(0.001)
            if self.error is not None:
                raise self.error

    async def close(self) -> None:
        """Wait until all that was settled is in the journal; raises what the owner raised."""
        await self._idle.wait()
        if self._pump is not None:
            self._pump.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._pump
            self._pump = None
        if self.error is not None:
            raise self.error

    def _give_up(self, name: str, future: asyncio.Future[str]) -> None:
        """A cancelled attempt: nothing was sent for it, so that a reservation already granted goes back."""
        self._asked.pop(name, None)
        if future.done() and not future.cancelled() and future.exception() is None:
            self.settle(name, Amount())

    def _stir(self) -> None:
        self._idle.clear()
        self._wake.set()
        if self._pump is None and self.error is None:
            self._pump = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                # Let all that is ready now join this append.
                await asyncio.sleep(0)
                await self._commit()
                if not self._wake.is_set():
                    self._idle.set()
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self.error = error
            for _, future in self._asked.values():
                if not future.done():
                    future.set_exception(error)
            self._asked.clear()
            self._idle.set()

    async def _commit(self) -> None:
        settled, self._settled = self._settled, []
        kept, self._kept = self._kept, []
        asked = list(self._asked.items())
        last_call = bool(asked) and not self._open
        reserve = [(name, amount) for name, (amount, _) in asked]
        reasons = await self._transact(Batch(settled, kept, reserve, last_call))
        unfit: list[tuple[str, str]] = []
        for (name, (_, future)), reason in zip(asked, reasons, strict=True):
            if reason is not None:
                unfit.append((name, reason))
                continue
            self._asked.pop(name, None)
            if future.done():
                # Cancelled while the append was under way: nothing will be sent for it.
                self.settle(name, Amount())
            else:
                self._open.add(name)
                future.set_result(name)
        if unfit and last_call and len(unfit) == len(asked):
            for name, reason in unfit:
                pending = self._asked.pop(name, None)
                if pending is not None and not pending[1].done():
                    pending[1].set_exception(refused(reason))
