"""The whole YAML: one model composed of the rooms' sections."""

import os
from typing import Literal, Self

from pydantic import Field, model_validator

from storage.config import CacheConfig, DataConfig
from storage.errors import InputError
from storage.identity import CaptureIdentity
from storage.settings import Settings
from trainer.config import CurriculumConfig, EvaluateConfig, StudentConfig, TrainConfig
from trainer.served import require_served
from workers.api.config import GenerateConfig
from workers.config import BudgetConfig, TeacherConfig

_JOB_VARIABLES = {"RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"}
"""What Ray sets in the process of a submitted job."""


class ClusterConfig(Settings):
    """Where the work runs."""

    address: str = "here"
    """`here`: the cluster whose job this is, else a Ray of its own; `local`: always a Ray of its own; `auto` or
    `host:port`: join a running cluster."""
    num_cpus: int | None = Field(default=None, ge=1)
    """CPUs of the local Ray; none means those of the machine."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """What ranks run on; `auto` takes GPUs where the cluster has them."""
    env: list[str] = Field(default_factory=list)
    """Names of environment variables that `lectern submit` takes along, e.g. `HF_TOKEN`; never their values."""
    price_per_hour: float = Field(default=0.0, ge=0.0)
    """Price per hour of the machines of one teacher replica, in `budget.currency`."""

    @property
    def joins(self) -> str | None:
        """Address of the cluster that a run joins; None where it starts a Ray of its own."""
        if self.address == "here":
            return "auto" if os.environ.keys() >= _JOB_VARIABLES else None
        return None if self.address == "local" else self.address


class RunConfig(Settings):
    """Everything that one run needs."""

    data: DataConfig
    teacher: TeacherConfig = TeacherConfig()
    cache: CacheConfig
    student: StudentConfig
    curriculum: CurriculumConfig = CurriculumConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    generate: GenerateConfig = GenerateConfig()
    budget: BudgetConfig = BudgetConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _targets_serve_the_loss(self) -> Self:
        try:
            require_served(self.train.loss, CaptureIdentity.of(self.cache))
        except InputError as error:
            raise ValueError(str(error)) from error
        return self
