"""The loop on Ray Train: placement, checkpoint storage, restarts, and errors told in our own words."""

import contextlib
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from storage.errors import LecternError, WorkerError
from storage.object_store import Store
from trainer.checkpoint import newest
from trainer.collective import everyones, rebuild_error
from trainer.engine import Place
from trainer.loop import run_rank
from trainer.spec import LoopSpec


def fit(spec: LoopSpec) -> dict[str, Any]:
    """Run the loop on all ranks and return what rank 0 returned."""
    from ray.exceptions import RayActorError
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig

    from trainer.elastic import Trainer

    gpu, workers, least = spec.device == "gpu", spec.train.workers, spec.train.min_workers
    path, filesystem = checkpoint_storage(spec.run_dir)
    trainer = Trainer(
        ray_train_loop,
        train_loop_config={"spec": spec},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers if least is None else (least, workers),
            elastic_resize_monitor_interval_s=spec.train.grow_every_s,
            use_gpu=gpu,
            resources_per_worker={"CPU": 1, **({"GPU": 1} if gpu else {})},
            label_selector=dict(spec.labels) or None,
        ),
        run_config=RunConfig(
            name=spec.name,
            storage_path=path,
            storage_filesystem=filesystem,
            checkpoint_config=CheckpointConfig(num_to_keep=spec.train.keep_checkpoints),
            failure_config=FailureConfig(max_failures=spec.train.max_failures),
        ),
    )
    try:
        figures = trainer.fit().return_value
    except TrainingFailedError as error:
        raise _explained(error, spec) from error
    except RayActorError as error:
        # Only the end of this process frees what the controller held: Ray Train's own cleaner needs a dashboard.
        raise WorkerError(
            f"training {spec.name} ended because Ray Train's controller died. The newest checkpoint is kept in "
            f"{spec.run_dir}/checkpoints/{spec.name}; the same command goes on from there"
        ) from error
    if figures is None:
        raise WorkerError(f"training {spec.name} ended without a result; see Ray's logs")
    if "error" in figures:
        raise rebuild_error(*figures["error"])
    return dict(figures)


def checkpoint_storage(run_dir: str) -> tuple[str, Any]:
    """Return path and pyarrow filesystem of a run's checkpoints; none stands for local files.

    Object stores go through fsspec, so that checkpoints find the same endpoint and credentials as everything else.
    """
    url = f"{run_dir}/checkpoints"
    if "://" not in url:
        return url, None
    import fsspec
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    filesystem, path = fsspec.core.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
    return path, PyFileSystem(FSSpecHandler(filesystem))


def ray_train_loop(config: dict[str, Any]) -> dict[str, Any]:
    """Run one rank inside a Ray Train worker; the adapter between Ray Train and `run_rank`."""
    import ray.train

    spec: LoopSpec = config["spec"]
    context = ray.train.get_context()
    place = Place(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        local_rank=context.get_local_rank(),
        local_world_size=context.get_local_world_size(),
        device=spec.device,
    )

    def report(folder: Path, step: int) -> None:
        ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(str(folder)))

    def restore() -> AbstractContextManager[Any]:
        # Not the newest that Ray Train knows of: it takes seconds to note one that all ranks have written.
        found = newest(Store(spec.run_dir).child(f"checkpoints/{spec.name}")) if place.rank == 0 else None
        name = everyones(found and found[0])[0]
        if name is None:
            return contextlib.nullcontext()
        path, filesystem = checkpoint_storage(spec.run_dir)
        opened: AbstractContextManager[Any] = ray.train.Checkpoint(
            f"{path}/{spec.name}/{name}", filesystem
        ).as_directory()
        return opened

    def going() -> list[str]:
        info = ray.train.get_preemption_info()
        return [] if info is None else list(info.preempted_node_ids)

    return run_rank(spec, place, report, restore, going)


def _explained(error: Exception, spec: LoopSpec) -> LecternError:
    """Return the error of ours that ended a training, or a WorkerError that tells what did."""
    failures = getattr(error, "worker_failures", None) or {}
    for failure in failures.values():
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, LecternError):
                return cause
            cause = cause.__cause__ or cause.__context__
    first = next(iter(failures.items()), None)
    what = f"rank {first[0]}: {_last_line(first[1])}" if first else _last_line(error)
    return WorkerError(
        f"training {spec.name} failed {spec.train.max_failures + 1} times, at last with {what}. The newest checkpoint "
        f"is kept in {spec.run_dir}/checkpoints/{spec.name}; the same command goes on from there"
    )


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
