"""The loop that every training rank runs: same order, same arithmetic, whatever the number of ranks."""

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from storage.errors import LecternError, WorkerError
from storage.sample_set import SampleSet
from storage.union import DatasetUnion
from trainer import checkpoint
from trainer.assembly import build_module
from trainer.collective import StepCounts, StoppedError, first_error, gather_counts, together
from trainer.curriculum import planned_order
from trainer.engine import Place, peak_memory_bytes, prepare_process, set_learning_rate, start_engine
from trainer.export import export_model
from trainer.feed import Feed, StepData, step_loader
from trainer.flops import ModelFlops, peak_flops
from trainer.lora import is_adapter
from trainer.mixing import Mixer, apply, segments
from trainer.optimize import optimize
from trainer.preemption import Ask, PreemptionWatch, nobody_goes
from trainer.sampler import EMPTY_DIGEST, chain_digest
from trainer.schedules import learning_rate
from trainer.spec import LoopSpec
from trainer.trackers import RunLog

Report = Callable[[Path, int], None]
"""Hands a written checkpoint folder and its step over to storage; collective."""

Restore = Callable[[], Any]
"""Returns a context manager that gives the local folder of the checkpoint to resume from, or none."""


def run_rank(spec: LoopSpec, place: Place, report: Report, restore: Restore, ask: Ask = nobody_goes) -> dict[str, Any]:
    """Train, report checkpoints, export; the process group is up already. A node that `ask` names brings a checkpoint.

    Returns:
        The run's figures on rank 0, an empty dict elsewhere; `{"error": [class, message]}` on every rank when the
        run cannot go on and trying again would not help.
    """
    prepare_process(place)
    try:
        with ExitStack() as stack:
            return _Rank(spec, place, stack, PreemptionWatch(ask)).run(report, restore)
    except StoppedError as stopped:
        return {"error": [type(stopped.error).__name__, str(stopped.error)]}


