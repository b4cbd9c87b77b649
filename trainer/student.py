"""Students: from a folder or a config to a model, and which of its parameters are trained."""

import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from storage.classes import CALLED, auto_model
from storage.errors import InputError
from storage.identity import DatasetIdentity, TokenizerIdentity
from storage.tokenizer import Tokenizer
from trainer.alignment import Aligner
from trainer.anatomy import attention_module
from trainer.config import StudentConfig
from trainer.lora import add_lora
from trainer.loss_config import LossConfig
from trainer.served import require_same_tokens


def resolve_student(
    student: StudentConfig, identity: DatasetIdentity, loss: LossConfig | None = None
) -> tuple[str | None, Tokenizer | None]:
    """Return where a student's model lies and the tokenizer that it brings, after cheap checks.

    A fresh student has no folder; one that brings no tokenizer reads the dataset's.

    Raises:
        InputError: there is no such model, its tokenizer is another one than the dataset's and the loss (where it is
            given) does not compare across tokenizers, or its vocabulary is too small.
    """
    folder = None if student.path is None else str(_local_folder(student.path))
    named = folder if student.tokenizer is None else _local_folder(student.tokenizer, "student.tokenizer")
    own = None if named is None else Tokenizer.load(named)
    tokens = identity.tokenizer if own is None else TokenizerIdentity.of(own)
    if loss is not None:
        require_same_tokens(loss, f"student {student.tokenizer or student.path}", tokens, identity.tokenizer)
    vocab_size = int(student_config(student, folder, tokens.vocab_size, identity).get_text_config().vocab_size)
    if vocab_size < tokens.vocab_size:
        raise InputError(
            f"the student's vocabulary has {vocab_size} entries, but its tokenizer needs {tokens.vocab_size}; leave "
            "student.config.vocab_size out to have it filled in, or start from a model of the same tokenizer"
        )
    return folder, own


def with_vocabulary(student: StudentConfig, aligner: Aligner | None) -> StudentConfig:
    """Return a fresh student that says nothing of its vocabulary with that of its own tokenizer."""
    if aligner is None or student.config is None:
        return student
    return student.model_copy(update={"config": {"vocab_size": aligner.vocab_size, **student.config}})


def aligner_of(
    student: StudentConfig,
    resolved: tuple[str | None, Tokenizer | None],
    identity: DatasetIdentity,
    teacher: Path,
    loss: LossConfig,
) -> Aligner | None:
    """Return what lays the teacher's tokens over the student's; none where these are the same and the loss wants none.

    Args:
        student: the student.
        resolved: what `resolve_student` returned.
        identity: of the dataset.
        teacher: folder of the dataset's tokenizer.
        loss: what the student is trained by.

    Raises:
        InputError: one of the two tokenizers does not spell text.
    """
    folder, own = resolved
    if not loss.crosses and (own is None or own.digest == identity.tokenizer.digest):
        return None
    teachers = Tokenizer.load(teacher)
    own = teachers if own is None else own
    return _laid_over(teachers, own, student_config(student, folder, own.vocab_size, identity))


def aligner_of_model(folder: Path, teacher: Tokenizer) -> Aligner | None:
    """Return what lays the teacher's tokens over those of a trained model, none where they are the same."""
    from transformers import AutoConfig

    own = Tokenizer.load(folder)
    return None if own.digest == teacher.digest else _laid_over(teacher, own, AutoConfig.from_pretrained(folder))


def _laid_over(teacher: Tokenizer, own: Tokenizer, config: Any) -> Aligner:
    """Return the aligner of a student with this transformers config."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return Aligner(teacher, own, positions or sys.maxsize)


def student_config(student: StudentConfig, folder: str | None, vocab_size: int, identity: DatasetIdentity) -> Any:
    """Return the transformers config of the student; a fresh one that says nothing gets this vocabulary."""
    from transformers import AutoConfig

    classes = identity.capture.classes
    if folder is not None:
        config = AutoConfig.from_pretrained(folder)
        if classes is not None and config.num_labels != classes:
            config.num_labels = classes
        return config
    fields = {"vocab_size": vocab_size, **(student.config or {})}
    try:
        return AutoConfig.for_model(**fields, **({} if classes is None else {"num_labels": classes}))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"student.config is not a transformers config: {error}") from error


def build_student(student: StudentConfig, folder: str | None, identity: DatasetIdentity) -> Any:
    """Return the student in float32, a model of the dataset's task: loaded from `folder`, or fresh.

    Fresh weights depend on the seed alone; a folder without a classifier's head gets a fresh one.
    """
    task = identity.capture.task
    builder, config = auto_model(task), student_config(student, folder, identity.tokenizer.vocab_size, identity)
    with torch.random.fork_rng():
        torch.manual_seed(student.seed)
        try:
            if folder is None:
                return builder.from_config(config, dtype=torch.float32)
            return builder.from_pretrained(folder, config=config, dtype=torch.float32, use_safetensors=True)
        except (ValueError, TypeError, ZeroDivisionError, RuntimeError) as error:
            what = "student.config" if folder is None else f"student.path {student.path}"
            classes = f" for the teacher's {identity.capture.classes} classes" if identity.capture.classes else ""
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"{what} does not make a {CALLED[task]}{classes}: {reason}") from error


def prepare_student(model: Any, student: StudentConfig, loss: LossConfig | None = None) -> None:
    """Decide what of a built student is trained: all, or its adapters, without what is frozen; see `freeze`.

    Where the loss looks at attention, the student is made to compute its weights; InputError where a layer has none.
    """
    if loss is not None and loss.attends:
        model.set_attn_implementation("eager")
        for layer in loss.attention_map.values():
            attention_module(model, layer)
    if student.lora is not None:
        add_lora(model, student.lora, student.seed, class_head(model))
    freeze(model, student.frozen)


def class_head(model: Any) -> list[str]:
    """Return the names of a classifier's own modules, beside the body that it shares with other models."""
    if model.get_output_embeddings() is not None:
        return []
    return [name for name, _ in model.named_children() if name != model.base_model_prefix]


def freeze(model: nn.Module, patterns: Sequence[str]) -> int:
    """Keep the parameters whose names match any pattern as they are; returns how many values that are.

    Raises:
        InputError: a pattern matches nothing, or nothing is left to train.
    """
    named = dict(model.named_parameters())
    frozen: set[str] = set()
    for pattern in patterns:
        matched = [name for name in named if fnmatchcase(name, pattern)]
        if not matched:
            some = ", ".join(list(named)[:6])
            raise InputError(f"student.frozen {pattern!r} matches no parameter of the student; its names are {some}, …")
        frozen.update(matched)
    if not any(parameter.requires_grad for name, parameter in named.items() if name not in frozen):
        raise InputError(f"student.frozen {', '.join(patterns)} leaves nothing to train; name fewer modules")
    for name in frozen:
        named[name].requires_grad_(False)
    return sum(named[name].numel() for name in frozen)


def _local_folder(name: str, what: str = "student.path") -> Path:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.absolute()
    if folder.is_absolute() or name.startswith((".", "~")):
        raise InputError(f"{what} {name} is no folder; give a model folder or a hub name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"]))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise InputError(
            f"{what} {name} is neither a folder nor a model that the hub gives: {str(error).splitlines()[0]}"
        ) from error
