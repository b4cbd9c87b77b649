"""The rank actor of a capture: it holds one shard of a teacher, scores units and commits them."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from storage.identity import DatasetIdentity
from storage.object_store import Store
from storage.sample_set import SampleSet
from storage.samples import SampleBatch
from storage.targets import TargetBatch
from storage.writer import DatasetWriter, Receipt
from workers.config import TeacherConfig
from workers.local.base_rank import BaseRank, RankPlace, folder_here
from workers.units import WorkUnit, unit_of

NOT_FINITE = "the teacher's logits are NaN or infinite; teacher.dtype float32 may help"
"""Why a sample is refused here."""


@dataclass(frozen=True)
class CaptureJob:
    """Everything a replica needs to know to score units into a dataset."""

    teacher: TeacherConfig
    model_folder: Path
    samples_url: str
    dataset_url: str
    identity: DatasetIdentity

    @property
    def batch_tokens(self) -> int:
        """Return the limit of a batch."""
        return self.teacher.batch_tokens

    def limited(self, batch_tokens: int) -> "CaptureJob":
        """Return the job with another limit of a batch."""
        return replace(self, teacher=self.teacher.model_copy(update={"batch_tokens": batch_tokens}))


@dataclass(frozen=True)
class UnitReceipt:
    """What became of a unit and what it took, in seconds."""

    receipt: Receipt | None
    """Of what was committed; none where the teacher refuses all of the unit's samples."""
    scored: bool = True
    """False where the dataset held it already, so that nothing was done."""
    forward_s: float = 0.0
    selection_s: float = 0.0
    commit_s: float = 0.0
    """Merging, encoding and writing."""
    padded_tokens: int = 0
    """Tokens of the forward passes, padding included."""
    batch_tokens: int = 0
    """Limit of a batch by the end of the unit: less than configured where memory ran out."""
    refused: Mapping[bytes, str] = field(default_factory=dict)
    """Id → reason of the samples that are left out."""


@dataclass(frozen=True, eq=False)
class Scored:
    """A unit between scoring and commit."""

    samples: SampleBatch
    part: Any
    """Rank 0's `scoring.ScoredPart`."""
    padded_tokens: int = 0
    batch_tokens: int = 0


