"""Students: from a folder or a config to a model, and which of its parameters are trained."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from storage.errors import InputError
from storage.identity import DatasetIdentity
from storage.tokenizer import Tokenizer
from trainer.anatomy import attention_module
from trainer.config import StudentConfig
from trainer.lora import add_lora
from trainer.loss_config import LossConfig


def resolve_student(student: StudentConfig, identity: DatasetIdentity) -> str | None:
    """Return the local folder of a student that starts from a model, none for a fresh one, after cheap checks.

    Raises:
        InputError: there is no such model, its tokenizer is not the dataset's, or its vocabulary is too small.
    """
    folder = None if student.path is None else str(_local_folder(student.path))
    if folder is not None:
        digest = Tokenizer.load(folder).digest
        if digest != identity.tokenizer.digest:
            raise InputError(
                f"the tokenizer of student {student.path} ({digest[:12]}…) is not the one that the dataset was "
                f"captured with ({identity.tokenizer.digest[:12]}…); token targets need a student of the same tokenizer"
            )
    vocab_size = int(student_config(student, folder, identity).get_text_config().vocab_size)
    if vocab_size < identity.tokenizer.vocab_size:
        raise InputError(
            f"the student's vocabulary has {vocab_size} entries, but the dataset's tokenizer needs "
            f"{identity.tokenizer.vocab_size}; leave student.config.vocab_size out to have it filled in, or start from "
            "a model of the same tokenizer"
        )
    return folder


def student_config(student: StudentConfig, folder: str | None, identity: DatasetIdentity) -> Any:
    """Return the transformers config of the student."""
    from transformers import AutoConfig

    if folder is not None:
        return AutoConfig.from_pretrained(folder)
    fields = {"vocab_size": identity.tokenizer.vocab_size, **(student.config or {})}
    try:
        return AutoConfig.for_model(**fields)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"student.config is not a transformers config: {error}") from error


def build_student(student: StudentConfig, folder: str | None, identity: DatasetIdentity) -> Any:
    """Return the student in float32: loaded from `folder`, or fresh with weights that depend on the seed alone."""
    from transformers import AutoModelForCausalLM

    if folder is not None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    config = student_config(student, folder, identity)
    with torch.random.fork_rng():
        torch.manual_seed(student.seed)
        try:
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except (ValueError, TypeError, ZeroDivisionError) as error:
            raise InputError(f"student.config does not make a causal language model: {error}") from error


def prepare_student(model: Any, student: StudentConfig, loss: LossConfig | None = None) -> None:
    """Decide what of a built student is trained: all, or its adapters, without what is frozen; see `freeze`.

    Where the loss looks at attention, the student is made to compute its weights; InputError where a layer has none.
    """
    if loss is not None and loss.attends:
        model.set_attn_implementation("eager")
        for layer in loss.attention_map.values():
            attention_module(model, layer)
    if student.lora is not None:
        add_lora(model, student.lora, student.seed)
    freeze(model, student.frozen)


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


def _local_folder(name: str) -> Path:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.absolute()
    if folder.is_absolute() or name.startswith((".", "~")):
        raise InputError(f"student.path {name} is no folder; give a model folder or a hub name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"]))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise InputError(
            f"student.path {name} is neither a folder nor a model that the hub gives: {str(error).splitlines()[0]}"
        ) from error
