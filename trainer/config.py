"""Config sections of this room: `student`, `curriculum`, `train`, `evaluate`."""

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from storage.settings import Settings


class StudentConfig(Settings):
    """Which model is trained: a folder or hub name, or a fresh one from a config."""

    path: str | None = None
    """`AutoModelForCausalLM` folder or hub name to start from."""
    config: dict[str, Any] | None = None
    """transformers config of a fresh student, e.g. `{model_type: qwen2, hidden_size: 128, …}`."""
    seed: int = 0
    """Seed of a fresh student's weights."""
    frozen: list[str] = Field(default_factory=list)
    """Parameters that stay as they are, by patterns of their names, e.g. `model.embed_tokens.*`."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (self.config is None):
            raise ValueError("student needs exactly one of `path` (start from a model) and `config` (a fresh one)")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("student.config needs `model_type`, e.g. `qwen2` or `llama`")
        return self


class DifficultyConfig(Settings):
    """Which samples of a source come when, by how hard the teacher found them when it scored them."""

    by: Literal["teacher_nll", "teacher_entropy"] = "teacher_nll"
    """What is hard: text that the teacher did not expect, or where it was unsure; mean over a sample, in nats."""
    order: Literal["shuffled", "rising", "falling"] = "shuffled"
    """Order of each pass over a source: shuffled, or ten shuffled groups of rising or falling difficulty."""
    keep: tuple[float, float] = (0.0, 1.0)
    """Between which quantiles of each source samples are used at all, e.g. `[0, 0.95]` leaves out the hardest 5%."""
    open_first: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of each source, its easiest samples, that is open at the first step; the others join in ten steps."""
    open_until: float = Field(default=0.5, ge=0.0, le=1.0)
    """Where all samples are open, as a fraction of the steps."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        low, high = self.keep
        if not 0 <= low < high <= 1:
            raise ValueError(f"curriculum.difficulty.keep {list(self.keep)} must be two rising quantiles from 0 to 1")
        if self.open_first < 1 and self.order == "falling":
            raise ValueError(
                "curriculum.difficulty opens with the easiest samples (open_first) and orders them hardest first "
                "(order: falling); drop one of the two"
            )
        return self


class AdaptiveConfig(Settings):
    """Shares that follow how far the student is behind the teacher on each source (DDK, Liu et al. 2024)."""

    every: int = Field(default=100, ge=1)
    """Steps between decisions; the first one falls after so many."""
    smoothing: float = Field(default=0.5, gt=0.0, le=1.0)
    """Part of the shares that follows the losses; the rest is spread evenly, so that no source dies out."""
    samples: int = Field(default=32, ge=1)
    """Held-out windows of each source that are compared; at most `evaluate.samples_per_source`."""


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
    table: dict[float, dict[str, float]] = Field(default_factory=dict)
    """Shares at fractions of the steps, e.g. `{0: {general: 1}, 0.5: {general: 0.5, domain: 0.5}}`, evenly changing in
    between and constant before and after; instead of `start` and `end`."""
    max_epochs: float | None = Field(default=None, gt=0)
    """Refuse a plan that passes over a source more often than this; none allows any number."""
    difficulty: DifficultyConfig | None = None
    """Choose and order samples by difficulty; none: all samples, shuffled."""
    adaptive: AdaptiveConfig | None = None
    """Decide on the shares while training, beginning with `start`; none: they are planned."""

    @model_validator(mode="after")
    def _shares_are_sane(self) -> Self:
        rows = {"start": self.start, "end": self.end, **{f"table.{at:g}": row for at, row in self.table.items()}}
        for name, shares in rows.items():
            bad = {k: v for k, v in shares.items() if v < 0}
            if bad or (shares and sum(shares.values()) <= 0):
                raise ValueError(f"curriculum.{name}: {shares} must be non-negative shares with a positive sum")
        if self.table and self.start:
            raise ValueError("curriculum has both a table and start; give one of them")
        empty = [at for at, row in self.table.items() if not row or not 0 <= at <= 1]
        if empty:
            raise ValueError(f"curriculum.table {empty[0]:g}: give shares at a fraction of the steps from 0 to 1")
        if self.finish < self.begin:
            raise ValueError(f"curriculum.finish {self.finish} lies before curriculum.begin {self.begin}")
        if self.end and not self.start:
            raise ValueError("curriculum.end needs curriculum.start beside it")
        if self.adaptive is not None and (self.end or self.table or self.max_epochs is not None):
            raise ValueError(
                "curriculum.adaptive decides on the shares while training; give no end, table or max_epochs beside it"
            )
        return self


class ScheduleConfig(Settings):
    """A value that changes over the steps of a run."""

    shape: Literal["constant", "linear", "cosine", "step", "warmup_stable_decay", "two_stage"]
    """How the value moves: not at all; evenly or by a cosine from `begin` to `finish`; in one jump half-way between
    them; rising until `begin`, held, falling from `finish` to the last step; held until `begin`, then annealed."""
    start: float = Field(ge=0.0)
    """Value at first; of `warmup_stable_decay` the one that is held."""
    end: float = Field(default=0.0, ge=0.0)
    """Value at last."""
    begin: float = Field(default=0.0, ge=0.0, le=1.0)
    """Where the move begins, as a fraction of the steps; of `warmup_stable_decay` where the rise ends, of `two_stage`
    where the second stage begins."""
    finish: float = Field(default=1.0, ge=0.0, le=1.0)
    """Where the move is done, as a fraction of the steps; of `warmup_stable_decay` where the fall begins."""

    @model_validator(mode="after")
    def _moves_forward(self) -> Self:
        if self.finish < self.begin:
            raise ValueError(f"schedule: finish {self.finish} lies before begin {self.begin}")
        if self.shape == "constant" and "end" in self.model_fields_set and self.end != self.start:
            raise ValueError(f"schedule: a constant has no end {self.end:g} beside its start {self.start:g}; drop one")
        return self

    @property
    def values(self) -> tuple[float, float]:
        """Return start and end."""
        return self.start, self.start if self.shape == "constant" else self.end


Schedule = float | ScheduleConfig
"""A value at every step: one number, or what changes."""


def _which(value: Any) -> str:
    return SCHEDULE_TAG if isinstance(value, (dict, ScheduleConfig)) else NUMBER_TAG


NUMBER_TAG, SCHEDULE_TAG = "=number", "=schedule"
"""Parts of an error's path that are no keys."""
_AsSchedule = Annotated[ScheduleConfig, Tag(SCHEDULE_TAG)]
Weight = Annotated[Annotated[float, Field(ge=0.0), Tag(NUMBER_TAG)] | _AsSchedule, Discriminator(_which)]
"""A schedule of values that are not negative."""
Positive = Annotated[Annotated[float, Field(gt=0.0), Tag(NUMBER_TAG)] | _AsSchedule, Discriminator(_which)]
"""A schedule of values above 0."""


