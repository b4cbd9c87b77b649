"""Config of the loss, and of values that change over the steps."""

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from storage.settings import Settings, added


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


WEIGHTS = ("ce", "kl", "hidden", "attention", "relation")
"""Terms of the loss, by the names of their weights."""


ACROSS = ("alm", "uld")
"""Divergences that compare students of another tokenizer."""


class LossConfig(Settings):
    """Terms that are summed into the training loss, and their weights."""

    divergence: Literal[
        "forward_kl", "reverse_kl", "jsd", "skew_kl", "reverse_skew_kl", "adaptive_kl", "tvd", "alm", "uld"
    ] = "forward_kl"
    """How the student is compared with the teacher; see docs/losses.md for which kinds of targets each one takes. `alm`
    and `uld` compare a student that has another tokenizer."""
    alm_tau: float = Field(default=100.0, ge=1.0, exclude_if=lambda value: value == 100.0)
    """τ of `alm`: likelihoods of chunks are compared as p^(1/τ)."""
    kl: Weight = 0.9
    """Weight of the divergence from the teacher."""
    ce: Weight = 0.1
    """Weight of hard-label cross-entropy."""
    hidden: Weight = 0.0
    """Weight of the distance between projected hidden states and those of the teacher."""
    hidden_distance: Literal["mse", "cosine"] = added("mse")
    """`mse`: squared error, divided by the teacher's variance of each channel; `cosine`: 1 − cosine."""
    hidden_norm: bool = added(False)
    """Put a LayerNorm before each projection, so that the scale of the student's states does not matter."""
    hidden_map: dict[str, str] = Field(default_factory=dict)
    """Dataset layer → student layer, e.g. `{final: final, model.layers.3: model.layers.1}`."""
    attention: Weight = added(0.0)
    """Weight of the squared distance between the student's attention and the teacher's, both averaged over their
    heads; the student then runs eager attention."""
    attention_map: dict[str, str] = added({})
    """Dataset layer → student layer, e.g. `{model.layers.5: model.layers.2}`; the dataset keeps `cache.attention`."""
    relation: Weight = added(0.0)
    """Weight of the divergence between the relations of the student's positions and the teacher's (MiniLMv2)."""
    relation_map: dict[str, str] = added({})
    """Dataset layer → student layer, e.g. `{model.layers.5.self_attn.v_proj: model.layers.2.self_attn.v_proj}`; the
    dataset keeps them as `cache.hidden`, whole."""
    relation_heads: int = Field(default=1, ge=1, exclude_if=lambda value: value == 1)
    """Relation heads that the states are cut into; the widths of both sides must be multiples."""
    beta: float = Field(default=0.5, ge=0.0, le=1.0)
    """Teacher's share of the mixture in `jsd`; 0 stands for forward, 1 for reverse KL."""
    skew: float = Field(default=0.1, gt=0.0, lt=1.0)
    """Share α of the first argument in the mixture of `skew_kl` and `reverse_skew_kl`."""
    draw_weight: float = Field(default=0.5, gt=0.0, le=1.0)
    """Of `forward_kl` on hybrid targets: how far the tail follows the draws; for the rest it is one bucket, which has
    no noise. 1 takes the draws alone, unbiased and noisier; see docs/losses.md."""
    temperature: Positive = 1.0
    """Temperature T at which teacher and student are compared; value and gradient are multiplied by T². Other than 1
    it needs whole distributions: `exact`, or targets of kind `dense`."""
    exact: bool = False
    """Compare whole distributions, made from the cached hidden state `final` and the teacher's head, instead of the
    kept entries."""
    adaptive: Literal["none", "uncertainty", "gradient"] = "none"
    """`uncertainty` learns the weights (Kendall et al. 2018), beginning with the given ones: the loss of each term L
    is ½·exp(−s)·L + ½·s with s learned, so that its weight comes to rest at 1 / (2·L). `gradient` makes the given
    weights those of the terms' gradients on the student's states: each term pulls as hard as its weight says."""
    adaptive_every: int = Field(default=10, ge=1, exclude_if=lambda value: value == 10)
    """Steps between two measurements of the gradients that `adaptive: gradient` weighs by."""

    @model_validator(mode="after")
    def _something_to_learn(self) -> Self:
        if max(end for term in WEIGHTS for end in both_ends(getattr(self, term))) <= 0:
            raise ValueError(f"train.loss: {', '.join(WEIGHTS)} are all 0; give at least one a positive weight")
        if self.transfers and not self.hidden_map:
            raise ValueError("train.loss.hidden is positive but train.loss.hidden_map names no layers")
        if self.relates and not self.relation_map:
            raise ValueError("train.loss.relation is positive but train.loss.relation_map names no layers")
        if self.attends and not self.attention_map:
            raise ValueError("train.loss.attention is positive but train.loss.attention_map names no layers")
        if self.crosses:
            self._check_across()
        if min(both_ends(self.temperature)) <= 0:
            raise ValueError("train.loss.temperature must stay above 0; give its schedule a positive start and end")
        if self.adaptive == "gradient" and self.attends:
            raise ValueError(
                "train.loss.adaptive gradient weighs terms by their gradients on hidden states, but that of attention "
                "reaches these through the layer alone; set adaptive to uncertainty, or leave attention out"
            )
        if self.adaptive == "uncertainty" and any(isinstance(getattr(self, term), ScheduleConfig) for term in WEIGHTS):
            raise ValueError("train.loss.adaptive uncertainty learns the weights; give them as plain numbers beside it")
        return self

    def _check_across(self) -> None:
        others = {"hidden": self.transfers, "attention": self.attends, "relation": self.relates}
        for name in (name for name, is_asked in others.items() if is_asked):
            raise ValueError(
                f"train.loss.{name} compares position by position, but {self.divergence} is for students whose tokens "
                "are others than the teacher's; leave it out"
            )
        if self.softened:
            raise ValueError(f"train.loss.temperature has no meaning for {self.divergence}; leave it at 1")

    @property
    def crosses(self) -> bool:
        """Whether the divergence is one across tokenizers."""
        return self.distils and self.divergence in ACROSS

    @property
    def distils(self) -> bool:
        """Whether the student is compared with the teacher's distributions."""
        return max(both_ends(self.kl)) > 0

    @property
    def transfers(self) -> bool:
        """Whether the student is compared with the teacher's hidden states."""
        return max(both_ends(self.hidden)) > 0

    @property
    def attends(self) -> bool:
        """Whether the student's attention is compared with the teacher's."""
        return max(both_ends(self.attention)) > 0

    @property
    def relates(self) -> bool:
        """Whether relations between positions are compared."""
        return max(both_ends(self.relation)) > 0

    @property
    def attention_layers(self) -> tuple[str, ...]:
        """Return the dataset layers whose attention is needed."""
        return tuple(self.attention_map) if self.attends else ()

    @property
    def layers(self) -> tuple[str, ...]:
        """Return the dataset layers whose hidden states are needed."""
        final = ("final",) if self.exact and self.distils else ()
        return tuple(dict.fromkeys((*final, *(layer for layer, _ in self._pairs))))

    @property
    def student_layers(self) -> tuple[str, ...]:
        """Return the student's layers whose states are compared with cached ones."""
        return tuple(dict.fromkeys(own for _, own in self._pairs))

    @property
    def _pairs(self) -> list[tuple[str, str]]:
        hidden = self.hidden_map.items() if self.transfers else ()
        return [*hidden, *(self.relation_map.items() if self.relates else ())]

    @property
    def softened(self) -> bool:
        """Whether the temperature is ever other than 1."""
        return both_ends(self.temperature) != (1.0, 1.0)
