"""What a dataset was captured from: one model of it, its fingerprint, and the refusal of any other one."""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from storage.config import CacheConfig, HiddenDtype, Kind
from storage.errors import IdentityError, InputError
from storage.object_store import Store
from storage.settings import Settings, added

if TYPE_CHECKING:
    from storage.tokenizer import Tokenizer

ROWS_VERSION = 1
"""Version of what rows mean: a new one makes every captured target foreign. New settings are `added` fields instead."""

_CHUNK_BYTES = 1 << 24


Task = Literal["next_token", "token_classification", "sequence_classification"]
"""What a teacher's distributions are over: the next token, or classes of a token or of a whole text."""

DRAWN_KINDS = frozenset({"hybrid", "hybrid_counts", "sampled"})
"""Kinds that hold draws."""
COUNTED_KINDS = frozenset({"hybrid_counts", "sampled"})
"""Kinds that know of drawn entries only how often they were drawn."""
HEAD_KINDS = frozenset({"topk", "hybrid", "hybrid_counts"})
"""Kinds that hold the best entries."""


class TeacherIdentity(Settings):
    """The model that spoke."""

    name: str
    """Folder, hub name or `embedded`: for people, not part of the fingerprint; the weights' digest decides."""
    revision: str | None = None
    """Commit of a hub model."""
    architecture: str
    """Class name in the model's config, e.g. `DeepseekV3ForCausalLM`."""
    weights: str
    """Hex BLAKE2b over the weight files; see `weights_digest`."""
    parameters: int = Field(ge=0)
    """Number of parameters in the weight files."""


class TokenizerIdentity(Settings):
    """The tokenizer that cut the text."""

    digest: str
    """Hex BLAKE2b of the canonical tokenizer.json."""
    vocab_size: int = Field(ge=1)
    """Largest token id + 1, added tokens included, padding not."""

    @classmethod
    def of(cls, tokenizer: "Tokenizer") -> Self:
        """Return what tells a tokenizer from others."""
        return cls(digest=tokenizer.digest, vocab_size=tokenizer.vocab_size)


class CaptureIdentity(Settings):
    """What is kept of each distribution; settings that do not apply to the kind are null."""

    kind: Kind
    top_k: int | None = Field(default=None, ge=1)
    draws: int | None = Field(default=None, ge=1, le=255)
    draw_sets: int = added(1)
    seed: int | None = None
    hidden: list[str] = Field(default_factory=list)
    hidden_dtype: HiddenDtype | None = None
    hidden_every: float | None = added(None)
    """Which positions keep hidden states and attention, see `storage.hidden.kept_positions`; null: all."""
    hidden_projection: int | None = added(None)
    """Width that hidden states are projected to."""
    projection: str | None = added(None)
    """Digest of the projection's file; null where nothing is projected."""
    attention: list[str] = added([])
    """Layers whose head-averaged attention is kept."""
    task: Task = added("next_token")
    """What the entries are: token ids, or the numbers of classes."""
    classes: int | None = added(None)
    """How many there are, where they are classes."""

    @classmethod
    def of(cls, cache: CacheConfig) -> Self:
        """Take from the config what applies to its kind, in one canonical form."""
        sampled = cache.kind in DRAWN_KINDS
        return cls(
            kind=cache.kind,
            top_k=cache.top_k if cache.kind in HEAD_KINDS else None,
            draws=cache.draws if sampled else None,
            draw_sets=cache.draw_sets if sampled else 1,
            seed=cache.seed if sampled else None,
            hidden=sorted(set(cache.hidden)),
            hidden_dtype=cache.hidden_dtype if cache.hidden else None,
            hidden_every=cache.hidden_every if cache.hidden_every != 1 and (cache.hidden or cache.attention) else None,
            hidden_projection=cache.hidden_projection if cache.hidden else None,
            attention=sorted(set(cache.attention)),
        )

    @model_validator(mode="after")
    def _only_what_applies(self) -> Self:
        needed = {
            "top_k": self.kind in HEAD_KINDS,
            "draws": self.kind in DRAWN_KINDS,
            "seed": self.kind in DRAWN_KINDS,
        }
        needed["hidden_dtype"] = bool(self.hidden)
        needed["classes"] = self.task != "next_token"
        for name, applies in needed.items():
            if (getattr(self, name) is not None) != applies:
                raise ValueError(
                    f"capture.{name} must be {'set' if applies else 'null'} for kind {self.kind}, task {self.task}"
                )
        if not 1 <= self.draw_sets <= (16 if needed["draws"] else 1):
            raise ValueError(f"capture.draw_sets {self.draw_sets} does not fit kind {self.kind}")
        return self


