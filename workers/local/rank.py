"""The rank actor: one process that holds one shard of a teacher, scores units and commits them."""

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from storage.errors import WorkerError
from storage.identity import DatasetIdentity
from storage.object_store import Store
from storage.sample_set import SampleSet
from storage.samples import SampleBatch
from storage.targets import TargetBatch
from storage.writer import DatasetWriter, Receipt
from workers.config import TeacherConfig
from workers.units import WorkUnit


@dataclass(frozen=True)
class RankPlace:
    """Where a rank stands in its replica."""

    rank: int
    num_ranks: int
    local_rank: int
    """Number of the rank among those of its node."""
    num_local_ranks: int
    master_address: str
    master_port: int
    device: str
    """`cpu` or `cuda`."""
    threads: int
    """CPU threads for this rank."""


@dataclass(frozen=True)
class CaptureJob:
    """Everything a replica needs to know to score units into a dataset."""

    teacher: TeacherConfig
    model_folder: Path
    samples_url: str
    dataset_url: str
    identity: DatasetIdentity


@dataclass(frozen=True)
class UnitReceipt:
    """What became of a unit and what it took, in seconds."""

    receipt: Receipt
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


class BatchTooLargeError(WorkerError):
    """A batch ran out of memory on a replica of several ranks, which cannot go on; a new one takes smaller batches."""


@dataclass(frozen=True, eq=False)
class Scored:
    """A unit between scoring and commit."""

    samples: SampleBatch
    part: Any
    """Rank 0's `scoring.ScoredPart`."""
    padded_tokens: int = 0
    batch_tokens: int = 0


