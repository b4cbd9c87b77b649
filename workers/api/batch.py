"""Batch files: many requests in one upload, answered within a day at a lower price, as OpenAI's Batch API does it.

`batches/<name>.json`, beside the answers, says which requests went out together. It is written before anything is sent,
and bears the name that the batch gets at the endpoint, so that after any crash the next run finds the batch, waits for
it and collects it: nothing is submitted, and paid, twice. Each request's worst case is reserved in the ledger before,
and settled once its answer is on disk.
"""

import asyncio
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pydantic import Field, ValidationError

from storage.errors import BudgetError, InputError, IntegrityError
from storage.object_store import Store
from storage.settings import Settings, first_problem
from workers.api.answers import Answer, AnswerStore
from workers.api.batch_calls import BatchCalls, BatchState
from workers.api.client import GivenUpError
from workers.api.generation import AskResult
from workers.api.prices import Prices
from workers.api.reply import BrokenReplyError, CountTokens, Request, read_reply, request_body
from workers.api.verdicts import Action, judge_status
from workers.ledger.amounts import NOTHING, Amount
from workers.ledger.ledger import Batch, Ledger, refused

PREFIX = "batches/"
MOST_BYTES = 100 << 20
"""A file is closed at this size; OpenAI takes 200 MB."""
LOOKS = 3
"""How often a batch is looked for whose creation got no answer."""
KEPT_TOGETHER = 256
"""Answers that are put on disk before what they cost is settled."""


class Sent(Settings):
    """A request of a batch, as far as its answer is judged by it."""

    reservation: str
    path: str
    most_input: int
    most_output: int
    least_input: int


class BatchRecord(Settings):
    """The contents of `batches/<name>.json`."""

    name: str
    """Given to the endpoint as metadata."""
    model: str
    created_at: str
    """UTC, ISO 8601."""
    batch_id: str | None = None
    """The endpoint's own; none until it has answered."""
    closed: bool = False
    """All that came of it is on disk and in the ledger."""
    requests: dict[str, Sent] = Field(min_length=1)
    """Key in hex, which is the `custom_id` too → request."""

    def save(self, store: Store) -> "BatchRecord":
        """Write it and return it."""
        store.write(f"{PREFIX}{self.name}.json", self.model_dump_json().encode())
        return self


def open_records(store: Store) -> list[BatchRecord]:
    """Return the batches that are not closed, oldest first; IntegrityError when a record is damaged."""
    found = []
    for key in store.list(PREFIX):
        try:
            record = BatchRecord.model_validate_json(store.read(key))
        except ValidationError as error:
            raise IntegrityError(
                f"{store.shown(key)} is damaged: {first_problem(error)}; look the batch up at the endpoint, and delete "
                "the file once its answers are not wanted any more"
            ) from error
        found += [] if record.closed else [record]
    return sorted(found, key=lambda record: record.created_at)


