"""Model folders: where one lies, what its config says, and the identity of a dataset captured from it. No torch."""

import json
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from storage.config import CacheConfig
from storage.errors import InputError
from storage.identity import (
    CaptureIdentity,
    DatasetIdentity,
    Task,
    TeacherIdentity,
    TokenizerIdentity,
    parameter_count,
    weights_digest,
)
from storage.projection import with_projection
from storage.tokenizer import Tokenizer
from workers.config import TeacherConfig

_LIGHT_FILES = ["*.json", "*.jinja", "tokenizer*"]


@dataclass(frozen=True)
class ModelFacts:
    """What a model folder's config.json says."""

    folder: Path
    architecture: str
    vocab_size: int
    """Width of the output head, padding included."""
    max_positions: int | None
    """Longest window, where the config names one."""
    num_attention_heads: int | None
    num_key_value_heads: int | None
    num_classes: int = 2
    """Of a classifier; transformers' default where the config says nothing."""
    one_class_each: bool = True
    """Whether a classifier's classes exclude each other."""

    def num_outputs(self, task: Task) -> int:
        """Return the width of the output head."""
        return self.vocab_size if task == "next_token" else self.num_classes


def is_hub_name(name: str) -> bool:
    """Tell whether a model is named by its hub name `owner/name`: no folder of that name is here."""
    plain = not name.startswith((".", "/", "~")) and name.count("/") == 1
    return plain and not Path(name).expanduser().is_dir()


def resolve_model(name: str, revision: str | None = None, weights: bool = True) -> Path:
    """Return the folder of a model: `name` itself, or a snapshot of that hub name.

    `weights` false fetches only config and tokenizer. Raises InputError when there is no such model.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.absolute()
    if not is_hub_name(name):
        raise InputError(
            f"teacher.name {name!r} is no folder; name an existing model folder, a hub model as `owner/name`, or "
            "`embedded`"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = _LIGHT_FILES + (["*.safetensors"] if weights else [])
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"teacher.name {name!r} is no folder here, and the hub gave no such model: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error


def model_facts(folder: Path) -> ModelFacts:
    """Read config.json; InputError when it is missing or not that of a language model."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{folder} has no config.json; a model folder is what save_pretrained writes") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    text: dict[str, Any] = {**config, **(config.get("text_config") or {})}
    if not isinstance(text.get("vocab_size"), int):
        raise InputError(f"{path} names no vocab_size; it is not the config of a language model")
    return ModelFacts(
        folder=folder,
        architecture=str((config.get("architectures") or [config.get("model_type", "unknown")])[0]),
        vocab_size=text["vocab_size"],
        max_positions=text.get("max_position_embeddings"),
        num_attention_heads=text.get("num_attention_heads"),
        num_key_value_heads=text.get("num_key_value_heads"),
        one_class_each=config.get("problem_type") in {None, "single_label_classification"},
        num_classes=len(config.get("id2label") or ()) or int(config.get("num_labels", 2)),
    )


def check_teacher(facts: ModelFacts, teacher: TeacherConfig, tokenizer: Tokenizer, window_tokens: int) -> None:
    """Raise InputError when this teacher cannot score these windows with these settings."""
    if facts.max_positions is not None and window_tokens > facts.max_positions:
        raise InputError(
            f"data.window_tokens {window_tokens} is longer than the {facts.max_positions} positions of teacher "
            f"{teacher.name}; lower it to {facts.max_positions} or less"
        )
    if tokenizer.vocab_size > facts.vocab_size:
        raise InputError(
            f"the tokenizer of teacher {teacher.name} has ids up to {tokenizer.vocab_size - 1}, its output head only "
            f"{facts.vocab_size} entries; the tokenizer is not this model's"
        )
    if teacher.task != "next_token" and (facts.num_classes < 2 or not facts.one_class_each):
        raise InputError(
            f"teacher {teacher.name} gives {facts.num_classes} scores that are no distribution over classes (its "
            "config's problem_type and id2label tell); a classifier with one right class of several is needed"
        )
    if teacher.sharding == "none" and teacher.ranks > 1:
        raise InputError(
            f"teacher.sharding none holds the whole model in one rank, but teacher.ranks is {teacher.ranks}; set ranks "
            "to 1, or sharding to tensor_parallel or zero3"
        )
    heads = facts.num_attention_heads
    if teacher.sharding == "tensor_parallel" and heads is not None and heads % teacher.ranks:
        fitting = [n for n in range(1, heads + 1) if heads % n == 0]
        raise InputError(
            f"teacher.ranks {teacher.ranks} does not divide the {heads} attention heads of teacher {teacher.name}; use "
            f"one of {fitting}, or sharding zero3"
        )


def capture_identity(cache: CacheConfig, teacher: TeacherConfig, num_classes: int | None) -> CaptureIdentity:
    """Return what is kept of a teacher's distributions; `num_classes` counts where it is a classifier."""
    capture = CaptureIdentity.of(cache)
    if teacher.task == "next_token":
        return capture
    return capture.model_copy(update={"task": teacher.task, "classes": num_classes})


def teacher_identity(
    folder: Path, teacher: TeacherConfig, cache: CacheConfig, tokenizer: Tokenizer, uses_chat_template: bool
) -> DatasetIdentity:
    """Return the identity of what this teacher and these capture settings give; hashes the weights once.

    Raises:
        InputError: the folder has no safetensors weights, or `dense` entries do not fit their count column.
    """
    facts = model_facts(folder)
    capture = capture_identity(cache, teacher, facts.num_classes)
    template = tokenizer.chat_template if uses_chat_template else None
    return DatasetIdentity(
        teacher=TeacherIdentity(
            name=teacher.name,
            revision=folder.name if "snapshots" in folder.parts else teacher.revision,
            architecture=facts.architecture,
            weights=weights_digest(folder),
            parameters=parameter_count(folder),
        ),
        tokenizer=TokenizerIdentity.of(tokenizer),
        chat_template=None if template is None else blake2b(template.encode(), digest_size=16).hexdigest(),
        precision=teacher.precision,
        capture=with_projection(capture, cache.url),
    )