def both_ends(schedule: Schedule) -> tuple[float, float]:
    """Return the values that a schedule moves between."""
    return schedule.values if isinstance(schedule, ScheduleConfig) else (schedule, schedule)


class LossConfig(Settings):
    """Terms that are summed into the training loss, and their weights."""

    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "reverse_skew_kl", "adaptive_kl", "tvd"] = (
        "forward_kl"
    )
    """How the student is compared with the teacher; see docs/losses.md for which kinds of targets each one takes."""
    kl: Weight = 0.9
    """Weight of the divergence from the teacher."""
    ce: Weight = 0.1
    """Weight of hard-label cross-entropy."""
    hidden: Weight = 0.0
    """Weight of the squared error of projected hidden states, divided by the teacher's channel variance."""
    hidden_map: dict[str, str] = Field(default_factory=dict)
    """Dataset layer → student layer, e.g. `{final: final, model.layers.3: model.layers.1}`."""
    beta: float = Field(default=0.5, ge=0.0, le=1.0)
    """Teacher's share of the mixture in `jsd`; 0 stands for forward, 1 for reverse KL."""
    skew: float = Field(default=0.1, gt=0.0, lt=1.0)
    """Share α of the first argument in the mixture of `skew_kl` and `reverse_skew_kl`."""
    temperature: Positive = 1.0
    """Temperature T at which teacher and student are compared; value and gradient are multiplied by T². Other than 1
    it needs whole distributions: `exact`, or targets of kind `dense`."""
    exact: bool = False
    """Compare whole distributions, made from the cached hidden state `final` and the teacher's head, instead of the
    kept entries."""
    adaptive: Literal["none", "uncertainty"] = "none"
    """`uncertainty` learns the weights (Kendall et al. 2018), beginning with the given ones: the loss of each term L
    is ½·exp(−s)·L + ½·s with s learned, so that its weight comes to rest at 1 / (2·L)."""

    @model_validator(mode="after")
    def _something_to_learn(self) -> Self:
        if max(*both_ends(self.kl), *both_ends(self.ce), *both_ends(self.hidden)) <= 0:
            raise ValueError("train.loss: kl, ce and hidden are all 0; give at least one a positive weight")
        if self.transfers and not self.hidden_map:
            raise ValueError("train.loss.hidden is positive but train.loss.hidden_map names no layers")
        if min(both_ends(self.temperature)) <= 0:
            raise ValueError("train.loss.temperature must stay above 0; give its schedule a positive start and end")
        if self.adaptive != "none" and any(isinstance(w, ScheduleConfig) for w in (self.kl, self.ce, self.hidden)):
            raise ValueError(
                "train.loss.adaptive learns the weights; give kl, ce and hidden as plain numbers beside it"
            )
        return self

    @property
    def distils(self) -> bool:
        """Whether the student is compared with the teacher's distributions."""
        return max(both_ends(self.kl)) > 0

    @property
    def transfers(self) -> bool:
        """Whether the student is compared with the teacher's hidden states."""
        return max(both_ends(self.hidden)) > 0

    @property
    def layers(self) -> tuple[str, ...]:
        """Return the dataset layers whose hidden states are needed."""
        final = ("final",) if self.exact and self.distils else ()
        return tuple(dict.fromkeys((*final, *(self.hidden_map if self.transfers else ()))))

    @property
    def softened(self) -> bool:
        """Whether the temperature is ever other than 1."""
        return both_ends(self.temperature) != (1.0, 1.0)


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
        if max(both_ends(self.learning_rate)) <= 0:
            raise ValueError("train.learning_rate is 0 throughout; give its schedule a positive start")
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
