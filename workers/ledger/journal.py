"""The journal: numbered segments on an object store, each made by a conditional create.

Creating segment N succeeds for one writer only, and only one who has read all segments below N tries it: the create is
a compare-and-append. Several runs may share a journal; none can miss what another reserved.

`ledger/00000000.jsonl` … hold the entries, one JSON object a line. `ledger/state-NNNNNNNN.json` is the account after
all segments below N, a short cut for who opens the journal; it follows from the segments and may be deleted.
"""

import json
import uuid
from collections.abc import Sequence
from typing import Any

from storage.errors import InputError, IntegrityError
from storage.object_store import Store
from workers.ledger.account import Account, Entry

PREFIX = "ledger/"
STATE_EVERY = 256
"""Segments between two states."""

_STATE = f"{PREFIX}state-"


class Journal:
    """One writer's view of a journal. Not safe for several threads.

    Attributes:
        account: the state after all segments that this view has read or written.
    """

    def __init__(self, store: Store, currency: str) -> None:
        """Open a journal and read it; InputError when it is kept in another currency."""
        self.store = store
        self.currency = currency
        self.account = Account()
        self._next = 0
        self._load_state()
        self.catch_up()

    def append(self, entries: Sequence[Entry]) -> bool:
        """Append entries as one segment; False, and nothing appended, when another writer was faster.

        After False, `account` holds what the other one wrote: decide again and append again. Raises StorageError when
        the store failed and it is unknown whether the segment exists; `catch_up` finds out.
        """
        first: list[Entry] = [{"type": "batch", "nonce": uuid.uuid4().hex}]
        if self._next == 0:
            first.append({"type": "ledger", "version": 1, "currency": self.currency})
        data = _encode([*first, *entries])
        key = _key(self._next)
        if not self.store.create(key, data) and self.store.read(key) != data:
            # A retried create may have met its own first success; the bytes hold a nonce, so they tell.
            self.catch_up()
            return False
        self._take(data)
        return True

    def catch_up(self) -> None:
        """Read the segments that others have written meanwhile."""
        while (data := self.store.read_if_exists(_key(self._next))) is not None:
            self._take(data)

    def _take(self, data: bytes) -> None:
        where = self.store.shown(_key(self._next))
        try:
            entries = [json.loads(line) for line in data.splitlines()]
        except ValueError as error:
            raise IntegrityError(f"{where} is damaged ({error}); what was spent cannot be told without it") from error
        for entry in entries:
            if entry.get("type") == "ledger" and entry["currency"] != self.currency:
                raise InputError(
                    f"the ledger in {where} is kept in {entry['currency']}, budget.currency says {self.currency}; set "
                    "it to the same, or give this budget a ledger of its own with budget.ledger"
                )
        self.account.apply(entries)
        self._next += 1
        if self._next % STATE_EVERY == 0:
            state = {"currency": self.currency, "account": self.account.to_json()}
            self.store.write(f"{_STATE}{self._next:08d}.json", json.dumps(state).encode())

    def _load_state(self) -> None:
        # A state is used only while the segment before it is still there: a deleted journal must not live on in it.
        keys = self.store.list(PREFIX)
        for key in reversed([key for key in keys if key.startswith(_STATE)]):
            number = int(key.removeprefix(_STATE).partition(".")[0])
            if _key(number - 1) not in keys:
                continue
            try:
                state = json.loads(self.store.read(key))
                account = Account.from_json(state["account"])
            except (ValueError, KeyError, TypeError):
                continue
            if state["currency"] == self.currency:
                self.account, self._next = account, number
            return


def _key(number: int) -> str:
    return f"{PREFIX}{number:08d}.jsonl"


def _encode(entries: Sequence[Entry]) -> bytes:
    return b"".join(json.dumps(dict[str, Any](entry), separators=(",", ":")).encode() + b"\n" for entry in entries)