class Rank(BaseRank):
    """A rank that scores samples."""

    def __init__(self) -> None:
        super().__init__()
        self._scored: dict[str, Scored] = {}
        """Units that this rank has scored and not committed yet; of rank 0 only."""
        self._found: dict[str, Receipt] = {}
        """Units that it was asked to score and found committed, until it is asked to commit them; of rank 0 only."""

    def load(self, job: CaptureJob, place: RankPlace) -> Any:
        """Load and shard the model; returns a `sharding.ShardReport`.

        Raises:
            InputError: the model cannot be loaded or a layer to capture does not exist.
        """
        job = replace(job, model_folder=folder_here(job.model_folder, job.teacher, job.identity.teacher.revision))
        self.job = job
        capture = job.identity.capture

        def inspect(model: Any) -> None:
            from storage.heads import FINAL, save_head
            from workers.local.head import output_head
            from workers.local.hooks import attention_module, check_layers

            check_layers(model, capture.hidden, job.teacher.sharding == "tensor_parallel" and job.teacher.ranks > 1)
            for layer in capture.attention:
                attention_module(model, layer)
            if place.rank == 0 and FINAL in capture.hidden:
                head = output_head(model, job.identity.tokenizer.vocab_size)
                save_head(Store(job.dataset_url), head, job.identity.fingerprint)

        eager = "eager" if capture.attention else None
        report = self._load_model(job.teacher, job.model_folder, place, eager, inspect)
        self.settings = scoring_settings(job)
        self.samples = SampleSet.open(job.samples_url)
        self.writer = DatasetWriter.open(job.dataset_url, job.identity)
        return report

    def score(self, unit: WorkUnit) -> Any:
        """Score this rank's part of a unit; all ranks of the replica must be asked, in the same order.

        Returns a list with a reference to its `scoring.ScoredPart`, empty on rank 0, which keeps its own, and where
        the dataset holds the unit already.
        """
        from workers.local.batching import padded_tokens
        from workers.local.scoring import score_part

        if self._is_committed(unit):
            return []
        samples = self.samples.read(unit.rows)
        rank, num_ranks = self.place.rank, self.place.num_ranks
        while True:
            try:
                part = score_part(self.model, samples, self.settings, rank, num_ranks, self.device, self._advance)
                break
            except Exception as error:
                longest = int(samples.lengths().max())
                what, remedy = f"one window of {longest} tokens", "shorten data.window_tokens, or raise teacher.ranks"
                limit = self._smaller(error, self.settings.batch_tokens, longest, what, remedy)
                self.settings = replace(self.settings, batch_tokens=limit)
        if rank == 0:
            limit = self.settings.batch_tokens
            self._scored[unit.unit_id] = Scored(samples, part, padded_tokens(samples.lengths(), limit), limit)
            return []
        import ray

        return [ray.put(part)]

    def commit(self, unit: WorkUnit, attempt: str, *boxes: Any) -> UnitReceipt:
        """Put the ranks' parts together and commit the unit; asked of rank 0. `boxes` are what `score` returned."""
        start = time.perf_counter()
        found = self._scored.pop(unit.unit_id, None)
        if found is None:
            before = self._found.pop(unit.unit_id, None) or self.writer.committed(unit.unit_id)
            assert before is not None, "a unit that rank 0 has not scored was committed before"
            return UnitReceipt(before, scored=False)
        samples = found.samples
        parts = [found.part, *_fetch([reference for box in boxes for reference in box])]
        scored, targets = self._merge(samples, parts)
        receipt = self._commit(unit, samples, scored, targets, attempt) if targets is not None else None
        self._advance()
        return UnitReceipt(
            receipt=receipt,
            forward_s=max(part.forward_s for part in parts),
            selection_s=max(part.selection_s for part in parts),
            commit_s=time.perf_counter() - start,
            padded_tokens=found.padded_tokens,
            batch_tokens=found.batch_tokens,
            refused=dict.fromkeys((samples.ids()[n] for n in set(range(len(samples))) - set(scored)), NOT_FINITE),
        )

    def _commit(
        self, unit: WorkUnit, samples: SampleBatch, scored: Sequence[int], targets: TargetBatch, attempt: str
    ) -> Receipt:
        """Commit those samples of a unit that were scored; a unit that lacks some goes by another name."""
        if len(scored) < len(samples):
            whole, rows = self.samples, [unit.rows[n] for n in scored]
            unit = unit_of(rows, whole.num_tokens, whole.sample_ids, self.job.identity.fingerprint)
            samples = samples.take(scored)
        return self.writer.commit(unit.unit_id, samples, targets, attempt)

    def _merge(self, samples: SampleBatch, parts: Sequence[Any]) -> tuple[Sequence[int], TargetBatch | None]:
        """Return which samples of a unit were scored, rising, and their targets; none where it is none of them."""
        from workers.local.scoring import merge_parts, scored_samples

        scored = scored_samples(len(samples), parts)
        return scored, merge_parts(samples, parts, self.settings) if scored else None

    def _is_committed(self, unit: WorkUnit) -> bool:
        """Tell on every rank whether the dataset holds a unit."""
        found = self.writer.committed(unit.unit_id) if self.place.rank == 0 else None
        if found is not None:
            self._found[unit.unit_id] = found
        return self._same_everywhere(found is not None)


def _fetch(references: Sequence[Any]) -> list[Any]:
    """Return other ranks' parts."""
    if not references:
        return []
    import ray

    return list(ray.get(list(references)))


def scoring_settings(job: CaptureJob) -> Any:
    """Return the `scoring.ScoringSettings` of a job."""
    from storage.projection import load_projection
    from workers.local.scoring import ScoringSettings
    from workers.local.selection import SelectionSettings

    capture, vocab_size = job.identity.capture, job.identity.num_targets
    return ScoringSettings(
        selection=SelectionSettings(
            kind=capture.kind,
            top_k=min(capture.top_k or 1, vocab_size),
            draws=capture.draws or 0,
            vocab_size=vocab_size,
        ),
        seed=capture.seed or 0,
        draw_sets=capture.draw_sets,
        hidden=tuple(capture.hidden),
        hidden_dtype=capture.hidden_dtype or "float16",
        batch_tokens=job.teacher.batch_tokens,
        data_parallel=job.teacher.sharding == "zero3" and job.teacher.ranks > 1,
        hidden_every=capture.hidden_every,
        attention=tuple(capture.attention),
        task=capture.task,
        projection=load_projection(Store(job.dataset_url), capture.projection) if capture.projection else None,
    )
