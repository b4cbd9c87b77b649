"""What the stages of one run share: config, run directory, progress, and what earlier stages found."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.config import RunConfig
from cluster.progress import Progress, Shown
from cluster.ray_session import RaySession, ray_session
from cluster.rundir import RunDir
from storage.identity import DatasetIdentity
from storage.sample_set import SampleSet
from storage.tokenizer import Tokenizer


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

    def ray(self, task: Shown) -> RaySession:
        """Return a running Ray, started at the first call and kept until `close_ray`; `task` says so meanwhile."""
        if self._ray is None:
            task.note("starting Ray")
            teacher, train = self.config.teacher, self.config.train
            num_ranks = max(teacher.ranks * teacher.replicas.max, train.workers)
            self._ray = self._stack.enter_context(ray_session(self.config.cluster, num_ranks))
            self.run.event("ray_started", device=self._ray.device, logs=self._ray.logs, local=self._ray.local)
            task.note("")
        return self._ray

    def close_ray(self) -> None:
        """Shut a local Ray down, or leave a joined one."""
        self._stack.close()
        self._ray = None