@dataclass
class BatchAsker:
    """Has requests answered by batch files; belongs to one event loop and one ledger."""

    calls: BatchCalls
    ledger: Ledger
    answers: AnswerStore
    store: Store
    """Where records lie, and answers."""
    prices: Prices
    """Those of a batch."""
    count_tokens: CountTokens | None = None

    async def ask_all(
        self,
        keyed: Iterable[tuple[bytes, Request]],
        on_progress: Callable[[AskResult, int], None] | None = None,
    ) -> AskResult:
        """Bring the answers of all requests on disk: collects what earlier runs submitted, and submits what is left.

        A cap leaves the rest unsubmitted, and `stopped` says why. `on_progress` gets the counts, and how many requests
        the endpoint is done with.

        Raises:
            InputError: key, model or file are wrong.
            StorageError: the ledger or a record cannot be written.
        """
        result = AskResult()
        waiting = [await self._found(record) for record in open_records(self.store)]
        live = [record for record in waiting if record is not None]
        sent = {key for record in live for key in record.requests}
        for group in self._groups(keyed, sent, result):
            record = await self._submit(group, result)
            live += [record] if record is not None else []
            if result.stopped is not None:
                break
        await self._collect_all(live, result, on_progress)
        return result

    def _groups(
        self, keyed: Iterable[tuple[bytes, Request]], sent: set[str], result: AskResult
    ) -> Iterator[list[tuple[str, Request]]]:
        """Yield what is neither answered nor on its way, in groups for one file each."""
        group: list[tuple[str, Request]] = []
        size = 0
        for key, request in keyed:
            result.requests += 1
            name = key.hex()
            if key in self.answers:
                result.reused += 1
            elif name not in sent:
                sent.add(name)
                group.append((name, request))
                size += len(json.dumps(request.body))
                if len(group) >= self.calls.batch.requests or size >= MOST_BYTES:
                    yield group
                    group, size = [], 0
        if group:
            yield group

    async def _submit(self, group: Sequence[tuple[str, Request]], result: AskResult) -> BatchRecord | None:
        """Reserve, record and submit as many of a group as the budget takes."""
        batch = uuid.uuid4().hex
        reserve = [
            (f"{batch}-{n}", self.prices.worst(request.most_input, request.most_output))
            for n, (_, request) in enumerate(group)
        ]
        reasons = await asyncio.to_thread(self.ledger.transact, Batch(reserve=reserve, last_call=True))
        granted = [item for item, reason in zip(group, reasons, strict=True) if reason is None]
        names = [name for (name, _), reason in zip(reserve, reasons, strict=True) if reason is None]
        unfit = next((reason for reason in reasons if reason is not None), None)
        if unfit is not None:
            result.stopped = refused(unfit)
        if not granted:
            return None
        requests = {
            key: Sent(
                reservation=name,
                path=request.path,
                most_input=request.most_input,
                most_output=request.most_output,
                least_input=request.least_input,
            )
            for name, (key, request) in zip(names, granted, strict=True)
        }
        record = BatchRecord(
            name=batch, model=str(self.calls.api.model), created_at=datetime.now(UTC).isoformat(), requests=requests
        ).save(self.store)
        lines = [
            {"custom_id": key, "method": "POST", "url": f"/v1{request.path}",
             "body": request_body(request, self.calls.api.extra_body)}
            for key, request in granted
        ]  # fmt: skip
        try:
            file = await self.calls.upload("".join(f"{json.dumps(line)}\n" for line in lines).encode())
        except BaseException:
            # Without a batch a file costs nothing.
            await self._close(record, self._nothing(record))
            raise
        try:
            batch_id = await self.calls.create(file, f"/v1{granted[0][1].path}", record.name)
        except GivenUpError:
            return await self._found(record)
        except (InputError, BudgetError):
            await self._close(record, self._nothing(record))
            raise
        return record.model_copy(update={"batch_id": batch_id}).save(self.store)

    async def _found(self, record: BatchRecord) -> BatchRecord | None:
        """Return a record with its batch's id; one that the endpoint does not know is closed, its cost unknown."""
        for look in range(LOOKS):
            if record.batch_id is not None:
                return record
            batch_id = await self.calls.find(record.name)
            if batch_id is not None:
                return record.model_copy(update={"batch_id": batch_id}).save(self.store)
            if look + 1 < LOOKS:
                await asyncio.sleep(self.calls.batch.poll_s)
        kept = [sent.reservation for sent in record.requests.values() if self._is_open(sent)]
        await self._close(record, Batch(kept=kept))
        return None

    async def _collect_all(
        self, live: list[BatchRecord], result: AskResult, on_progress: Callable[[AskResult, int], None] | None
    ) -> None:
        while live:
            states = [await self.calls.state(str(record.batch_id)) for record in live]
            for record, state in zip(list(live), states, strict=True):
                if state.ended:
                    live.remove(record)
                    await self._collect(record, state, result)
            if on_progress is not None:
                on_progress(result, sum(state.done for state in states if not state.ended))
            if live:
                await asyncio.sleep(self.calls.batch.poll_s)

    async def _collect(self, record: BatchRecord, state: BatchState, result: AskResult) -> None:
        """Put a batch's answers on disk and settle what they cost; what was not executed costs nothing."""
        left = dict(record.requests)
        for file in state.files:
            lines = [line for line in (await self.calls.content(file)).splitlines() if line.strip()]
            for first in range(0, len(lines), KEPT_TOGETHER):
                part = [self._line(line) for line in lines[first : first + KEPT_TOGETHER]]
                ours = {key: line for key, line in part if key in left}
                outcomes = await asyncio.gather(
                    *(self._take(key, line, left[key], record, result) for key, line in ours.items())
                )
                settled = [(name, amount) for name, amount in outcomes if amount is not None]
                kept = [name for name, amount in outcomes if amount is None]
                await asyncio.to_thread(self.ledger.transact, self._still_open(record, settled, kept))
                for key in ours:
                    del left[key]
        if left:
            reason = state.reason or "not executed by the end of the batch"
            result.failed[reason] = result.failed.get(reason, 0) + len(left)
        await self._close(record, self._nothing(record))

    async def _take(
        self, key: str, line: dict[str, Any], sent: Sent, record: BatchRecord, result: AskResult
    ) -> tuple[str, Amount | None]:
        """Keep one answer; returns its reservation and what it came to, None where that is unknown."""
        response = line.get("response") or {}
        status, body = int(response.get("status_code") or 500), response.get("body") or line.get("error") or {}
        began = datetime.fromisoformat(record.created_at)
        request = Request(sent.path, {}, sent.most_input, sent.most_output, sent.least_input)
        if status != 200:
            verdict = judge_status(status, body, {}, self.calls.key)
            if verdict.action is Action.SET_ASIDE:
                await self._keep(key, Answer(None, verdict.reason))
                result.set_aside += 1
            else:
                result.failed[verdict.reason] = result.failed.get(verdict.reason, 0) + 1
            return sent.reservation, NOTHING
        try:
            reply = read_reply(body, request, self.count_tokens)
        except BrokenReplyError as error:
            result.failed[str(error)] = result.failed.get(str(error), 0) + 1
            usage = error.usage
        else:
            await self._keep(key, Answer(reply))
            result.answered += 1
            usage = reply.usage
        return sent.reservation, None if usage is None else self.prices.settled(usage, began, datetime.now(UTC))

    async def _keep(self, key: str, answer: Answer) -> None:
        if bytes.fromhex(key) not in self.answers:
            await self.answers.put(bytes.fromhex(key), answer)

    async def _close(self, record: BatchRecord, batch: Batch) -> None:
        await asyncio.to_thread(self.ledger.transact, batch)
        record.model_copy(update={"closed": True}).save(self.store)

    def _nothing(self, record: BatchRecord) -> Batch:
        """Give back what is still reserved for a record."""
        return Batch(settled=[(sent.reservation, NOTHING) for sent in record.requests.values() if self._is_open(sent)])

    def _still_open(self, record: BatchRecord, settled: Sequence[tuple[str, Amount]], kept: Sequence[str]) -> Batch:
        """Leave out what a run before has settled: collecting a batch again changes nothing."""
        open_ = {sent.reservation for sent in record.requests.values() if self._is_open(sent)}
        return Batch([item for item in settled if item[0] in open_], [name for name in kept if name in open_])

    def _is_open(self, sent: Sent) -> bool:
        return sent.reservation in self.ledger.journal.account.open

    @staticmethod
    def _line(raw: bytes) -> tuple[str, dict[str, Any]]:
        try:
            line = json.loads(raw)
            return str(line["custom_id"]), line
        except (ValueError, KeyError, TypeError):
            return "", {}
