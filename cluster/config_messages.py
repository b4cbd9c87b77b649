"""Problems of a config in plain words: what pydantic found, and the nearest valid name of an unknown key."""

import difflib
from collections.abc import Iterator, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from cluster.config import RunConfig
from trainer.loss_config import NUMBER_TAG, SCHEDULE_TAG

_PLAIN_MESSAGES = {
    "missing": "is missing; it has no default",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "bool_parsing": "must be true or false",
    "string_type": "must be text",
    "list_type": "must be a list",
    "dict_type": "must be a mapping of names to values",
    "model_type": "must be a section with keys of its own",
    "model_attributes_type": "must be a section with keys of its own",
}


def describe(detail: ErrorDetails) -> str:
    """Return one problem that pydantic found as a plain sentence with the key's full path."""
    keys = [part for part in detail["loc"] if part not in (NUMBER_TAG, SCHEDULE_TAG)]
    path = ".".join(str(part) for part in keys)
    kind = detail["type"]
    if kind == "extra_forbidden":
        return _describe_unknown(keys)
    if kind == "missing":
        return f"{path} {_PLAIN_MESSAGES['missing']}"
    message = detail["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return message if not path or path.split(".")[-1] in message else f"{path}: {message}"
    message = _PLAIN_MESSAGES.get(kind, message[:1].lower() + message[1:].replace("Input should", "should"))
    message = message.replace("input should", "must").replace("should", "must")
    return f"{path} = {_short(detail['input'])}: {message}"


def nearest_name(unknown: Sequence[str | int]) -> tuple[str | None, list[str]]:
    """Return the full path of the valid key nearest to an unknown one, if any, and the names valid in its section.

    Names of the same section come first; then the same or a similar name anywhere in the config.
    """
    *section, name = [str(part) for part in unknown]
    model = _model_at(section)
    siblings = list(model.model_fields) if model else []
    prefix = ".".join(section)
    close = difflib.get_close_matches(str(name), siblings, n=1, cutoff=0.6)
    if close:
        return (f"{prefix}.{close[0]}" if prefix else close[0]), siblings
    by_leaf: dict[str, str] = {}
    for path in _all_paths(RunConfig):
        by_leaf.setdefault(path.rpartition(".")[2], path)
    close = difflib.get_close_matches(str(name), list(by_leaf), n=1, cutoff=0.75)
    return (by_leaf[close[0]] if close else None), siblings


def _describe_unknown(loc: Sequence[str | int]) -> str:
    path = ".".join(str(part) for part in loc)
    near, siblings = nearest_name(loc)
    if near:
        return f"unknown key {path}; did you mean {near}?"
    section = path.rpartition(".")[0] or "the top level"
    return f"unknown key {path}; valid names in {section}: {', '.join(siblings)}"


def _model_at(section: Sequence[str]) -> type[BaseModel] | None:
    """Return the config model that a path leads to; list indexes and the user's own names are passed over."""
    model: type[BaseModel] | None = RunConfig
    is_name = False
    for part in section:
        if is_name or part.isdigit():
            is_name = False
            continue
        if model is None or part not in model.model_fields:
            return None
        annotation = model.model_fields[part].annotation
        model, is_name = _inner_model(annotation), get_origin(annotation) is dict
    return model


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in {list, dict, Union, UnionType, Annotated}:
        for argument in get_args(annotation):
            if (found := _inner_model(argument)) is not None:
                return found
    return None


def _all_paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted path of every key of the config, sections before their keys."""
    for name, info in model.model_fields.items():
        yield f"{prefix}{name}"
        inner = _inner_model(info.annotation)
        if inner is not None:
            yield from _all_paths(inner, f"{prefix}{name}.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
