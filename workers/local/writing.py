"""Has a fleet of local replicas write the completions that are not on disk yet. The driver's side; no torch."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from storage.errors import LecternError, WorkerError
from storage.samples import Int32Array
from storage.tokenizer import Tokenizer
from workers.api.answers import AnswerStore, request_key
from workers.api.config import GenerateConfig
from workers.api.generation import Author, chat_request
from workers.api.prompts import Prompt, prompt_ids
from workers.config import TeacherConfig
from workers.local.writing_rank import WritingJob, WritingRank, WritingReceipt, WritingUnit
from workers.loop import OnEvent, brief
from workers.resources import Machines


class WritingPlan(Sequence[WritingUnit]):
    """The completions that are missing, in units; read prompt by prompt, so that memory does not grow with them."""

    def __init__(
        self,
        prompts: Callable[[], Iterable[Prompt]],
        config: GenerateConfig,
        author: Author,
        tokenizer: Tokenizer,
        answers: AnswerStore,
    ) -> None:
        """Count. `prompts` gives the same ones each time; of `answers` those of now count.

        Raises:
            InputError: a prompt cannot be put to the model.
        """
        self._prompts, self._config, self._author = prompts, config, author
        self._tokenizer, self._answers = tokenizer, answers
        self.wanted = config.samples * sum(1 for _ in prompts())
        units = [(len(unit.keys), unit.num_tokens) for unit in self]
        self._num_units = len(units)
        self.missing = sum(count for count, _ in units)
        """Completions to be written."""
        self.tokens = sum(tokens for _, tokens in units)

    def __len__(self) -> int:
        return self._num_units

    def __getitem__(self, index: int) -> WritingUnit:  # type: ignore[override]
        raise TypeError("a plan of completions is read in order")

    def __iter__(self) -> Iterator[WritingUnit]:
        keys: list[bytes] = []
        prompts: list[Int32Array] = []
        longest = 0
        for key, ids in self._missing():
            longest_then = max(longest, len(ids))
            if keys and (len(keys) + 1) * (longest_then + self._config.max_tokens) > self._config.batch_tokens:
                yield self._unit(keys, prompts)
                keys, prompts, longest_then = [], [], len(ids)
            keys.append(key)
            prompts.append(ids)
            longest = longest_then
        if keys:
            yield self._unit(keys, prompts)

    def _missing(self) -> Iterator[tuple[bytes, Int32Array]]:
        seen: set[bytes] = set()
        for prompt in self._prompts():
            request = chat_request(prompt, self._config, self._author.model, None)
            keys = [request_key(request, self._author.version, index) for index in range(self._config.samples)]
            open_ = [key for key in keys if key not in self._answers and key not in seen]
            if open_:
                seen.update(open_)
                ids = prompt_ids(prompt, self._tokenizer)
                yield from ((key, ids) for key in open_)

    def _unit(self, keys: Sequence[bytes], prompts: Sequence[Int32Array]) -> WritingUnit:
        name = blake2b(b"".join(keys), digest_size=16, person=b"lectern.writing").hexdigest()
        tokens = sum(len(ids) + self._config.max_tokens for ids in prompts)
        return WritingUnit(name, tokens, tuple(keys), tuple(prompts))


@dataclass
class WritingResult:
    """What a fleet wrote."""

    answers: int = 0
    tokens: int = 0
    """Of the completions."""
    seconds: float = 0.0
    """Wall-clock time from the first ready replica to the last receipt."""
    failed_units: list[dict[str, Any]] = field(default_factory=list)
    replicas_lost: int = 0
    ranks: list[dict[str, Any]] = field(default_factory=list)

    def add(self, unit: WritingUnit, receipt: WritingReceipt) -> dict[str, Any]:
        """Count a unit; returns the facts of its `unit_done` event."""
        self.answers += receipt.answers
        self.tokens += receipt.tokens
        return {"answers": receipt.answers, "tokens": receipt.tokens}


def write_missing(
    plan: WritingPlan,
    teacher: TeacherConfig,
    config: GenerateConfig,
    model_folder: Path,
    answers_url: str,
    machines: Machines,
    on_event: OnEvent,
) -> WritingResult:
    """Write what is planned; Ray must be running. Each unit is on disk, below `answers_url`, when it is done.

    Events are those of `workers.loop`.

    Raises:
        InputError: the model or a setting is wrong, or no node can hold a rank.
        StorageError: the store failed.
        WorkerError: no replica could be started.
    """
    from workers.fleet import log_hint
    from workers.local_fleet import local_loop

    result = WritingResult()
    job = WritingJob(teacher, config, model_folder, answers_url)
    loop = local_loop(plan, plan.tokens, teacher, job, WritingRank, machines, on_event, result.add)
    try:
        loop.run()
    except LecternError:
        raise
    except Exception as error:
        raise WorkerError(f"the teacher did not start: {brief(error)}; {log_hint()}") from error
    finally:
        result.failed_units, result.replicas_lost, result.seconds = loop.failed_units, loop.replicas_lost, loop.seconds
        result.ranks = loop.first_report or []
    return result
