"""The loop that every training rank runs: same order, same arithmetic, whatever the number of ranks."""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import storage.errors
from storage.errors import LecternError, WorkerError
from storage.heads import load_head
from storage.hidden import positions_per_state
from storage.identity import DatasetIdentity
from storage.sample_set import SampleSet
from storage.samples import UInt8Array
from storage.shard_source import Reading
from storage.union import DatasetUnion
from trainer import checkpoint
from trainer.config import CurriculumConfig, StudentConfig, TrainConfig
from trainer.curriculum import planned_shares
from trainer.engine import Device, Place, gradient_norm, prepare_process, set_learning_rate, start_engine
from trainer.export import export_model
from trainer.feed import Feed, StepData, channel_variance, step_loader
from trainer.losses.hidden import HiddenTransfer
from trainer.metrics import MetricsLog
from trainer.sampler import EMPTY_DIGEST, PlannedOrder, chain_digest
from trainer.schedules import learning_rate
from trainer.student import DistilModel, build_student, examine, freeze


@dataclass(frozen=True)
class LoopSpec:
    """Everything a rank needs to know; travels from the driver to the ranks."""

    name: str
    student: StudentConfig
    student_folder: str | None
    train: TrainConfig
    curriculum: CurriculumConfig
    dataset_urls: tuple[str, ...]
    """The run's own dataset first."""
    identity: DatasetIdentity
    samples_url: str
    run_dir: str
    device: Device
    reading: Reading
    facts: dict[str, Any]
    """What the run depends on, kept in every checkpoint."""
    resume: str | None = None
    """Name of the checkpoint below `<run_dir>/checkpoints/<name>` that this attempt starts from."""


VARIANCE_SAMPLES = 32
"""Samples that the teacher's channel variance is measured on."""

Report = Callable[[Path, int], None]
"""Hands a written checkpoint folder and its step over to storage; collective."""

Restore = Callable[[], Any]
"""Returns a context manager that gives the local folder of the checkpoint to resume from, or none."""


def run_rank(spec: LoopSpec, place: Place, report: Report, restore: Restore) -> dict[str, Any]:
    """Train, report checkpoints, export; the process group is up already.

    Returns:
        The run's figures on rank 0, an empty dict elsewhere; `{"error": [class, message]}` on every rank when the
        run cannot go on and trying again would not help.
    """
    prepare_process(place)
    try:
        with ExitStack() as stack:
            return _Rank(spec, place, stack).run(report, restore)
    except _StoppedError as stopped:
        return {"error": [type(stopped.error).__name__, str(stopped.error)]}


def planned_order(samples: SampleSet, curriculum: CurriculumConfig, train: TrainConfig) -> PlannedOrder:
    """Return the planned order of a run over the training samples; InputError when the mixture cannot be met."""
    ids = {name: samples.ids(samples.rows("train", name)) for name in samples.source_names}
    shares = planned_shares(curriculum, {name: len(pool) for name, pool in ids.items()}, train.steps)
    order = PlannedOrder(ids, shares, train.global_batch_size, train.seed)
    order.check_epochs(curriculum.max_epochs)
    return order


class _StoppedError(Exception):
    """Raised on all ranks alike, so that none is left waiting for another; anything else restarts the ranks."""

    def __init__(self, error: LecternError) -> None:
        super().__init__(str(error))
        self.error = error


