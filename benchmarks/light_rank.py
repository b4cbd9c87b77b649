"""Ranks without a model, for measuring and breaking the fleet around them: scoring is a declared wait per token.

Everything else is the real thing: samples are read, rows are encoded and committed, heartbeats are answered. Targets
follow from the tokens by a formula, so that what lies in the dataset can be checked row by row.
"""

import json
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from storage.config import CacheConfig
from storage.identity import CaptureIdentity, DatasetIdentity, TeacherIdentity, TokenizerIdentity
from storage.sample_set import SampleSet
from storage.samples import SampleBatch, offsets_of
from storage.targets import TargetBatch
from storage.writer import DatasetWriter
from workers.config import TeacherConfig
from workers.local.base_rank import RankPlace
from workers.local.rank import CaptureJob, Rank, Scored
from workers.resources import Machines
from workers.units import WorkUnit

TOP_K = 4
WAIT_S = "LECTERN_LIGHT_WAIT_S"
"""Seconds that each token takes, in the environment of the ranks."""
SLOW_SHARE = "LECTERN_LIGHT_SLOW_SHARE"
"""Share of the ranks that take eight times as long."""
BATCH_TOKENS = 100
"""After so many tokens a rank has made progress."""


@dataclass(frozen=True)
class LightReport:
    """What a rank says once it is loaded."""

    rank: int
    node: str
    """Id of the Ray node that it runs on."""
    parameters_held: int = 0
    parameters_total: int = 0
    replicated: tuple[str, ...] = ()


@dataclass(frozen=True)
class LightPart:
    """A unit's time on one rank."""

    forward_s: float
    selection_s: float = 0.0


class LightRank(Rank):
    """A rank that waits instead of computing; it leaves a note under its process id in the folder of the teacher."""

    def load(self, job: CaptureJob, place: RankPlace) -> Any:
        """Open samples and dataset."""
        self.job, self.place = job, place
        self.wait_s = float(os.environ.get(WAIT_S, "0.001"))
        if random.random() < float(os.environ.get(SLOW_SHARE, "0")):
            self.wait_s *= 8
        self.samples = SampleSet.open(job.samples_url)
        self.writer = DatasetWriter.open(job.dataset_url, job.identity)
        self.note = {"rank": place.rank, "replica": f"{place.master_address}:{place.master_port}", "node": node_id()}
        self._leave_note()
        return LightReport(place.rank, self.note["node"])

    def score(self, unit: WorkUnit) -> Any:
        """Wait as long as the unit's tokens take."""
        start = time.perf_counter()
        if self.place.rank == 0 and self.writer.committed(unit.unit_id) is not None:
            return []
        if "first_unit_at" not in self.note:
            self.note["first_unit_at"] = time.time()
            self._leave_note()
        samples = self.samples.read(unit.rows)
        left = unit.num_tokens
        while left > 0:
            time.sleep(min(left, BATCH_TOKENS) * self.wait_s)
            left -= BATCH_TOKENS
            self._advance()
        if self.place.rank == 0:
            self._scored[unit.unit_id] = Scored(samples, LightPart(time.perf_counter() - start))
        return []

    def _leave_note(self) -> None:
        (self.job.model_folder / f"rank-{os.getpid()}.json").write_text(json.dumps(self.note))

    def _merge(self, samples: SampleBatch, parts: Sequence[Any]) -> tuple[Sequence[int], TargetBatch]:
        return range(len(samples)), light_targets(samples, self.job.identity.tokenizer.vocab_size)


def node_id() -> str:
    """Return the id of this process's Ray node."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def light_targets(samples: SampleBatch, vocab_size: int) -> TargetBatch:
    """Return top-4 targets that follow from the tokens."""
    truth = samples.tokens[samples.supervised].astype(np.int64)
    ids = (truth[:, None] + np.arange(TOP_K) * 3) % vocab_size
    probability = np.array([0.5, 0.2, 0.1, 0.05])
    return TargetBatch(
        offsets=offsets_of(samples.num_supervised()),
        count=np.full(len(truth), TOP_K, dtype=np.int32),
        id=ids.astype(np.int32).reshape(-1),
        logprob=np.tile(np.log(probability), len(truth)).astype(np.float16),
        draws=None,
        tail_mass=np.full(len(truth), 0.15, dtype=np.float16),
        teacher_nll=np.full(len(samples), 0.7, dtype=np.float32),
        teacher_entropy=np.full(len(samples), 1.2, dtype=np.float32),
    )


def light_identity(vocab_size: int) -> DatasetIdentity:
    """Return the identity of a dataset of such targets."""
    return DatasetIdentity(
        teacher=TeacherIdentity(name="light", architecture="light", weights="0" * 64, parameters=0),
        tokenizer=TokenizerIdentity(digest="0" * 64, vocab_size=vocab_size),
        precision="float32",
        capture=CaptureIdentity(kind="topk", top_k=TOP_K),
    )


def light_teacher(folder: Path, vocab_size: int) -> Path:
    """Write the folder that such a teacher is named by."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"architectures": ["Light"], "vocab_size": vocab_size}))
    return folder


def light_samples(folder: Path, num_documents: int, window_tokens: int = 64) -> tuple[SampleSet, int]:
    """Prepare windows of the prose that comes with Python; returns them and the size of their vocabulary."""
    from storage.config import DataConfig, SourceConfig
    from storage.sample_set import prepare_samples
    from storage.tokenizer import Tokenizer
    from workers.config import EmbeddedTeacherConfig
    from workers.embedded import ensure_tokenizer

    source = SourceConfig(name="general", path="embedded:general", max_documents=num_documents)
    data = DataConfig(sources=[source], window_tokens=window_tokens, heldout_fraction=0.0)
    tokenizer = Tokenizer.load(ensure_tokenizer(EmbeddedTeacherConfig(vocab_size=512), data))
    return prepare_samples(data, tokenizer, folder), tokenizer.vocab_size


def light_capture(
    folder: Path,
    url: str,
    teacher: TeacherConfig,
    unit_tokens: int,
    on_event: Callable[[dict[str, Any]], None],
    may_grow: bool = False,
) -> Any:
    """Capture the samples in `folder/samples` with the teacher in `folder/teacher`; returns a `CaptureResult`."""
    from workers.coordinator import capture

    samples = SampleSet.open(folder / "samples")
    vocab_size = json.loads((folder / "teacher" / "config.json").read_text())["vocab_size"]
    return capture(
        teacher,
        CacheConfig(url=url, kind="topk", top_k=TOP_K, unit_tokens=unit_tokens),
        folder / "teacher",
        samples,
        samples.rows(),
        light_identity(vocab_size),
        on_event=on_event,
        rank_class=LightRank,
        machines=Machines(may_grow=may_grow),
    )
