"""What the stages of one run share: config, run directory, progress, and what earlier stages found."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.config import RunConfig
from cluster.nodes import node_watch
from cluster.pricing import price_of_replica
from cluster.progress import Progress, Shown
from cluster.ray_session import RaySession, ray_session
from cluster.rundir import RunDir
from storage.identity import DatasetIdentity
from storage.sample_set import SampleSet
from storage.tokenizer import Tokenizer
from workers.model_folder import is_hub_name
from workers.resources import Machines


@dataclass
class StageOutcome:
    """What a stage reports when it ends; `skipped` when there was nothing left to do."""

    skipped: bool = False
    facts: dict[str, Any] = field(default_factory=dict)


class Workspace:
    """The state of one command. Later stages need the attributes that earlier ones fill."""

    tokenizer: Tokenizer
    samples: SampleSet
    model_folder: Path
    identity: DatasetIdentity

    def __init__(self, config: RunConfig, run: RunDir, progress: Progress) -> None:
        self.config = config
        self.run = run
        self.progress = progress
        self._stack = contextlib.ExitStack()
        self._ray: RaySession | None = None

    def __enter__(self) -> "Workspace":
        return self

    def __exit__(self, *_: object) -> None:
        self.close_ray()
        self.run.flush()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[StageOutcome]:
        """Time a stage and write its start and end to events.jsonl."""
        began = time.monotonic()
        self.run.event("stage_started", stage=name)
        outcome = StageOutcome()
        try:
            yield outcome
        except BaseException as error:
            self.run.event("stage_failed", stage=name, error=str(error) or type(error).__name__)
            raise
        seconds = round(time.monotonic() - began, 3)
        self.run.event("stage_finished", stage=name, seconds=seconds, skipped=outcome.skipped, **outcome.facts)

    def labels(self, stage: str) -> dict[str, str]:
        """Return the labels that nodes of a stage must carry; a Ray of one machine has none, and runs everything."""
        cluster = self.config.cluster
        return {} if cluster.joins is None else cluster.labels(stage)

    def machines(self, task: Shown) -> Machines:
        """Return where the ranks of a local teacher run; starts Ray."""
        session, cluster = self.ray(task), self.config.cluster
        price = price_of_replica(cluster, self.config.teacher.ranks)
        return Machines(session.device, self.labels("capture"), not session.local, price)

    def ray(self, task: Shown) -> RaySession:
        """Return a running Ray, started at the first call and kept until `close_ray`; `task` says so meanwhile."""
        if self._ray is None:
            task.note("starting Ray")
            teacher = self.config.teacher
            workers = [stage.train.workers for stage in self.config.chain()]
            num_ranks = max(teacher.ranks * teacher.replicas.max, *workers)
            self._ray = self._stack.enter_context(ray_session(self.config.cluster, num_ranks))
            self.run.event("ray_started", device=self._ray.device, logs=self._ray.logs, local=self._ray.local)
            if not self._ray.local:
                task.note("asking the nodes whether they reach the run directory and the dataset")
                self._stack.enter_context(node_watch(self.config.cluster, self.run.event))
                self._check_nodes(self._ray.device)
            task.note("")
        return self._ray

    def _check_nodes(self, device: str) -> None:
        """Find out before any work starts whether the nodes of a joined cluster see what the run names."""
        from cluster.placement import check_placement
        from cluster.reach import check_reach

        check_placement(self.config.cluster)
        config = self.config
        places = {"--run-dir": self.run.url, "cache.url": config.cache.url}
        if config.teacher.kind != "local" and config.budget.ledger is not None:
            places["budget.ledger"] = config.budget.ledger
        folders = {}
        if config.teacher.kind != "api" and not is_hub_name(config.teacher.name):
            folders[f"the teacher ({config.teacher.name})"] = str(self.model_folder)
        if config.student.path is not None and not is_hub_name(config.student.path):
            folders["student.path"] = str(Path(config.student.path).expanduser().absolute())
        bundle = {"CPU": 1.0, "GPU": 1.0} if device == "gpu" else {"CPU": 1.0}
        labels = config.cluster.labels("capture")
        nodes = check_reach(places, folders, bundle, config.teacher.startup_timeout_s, labels)
        self.run.event("nodes_reach", nodes=nodes)

    def close_ray(self) -> None:
        """Shut a local Ray down, or leave a joined one."""
        self._stack.close()
        self._ray = None
