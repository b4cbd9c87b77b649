"""Config sections of this room: `student`, `curriculum`, `train`, `evaluate`."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from storage.settings import Settings


class StudentConfig(Settings):
    """Which model is trained: a folder or hub name, or a fresh one from a config."""

    path: str | None = None
    """`AutoModelForCausalLM` folder or hub name to start from."""
    config: dict[str, Any] | None = None
    """transformers config of a fresh student, e.g. `{model_type: qwen2, hidden_size: 128, …}`."""
    seed: int = 0
    """Seed of a fresh student's weights."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (self.config is None):
            raise ValueError("student needs exactly one of `path` (start from a model) and `config` (a fresh one)")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("student.config needs `model_type`, e.g. `qwen2` or `llama`")
        return self


class CurriculumConfig(Settings):
    """How the sources are mixed over the steps."""

    start: dict[str, float] = Field(default_factory=dict)
    """Share of each source at `begin`; normalised to 1. Empty: shares by number of training samples."""
    end: dict[str, float] = Field(default_factory=dict)
    """Share of each source at `finish`; empty means the same as `start`."""
    shape: Literal["linear", "cosine", "step"] = "linear"
    """How the shares move from `start` to `end`; `step` jumps half-way."""
    begin: float = Field(default=0.0, ge=0.0, le=1.0)
    """Where the ramp starts, as a fraction of the steps."""
    finish: float = Field(default=1.0, ge=0.0, le=1.0)
    """Where the ramp ends, as a fraction of the steps."""
    max_epochs: float | None = Field(default=None, gt=0)
    """Refuse a plan that passes over a source more often than this; none allows any number."""

    @model_validator(mode="after")
    def _shares_are_sane(self) -> Self:
        for name, shares in (("start", self.start), ("end", self.end)):
            bad = {k: v for k, v in shares.items() if v < 0}
            if bad or (shares and sum(shares.values()) <= 0):
                raise ValueError(f"curriculum.{name}: {shares} must be non-negative shares with a positive sum")
        if self.finish < self.begin:
            raise ValueError(f"curriculum.finish {self.finish} lies before curriculum.begin {self.begin}")
        if self.end and not self.start:
            raise ValueError("curriculum.end needs curriculum.start beside it")
        return self


class LossConfig(Settings):
    """Weights of the terms that are summed into the training loss."""

    kl: float = Field(default=0.9, ge=0.0)
    """Forward KL divergence from the teacher's sparse targets."""
    ce: float = Field(default=0.1, ge=0.0)
    """Hard-label cross-entropy."""
    hidden: float = Field(default=0.0, ge=0.0)
    """Mean squared error of projected hidden states, divided by the teacher's channel variance."""
    hidden_map: dict[str, str] = Field(default_factory=dict)
    """Dataset layer → student layer, e.g. `{final: final, model.layers.3: model.layers.1}`."""

    @model_validator(mode="after")
    def _something_to_learn(self) -> Self:
        if self.kl + self.ce + self.hidden <= 0:
            raise ValueError("train.loss: kl, ce and hidden are all 0; give at least one a positive weight")
        if self.hidden > 0 and not self.hidden_map:
            raise ValueError("train.loss.hidden is positive but train.loss.hidden_map names no layers")
        return self


class TrainConfig(Settings):
    """The ZeRO loop."""

    steps: int = Field(default=1000, ge=1)
    """Optimizer steps."""
    global_batch_size: int = Field(default=32, ge=1)
    """Samples per optimizer step, over all ranks and accumulation."""
    micro_batch_size: int = Field(default=4, ge=1)
    """Samples per rank and forward pass."""
    workers: int = Field(default=2, ge=1)
    """Training ranks."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the forward and backward pass; `auto` is bfloat16 where the machine computes it natively, else
    float32."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate of AdamW."""
    final_learning_rate_fraction: float = Field(default=0.1, ge=0.0, le=1.0)
    """Learning rate at the last step, as a fraction of the peak; cosine in between."""
    warmup_steps: int = Field(default=20, ge=0)
    """Steps of linear warm-up."""
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
    seed: int = 0
    """Seed of the sample order."""
    checkpoint_every: int = Field(default=100, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints kept on storage."""
    max_failures: int = Field(default=3, ge=0)
    """Rank failures survived before the run is given up."""
    log_every: int = Field(default=1, ge=1)
    """Steps between lines in metrics.jsonl."""

    @model_validator(mode="after")
    def _batch_splits(self) -> Self:
        chunk = self.workers * self.micro_batch_size
        if self.global_batch_size % chunk:
            raise ValueError(
                f"train.global_batch_size {self.global_batch_size} does not split into workers {self.workers} × "
                f"micro_batch_size {self.micro_batch_size}; use a multiple of {chunk}"
            )
        if self.warmup_steps >= self.steps:
            raise ValueError(f"train.warmup_steps {self.warmup_steps} must be below train.steps {self.steps}")
        return self


class EvaluateConfig(Settings):
    """Held-out evaluation."""

    samples_per_source: int = Field(default=64, ge=1)
    """Held-out windows scored per source, at most."""
    baseline: bool = True
    """Also train and score the same student on hard labels only."""
    shown_samples: int = Field(default=3, ge=0)
    """Held-out windows per source whose tokens appear in the report."""
