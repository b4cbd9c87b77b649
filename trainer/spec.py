"""What is trained on what: as the driver is asked for it, and as it travels to the ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from storage.identity import DatasetIdentity
from storage.shard_source import DEFAULT_READING, Reading
from trainer.alignment import Aligner
from trainer.config import StudentConfig, TrainConfig
from trainer.curriculum_config import CurriculumConfig

Device = Literal["cpu", "gpu"]


@dataclass(frozen=True)
class Training:
    """One training of a student."""

    name: str
    """`student`, `baseline`, …: folder of the export and `run` in metrics.jsonl."""
    student: StudentConfig
    """Where the student comes from."""
    train: TrainConfig
    """The loop; `train.loss` decides between student and baseline (see `trainer.stages`)."""
    curriculum: CurriculumConfig
    """Mixture of the sources over the steps."""
    dataset_url: str
    """Captured targets of the training samples."""
    identity: DatasetIdentity
    """What the dataset at `dataset_url` must have been captured from."""
    samples_url: str
    """The prepared samples."""
    run_dir: str
    """Any fsspec URL; checkpoints, metrics and the exported model lie below it."""
    device: Device
    """What the ranks run on."""
    tokenizer_folder: str | Path
    """Local folder whose tokenizer files are put beside the exported model."""
    reading: Reading = DEFAULT_READING
    """Checks and memory of the ranks' readers; layers that the loss does not use are left unread."""
    also: Sequence[str] = ()
    """Further datasets, for samples that the first one does not hold."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """What the nodes of the ranks must carry."""
    left_out: Sequence[bytes] = ()
    """Ids of training samples that no dataset holds and the run does without, sorted."""
    mixing: Sequence[dict[str, Any]] | None = None
    """Decisions of another run with an adaptive curriculum (`TrainResult.mixing`), to train in its order."""
    earlier: Mapping[str, float] = field(default_factory=dict)
    """Samples of each source that stages before have used; see `curriculum.planned_shares`."""
    after: str | None = None
    """Digest of the facts of the stage whose model `student.path` is; stands for it in this one's facts."""


@dataclass(frozen=True)
class LoopSpec:
    """What a rank must know to train; travels from the driver to the ranks."""

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
    mixing: tuple[dict[str, Any], ...] | None = None
    """Decisions on the mixture that this run follows instead of making its own."""
    earlier: Mapping[str, float] = field(default_factory=dict)
    """Samples of each source that stages before have used."""
    left_out: tuple[bytes, ...] = ()
    """Ids of training samples that the run does without."""
    aligner: Aligner | None = None
    """Lays the samples' tokens over those of a student with another tokenizer."""
