"""Feeds a fleet of teacher replicas until every sample asked for is in the dataset.

The manifests are the only durable state: the coordinator may die at any moment, and the next one plans again from what
is missing. Work in flight is bounded; nothing bigger than a receipt comes through here.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from storage.config import CacheConfig
from storage.errors import LecternError, WorkerError
from storage.identity import DatasetIdentity
from storage.sample_set import SampleSet
from storage.samples import Int64Array
from workers.config import TeacherConfig
from workers.fleet import log_hint
from workers.local.rank import CaptureJob, Rank, UnitReceipt
from workers.local_fleet import local_loop
from workers.loop import OnEvent, brief
from workers.metrics import FleetMetrics
from workers.model_folder import model_facts
from workers.resources import ANY_CPU, Machines
from workers.result import CaptureResult
from workers.units import WorkUnit
from workers.work import plan_work


def capture(
    teacher: TeacherConfig,
    cache: CacheConfig,
    model_folder: Path,
    samples: SampleSet,
    rows: Sequence[int] | Int64Array,
    identity: DatasetIdentity,
    machines: Machines = ANY_CPU,
    on_event: OnEvent | None = None,
    rank_class: type[Rank] = Rank,
) -> CaptureResult:
    """Score the samples at `rows` that the dataset lacks; Ray must be running.

    Args:
        machines: where the ranks run.
        on_event: called in this process with `{event: …}` dicts: `single_writer`, `units_planned`, and those of
            `workers.loop`.
        rank_class: the actor class of a rank; another one may score in another way.

    Raises:
        InputError: the model, the dataset or a setting is wrong, or no node can hold a rank.
        StorageError: the store failed.
        WorkerError: no replica could be started, or the teacher refuses too many samples.
    """
    notify = on_event or (lambda event: None)
    with plan_work(teacher, cache, samples, rows, identity, notify, model_facts(model_folder).vocab_size) as work:
        result = CaptureResult(reused_samples=work.reused, refused=dict(work.refused.reasons))
        if not len(work.units):
            return result
        job = CaptureJob(teacher, model_folder, samples.url, cache.url, identity)
        metrics = FleetMetrics()

        def tell(event: dict[str, Any]) -> None:
            metrics.take(event)
            notify(event)

        def on_done(unit: WorkUnit, receipt: UnitReceipt) -> dict[str, Any]:
            work.refused.add(receipt.refused)
            return result.add(unit, receipt)

        units = work.in_any_order()
        loop = local_loop(units, work.units.tokens, teacher, job, rank_class, machines, tell, on_done)
        try:
            result.run(loop, work.refused.reasons)
        except LecternError:
            raise
        except Exception as error:
            raise WorkerError(
                f"the teacher did not start, {teacher.max_attempts} times in a row: {brief(error)}; a rank that dies "
                f"while loading is often out of memory: {log_hint()}, or raise teacher.ranks"
            ) from error
        return result
