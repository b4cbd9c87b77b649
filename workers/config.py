"""Config sections of this room: `teacher` and `budget`."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from storage.identity import Task
from storage.settings import Settings
from workers.api.config import ApiConfig, Signal


class EmbeddedTeacherConfig(Settings):
    """The small DeepSeek-V3-architecture teacher that is trained on the machine itself."""

    vocab_size: int = Field(default=4096, ge=300)
    """Entries of the byte-level BPE tokenizer trained on the corpora."""
    hidden_size: int = Field(default=256, ge=16)
    """Width of the model."""
    layers: int = Field(default=4, ge=2)
    """Decoder layers; the first is dense, the rest have routed experts."""
    experts: int = Field(default=4, ge=2)
    """Routed experts in each mixture layer, two of them active per token."""
    window_tokens: int = Field(default=256, ge=16)
    """Length of its training windows, in tokens."""
    train_tokens: int = Field(default=300_000, ge=1)
    """Tokens it is trained on, once; about 3,500 a second on two cores."""
    seed: int = 0
    """Seed of its weights and data order."""


class ReplicasConfig(Settings):
    """How many whole copies of the teacher work side by side; a plain number n means `{min: 1, max: n}`."""

    min: int = Field(default=1, ge=1)
    """Copies without which a capture fails after `startup_timeout_s`."""
    max: int = Field(default=1, ge=1)
    """Most copies at any time: as many as there is work for, as resources come and go."""

    @model_validator(mode="after")
    def _check_order(self) -> "ReplicasConfig":
        if self.min > self.max:
            raise ValueError(f"min {self.min} is more than max {self.max}")
        return self


class OffloadConfig(Settings):
    """Where the shares of a teacher split with ZeRO-3 lie while they are not computed with."""

    to: Literal["cpu", "nvme"] = "cpu"
    """Host memory, or files on a fast local disk; the latter needs an accelerator and DeepSpeed's asynchronous I/O."""
    folder: str | None = None
    """Folder on that disk, on every node."""

    @model_validator(mode="after")
    def _disk_has_a_folder(self) -> "OffloadConfig":
        if (self.to == "nvme") != (self.folder is not None):
            raise ValueError("folder names where the files go with `to: nvme`, and goes with that alone")
        return self


class TeacherConfig(Settings):
    """Which model is distilled, and how it is run."""

    kind: Literal["local", "api", "mixed"] = "local"
    """`local`: loaded here and sharded with DeepSpeed; `api`: behind an OpenAI-compatible endpoint; `mixed`: both on
    one queue, the cheaper one filled first; the endpoint must serve the very weights of `name` and score prompts."""
    name: str = "embedded"
    """`embedded`, a folder, or a hub name of any `AutoModelForCausalLM`; of an `api` teacher only its tokenizer and
    config are used."""
    revision: str | None = None
    """Commit of a hub model; pinned into the dataset's identity."""
    task: Task = "next_token"
    """What it says: which token follows (`AutoModelForCausalLM`), or of which class a token
    (`AutoModelForTokenClassification`) or a whole text (`AutoModelForSequenceClassification`) is. Classes are stored
    like token ids; they need `data.pack: false`, and those of texts `data.supervise: last`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the weights and the forward pass; `auto` is bfloat16 where the machine computes it natively, else
    float32. It is part of the dataset's identity: name one where several kinds of machine work on one dataset."""
    sharding: Literal["none", "tensor_parallel", "zero3"] = "tensor_parallel"
    """How DeepSpeed splits the model over the ranks; `none` needs `ranks: 1`."""
    ranks: int = Field(default=1, ge=1)
    """Rank actors of one replica, one accelerator (or CPU share) each."""
    offload: OffloadConfig | None = None
    """Keep weights off the accelerator but for the layer at work (`sharding: zero3`, one rank will do): slower by the
    copying, for teachers that fit no other way. `{}` keeps them in host memory."""
    quantize: Literal["int8", "int4"] | None = None
    """Round the weights to 8 or 4 bits while loading (bitsandbytes; `sharding: none`): another teacher, by its answers
    and so by its identity, in half or a quarter of the memory."""
    replicas: ReplicasConfig = ReplicasConfig()
    """Whole copies of the teacher that work side by side."""
    batch_tokens: int = Field(default=8192, ge=1)
    """Padded tokens in one forward pass of a replica."""
    max_attempts: int = Field(default=3, ge=1)
    """How often a unit is tried before it is set aside as failed; three times as often when its replica was lost."""
    startup_timeout_s: float = Field(default=1800.0, gt=0)
    """Seconds a replica may take from being asked for to being ready."""
    unit_timeout_s: float = Field(default=3600.0, gt=0)
    """Seconds a unit may take before its replica counts as hung and is replaced."""
    heartbeat_timeout_s: float = Field(default=300.0, gt=0)
    """Seconds in which every rank must answer, and finish a batch while it has work; else its replica is replaced."""
    api: ApiConfig = ApiConfig()
    """The endpoint of an `api` teacher."""
    require: Signal | None = None
    """The least that an `api` teacher must give; none takes the richest that there is, and says what that is."""
    embedded: EmbeddedTeacherConfig = EmbeddedTeacherConfig()
    """Shape of the embedded teacher; used where `name` is `embedded`."""

    @model_validator(mode="after")
    def _what_goes_together(self) -> "TeacherConfig":
        if self.offload is not None and self.sharding != "zero3":
            raise ValueError(f"offload is a part of sharding zero3, not of {self.sharding}; set sharding: zero3")
        if self.quantize is not None and self.sharding != "none":
            raise ValueError(f"quantize cannot be split by {self.sharding}; set sharding: none and ranks: 1")
        return self

    @property
    def precision(self) -> str:
        """The precision of weights and forward pass, as a dataset's identity names it."""
        return self.dtype if self.quantize is None else f"{self.dtype}, weights {self.quantize}"

    @field_validator("replicas", mode="before")
    @classmethod
    def _plain_number(cls, value: Any) -> Any:
        return {"max": value} if isinstance(value, int) and not isinstance(value, bool) else value


class DatasetBudgetConfig(Settings):
    """Caps over all runs that ever spent on the dataset."""

    cap: float | None = Field(default=None, gt=0)
    """Most money, in `budget.currency`."""
    cap_tokens: int | None = Field(default=None, ge=1)
    """Most tokens, prompts and completions together."""
    cap_requests: int | None = Field(default=None, ge=1)
    """Most attempts."""


class BudgetConfig(Settings):
    """What a run may cost. Caps hold at every moment: an attempt's worst case is set apart before it is made."""

    currency: str = "USD"
    """Unit of every amount in plan, ledger and report."""
    cap: float | None = Field(default=None, gt=0)
    """Most that this run may spend on a teacher behind an API; a local one is priced by `cluster.price_per_hour`."""
    cap_tokens: int | None = Field(default=None, ge=1)
    """Most tokens that this run may send and receive, prompts and completions together."""
    cap_requests: int | None = Field(default=None, ge=1)
    """Most attempts that this run may make."""
    dataset: DatasetBudgetConfig = DatasetBudgetConfig()
    """Caps over all runs that spend on the same dataset."""
    ledger: str | None = None
    """Where the ledger lies: a folder or fsspec URL; none keeps it beside the dataset, in `cache.url`."""
