"""A replica of a teacher behind an API: one async actor that scores units of many requests at once and commits them."""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from storage.errors import BudgetError
from storage.identity import DatasetIdentity
from storage.object_store import Store
from storage.sample_set import SampleSet
from storage.samples import Sample
from storage.writer import DatasetWriter, Receipt
from workers.api.answers import Answer, AnswerStore, request_key
from workers.api.client import ApiClient, GivenUpError, SetAsideError
from workers.api.generation import endpoint_name
from workers.api.reply import Reply, Request
from workers.api.scoring import (
    ScoredPositions,
    ScoringMethod,
    documents_of,
    scored_positions,
    scoring_request,
    targets_of,
)
from workers.config import TeacherConfig
from workers.ledger.client import LedgerClient
from workers.ledger.ledger import Batch, Budget, Ledger, Standing
from workers.units import WorkUnit, unit_of


@dataclass(frozen=True)
class ApiJob:
    """Everything that an API replica needs to know; the key is not among it."""

    teacher: TeacherConfig
    samples_url: str
    dataset_url: str
    identity: DatasetIdentity
    method: ScoringMethod
    retry_refused: bool = False
    """Ask once more for what the endpoint refused before."""


@dataclass
class ApiReceipt:
    """What became of a unit."""

    receipt: Receipt | None = None
    """Of what was committed; none where no sample of the unit was scored."""
    samples: int = 0
    tokens: int = 0
    forward_s: float = 0.0
    """Waiting for the endpoint."""
    commit_s: float = 0.0
    refused: dict[bytes, str] = field(default_factory=dict)
    """Id → reason of the samples that the endpoint refuses."""
    failed: dict[str, int] = field(default_factory=dict)
    """Reason → samples that got no answer; a later run asks again."""
    stopped: str | None = None
    """The cap that left samples of the unit undone."""


class LedgerOwner:
    """The one owner of a run's ledger; made a Ray actor, whose methods run one at a time."""

    def __init__(self, url: str, budget: Budget) -> None:
        """Open the journal."""
        self._ledger = Ledger(Store(url), budget)

    def transact(self, batch: Batch) -> list[str | None]:
        """Journal a batch; see `Ledger.transact`."""
        return self._ledger.transact(batch)

    def standing(self) -> Standing:
        """Return where the run stands."""
        return self._ledger.standing()


class ApiScorer:
    """Scores units through an endpoint; made an async Ray actor."""

    def __init__(self, job: ApiJob, owner: Any) -> None:
        """`owner` is the handle of the run's `LedgerOwner`."""
        self._job = job
        self._owner = owner
        self._progress = 0

    async def load(self) -> dict[str, Any]:
        """Open everything; returns what the replica is, for events."""
        job, api = self._job, self._job.teacher.api

        async def transact(batch: Batch) -> list[str | None]:
            reasons: list[str | None] = await self._owner.transact.remote(batch)
            return reasons

        self._client = ApiClient(api, LedgerClient(transact))
        self._answers = AnswerStore(Store(job.dataset_url))
        self._samples = SampleSet.open(job.samples_url)
        self._writer = DatasetWriter.open(job.dataset_url, job.identity)
        return {"endpoint": api.base_url, "model": api.model}

    async def beat(self) -> int:
        """Return a number that rises with every answer."""
        return self._progress

    async def score(self, unit: WorkUnit, label: str) -> ApiReceipt:
        """Score what can be scored of a unit and commit it; a cap or a refusal leaves samples out."""
        result = ApiReceipt()
        start = time.perf_counter()
        batch = self._samples.read(unit.rows)
        samples = [batch.sample(n) for n in range(len(batch))]
        found = await asyncio.gather(*(self._sample(sample) for sample in samples), return_exceptions=True)
        done = self._sort(samples, found, result)
        result.forward_s = time.perf_counter() - start
        await self._client.ledger.settled()
        if done:
            start = time.perf_counter()
            rows = [unit.rows[n] for n in done]
            whole = unit_of(rows, self._samples.num_tokens, self._samples.sample_ids, self._job.identity.fingerprint)
            part = batch.take(done)
            targets = targets_of(part, [found[n] for n in done])  # type: ignore[misc]
            result.receipt = await asyncio.to_thread(self._writer.commit, whole.unit_id, part, targets, label)
            result.samples, result.tokens = len(done), part.num_tokens
            result.commit_s = time.perf_counter() - start
        return result

    def _sort(self, samples: Sequence[Sample], found: Sequence[Any], result: ApiReceipt) -> list[int]:
        """Return the places of the samples that were scored; the others are told by their reason."""
        failed: Counter[str] = Counter()
        done = []
        for place, item in enumerate(found):
            if isinstance(item, BudgetError):
                result.stopped = str(item)
            elif isinstance(item, SetAsideError):
                result.refused[samples[place].sample_id] = str(item)
            elif isinstance(item, GivenUpError):
                failed[str(item)] += 1
            elif isinstance(item, BaseException):
                raise item
            else:
                done.append(place)
        result.failed = dict(failed)
        return done

    async def _sample(self, sample: Sample) -> list[ScoredPositions]:
        return list(await asyncio.gather(*(self._document(ids) for ids, _ in documents_of(sample))))

    async def _document(self, ids: list[int]) -> ScoredPositions:
        api, method = self._job.teacher.api, self._job.method
        entries = self._job.identity.capture.top_k or 1
        request = scoring_request(ids, api.model, method, entries)
        key, answer = self._known(request)
        if answer is None:

            async def keep(reply: Reply) -> None:
                await self._answers.put(key, Answer(reply))

            try:
                answer = Answer(await self._client.ask(request, keep))
            except SetAsideError as error:
                answer = Answer(None, str(error))
                await self._answers.put(key, answer)
        self._progress += 1
        if answer.reply is None:
            raise SetAsideError(answer.set_aside)
        return scored_positions(answer.reply, method, ids, entries)

    def _known(self, request: Request) -> tuple[bytes, Answer | None]:
        """Return the answer on disk, or the key to keep one under; one asked once more is kept beside the first."""
        answer: Answer | None = None
        for index in count():
            key = request_key(request, endpoint_name(self._job.teacher.api), index)
            found = self._answers.get(key)
            if found is None:
                return key, None if self._job.retry_refused else answer
            answer = found
            if answer.reply is not None:
                return key, answer
        raise AssertionError("unreachable")