class _Rank:
    """One rank's state over a run."""

    def __init__(self, spec: LoopSpec, place: Place, stack: ExitStack, preemption: PreemptionWatch) -> None:
        self.spec, self.place, self.train, self._stack = spec, place, spec.train, stack
        self._preemption, self._asks = preemption, False
        with together():
            self.dataset = DatasetUnion.open(spec.dataset_urls, spec.identity, spec.reading)
            samples, adaptive = SampleSet.open(spec.samples_url), spec.curriculum.adaptive
            if spec.identity.capture.classes:
                self.dataset.labels = samples.labels()
            self.order = planned_order(samples, spec.curriculum, self.train, self.dataset, spec.left_out, spec.earlier)
            decides = adaptive is not None and spec.mixing is None
            self.mixer = Mixer(adaptive, samples, self.dataset, self.train, place) if adaptive and decides else None
            self._module = build_module(spec, samples, self.dataset, self.order, place)
        self._flops, self._peak = ModelFlops.of(self._module.model), peak_flops(self.train, place)
        self.engine: Any = None
        self.position = checkpoint.Position(
            step=0,
            digest=EMPTY_DIGEST.hex(),
            tokens=0,
            seconds=0.0,
            waited_s=0.0,
            world_size=place.world_size,
            config=spec.facts,
        )

    def run(self, report: Report, restore: Restore) -> dict[str, Any]:
        """Run the steps that are left and export."""
        with restore() as folder:
            self._start(None if folder is None else Path(folder))
            dist.barrier()
        resumed_from = self.position.step
        log: RunLog | None = None
        if self.place.rank == 0:
            spec = self.spec
            log = self._stack.enter_context(
                RunLog(self.train.trackers, spec.run_dir, spec.name, resumed_from, spec.facts)
            )
        load = step_loader(
            self.dataset, self.order, self.train, self.place.rank, self.place.world_size, self.spec.aligner
        )
        apply(self.order, self.spec.mixing or self.position.mixing)
        losses: dict[str, float] = {}
        for first, last in segments(resumed_from, self.train.steps, self.mixer.every if self.mixer else None):
            if self.mixer is not None and first % self.mixer.every == 0 and first:
                self._mix(first, self.mixer)
            with Feed(load, first, last) as feed:
                for step in range(first, last):
                    losses = self._step(step, feed, log)
                    # Every rank must ask, whatever is due besides.
                    warned = self._asks and self._preemption.fresh()
                    if ((step + 1) % self.train.checkpoint_every == 0 or warned) and step + 1 < self.train.steps:
                        self._checkpoint(report)
        self._check_order()
        export_model(self.engine, self.spec.run_dir, self.spec.name, self.place.rank, self.spec.student.lora)
        return self._figures(losses, resumed_from) if self.place.rank == 0 else {}

    def _start(self, folder: Path | None) -> None:
        """Start the engine, from a checkpoint where there is one. Collective."""
        universal = folder is not None and checkpoint.needs_universal(folder, self.place.world_size)
        self.engine = start_engine(self._module, self.train, self.place, universal)
        if folder is not None:
            with together():
                self.position = checkpoint.load(self.engine, folder, self.place, self.train.seed)
        if self._module.gradients is not None:
            self._module.gradients.squares |= self.position.gradients

    def _mix(self, step: int, mixer: Mixer) -> None:
        """Decide on the mixture from a step on, unless the checkpoint holds the decision."""
        if all(decision["step"] != step for decision in self.position.mixing):
            decision = mixer.decide(self.engine, self.order, step).to_json()
            self.position = replace(self.position, mixing=[*self.position.mixing, decision])
            apply(self.order, [decision])

    def _step(self, step: int, feed: Feed, log: RunLog | None) -> dict[str, float]:
        began, waited_before = time.perf_counter(), feed.waited_s
        data, counts = self._next(step, feed)
        set_learning_rate(self.engine, learning_rate(self.train, step))
        self.engine.module.at_step(step, self.train.steps)
        losses = optimize(self.engine, self.train, self.place, step, data, counts.num_supervised)
        gradients = self._module.gradients
        if gradients is not None:
            losses = gradients.observe(step, losses)
        seconds, waited = time.perf_counter() - began, feed.waited_s - waited_before
        self.position = replace(
            self.position,
            step=step + 1,
            digest=chain_digest(bytes.fromhex(self.position.digest), counts.sample_id).hex(),
            tokens=self.position.tokens + counts.num_tokens,
            own_tokens=self.position.own_tokens + counts.num_own_tokens,
            seconds=self.position.seconds + seconds,
            waited_s=self.position.waited_s + waited,
            gradients={} if gradients is None else dict(gradients.squares),
        )
        if log is not None and ((step + 1) % self.train.log_every == 0 or step + 1 == self.train.steps):
            log.write(self._line(step, losses, counts, seconds, waited))
        return losses

    def _next(self, step: int, feed: Feed) -> tuple[StepData, StepCounts]:
        """Return this rank's data and what all ranks have together; a read error on one rank stops them all."""
        error: LecternError | None = None
        data = None
        try:
            data = feed.next()
        except LecternError as caught:
            error = caught
        due = self._preemption.is_due()
        counts = gather_counts(data, self.train.global_batch_size // self.place.world_size, self.place, due)
        self._asks = counts.due
        if data is None or counts.failed:
            raise StoppedError(first_error(error) or WorkerError(f"no rank could read step {step + 1}"))
        return data, counts

    def _line(
        self, step: int, losses: dict[str, float], counts: StepCounts, seconds: float, waited: float
    ) -> dict[str, Any]:
        names, size = self.order.sources, self.train.global_batch_size
        flops = self._flops.step(counts.num_own_tokens, counts.num_supervised, size)
        return {
            "step": step + 1,
            **losses,
            "lr": learning_rate(self.train, step),
            "weights": self.engine.module.weights(),
            "seconds": seconds,
            "tokens_per_s": counts.num_own_tokens / seconds,
            "mfu": None if self._peak is None else flops / seconds / self._peak,
            "data_wait_fraction": waited / seconds,
            "world_size": self.place.world_size,
            "peak_memory_bytes": peak_memory_bytes(self.place),
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
            raise StoppedError(WorkerError(message))

    def _figures(self, losses: dict[str, float], resumed_from: int) -> dict[str, Any]:
        own = [p for name, p in self.engine.module.model.named_parameters() if not is_adapter(name)]
        return {
            **asdict(self.position),
            "losses": losses,
            "resumed_from": resumed_from,
            "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in own),
        }
