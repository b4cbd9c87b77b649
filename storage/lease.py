"""One writer at a time, for stores that ignore conditional creates: a lease object that names its owner and expires.

Without an atomic create nothing can be perfectly exclusive. A second writer that starts at any other moment is refused;
of two that start within the same two seconds at most one goes on; and should a stalled one slip through, records still
only ever name files that exist.
"""

import getpass
import json
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from pydantic import ValidationError

from storage.errors import InputError, LecternError, StorageError
from storage.identity import canonical_json
from storage.object_store import Store
from storage.settings import Settings

LEASE_KEY = "lease.json"
LEASE_S = 120.0
"""A lease that was not renewed for so long, by the store's clock, is void."""
SETTLE_S = 2.0
"""Wait between writing a lease and believing it: a rival that looked at the same moment has written by then."""


class LeaseRecord(Settings):
    """The contents of lease.json. When it was renewed is told by the store."""

    user: str
    host: str
    pid: int
    token: str
    lease_s: float

    @classmethod
    def of_this_process(cls) -> Self:
        """Return a new lease of this process."""
        try:
            user = getpass.getuser()
        except (KeyError, OSError):
            user = str(os.getuid())
        return cls(user=user, host=socket.gethostname(), pid=os.getpid(), token=uuid.uuid4().hex, lease_s=LEASE_S)

    @property
    def owner(self) -> str:
        """Return who holds it, for messages."""
        return f"{self.user}@{self.host}, process {self.pid}"

    def owner_is_gone(self) -> bool:
        """Tell whether the owner was a process of this machine that has ended."""
        if self.host != socket.gethostname():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # it runs, as another user
        return False


class Lease:
    """The right to write, renewed by a thread until it is released."""

    def __init__(self, store: Store, record: LeaseRecord) -> None:
        self.record = record
        self.lost = False
        """Another process has taken the lease, as it may once it was not renewed in time."""
        self._store = store
        self._num_holders = 1
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True, name="lectern-lease")
        self._thread.start()

    @classmethod
    def acquire(cls, store: Store) -> "Lease":
        """Take the lease, or share the one of this process; InputError, naming the owner, while another holds it."""
        ours = _HELD.get((os.getpid(), store.url))
        if ours is not None:
            ours._num_holders += 1
            return ours
        held = _read(store)
        if held is not None and not held.owner_is_gone():
            age_s = _age(store)
            if age_s is not None and age_s < held.lease_s:
                raise _refusal(store, held, age_s)
        record = LeaseRecord.of_this_process()
        store.write(LEASE_KEY, canonical_json(record.model_dump(mode="json")))
        threading.Event().wait(SETTLE_S)
        winner = _read(store)
        if winner is not None and winner.token != record.token:
            raise _refusal(store, winner, SETTLE_S)
        lease = _HELD[os.getpid(), store.url] = cls(store, record)
        return lease

    def check(self) -> None:
        """Raise StorageError when the lease was lost."""
        if self.lost:
            raise StorageError(
                f"another process took {self._store.shown(LEASE_KEY)}, which this one did not renew for {LEASE_S:g} s; "
                "what was committed is intact: wait until that process has ended, and run again"
            )

    def release(self) -> None:
        """Give the lease up, when every holder in this process has."""
        self._num_holders -= 1
        if self._num_holders:
            return
        _HELD.pop((os.getpid(), self._store.url), None)
        self._ended.set()
        self._thread.join()
        held = _read(self._store)
        if held is not None and held.token == self.record.token:
            self._store.delete(LEASE_KEY)

    def _renew(self) -> None:
        while not self._ended.wait(self.record.lease_s / 4):
            try:
                held = _read(self._store)
                if held is not None and held.token != self.record.token:
                    self.lost = True
                    return
                self._store.write(LEASE_KEY, canonical_json(self.record.model_dump(mode="json")))
            except LecternError:
                continue  # Three more tries before it expires; commits meet the same failure and tell it.


_HELD: dict[tuple[int, str], Lease] = {}
"""Leases of this process, by process (a fork has none) and store."""


@contextmanager
def write_access(store: Store) -> Iterator[Lease | None]:
    """Check that a store can be written, and hold its lease meanwhile where only one process may write.

    Yields the lease, None where conditional creates let any number of processes write. Raises InputError when the
    store cannot be written, or another process holds the lease.
    """
    lease = None if store.probe() else Lease.acquire(store)
    try:
        yield lease
    finally:
        if lease is not None:
            lease.release()


def _read(store: Store) -> LeaseRecord | None:
    raw = store.read_if_exists(LEASE_KEY)
    if raw is None:
        return None
    try:
        return LeaseRecord.model_validate(json.loads(raw))
    except (ValidationError, ValueError) as error:
        raise InputError(f"{store.shown(LEASE_KEY)} is no lease; delete it when no other process writes") from error


def _age(store: Store) -> float | None:
    """Return the seconds since the lease was renewed; None when it was released meanwhile."""
    renewed = store.modified(LEASE_KEY)
    return None if renewed is None else store.now() - renewed


def _refusal(store: Store, held: LeaseRecord, age_s: float) -> InputError:
    return InputError(
        f"{store.shown()} ignores conditional creates, so only one process may write to it at a time, and "
        f"{held.owner} does: it renewed its lease {max(age_s, 0):.0f} s ago. Wait until it has ended; a process that "
        f"died loses the lease after {held.lease_s:g} s"
    )
