"""Config sections of this room: `student`, `curriculum`, `train`, `evaluate`."""

import math
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from storage.settings import Settings, added
from trainer.curriculum_config import CurriculumConfig
from trainer.loss_config import LossConfig, Positive, both_ends


class LoraConfig(Settings):
    """Low-rank adapters (Hu et al. 2021): the student stays as it is, ΔW = alpha / rank · B·A is learned beside it."""

    rank: int = Field(default=8, ge=1)
    """Inner width of the adapters."""
    alpha: float = Field(default=16.0, gt=0.0)
    """The adapters' output is scaled by `alpha / rank`."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout of the adapters' input."""
    targets: list[str] = Field(default_factory=list)
    """Linear layers that get one, by the ends of their names, e.g. `[q_proj, v_proj]`; empty: all but the output
    head."""


class StudentConfig(Settings):
    """Which model is trained: a folder or hub name, or a fresh one from a config."""

    path: str | None = None
    """`AutoModelForCausalLM` folder or hub name to start from."""
    config: dict[str, Any] | None = None
    """transformers config of a fresh student, e.g. `{model_type: qwen2, hidden_size: 128, …}`."""
    tokenizer: str | None = added(None)
    """Folder or hub name of a tokenizer of the student's own, e.g. for a fresh student with a smaller vocabulary; none:
    that of `path`, or the teacher's. Another one than the teacher's needs a loss across tokenizers."""
    seed: int = 0
    """Seed of a fresh student's weights."""
    frozen: list[str] = Field(default_factory=list)
    """Parameters that stay as they are, by patterns of their names, e.g. `model.embed_tokens.*`."""
    lora: LoraConfig | None = None
    """Train low-rank adapters alone, which are merged into the exported model; needs the extra `lora`. None: train
    the student itself."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (self.config is None):
            raise ValueError("student needs exactly one of `path` (start from a model) and `config` (a fresh one)")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("student.config needs `model_type`, e.g. `qwen2` or `llama`")
        return self


class EwcConfig(Settings):
    """Elastic weight consolidation (Kirkpatrick et al. 2017): weights that earlier sources rest on move less."""

    weight: float = Field(gt=0.0)
    """λ of (λ/2)·Σ F·(θ − θ*)², added to the loss per token; F is the Fisher information per token."""
    samples: int = Field(default=64, ge=1)
    """Training windows that the Fisher information is measured on."""
    sources: list[str] = Field(default_factory=list)
    """Sources to keep; empty: those that earlier stages used."""


class TrainConfig(Settings):
    """The ZeRO loop."""

    steps: int = Field(default=1000, ge=1)
    """Optimizer steps."""
    global_batch_size: int = Field(default=32, ge=1)
    """Samples per optimizer step, over all ranks and accumulation."""
    micro_batch_size: int = Field(default=4, ge=1)
    """Samples per rank and forward pass."""
    workers: int = Field(default=2, ge=1)
    """Training ranks; with `min_workers` at most."""
    min_workers: int | None = Field(default=None, ge=1)
    """Go on with as few ranks as this when machines are lost, or not there yet, and with more when they come (elastic);
    none: always `workers`."""
    grow_every_s: float = Field(default=60.0, gt=0.0)
    """Seconds between two looks for machines that have come, where there is `min_workers`; taking them in costs the
    steps since the newest checkpoint."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage."""
    offload: Literal["optimizer", "parameters"] | None = added(None)
    """Host memory holds the optimizer's state and master weights, and does its step (`optimizer`, ZeRO 1 to 3), or the
    parameters as well (`parameters`, ZeRO 3): slower steps of larger students. None: all stays on the accelerator."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the forward and backward pass; `auto` is bfloat16 where the machine computes it natively, else
    float32."""
    learning_rate: Positive = 1e-3
    """Learning rate of AdamW: a peak with a cosine after it, or a schedule of its own."""
    final_learning_rate_fraction: float = Field(default=0.1, ge=0.0, le=1.0)
    """Learning rate at the last step, as a fraction of a plain number's peak."""
    warmup_steps: int = Field(default=20, ge=0)
    """Steps of linear warm-up, whatever comes after."""
    weight_decay: float = Field(default=0.1, ge=0.0)
    """Decoupled weight decay of matrices; vectors have none."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    """AdamW moment decay."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Global gradient norm limit."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    loss: LossConfig = LossConfig()
    """Loss terms and their weights."""
    ewc: EwcConfig | None = None
    """Hold on to what earlier stages have learned; none: let it go."""
    seed: int = 0
    """Seed of the sample order."""
    seeds: list[int] = added([])
    """Train once for each of these, in place of `seed` and `student.seed`; the first one's models are `student` and
    `baseline`, the others bear their seed. The report gives mean and standard deviation. Empty: train once."""
    checkpoint_every: int = Field(default=100, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints kept on storage."""
    max_failures: int = Field(default=3, ge=0)
    """Rank failures survived before the run is given up."""
    log_every: int = Field(default=1, ge=1)
    """Steps between lines in metrics.jsonl."""
    trackers: list[Literal["wandb", "mlflow"]] = Field(default_factory=list)
    """Where the lines go as well, beside TensorBoard, which always gets them; must be installed, and take project and
    keys from their own environment variables."""
    peak_flops: float | None = Field(default=None, gt=0)
    """Operations per second of one rank's hardware, for `mfu` in metrics.jsonl; none: what the maker states of a known
    GPU in half precision."""

    @model_validator(mode="after")
    def _batch_splits(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"train.seeds {self.seeds} names a seed twice; each is trained once")
        least = self.workers if self.min_workers is None else self.min_workers
        if least > self.workers:
            raise ValueError(f"train.min_workers {least} is more than train.workers {self.workers}")
        chunks = [ranks * self.micro_batch_size for ranks in range(least, self.workers + 1)]
        if any(self.global_batch_size % chunk for chunk in chunks):
            ranks = str(self.workers) if least == self.workers else f"{least} to {self.workers}"
            raise ValueError(
                f"train.global_batch_size {self.global_batch_size} does not split into workers {ranks} × "
                f"micro_batch_size {self.micro_batch_size}; use a multiple of {math.lcm(*chunks)}"
            )
        if max(both_ends(self.learning_rate)) <= 0:
            raise ValueError("train.learning_rate is 0 throughout; give its schedule a positive start")
        least_stage = {None: 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.zero_stage < least_stage:
            raise ValueError(
                f"train.offload {self.offload} is a part of ZeRO {least_stage} and above, and train.zero_stage is "
                f"{self.zero_stage}; set train.zero_stage: {max(least_stage, 2)}"
            )
        if self.ewc is not None and self.zero_stage == 3:
            raise ValueError(
                "train.ewc compares whole parameters, which ZeRO 3 takes apart; use train.zero_stage 2 or less, or "
                "curriculum.replay instead"
            )
        if self.warmup_steps >= self.steps:
            raise ValueError(f"train.warmup_steps {self.warmup_steps} must be below train.steps {self.steps}")
        return self


class TaskConfig(Settings):
    """Prompts and references that a trained model is scored on."""

    name: str
    """Its name in the report."""
    path: str
    """JSON lines, a file or URL: `{"prompt": …, "reference": text or list of texts, "candidates": list of texts}`.
    Where there are candidates the model picks the likeliest, else it writes."""
    metric: Literal["accuracy", "f1", "bleu", "recall"] = "accuracy"
    """`accuracy`: the answer is a reference; `f1`: words shared with one; `bleu`: of the whole file; `recall`: share of
    the references among the `k` likeliest candidates."""
    k: int = Field(default=1, ge=1)
    """Candidates that `recall` looks at."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Most tokens of a written answer."""
    stop: str = "\n"
    """Text that ends a written answer; empty: its end token alone."""
    max_examples: int = Field(default=500, ge=1)
    """Lines that are used, at most."""


class LmEvalConfig(Settings):
    """Public benchmarks, scored by the package lm-eval (extra `eval`)."""

    tasks: list[str] = Field(min_length=1)
    """Names of its tasks, e.g. `[hellaswag, arc_easy]`; their data come from the hub, or from where a task says."""
    include_path: str | None = None
    """Folder with task files (YAML) of your own. They may hold code: name only a folder that you trust."""
    limit: int | None = Field(default=None, ge=1)
    """Examples of each task, at most; none: all."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Solved examples before each question; none: as the task says."""
    batch_size: int = Field(default=8, ge=1)
    """Requests per forward pass."""


class EvaluateConfig(Settings):
    """Held-out evaluation."""

    samples_per_source: int = Field(default=64, ge=1)
    """Held-out windows scored per source, at most."""
    baseline: bool = True
    """Also train and score the same student on hard labels only."""
    shown_samples: int = Field(default=3, ge=0)
    """Held-out windows per source whose tokens appear in the report."""
    tasks: list[TaskConfig] = Field(default_factory=list)
    """What the trained models are asked beside."""
    lm_eval: LmEvalConfig | None = None
    """Public benchmarks that the trained models are scored on; needs the extra `eval`."""


class StageConfig(Settings):
    """One of several trainings in a row; each starts from the model that the one before ended with."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]{0,30}$")
    """Name, e.g. `pretrain`, `distil` or `finetune`."""
    train: TrainConfig = TrainConfig()
    """As the section `train`, from which it takes what is not given here; `loss` key by key."""
    curriculum: CurriculumConfig = CurriculumConfig()
    """As the section `curriculum`, which it takes whole where this is not given."""
    frozen: list[str] = Field(default_factory=list)
    """As `student.frozen`, which it takes where this is not given."""
    lora: LoraConfig | None = None
    """As `student.lora`, which it takes where this is not given."""


def inherited(stage: dict[str, Any], sections: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stage as it was written, with what it takes from the sections of the config; all raw values."""
    train, student = (dict(sections.get(name) or {}) for name in ("train", "student"))
    own = stage.get("train") or {}
    if not isinstance(own, dict):
        return stage
    merged = {**train, **own}
    if isinstance(train.get("loss"), dict) and isinstance(own.get("loss"), dict):
        merged["loss"] = {**train["loss"], **own["loss"]}
    defaults = {"curriculum": sections.get("curriculum"), "frozen": student.get("frozen"), "lora": student.get("lora")}
    given = {name: value for name, value in defaults.items() if value is not None}
    return {**given, **stage, "train": merged}
