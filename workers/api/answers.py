"""Every paid answer, on disk before it is used, found again by the content of its request.

`answers/<segment>.jsonl.gz` holds a first line `{"keys": [hex, …]}` and then one answer a line, written once.
Keys depend on the request alone (model, prompt, sampling settings, number of the sample), never on order or batch size.
"""

import asyncio
import gzip
import json
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from storage.errors import IntegrityError
from storage.identity import canonical_json
from storage.object_store import Store
from workers.api.reply import Reply, Request

PREFIX = "answers/"
_SUFFIX = ".jsonl.gz"
_CACHED_SEGMENTS = 8


@dataclass(frozen=True)
class Answer:
    """What came of a request: a reply, or the reason why there never will be one."""

    reply: Reply | None
    set_aside: str | None = None


def request_key(request: Request, endpoint: str, index: int = 0) -> bytes:
    """Return the 16-byte key of sample number `index` of a request to an endpoint (its URL and extra fields)."""
    value = [endpoint, request.path, request.body, index]
    return blake2b(canonical_json(value), digest_size=16, person=b"lectern.answer").digest()


class AnswerStore:
    """All answers below one URL. Writes are grouped: many answers at once share an object. One event loop."""

    def __init__(self, store: Store) -> None:
        """Read which answers there are."""
        self._store = store
        self._segments = [key for key in store.list(PREFIX) if key.endswith(_SUFFIX)]
        self._where: dict[bytes, tuple[int, int]] = {}
        for number, name in enumerate(self._segments):
            self._index(number, self._keys_of(name))
        self._cache: OrderedDict[int, list[bytes]] = OrderedDict()
        self._pending: list[tuple[bytes, bytes, asyncio.Future[None]]] = []
        self._writing = False

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, key: bytes) -> bool:
        return key in self._where

    def get(self, key: bytes) -> Answer | None:
        """Return an answer that is on disk, or None."""
        if key not in self._where:
            return None
        segment, line = self._where[key]
        if segment not in self._cache:
            self._cache[segment] = self._lines(self._segments[segment])
            while len(self._cache) > _CACHED_SEGMENTS:
                self._cache.popitem(last=False)
        values = json.loads(self._cache[segment][line + 1])
        reply = values.get("reply")
        return Answer(None if reply is None else Reply.from_json(reply), values.get("set_aside"))

    async def put(self, key: bytes, answer: Answer) -> None:
        """Return when the answer is on disk; raises StorageError when it cannot be written."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pending.append((key, _line(answer), future))
        if not self._writing:
            self._writing = True
            self._writer = asyncio.get_running_loop().create_task(self._write())
        await future

    async def _write(self) -> None:
        try:
            while self._pending:
                await asyncio.sleep(0)
                group, self._pending = self._pending, []
                name = segment_key(uuid.uuid4().hex)
                try:
                    await asyncio.to_thread(self._write_segment, name, group)
                except Exception as error:
                    _resolve((future for _, _, future in group), lambda f, e=error: f.set_exception(e))  # type: ignore[misc]
                    continue
                self._segments.append(name)
                self._index(len(self._segments) - 1, [key for key, _, _ in group])
                _resolve((future for _, _, future in group), lambda f: f.set_result(None))
        finally:
            self._writing = False

    def _write_segment(self, name: str, group: list[tuple[bytes, bytes, asyncio.Future[None]]]) -> None:
        self._store.write(name, _segment([(key, line) for key, line, _ in group]))

    def _index(self, segment: int, keys: Iterable[bytes]) -> None:
        for line, key in enumerate(keys):
            self._where.setdefault(key, (segment, line))

    def _keys_of(self, name: str) -> list[bytes]:
        try:
            return [bytes.fromhex(key) for key in json.loads(self._lines(name)[0])["keys"]]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise self._damaged(name, error) from error

    def _lines(self, name: str) -> list[bytes]:
        try:
            return gzip.decompress(self._store.read(name)).split(b"\n")
        except (OSError, EOFError, ValueError) as error:
            raise self._damaged(name, error) from error

    def _damaged(self, name: str, error: Exception) -> IntegrityError:
        return IntegrityError(
            f"{self._store.shown(name)} is damaged ({error}); delete it: only its answers are asked, and paid, again"
        )


def create_segment(store: Store, name: str, answers: Sequence[tuple[bytes, Answer]]) -> bool:
    """Write key and answer of many at once under a name that others may know; of several that do so one gets True."""
    return store.create(segment_key(name), _segment([(key, _line(answer)) for key, answer in answers]))


def segment_key(name: str) -> str:
    """Return where the segment of that name lies."""
    return f"{PREFIX}{name}{_SUFFIX}"


def _segment(lines: Sequence[tuple[bytes, bytes]]) -> bytes:
    head = json.dumps({"keys": [key.hex() for key, _ in lines]}).encode()
    return gzip.compress(b"\n".join([head, *(line for _, line in lines)]) + b"\n", compresslevel=1, mtime=0)


def _line(answer: Answer) -> bytes:
    values: dict[str, Any] = {"reply": answer.reply.to_json()} if answer.reply is not None else {}
    if answer.set_aside is not None:
        values["set_aside"] = answer.set_aside
    return json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode(errors="surrogatepass")


def _resolve(futures: Iterable[asyncio.Future[None]], act: Callable[[asyncio.Future[None]], None]) -> None:
    for future in futures:
        if not future.done():
            act(future)
