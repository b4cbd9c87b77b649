"""Config sections of this room: `data` (what text) and `cache` (what is kept of the teacher)."""

from typing import Literal, Self

from pydantic import Field, model_validator

from storage.settings import Settings, added

Codec = Literal["plain", "compact"]
"""How the entries are packed."""
Kind = Literal["topk", "hybrid", "hybrid_counts", "sampled", "dense", "text"]
"""Which entries are kept at each position."""
HiddenDtype = Literal["float32", "float16", "bfloat16", "int8"]
"""Stored precision of hidden states."""


class CleaningConfig(Settings):
    """Normalisation steps applied to each document, in the order of these fields."""

    strip_html: bool = False
    """Replace HTML markup by its visible text."""
    nfkc: bool = False
    """Apply Unicode NFKC normalisation."""
    term_map: dict[str, str] = Field(default_factory=dict)
    """Whole-term replacements, longest first, e.g. `{concrete: 混凝土}`."""
    deduplicate: bool = False
    """Drop documents whose cleaned text was already seen in the same source."""


class SourceConfig(Settings):
    """One named corpus."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Short name used by the curriculum and the reports, e.g. `general`."""
    path: str | list[str]
    """`embedded:general`, `embedded:domain`, or fsspec URLs; globs are expanded and sorted."""
    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    """`auto` goes by the file's suffix: .jsonl/.json, .parquet, anything else is plain text."""
    text_field: str = "text"
    """Field (JSONL) or column (Parquet) that holds plain text."""
    messages_field: str = "messages"
    """Field that holds chat messages `[{role, content}, …]`; used where present."""
    prompt_field: str = "prompt"
    """Field of an unsupervised prompt; used together with `completion_field`."""
    completion_field: str = "completion"
    """Field of the supervised completion."""
    tokens_field: str | None = added(None)
    """Field that holds token ids, taken as they are, with `supervised`, true for those to be learnt, beside it; e.g.
    `tokens` of what `lectern generate` keeps with `generate.logprobs`. Used where set and present."""
    label_field: str | None = added(None)
    """Field that holds the class of a text, a number as the `id2label` of a teacher that classifies counts them; beside
    `tokens_field` a list of one for each token, −100 where there is none. The student's hard labels; null where a row
    has none."""
    clean: CleaningConfig = CleaningConfig()
    """Normalisation steps for this source."""
    max_documents: int | None = Field(default=None, ge=1)
    """Read at most this many documents; none means all."""


class DataConfig(Settings):
    """Which text becomes samples, and how."""

    sources: list[SourceConfig] = Field(min_length=1)
    """The corpora; the curriculum mixes them by name."""
    window_tokens: int = Field(default=1024, ge=2)
    """Length of a context window, in tokens; at most the model's positions."""
    pack: bool = True
    """Pack several short documents into one window; attention and positions restart at each."""
    supervise: Literal["all", "last"] = added("all")
    """`all`: whatever the student must predict; `last`: of each window's documents the last token alone, where a
    teacher that classifies whole texts has its one answer."""
    chat_template: str | None = None
    """Jinja chat template that replaces the tokenizer's own."""
    heldout_fraction: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Share of documents, chosen by a hash of their text, kept away from training."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """What a malformed row does: stop with its file and line, or be counted and left out."""

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"data.sources holds a name twice: {names}; give each source a name of its own")
        return self


class CacheConfig(Settings):
    """What is kept of the teacher, and where."""

    url: str
    """Folder or fsspec URL of the dataset, e.g. `runs/cache` or `s3://bucket/r1-targets`."""
    also: list[str] = Field(default_factory=list)
    """Further datasets with the same tokenizer, of any teacher and kind. What they hold is not scored again: of all
    datasets that hold a sample the first one serves it, `cache.url` before these, in the order of this list."""
    kind: Kind = "hybrid"
    """`topk`: the k best entries + tail; `hybrid`: exact k best + draws from the rest, with their log-probabilities;
    `hybrid_counts`: of the draws only how often each entry was drawn, about half of the bytes, for forward KL alone;
    `sampled`: draws alone; `dense`: all entries; `text`: no probabilities, for training on text that the teacher
    wrote."""
    top_k: int = Field(default=12, ge=1, le=65_535)
    """Entries kept for their rank at each position (kinds `topk` and `hybrid…`)."""
    draws: int = Field(default=12, ge=1, le=255)
    """Draws at each position by systematic resampling (kinds `hybrid…` and `sampled`)."""
    draw_sets: int = Field(default=1, ge=1, le=16)
    """Independent sets of draws; each pass of a training over a sample uses the next one, so that the noise of the
    draws is not seen over and over."""
    seed: int = 0
    """Seed of the draws; a sample's draws depend on this and on its id alone."""
    codec: Codec = "plain"
    """`plain`: lists that every Parquet reader understands; `compact`: packed to a fraction of that, log-probabilities
    rounded by at most 0.01 nats. Decided when the dataset is made: an existing one keeps its own."""
    hidden: list[str] = Field(default_factory=list)
    """Hidden states to keep: `final` (input of the output head), or what a module puts out: `model.layers.3`, or
    `model.layers.3.self_attn.v_proj` for the values of its attention (not under tensor parallelism)."""
    hidden_dtype: HiddenDtype = "float16"
    """Stored precision of the hidden states; `int8` has a float32 scale for each position."""
    hidden_projection: int | None = Field(default=None, ge=1)
    """Keep hidden states in so many dimensions, by a principal component analysis that is fitted when the capture
    begins and kept with the dataset; none keeps them whole."""
    hidden_every: float = Field(default=1.0, gt=0)
    """Keep hidden states and attention of one supervised position in so many, evenly spaced; below 1: of this share."""
    attention: list[str] = Field(default_factory=list)
    """Layers whose head-averaged attention is kept, e.g. `model.layers.3`; the teacher then runs eager attention."""
    unit_tokens: int = Field(default=65_536, ge=1)
    """Tokens scored and committed together; one data file each."""
    most_refused: float = Field(default=0.05, ge=0.0, le=1.0)
    """Share of the samples that may be left out because the teacher refuses them: logits that are no numbers, text over
    its context, content that a provider will not take. A capture that finds more ends with an error."""
    retry_refused: bool = False
    """Ask the teacher once more for what it refused; asked in another way, through another endpoint say, it is asked
    anyhow."""
    verify_hashes: bool = True
    """Check each data file's SHA-256 the first time that a process reads it."""
    read_memory_bytes: int = Field(default=1 << 30, ge=1)
    """Memory of each process for decoded data files and batches read ahead."""
    read_disk_bytes: int = Field(default=20 << 30, ge=0)
    """Local disk for decoded data files, all processes together: those of a remote dataset, and those of a local one
    that memory cannot hold; 0 keeps none."""
    read_disk_folder: str | None = None
    """Where they are kept; none means `shards` in `$LECTERN_CACHE` or `~/.cache/lectern`. Safe to delete."""

    @model_validator(mode="after")
    def _dense_is_plain(self) -> Self:
        if self.codec == "compact" and self.kind == "dense":
            raise ValueError(
                "cache.codec `compact` packs the few entries of a sparse target; cache.kind `dense` keeps them all: "
                "use codec `plain`, or keep the hidden state `final` in place of dense targets"
            )
        return self
