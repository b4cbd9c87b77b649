"""The part of the config that is about an endpoint: where it is, what it costs, how it may be used."""

import re
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


class BatchConfig(Settings):
    """Batch files, as OpenAI's Batch API takes them: answers within a day, at a lower price."""

    requests: int = Field(default=10_000, ge=1, le=50_000)
    """Most requests of one file."""
    price: float = Field(default=0.5, ge=0, le=1)
    """What they cost, as a share of `prices`."""
    poll_s: float = Field(default=60.0, gt=0)
    """Seconds between two looks at a batch."""
    window: str = "24h"
    """Time within which the endpoint is asked to answer."""


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
    batch: BatchConfig | None = None
    """Have `lectern generate` send batch files, `{}` with the usual settings; none asks request by request."""
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


class FilterConfig(Settings):
    """What a completion must be to be kept; a limit that is none is not looked at. Filtered ones are kept apart."""

    finished: bool = True
    """The teacher came to an end by itself (`finish_reason` is `stop`)."""
    answer_chars: tuple[int, int] | None = None
    """Least and most characters of the answer."""
    reasoning_chars: tuple[int, int] | None = None
    """Least and most characters of the reasoning."""
    script: str | None = None
    """Unicode script that at least nine tenths of the letters must have, e.g. `latin`, `cyrillic`, `cjk`."""
    repetition: float | None = Field(default=None, gt=0, le=1)
    """Largest share of the eight-word runs of reasoning and answer that occurred before in the same completion."""
    duplicate: bool = True
    """The answer and reasoning of an earlier kept completion of the same prompt, whatever the white space."""
    format: str | None = None
    """Regular expression that must be found in the answer, e.g. `\\\\boxed\\{.+\\}`."""
    checker: str | None = None
    """Compares the answer with the prompt's reference: `exact`, `numeric`, or `module:function` of your own, called
    with answer, reference and the prompt's row; true keeps the completion."""

    @model_validator(mode="after")
    def _can_be_applied(self) -> Self:
        if self.format is not None:
            try:
                re.compile(self.format)
            except re.error as error:
                raise ValueError(f"generate.filters.format is no regular expression: {error}") from error
        if self.checker not in {None, "exact", "numeric"} and not re.fullmatch(r"[\w.]+:\w+", self.checker or ""):
            raise ValueError(f"generate.filters.checker {self.checker!r} must be exact, numeric or module:function")
        return self


class GenerateConfig(Settings):
    """Completions that the teacher writes for prompts; `lectern generate`."""

    prompts: str | list[str] | None = None
    """JSONL or Parquet files with the prompts: fsspec URLs, globs are expanded and sorted."""
    prompt_field: str = "prompt"
    """Field of the prompt's text."""
    messages_field: str = "messages"
    """Field that holds chat messages; used where present."""
    reference_field: str = "reference"
    """Field of the right answer, for `filters.checker`."""
    max_prompts: int | None = Field(default=None, ge=1)
    """Use at most this many prompts; none means all."""
    url: str | None = None
    """Where the completions go; every answer lies beside the dataset first, in `cache.url`."""
    system: str | None = None
    """System message put before each prompt."""
    samples: int = Field(default=1, ge=1)
    """Completions for each prompt."""
    max_tokens: int = Field(default=4096, ge=1)
    """Most tokens of a completion, reasoning included; what is reserved for each attempt."""
    temperature: float = Field(default=0.6, ge=0)
    """Sampling temperature."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Nucleus of the sampling."""
    stop: list[str] = Field(default_factory=list, max_length=4)
    """Texts that end a completion and are not part of it; at most four, as endpoints take no more."""
    logprobs: int | None = Field(default=None, ge=1, le=20)
    """Ask an endpoint for so many best tokens at each step of its own text, with their log-probabilities: `lectern
    capture` makes targets of them where it scores no prompts. Sources of such rows set `tokens_field: tokens`."""
    batch_tokens: int = Field(default=65_536, ge=1)
    """Tokens of prompts and completions, `max_tokens` each, that a local replica writes side by side; halved when
    memory runs out."""
    completion_format: str = "<think>\n{reasoning}\n</think>\n\n{answer}"
    """How reasoning and answer make the text that a student learns; without reasoning it is the answer alone."""
    filters: FilterConfig = FilterConfig()
    """What a completion must be to be kept."""