class DatasetIdentity(Settings):
    """Everything that decides which targets a sample gets. Two equal fingerprints mean exchangeable rows."""

    teacher: TeacherIdentity
    tokenizer: TokenizerIdentity
    chat_template: str | None = None
    """Hex digest of the chat template; null where no template applies."""
    precision: str
    """Precision of the teacher's forward pass, e.g. `bfloat16`."""
    capture: CaptureIdentity
    schema_version: int = ROWS_VERSION

    @property
    def num_targets(self) -> int:
        """Return what every entry's id is below: the vocabulary's size, or the number of classes."""
        return self.capture.classes or self.tokenizer.vocab_size

    @property
    def fingerprint(self) -> str:
        """Return 32 hex digits over all fields but the teacher's name and `added` ones that are neutral."""
        fields = self.model_dump(mode="json")
        del fields["teacher"]["name"]
        return blake2b(canonical_json(fields), digest_size=16, person=b"lectern.identity").hexdigest()


def canonical_json(value: Any) -> bytes:
    """Return JSON with sorted keys and no spaces, the same bytes for the same value everywhere."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def require_same(expected: DatasetIdentity, found: DatasetIdentity, where: str) -> None:
    """Raise IdentityError, with both sides and the first field that differs, unless the fingerprints are equal."""
    if expected.fingerprint == found.fingerprint:
        return
    left, right = dict(_flatten(expected.model_dump(mode="json"))), dict(_flatten(found.model_dump(mode="json")))
    names = [name for name in [*left, *right] if name != "teacher.name" and left.get(name) != right.get(name)]
    first = names[0]
    raise IdentityError(
        f"{where} was captured with another identity: {first} is {right.get(first)!r} there, {left.get(first)!r} "
        f"here. There: teacher {found.teacher.name}, fingerprint {found.fingerprint}; here: teacher "
        f"{expected.teacher.name}, fingerprint {expected.fingerprint}. Use the settings it was captured with, or "
        "another cache.url"
    )


def weights_digest(folder: str | Path) -> str:
    """Return 64 hex digits of BLAKE2b over a model folder's safetensors files, by name.

    Kept in the user's cache folder by path, size and time of change, since hashing a large model takes minutes.
    Raises InputError when the folder has none.
    """
    files = weight_files(folder)
    state = [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    memo_key = f"weights-{blake2b(canonical_json(state), digest_size=16).hexdigest()}.json"
    memo = Store(cache_folder() / "digests")
    known = memo.read_if_exists(memo_key)
    if known is not None:
        return str(json.loads(known)["digest"])
    with ThreadPoolExecutor(max_workers=4) as pool:
        digests = list(pool.map(_file_digest, files))
    digest = blake2b(digest_size=32, person=b"lectern.weights")
    for file, part in zip(files, digests, strict=True):
        digest.update(canonical_json([file.name, part]))
    memo.write(memo_key, canonical_json({"files": state, "digest": digest.hexdigest()}))
    return digest.hexdigest()


def parameter_count(folder: str | Path) -> int:
    """Return the number of values in a model folder's safetensors files, read from their headers alone."""
    return sum(_values_in(file) for file in weight_files(folder))


def weight_files(folder: str | Path) -> list[Path]:
    """Return the safetensors files of a model folder, resolved and sorted by name."""
    files = sorted(Path(folder).glob("*.safetensors"), key=lambda file: file.name)
    if not files:
        raise InputError(
            f"{folder} holds no *.safetensors file; Lectern reads no other weight format: save the model again "
            "with save_pretrained(safe_serialization=True)"
        )
    return [file.absolute() for file in files]


def cache_folder() -> Path:
    """Return where things worth keeping between runs lie: $LECTERN_CACHE, else ~/.cache/lectern."""
    return Path(os.environ.get("LECTERN_CACHE") or Path.home() / ".cache" / "lectern").expanduser()


def _file_digest(file: Path) -> str:
    digest = blake2b(digest_size=32)
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _values_in(file: Path) -> int:
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            if size > file.stat().st_size:
                raise ValueError("header longer than the file")
            header = json.loads(stream.read(size))
    except (ValueError, OSError) as error:
        raise InputError(f"{file} is not a readable safetensors file: {error}; download or save it again") from error
    total = 0
    for name, entry in header.items():
        if name != "__metadata__":
            values = 1
            for extent in entry["shape"]:
                values *= extent
            total += values
    return total


def _flatten(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, item in value.items():
        if isinstance(item, dict):
            yield from _flatten(item, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", item
