"""The calls of a batch API: upload, create, find, poll, fetch. None of them is billed but a batch that was created."""

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx2
import openai

from storage.errors import InputError
from workers.api.client import ApiClient
from workers.api.config import ApiConfig, BatchConfig

MARK = "lectern"
"""Metadata key that a batch's name is kept under at the endpoint."""
LISTED = 100
ENDED = {"completed", "failed", "expired", "cancelled"}

T = TypeVar("T")


@dataclass(frozen=True)
class BatchState:
    """Where a batch stands."""

    status: str
    done: int = 0
    """Requests that the endpoint is through with."""
    files: tuple[str, ...] = ()
    """Its files of answers and of errors, as far as there are."""
    reason: str | None = None
    """Why it failed as a whole."""

    @property
    def ended(self) -> bool:
        """Whether nothing more will come of it."""
        return self.status in ENDED


class BatchCalls:
    """An endpoint's batch API."""

    def __init__(self, client: ApiClient) -> None:
        self._client = client
        self.api: ApiConfig = client.api
        self.batch: BatchConfig = client.api.batch or BatchConfig()

    @property
    def key(self) -> str:
        """The key, to be kept out of messages."""
        return self._client.key

    async def upload(self, lines: bytes) -> str:
        """Upload a file of requests and return its id."""
        return str((await self._call(lambda own: own.files.create(file=("requests.jsonl", lines), purpose="batch"))).id)

    async def create(self, file: str, url: str, name: str) -> str:
        """Have a file's requests executed; returns the batch's id.

        Raises:
            GivenUpError: there was no answer, and the batch may exist.
            InputError: the endpoint refuses.
        """
        made = await self._call(
            lambda own: own.batches.create(
                input_file_id=file,
                endpoint=url,  # type: ignore[arg-type]
                completion_window=self.batch.window,  # type: ignore[arg-type]
                metadata={MARK: name},
            ),
            repeatable=False,
        )
        return str(made.id)

    async def find(self, name: str) -> str | None:
        """Return the id of the batch of that name, or None."""
        after: str | None = None
        while True:
            page = await self._call(
                lambda own, after=after: own.get(  # type: ignore[misc]
                    "/batches",
                    cast_to=httpx2.Response,
                    options={"params": {"limit": LISTED, **({"after": after} if after else {})}},
                )
            )
            values = page.json()
            items = values.get("data") or []
            for item in items:
                if (item.get("metadata") or {}).get(MARK) == name:
                    return str(item["id"])
            if not values.get("has_more") or not items:
                return None
            after = str(items[-1]["id"])

    async def state(self, batch_id: str) -> BatchState:
        """Return where a batch stands."""
        found = await self._call(lambda own: own.batches.retrieve(batch_id))
        counts = found.request_counts
        problems = [str(item.message) for item in (found.errors.data or [])] if found.errors else []
        return BatchState(
            status=str(found.status),
            done=(counts.completed + counts.failed) if counts is not None else 0,
            files=tuple(file for file in (found.output_file_id, found.error_file_id) if file),
            reason=f"the batch failed: {'; '.join(problems[:3])}" if found.status == "failed" else None,
        )

    async def content(self, file: str) -> bytes:
        """Return a file."""
        return (await self._call(lambda own: own.files.content(file))).content  # type: ignore[no-any-return]

    async def _call(self, call: Callable[[openai.AsyncOpenAI], Awaitable[T]], repeatable: bool = True) -> Any:
        try:
            return await self._client.perform(call, repeatable)
        except json.JSONDecodeError as error:
            raise InputError(f"{self.api.base_url} answers its batch API with what is no JSON: {error}") from None