class Rank:
    """One rank of a replica, made a Ray actor by `workers.fleet`.

    `load` and `score` run one at a time; `commit` runs beside them, so that a unit is encoded and uploaded while the
    next one is scored; `beat` answers at any time.
    """

    def __init__(self) -> None:
        self._progress = 0
        self._scored: dict[str, Scored] = {}
        """Units that this rank has scored and not committed yet; of rank 0 only."""

    def beat(self) -> int:
        """Return a number that rises with every batch and every commit."""
        return self._progress

    def address(self) -> tuple[str, str, int, int]:
        """Return this node's id, its address, a port that is free on it now, and its number of CPUs."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            port = int(probe.getsockname()[1])
        node = ray.get_runtime_context().get_node_id()
        return node, ray.util.get_node_ip_address(), port, len(os.sched_getaffinity(0))

    def load(self, job: CaptureJob, place: RankPlace) -> Any:
        """Load and shard the model; returns a `sharding.ShardReport`.

        Raises:
            InputError: the model cannot be loaded or a layer to capture does not exist.
        """
        _set_environment(place)
        import torch

        torch.set_num_threads(place.threads)
        from storage.heads import FINAL, save_head
        from workers.local.fit import check_fit, host_free_bytes, memory_need
        from workers.local.head import output_head
        from workers.local.hooks import attention_module, check_layers
        from workers.local.memory import keep_freed_memory
        from workers.local.sharding import load_model, shard_model
        from workers.model_folder import resolve_model

        keep_freed_memory()
        if not job.model_folder.is_dir():
            # The driver named a folder of its own node; the hub gives this node the same commit.
            job = replace(job, model_folder=resolve_model(job.teacher.name, job.identity.teacher.revision))
        self.job, self.place = job, place
        self.device = torch.device(place.device)
        if place.num_ranks > 1:
            import deepspeed

            if job.teacher.sharding != "tensor_parallel":
                # A shared-memory collective that only tensor parallelism uses; compiling it takes most of a minute.
                deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            deepspeed.init_distributed(dist_backend="nccl" if place.device == "cuda" else "gloo", verbose=False)
        capture = job.identity.capture
        device_free = torch.cuda.mem_get_info()[0] if self.device.type == "cuda" else None
        need = memory_need(job.model_folder, job.teacher)
        check_fit(need, job.teacher, host_free_bytes(), device_free, place.num_local_ranks)
        model = load_model(job.model_folder, job.teacher, self.device, "eager" if capture.attention else None)
        check_layers(model, capture.hidden)
        for layer in capture.attention:
            attention_module(model, layer)
        if place.rank == 0 and FINAL in capture.hidden:
            head = output_head(model, job.identity.tokenizer.vocab_size)
            save_head(Store(job.dataset_url), head, job.identity.fingerprint)
        self.model, report = shard_model(model, job.teacher, place.rank)
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
                self._take_smaller_batches(error, int(samples.lengths().max()))
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
            before = self.writer.committed(unit.unit_id)
            assert before is not None, "a unit that rank 0 has not scored was committed before"
            return UnitReceipt(before, scored=False)
        samples = found.samples
        parts = [found.part, *_fetch([reference for box in boxes for reference in box])]
        receipt = self.writer.commit(unit.unit_id, samples, self._merge(samples, parts), attempt)
        self._advance()
        return UnitReceipt(
            receipt=receipt,
            forward_s=max(part.forward_s for part in parts),
            selection_s=max(part.selection_s for part in parts),
            commit_s=time.perf_counter() - start,
            padded_tokens=found.padded_tokens,
            batch_tokens=found.batch_tokens,
        )

    def _merge(self, samples: SampleBatch, parts: Sequence[Any]) -> TargetBatch:
        from workers.local.scoring import merge_parts

        return merge_parts(samples, parts, self.settings)

    def _advance(self) -> None:
        self._progress += 1

    def _take_smaller_batches(self, error: Exception, longest: int) -> None:
        """Halve the batches from now on when memory ran out; raise anything else, and what cannot be halved."""
        import gc

        import torch

        from workers.local.memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise error
        before = self.settings.batch_tokens
        if before <= longest:
            raise WorkerError(
                f"one window of {longest} tokens runs out of memory on rank {self.place.rank} ({_first_line(error)}); "
                "shorten data.window_tokens, or raise teacher.ranks"
            ) from error
        if self.place.num_ranks > 1:
            raise BatchTooLargeError(f"a batch of {before} tokens runs out of memory: {_first_line(error)}") from error
        self.settings = replace(self.settings, batch_tokens=before // 2)
        error.__traceback__ = None  # it holds the tensors of the failed batch
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _is_committed(self, unit: WorkUnit) -> bool:
        """Tell whether the dataset holds a unit; all ranks give rank 0's answer, since they must do the same."""
        import torch

        found = self.place.rank == 0 and self.writer.committed(unit.unit_id) is not None
        if self.place.num_ranks == 1:
            return found
        answer = torch.tensor([found], dtype=torch.int32, device=self.device)
        torch.distributed.broadcast(answer, 0)
        return bool(answer.item())


def _fetch(references: Sequence[Any]) -> list[Any]:
    """Return other ranks' parts."""
    if not references:
        return []
    import ray

    return list(ray.get(list(references)))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def scoring_settings(job: CaptureJob) -> Any:
    """Return the `scoring.ScoringSettings` of a job."""
    from storage.projection import load_projection
    from workers.local.scoring import ScoringSettings
    from workers.local.selection import SelectionSettings

    capture, vocab_size = job.identity.capture, job.identity.tokenizer.vocab_size
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
        projection=load_projection(Store(job.dataset_url), capture.projection) if capture.projection else None,
    )


def _set_environment(place: RankPlace) -> None:
    """Tell torch.distributed and DeepSpeed where this rank stands, before either is imported."""
    on_cpu = place.device == "cpu"
    os.environ.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.num_ranks),
        # Ray shows each actor its own GPU alone, which therefore is number 0.
        LOCAL_RANK=str(place.local_rank if on_cpu else 0),
        # DeepSpeed's CPU collectives crash without LOCAL_SIZE.
        LOCAL_SIZE=str(place.num_local_ranks),
        LOCAL_WORLD_SIZE=str(place.num_local_ranks),
        MASTER_ADDR=place.master_address,
        MASTER_PORT=str(place.master_port),
    )
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
