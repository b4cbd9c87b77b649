"""Runs the loop on real ranks with gloo and DeepSpeed but without Ray; checkpoints are merged into a plain folder."""

import contextlib
import multiprocessing
import shutil
import tempfile
from pathlib import Path
from queue import Empty
from typing import Any

from storage.object_store import Store
from storage.shard_source import Reading
from tests.trainer.tiny import QWEN2, TinyRun, train_config
from trainer.config import StudentConfig
from trainer.curriculum_config import CurriculumConfig
from trainer.metrics import parse_lines
from trainer.spec import LoopSpec

TIMEOUT_S = 150


def loop_spec(run: TinyRun, run_dir: Path, **train: Any) -> LoopSpec:
    """Return the spec of a tiny training; `train` replaces fields of the train section."""
    return LoopSpec(
        name="student",
        student=StudentConfig(config={**QWEN2, "attention_dropout": 0.1}),
        student_folder=None,
        train=train_config(**train),
        curriculum=CurriculumConfig(start={"general": 0.9, "domain": 0.1}, end={"general": 0.1, "domain": 0.9}),
        dataset_urls=(run.dataset_url,),
        identity=run.identity,
        samples_url=run.samples.url,
        run_dir=str(run_dir),
        device="cpu",
        reading=Reading(),
        facts={},
    )


def run_ranks(spec: LoopSpec, resume: Path | None = None, going: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run all ranks of a spec in processes of their own and return what rank 0 returned.

    `going` are nodes that are about to go, of which rank 0 alone asks in time.
    """
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as meeting:
        ranks = [
            context.Process(target=_rank, args=(spec, rank, f"file://{meeting}/store", resume, going, results))
            for rank in range(spec.train.workers)
        ]
        for process in ranks:
            process.start()
        try:
            found = dict(results.get(timeout=TIMEOUT_S) for _ in ranks)
        except Empty:
            raise AssertionError(f"ranks ended with {[process.exitcode for process in ranks]}") from None
        finally:
            for process in ranks:
                process.join(10)
                process.kill()
    return found[0]


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl."""
    return parse_lines(Store(run_dir).read("metrics.jsonl"))


def _rank(spec: LoopSpec, rank: int, meeting: str, resume: Path | None, going: tuple[str, ...], results: Any) -> None:
    import torch.distributed as dist

    from trainer import preemption
    from trainer.engine import Place
    from trainer.loop import run_rank

    size = spec.train.workers
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)

    def report(folder: Path, step: int) -> None:
        shutil.copytree(
            folder, Path(spec.run_dir) / "checkpoints" / "student" / f"checkpoint_{step:06d}", dirs_exist_ok=True
        )
        dist.barrier()

    def ask() -> tuple[str, ...]:
        dist.barrier()
        return going

    preemption.CHECK_EVERY_S = 0.0 if going and rank == 0 else 1e9
    place = Place(rank, size, rank, size, "cpu")
    figures = run_rank(spec, place, report, lambda: contextlib.nullcontext(resume), ask)
    results.put((rank, figures))
    dist.barrier()
    dist.destroy_process_group()
