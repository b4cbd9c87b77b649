"""The whole YAML: one model composed of the rooms' sections."""

import os
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from storage.config import CacheConfig, DataConfig
from storage.errors import InputError
from storage.identity import CaptureIdentity
from storage.settings import Settings
from trainer.config import EvaluateConfig, StageConfig, StudentConfig, TrainConfig, inherited
from trainer.curriculum_config import CurriculumConfig
from trainer.served import require_served
from trainer.stages import Model, Stage, chain, models, on_hard_labels, with_seed
from workers.api.config import GenerateConfig
from workers.config import BudgetConfig, TeacherConfig

_JOB_VARIABLES = {"RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"}
"""What Ray sets in the process of a submitted job."""


class NodeTypeConfig(Settings):
    """One sort of machine that a cluster has or may add."""

    resources: dict[str, float] = Field(default_factory=dict)
    """What one node offers, as its launch file says, e.g. `{CPU: 48, GPU: 4}`; tells how many ranks fill it."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Labels of its nodes; a stage that is placed here goes to nodes that carry all of them."""
    price_per_hour: float = Field(default=0.0, ge=0.0)
    """Price of one node for an hour, in `budget.currency`."""


class PlacementConfig(Settings):
    """Which of `node_types` a stage runs on; none leaves the choice to Ray."""

    capture: str | None = None
    """Ranks of a local teacher, e.g. cheap spot GPUs: a lost node costs the units that it was scoring."""
    train: str | None = None
    """Ranks of student and baseline: machines that stay."""
    evaluate: str | None = None
    """The evaluation, one process."""
    head: str | None = None
    """The head node, which is there all the time: for its price."""


class ClusterConfig(Settings):
    """Where the work runs, and what it costs there."""

    address: str = "here"
    """`here`: the cluster whose job this is, else a Ray of its own; `local`: always a Ray of its own; `auto` or
    `host:port`: join a running cluster."""
    num_cpus: int | None = Field(default=None, ge=1)
    """CPUs of the local Ray; none means those of the machine."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """What ranks run on; `auto` takes GPUs where the cluster has them."""
    allowed_urls: list[str] = Field(default_factory=list)
    """Where sources and prompts may lie: URLs or folders and all below, e.g. `s3://bucket/data`; none allows all."""
    env: list[str] = Field(default_factory=list)
    """Names of environment variables that `lectern submit` takes along, e.g. `HF_TOKEN`; never their values."""
    price_per_hour: float = Field(default=0.0, ge=0.0)
    """Price per hour of the machines of one teacher replica, in `budget.currency`; where `placement.capture` names a
    node type, its price counts instead."""
    node_types: dict[str, NodeTypeConfig] = Field(default_factory=dict)
    """The machines by name, e.g. those of `ray_cluster.yaml`."""
    placement: PlacementConfig = PlacementConfig()
    """Which machines the stages run on."""
    storage_price_per_gb_month: float = Field(default=0.0, ge=0.0)
    """Price of keeping a gigabyte (10⁹ bytes) of the dataset for a month, in `budget.currency`."""

    @model_validator(mode="after")
    def _placement_names_node_types(self) -> Self:
        for stage in PlacementConfig.model_fields:
            name = getattr(self.placement, stage)
            if name is not None and name not in self.node_types:
                known = ", ".join(self.node_types) or "there are none"
                raise ValueError(f"cluster.placement.{stage} = {name!r} is not in cluster.node_types ({known})")
        return self

    def node_type(self, stage: str) -> NodeTypeConfig | None:
        """Return the machines of a stage (`capture`, `train`, `evaluate`, `head`), where the config names them."""
        name = getattr(self.placement, stage)
        return None if name is None else self.node_types[name]

    def labels(self, stage: str) -> dict[str, str]:
        """Return the labels that the nodes of a stage must carry; none where any node will do."""
        found = self.node_type(stage)
        return {} if found is None else dict(found.labels)

    @property
    def uses_gpus(self) -> bool:
        """Tell whether ranks run on GPUs, as far as the config says."""
        has_gpus = any(node_type.resources.get("GPU") for node_type in self.node_types.values())
        return self.device == "gpu" or (self.device == "auto" and has_gpus)

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
    stages: list[StageConfig] = Field(default_factory=list)
    evaluate: EvaluateConfig = EvaluateConfig()
    generate: GenerateConfig = GenerateConfig()
    budget: BudgetConfig = BudgetConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="before")
    @classmethod
    def _stages_inherit(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("stages"), list):
            return values
        stages = [inherited(stage, values) if isinstance(stage, dict) else stage for stage in values["stages"]]
        return {**values, "stages": stages}

    @model_validator(mode="after")
    def _stages_have_names_of_their_own(self) -> Self:
        names = [stage.name for stage in self.stages]
        if any(stage.train.seeds != self.train.seeds for stage in self.stages):
            raise ValueError("stages: train.seeds holds for all stages; name it in the section train alone")
        twice = [name for n, name in enumerate(names) if name in names[:n]]
        if twice:
            raise ValueError(f"stages: the name {twice[0]!r} is given twice; a stage's model is kept under its name")
        return self

    @property
    def models(self) -> list[Model]:
        """The models that a run trains, in order."""
        return models(self.train.seeds, self.evaluate.baseline)

    def chain(self, model: Model | None = None) -> list[Stage]:
        """Return the trainings that lead to a model, in order; without one, to the first student."""
        model = model or self.models[0]
        stages = chain(model.name, self.student, self.train, self.curriculum, self.stages)
        if model.seed is not None:
            stages = [with_seed(stage, model.seed) for stage in stages]
        return stages if model.kind == "student" else [on_hard_labels(stage) for stage in stages]

    @model_validator(mode="after")
    def _classes_fit_the_samples(self) -> Self:
        task = self.teacher.task
        if task == "next_token":
            return self
        if self.teacher.kind != "local":
            raise ValueError(f"teacher.task {task} needs the model itself; an endpoint gives next tokens alone")
        if self.cache.hidden or self.cache.attention or self.cache.kind == "text":
            raise ValueError(
                f"teacher.task {task} gives classes alone; leave cache.hidden and cache.attention empty, and set "
                "cache.kind to dense or topk"
            )
        wanted = "last" if task == "sequence_classification" else "all"
        if self.data.pack or self.data.supervise != wanted:
            raise ValueError(
                f"teacher.task {task} looks at one document at a time; set data.pack: false and data.supervise: "
                f"{wanted}"
            )
        if self.evaluate.tasks:
            raise ValueError(f"evaluate.tasks ask for text, which a student of teacher.task {task} does not write")
        if any(stage.curriculum.adaptive for stage in self.chain()):
            raise ValueError(
                f"curriculum.adaptive compares losses of next tokens; with teacher.task {task} give the shares in "
                "curriculum.start and curriculum.end"
            )
        return self

    @property
    def _capture(self) -> CaptureIdentity:
        return CaptureIdentity.of(self.cache).model_copy(update={"task": self.teacher.task})

    @model_validator(mode="after")
    def _targets_serve_the_loss(self) -> Self:
        try:
            for stage in self.chain():
                require_served(stage.train.loss, self._capture)
        except InputError as error:
            raise ValueError(str(error)) from error
        return self
