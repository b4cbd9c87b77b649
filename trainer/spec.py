"""What a rank must know to train; travels from the driver to the ranks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from storage.identity import DatasetIdentity
from storage.shard_source import Reading
from trainer.config import CurriculumConfig, StudentConfig, TrainConfig
from trainer.engine import Device


@dataclass(frozen=True)
class LoopSpec:
    """One training run."""

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
    labels: Mapping[str, str] = field(default_factory=dict)
    """What the nodes of the ranks must carry."""
    resume: str | None = None
    """Name of the checkpoint below `<run_dir>/checkpoints/<name>` that this attempt starts from."""
    mixing: tuple[dict[str, Any], ...] | None = None
    """Decisions on the mixture that this run follows instead of making its own."""
    left_out: tuple[bytes, ...] = ()
    """Ids of training samples that the run does without."""
