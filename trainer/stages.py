"""What is trained after what: each training starts from the model of the one before; imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from trainer.config import StageConfig, StudentConfig, TrainConfig
from trainer.curriculum import planned_shares
from trainer.curriculum_config import CurriculumConfig
from trainer.loss_config import LossConfig

BASELINE_LOSS = LossConfig(kl=0.0, ce=1.0, hidden=0.0)
"""Hard labels only: what the same student learns without the teacher."""


@dataclass(frozen=True)
class Model:
    """A model that a run ends with."""

    name: str
    """Folder of its export: its kind, for a further seed with `-seed<n>` behind it."""
    kind: Literal["student", "baseline"] = "student"
    seed: int | None = None
    """None: the seeds of the config."""

    @property
    def twin(self) -> "Model":
        """The student that a baseline stands beside; a student's is itself."""
        return replace(self, kind="student", name=self.name.replace("baseline", "student", 1))


def models(seeds: Sequence[int], baseline: bool) -> list[Model]:
    """Return the models of a run in the order in which they are trained, each student before its baseline."""
    kinds: list[Literal["student", "baseline"]] = ["student", "baseline"] if baseline else ["student"]
    return [
        Model(kind if n == 0 else f"{kind}-seed{seed}", kind, seed)
        for n, seed in enumerate(seeds or [None])
        for kind in kinds
    ]


@dataclass(frozen=True)
class Stage:
    """One training of a chain."""

    run: str
    """Its name in metrics.jsonl, and folder of its model: `student` for the last one, `student-<stage>` before."""
    student: StudentConfig
    train: TrainConfig
    curriculum: CurriculumConfig


def chain(
    name: str,
    student: StudentConfig,
    train: TrainConfig,
    curriculum: CurriculumConfig,
    stages: Sequence[StageConfig] = (),
) -> list[Stage]:
    """Return the trainings that lead to the model `name`, in order: one for each stage, or the only one."""
    train = train.model_copy(update={"seeds": []})
    if not stages:
        return [Stage(name, student, train, curriculum)]
    return [
        Stage(
            name if n + 1 == len(stages) else f"{name}-{stage.name}",
            student.model_copy(update={"frozen": stage.frozen, "lora": stage.lora}),
            stage.train.model_copy(update={"seeds": []}),
            stage.curriculum,
        )
        for n, stage in enumerate(stages)
    ]


def baseline_of(train: TrainConfig) -> TrainConfig:
    """Return the same training with hard labels only."""
    return train.model_copy(update={"loss": BASELINE_LOSS})


def on_hard_labels(stage: Stage) -> Stage:
    """Return the same stage without the teacher."""
    return replace(stage, train=baseline_of(stage.train))


def with_seed(stage: Stage, seed: int) -> Stage:
    """Return the same stage with other fresh weights and another order of samples."""
    student = stage.student.model_copy(update={"seed": seed})
    return replace(stage, student=student, train=stage.train.model_copy(update={"seed": seed}))


def consumed(stage: Stage, num_samples: Mapping[str, int], earlier: Mapping[str, float]) -> dict[str, float]:
    """Return how many samples of each source were used up to the end of a stage; `earlier`: before it."""
    drawn = planned_shares(stage.curriculum, num_samples, stage.train.steps, earlier).sum(axis=0)
    return {
        name: earlier.get(name, 0.0) + float(share) * stage.train.global_batch_size
        for name, share in zip(num_samples, drawn, strict=True)
    }
