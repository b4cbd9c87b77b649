"""The part of the config that is about an endpoint: where it is, what it costs, how it may be used."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from storage.settings import Settings

_HOURS = r"^([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d$"


class RatesConfig(Settings):
    """Prices in units of `budget.currency` per million tokens."""

    input: float = Field(ge=0)
    """Prompt tokens."""
    output: float = Field(ge=0)
    """Completion tokens."""
    cached_input: float | None = Field(default=None, ge=0)
    """Prompt tokens that the provider had in its cache; none means the price of `input`."""
    reasoning: float | None = Field(default=None, ge=0)
    """Completion tokens spent on thinking; none means the price of `output`."""


class HoursConfig(RatesConfig):
    """Prices at some hours of the day."""

    hours: str = Field(pattern=_HOURS)
    """Span of UTC time, e.g. `16:30-00:30`; one that ends before it begins passes midnight."""


class PricesConfig(RatesConfig):
    """What the endpoint charges; prices change, so they come from its price list and from nowhere else."""

    by_hour: list[HoursConfig] = Field(default_factory=list)
    """Other prices at some hours of the day; the first span that holds a moment counts."""
    batch_factor: float = Field(default=0.5, gt=0, le=1)
    """What requests in batch files cost, as a share of the prices above."""


class ApiConfig(Settings):
    """An OpenAI-compatible endpoint."""

    base_url: str | None = None
    """Where it is, e.g. `https://api.deepseek.com/v1` or `http://localhost:8000/v1`."""
    model: str | None = None
    """Name of the model there."""
    key_env: str | None = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key; none for a server that wants no key."""
    prices: PricesConfig | None = None
    """What it charges; needed for a cap in money."""
    concurrency: int = Field(default=64, ge=1, le=4096)
    """Most requests in flight; fewer while the endpoint answers 429."""
    requests_per_minute: float | None = Field(default=None, gt=0)
    """Most requests begun in a minute; slower while the endpoint answers 429."""
    tokens_per_minute: float | None = Field(default=None, gt=0)
    """Most tokens (prompt and `max_tokens`) begun in a minute."""
    attempt_timeout_s: float = Field(default=600.0, gt=0)
    """Seconds of wall clock that one attempt may take."""
    max_attempts: int = Field(default=6, ge=1)
    """How often a request is tried; each attempt is reserved and paid by itself."""
    max_wait_s: float = Field(default=60.0, gt=0)
    """Longest pause between attempts that the client chooses; `Retry-After` may ask for more."""
    context_tokens: int | None = Field(default=None, ge=1)
    """Most tokens of a prompt and its completion; none takes what the endpoint says."""
    stream: bool = False
    """Receive answers piece by piece, for endpoints that close silent connections while the model thinks."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Further fields of every request, e.g. `{chat_template_kwargs: {thinking: true}}`."""

    @model_validator(mode="after")
    def _plain_url(self) -> Self:
        if self.base_url is not None and not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"teacher.api.base_url {self.base_url!r} must begin with http:// or https://")
        if self.base_url is not None and "@" in self.base_url:
            raise ValueError(
                "teacher.api.base_url holds a user or key; name an environment variable in key_env instead"
            )
        return self


Signal = Literal["prompt_scoring", "generation_logprobs", "text"]
"""What an endpoint gives, richest first."""
