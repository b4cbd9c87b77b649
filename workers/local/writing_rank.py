"""The rank actor that writes completions, and what it is told. Torch is imported when the model is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from storage.object_store import Store
from storage.samples import Int32Array
from workers.api.answers import Answer, create_segment, segment_key
from workers.api.config import GenerateConfig
from workers.api.prices import Usage
from workers.api.reply import Reply
from workers.config import TeacherConfig
from workers.local.base_rank import BaseRank, RankPlace, folder_here


@dataclass(frozen=True, eq=False)
class WritingUnit:
    """Completions that are written side by side and put on disk together."""

    unit_id: str
    """Hex hash of the keys."""
    num_tokens: int
    """Of the prompts, and the most that the completions may have."""
    keys: tuple[bytes, ...]
    """What each answer is kept under; its draws follow from it."""
    prompts: tuple[Int32Array, ...]


@dataclass(frozen=True)
class WritingJob:
    """Everything that a replica needs to know to write completions."""

    teacher: TeacherConfig
    generate: GenerateConfig
    model_folder: Path
    """With the tokenizer in it."""
    answers_url: str

    @property
    def batch_tokens(self) -> int:
        """Return the limit of a batch."""
        return self.generate.batch_tokens

    def limited(self, batch_tokens: int) -> "WritingJob":
        """Return the job with another limit of a batch."""
        return replace(self, generate=self.generate.model_copy(update={"batch_tokens": batch_tokens}))


@dataclass(frozen=True)
class WritingReceipt:
    """What became of a unit."""

    answers: int
    tokens: int = 0
    """Of the completions."""
    batch_tokens: int = 0
    """Limit of a batch by the end of the unit: less than configured where memory ran out."""


class WritingRank(BaseRank):
    """A rank that continues prompts; rank 0 keeps the answers."""

    def load(self, job: WritingJob, place: RankPlace) -> Any:
        """Load and shard the model; returns a `sharding.ShardReport`. Raises InputError when it cannot be loaded."""
        from storage.tokenizer import Tokenizer
        from workers.local.ending import decoding_settings

        folder = folder_here(job.model_folder, job.teacher, job.teacher.revision)
        self.job = job
        report = self._load_model(job.teacher, folder, place)
        self.tokenizer = Tokenizer.load(folder)
        self.settings = decoding_settings(folder, job.generate, self.tokenizer)
        self.batch_tokens = job.batch_tokens
        self.store = Store(job.answers_url)
        self._written: dict[str, list[Answer]] = {}
        return report

    def score(self, unit: WritingUnit) -> Any:
        """Write the completions of a unit; all ranks of the replica must be asked, in the same order.

        Returns a list with a reference to this rank's answers, empty on rank 0, which keeps its own, and where the
        unit is on disk already.
        """
        if self._same_everywhere(self.place.rank == 0 and self.store.exists(segment_key(unit.unit_id))):
            return []
        rows = self._complete(unit)
        answers = [self._answer(row) for row in rows]
        if self.place.rank == 0:
            self._written[unit.unit_id] = answers
            return []
        import ray

        return [ray.put(answers)] if self._has_rows_of_its_own else []

    def commit(self, unit: WritingUnit, attempt: str, *boxes: Any) -> WritingReceipt:
        """Put a unit's answers on disk; asked of rank 0. `boxes` are what `score` returned."""
        own = self._written.pop(unit.unit_id, None)
        if own is None:
            return WritingReceipt(len(unit.keys))
        shares = [own, *_fetch([reference for box in boxes for reference in box])]
        answers = [shares[n % len(shares)][n // len(shares)] for n in range(len(unit.keys))]
        create_segment(self.store, unit.unit_id, list(zip(unit.keys, answers, strict=True)))
        self._advance()
        tokens = sum(a.reply.usage.output for a in answers if a.reply is not None and a.reply.usage is not None)
        return WritingReceipt(len(answers), tokens, self.batch_tokens)

    @property
    def _has_rows_of_its_own(self) -> bool:
        """Whether the ranks share the rows (ZeRO-3) instead of computing the same ones."""
        return self.job.teacher.sharding == "zero3" and self.place.num_ranks > 1

    def _complete(self, unit: WritingUnit) -> list[Any]:
        """Write this rank's share of a unit's completions; returns `decoding.Completion`s in order."""
        from workers.local.decoding import Completion

        number, count = (self.place.rank, self.place.num_ranks) if self._has_rows_of_its_own else (0, 1)
        rows = [
            Completion(p, key) for p, key in zip(unit.prompts[number::count], unit.keys[number::count], strict=True)
        ]
        open_ = [row for row in rows if self._has_room(row)]
        while True:
            try:
                self._write(open_, max(len(prompt) for prompt in unit.prompts), -(-len(unit.keys) // count))
                return rows
            except Exception as error:
                longest = max(len(prompt) for prompt in unit.prompts) + self.settings.max_tokens
                what, remedy = (
                    f"one completion of {longest} tokens",
                    "lower generate.max_tokens, or raise teacher.ranks",
                )
                self.batch_tokens = self._smaller(error, self.batch_tokens, longest, what, remedy)
                open_ = [row for row in rows if row.finish_reason is None]
                for row in open_:
                    row.restart()

    def _write(self, rows: Sequence[Any], longest: int, most_rows: int) -> None:
        """Bring rows to their end, as many at a time as the limit allows; every rank makes as many batches."""
        from workers.local.decoding import complete

        side_by_side = max(1, self.batch_tokens // longest)
        for first in range(0, most_rows, side_by_side):
            batch = rows[first : first + side_by_side]
            complete(self.model, batch, self.settings, self.tokenizer.decode, self.device, self._ranks(), self._advance)

    def _has_room(self, row: Any) -> bool:
        most = self.settings.max_positions
        if len(row.prompt) and (most is None or len(row.prompt) < most):
            return True
        row.finish_reason = "no_room"
        return False

    def _answer(self, row: Any) -> Answer:
        if row.finish_reason == "no_room":
            most = self.settings.max_positions
            return Answer(None, f"a prompt of {len(row.prompt)} tokens does not fit the teacher's {most} positions")
        if row.finish_reason == "not_finite":
            return Answer(None, "the teacher's logits are NaN or infinite")
        usage = Usage(len(row.prompt), len(row.ids), 0, 0)
        return Answer(Reply(text=row.text, reasoning=None, finish_reason=row.finish_reason, usage=usage))

    def _ranks(self) -> Any:
        """Return how the ranks keep in step."""
        import torch

        from workers.local.decoding import Ranks

        if self.place.num_ranks == 1:
            return Ranks()
        if not self._has_rows_of_its_own:

            def agree(ids: torch.Tensor) -> torch.Tensor:
                torch.distributed.broadcast(ids, 0)
                return ids

            return Ranks(agree=agree)

        def any_busy(busy: bool) -> bool:
            flag = torch.tensor([busy], dtype=torch.int32, device=self.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            return bool(flag.item())

        return Ranks(any_busy=any_busy)


def _fetch(references: Sequence[Any]) -> list[Any]:
    """Return other ranks' answers."""
    if not references:
        return []
    import ray

    return list(ray.get(list(references)))
