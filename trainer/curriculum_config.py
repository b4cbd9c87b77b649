"""Config of the curriculum: which samples are seen when."""

from typing import Literal, Self

from pydantic import Field, model_validator

from storage.settings import Settings


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
    replay: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Where stages follow each other: share of every step that goes to sources of earlier stages which this
    curriculum does not name, as they were used there."""
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