class _Rank:
    """One rank's state over a run."""

    def __init__(self, spec: LoopSpec, place: Place, stack: ExitStack) -> None:
        self.spec, self.place, self.train, self._stack = spec, place, spec.train, stack
        with _together():
            self.dataset = DatasetUnion.open(spec.dataset_urls, spec.identity, spec.reading)
            self.order = planned_order(SampleSet.open(spec.samples_url), spec.curriculum, self.train)
            module = self._build()
        self.engine = start_engine(module, self.train, place)
        self.position = checkpoint.Position(
            step=0,
            digest=EMPTY_DIGEST.hex(),
            tokens=0,
            seconds=0.0,
            waited_s=0.0,
            world_size=place.world_size,
            config=spec.facts,
        )

    def _build(self) -> DistilModel:
        model = build_student(self.spec.student, self.spec.student_folder, self.spec.identity)
        freeze(model, self.spec.student.frozen)
        if self.train.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        loss = self.train.loss
        mapped = loss.hidden_map if loss.transfers else {}
        anatomy = examine(model, list(mapped.values()), self.train.zero_stage)
        transfer = None
        if mapped:
            variance = channel_variance(self.dataset, self.order.pool_start(VARIANCE_SAMPLES), list(mapped))
            widths = {layer: (anatomy.widths[name], len(variance[layer])) for layer, name in mapped.items()}
            with torch.random.fork_rng():
                torch.manual_seed(self.spec.student.seed)
                transfer = HiddenTransfer(widths, variance)
        weight = positions_per_state(self.spec.identity.capture.hidden_every)
        head = None
        if loss.distils and loss.exact:
            head = load_head(self.dataset.datasets[0].store, self.spec.identity.fingerprint).to(self.place.torch_device)
        return DistilModel(model, loss, anatomy.head_path, transfer, weight, head).train()

    def run(self, report: Report, restore: Restore) -> dict[str, Any]:
        """Run the steps that are left and export."""
        with restore() as folder:
            if folder is not None:
                self.position = checkpoint.load(self.engine, Path(folder), self.place.rank)
            dist.barrier()
        resumed_from = self.position.step
        log = self._stack.enter_context(
            MetricsLog(self.spec.run_dir, self.spec.name, resumed_from) if self.place.rank == 0 else nullcontext()
        )
        load = step_loader(self.dataset, self.order, self.train, self.place.rank, self.place.world_size)
        feed = self._stack.enter_context(Feed(load, resumed_from, self.train.steps))
        losses: dict[str, float] = {}
        for step in range(resumed_from, self.train.steps):
            losses = self._step(step, feed, log)
            if (step + 1) % self.train.checkpoint_every == 0 and step + 1 < self.train.steps:
                self._checkpoint(report)
        self._check_order()
        export_model(self.engine, self.spec.run_dir, self.spec.name, self.place.rank)
        return self._figures(losses, resumed_from) if self.place.rank == 0 else {}

    def _step(self, step: int, feed: Feed, log: MetricsLog | None) -> dict[str, float]:
        began, waited_before = time.perf_counter(), feed.waited_s
        data, counts = self._next(step, feed)
        set_learning_rate(self.engine, learning_rate(self.train, step))
        self.engine.module.at_step(step, self.train.steps)
        losses = self._optimize(step, data, counts.num_supervised)
        seconds = time.perf_counter() - began
        self.position = replace(
            self.position,
            step=step + 1,
            digest=chain_digest(bytes.fromhex(self.position.digest), counts.sample_id).hex(),
            tokens=self.position.tokens + counts.num_tokens,
            seconds=self.position.seconds + seconds,
            waited_s=self.position.waited_s + feed.waited_s - waited_before,
        )
        if log is not None and ((step + 1) % self.train.log_every == 0 or step + 1 == self.train.steps):
            log.write(self._line(step, losses, counts.num_tokens / seconds, (feed.waited_s - waited_before) / seconds))
        return losses

    def _next(self, step: int, feed: Feed) -> tuple[StepData, "_Counts"]:
        """Return this rank's data and what all ranks have together; a read error on one rank stops them all."""
        error: LecternError | None = None
        data = None
        try:
            data = feed.next()
        except LecternError as caught:
            error = caught
        counts = _gather_counts(data, self.train.global_batch_size // self.place.world_size, self.place)
        if data is None or counts.failed:
            raise _StoppedError(_first_error(error) or WorkerError(f"no rank could read step {step + 1}"))
        return data, counts

    def _optimize(self, step: int, data: StepData, num_supervised: int) -> dict[str, float]:
        """Run one optimizer step; the loss is normalised by the supervised tokens of all ranks and micro-batches."""
        # DeepSpeed averages gradients over ranks; undo it, so that the sum over all of them remains.
        factor = self.place.world_size / max(num_supervised, 1)
        sums = torch.zeros(4, dtype=torch.float64)
        bad: list[bytes] = []
        losses: dict[str, float] = {}
        norm: float | None = None
        for n, batch in enumerate(data.batches):
            total, terms = self.engine(batch.to(self.place.torch_device))
            self.engine.backward(total * factor, scale_wrt_gas=False)
            values = torch.cat([total.detach()[None], terms]).double().cpu()
            sums += values
            bad += batch.ids if not torch.isfinite(values).all() else []
            if n + 1 == len(data.batches):
                losses = self._reduce(step, sums, num_supervised, bad)
                norm = gradient_norm(self.engine)
            self.engine.step()
        losses["grad_norm"] = self._checked_norm(step, data, norm)
        return losses

    def _reduce(self, step: int, sums: Tensor, num_supervised: int, bad: list[bytes]) -> dict[str, float]:
        sums = sums.to(self.place.torch_device)
        dist.all_reduce(sums)
        if not torch.isfinite(sums).all():
            raise not_finite("the loss", step, bad)
        loss, cross_entropy, kl, hidden = (sums / max(num_supervised, 1)).tolist()
        return {"loss": loss, "ce": cross_entropy, "kl": kl, "hidden": hidden}

    def _checked_norm(self, step: int, data: StepData, before_step: float | None) -> float:
        value = float(self.engine.get_global_grad_norm() if before_step is None else before_step)
        # float16 meets overflows while its loss scale settles, and skips those steps by itself.
        if not np.isfinite(value) or value < 0:
            if self.train.dtype == "float16":
                return 0.0
            raise not_finite("the gradient norm", step, [sample for batch in data.batches for sample in batch.ids])
        return value

    def _line(self, step: int, losses: dict[str, float], tokens_per_s: float, waited: float) -> dict[str, Any]:
        names, size = self.order.sources, self.train.global_batch_size
        return {
            "step": step + 1,
            **losses,
            "lr": learning_rate(self.train, step),
            "weights": self.engine.module.weights(),
            "tokens_per_s": tokens_per_s,
            "data_wait_fraction": waited,
            "planned": dict(zip(names, self.order.shares[step].tolist(), strict=True)),
            "realised": dict(zip(names, (self.order.counts[step] / size).tolist(), strict=True)),
        }

    def _checkpoint(self, report: Report) -> None:
        with tempfile.TemporaryDirectory(prefix="lectern-checkpoint-") as folder:
            checkpoint.save(self.engine, Path(folder), self.place.rank, self.position)
            report(Path(folder), self.position.step)

    def _check_order(self) -> None:
        planned = self.order.digest().hex()
        if self.position.digest != planned:
            message = (
                f"the samples that were consumed ({self.position.digest}) are not those that were planned ({planned}); "
                "the checkpoint belongs to other samples: delete it and run again"
            )
            raise _StoppedError(WorkerError(message))

    def _figures(self, losses: dict[str, float], resumed_from: int) -> dict[str, Any]:
        model = self.engine.module.model
        return {
            **asdict(self.position),
            "losses": losses,
            "resumed_from": resumed_from,
            "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters()),
        }


@dataclass(frozen=True, eq=False)
class _Counts:
    """What all ranks read for one step."""

    failed: bool
    num_supervised: int
    num_tokens: int
    sample_id: UInt8Array  # [global batch, 16], in the planned order


def _gather_counts(data: StepData | None, num_samples: int, place: Place) -> _Counts:
    """Exchange counts and sample ids between the ranks; `data` is none on a rank that could not read."""
    mine = np.zeros(3 + 2 * num_samples, dtype=np.int64)
    if data is None:
        mine[0] = 1
    else:
        mine[1:3] = data.num_supervised, data.num_tokens
        mine[3:] = np.ascontiguousarray(data.sample_id).reshape(-1).view(np.int64)
    tensor = torch.from_numpy(mine).to(place.torch_device)
    parts = [torch.empty_like(tensor) for _ in range(place.world_size)]
    dist.all_gather(parts, tensor)
    table = np.stack([part.cpu().numpy() for part in parts])  # [ranks, 3 + 2 · samples]
    ids = table[:, 3:].reshape(place.world_size, num_samples, 2).transpose(1, 0, 2)  # rank r holds r, r + R, …
    return _Counts(
        failed=bool(table[:, 0].any()),
        num_supervised=int(table[:, 1].sum()),
        num_tokens=int(table[:, 2].sum()),
        sample_id=np.ascontiguousarray(ids).view(np.uint8).reshape(-1, 16),
    )


@contextmanager
def _together() -> Iterator[None]:
    """Let all ranks stop with the same error when one of them fails inside. Collective."""
    mine: LecternError | None = None
    try:
        yield
    except LecternError as error:
        mine = error
    first = _first_error(mine)
    if first is not None:
        raise _StoppedError(first)


def _first_error(mine: LecternError | None) -> LecternError | None:
    """Return the error of the first rank that has one, on every rank. Collective."""
    for named in _everyones(None if mine is None else (type(mine).__name__, str(mine))):
        if named is not None:
            return rebuild_error(*named)
    return None


def rebuild_error(name: str, message: str) -> LecternError:
    """Return the error of our tree that a rank has named."""
    kind = getattr(storage.errors, name, WorkerError)
    assert issubclass(kind, LecternError)
    return kind(message)


def not_finite(what: str, step: int, mine: list[bytes]) -> Exception:
    """Return the error that stops a run whose loss or gradient is not a number. Collective."""
    bad = [sample.hex() for part in _everyones(mine) for sample in part]
    shown = ", ".join(bad[:4]) + (f" and {len(bad) - 4} more" if len(bad) > 4 else "")
    return _StoppedError(
        WorkerError(
            f"{what} of step {step + 1} is not finite; samples {shown or 'unknown'}. The last checkpoint is kept: "
            "lower train.learning_rate or train.clip_norm, or train in float32, in another --run-dir"
        )
    )


def _everyones(mine: Any) -> list[Any]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone
