"""Writes docs/configuration.md from the config models: `python docs/make_configuration.py`.

With `--check` nothing is written; the exit status is 1 when the file on disk is out of date.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from cluster.config import RunConfig
from trainer.loss_config import ScheduleConfig

TARGET = Path(__file__).with_name("configuration.md")

HEAD = """# Configuration

One YAML file describes a whole run. This page is made from the config models by `docs/make_configuration.py`; the same
as a JSON schema: `lectern plan --schema`. Only `data.sources`, `cache.url` and `student` have no default.

Any key can be set from the command line: `--set train.steps=100 --set data.sources.general.max_documents=50`.
The value is read as YAML; an item of a list is named by its index or by its `name`. An unknown key is an error that
names the nearest valid one. Secrets are never part of a config: stores and hubs take them from the environment.
"""


SAME_AS = {"stages.N.train": "train", "stages.N.curriculum": "curriculum", "stages.N.lora": "student.lora"}
"""Sections that have the keys of another one, told once."""

SCHEDULES = """Where a type says *schedule*, the value may be one number, or change over the steps:
`learning_rate: {shape: warmup_stable_decay, start: 1.0e-3, end: 1.0e-5, begin: 0.02, finish: 0.8}`."""


MANY = {list: ("list", ".N"), dict: ("mapping of names to sections", ".NAME")}
"""Collections of sections: what they are called, and how the path of one item ends."""


def page() -> str:
    """Return the whole page as Markdown."""
    parts = [HEAD, f"## Schedules\n\n{SCHEDULES}\n\n{table(ScheduleConfig, '…')}"]
    for name, field in RunConfig.model_fields.items():
        model = inner_model(field.annotation)
        assert model is not None, name
        prefix = f"{name}.N" if get_origin(field.annotation) is list else name
        parts.append(f"## `{name}`\n\n{paragraph(model.__doc__)}\n\n{table(model, prefix)}")
    return "\n".join(parts)


def table(model: type[BaseModel], prefix: str) -> str:
    """Return the keys below `prefix` as a Markdown table, nested sections flattened."""
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    rows += [f"| `{path}` | {kind} | {default} | {meaning} |" for path, kind, default, meaning in keys(model, prefix)]
    return "\n".join(rows) + "\n"


def keys(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    """Yield path, type, default and meaning of every key below a model."""
    for name, field in model.model_fields.items():
        inner = inner_model(field.annotation)
        path = f"{prefix}.{name}"
        if path in SAME_AS:
            yield path, "section", f"`{SAME_AS[path]}`", paragraph(field.description)
            continue
        if inner in (None, ScheduleConfig):
            yield path, type_text(field), default_text(field), paragraph(field.description).replace("|", "\\|")
            continue
        kind, item = MANY.get(get_origin(field.annotation), ("", ""))
        if kind:
            yield path, kind, default_text(field), paragraph(field.description)
        yield from keys(inner, path + item)


def type_text(field: FieldInfo) -> str:
    """Return a field's type and limits, e.g. `whole number ≥ 1`."""
    limits = []
    for limit in [*field.metadata, *(m for part in get_args(field.annotation) for m in get_args(part)[1:])]:
        for attribute, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<")):
            if getattr(limit, attribute, None) is not None:
                limits.append(f"{sign} {getattr(limit, attribute):,}")
    return " ".join([annotation_text(field.annotation), ", ".join(limits)]).strip()


def annotation_text(annotation: Any) -> str:
    """Return a type in plain words."""
    plain = {int: "whole number", float: "number", str: "text", bool: "true/false", Any: "any", NoneType: "none"}
    if annotation in plain:
        return plain[annotation]
    if annotation is ScheduleConfig:
        return "[schedule](#schedules)"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return annotation_text(arguments[0])
    if origin is Literal:
        return " \\| ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(annotation_text(argument) for argument in arguments if argument is not NoneType)
    if origin is list:
        return f"list of {annotation_text(arguments[0])}"
    if origin is tuple:
        return f"list of {len(arguments)} numbers"
    if origin is dict:
        return f"mapping of text to {annotation_text(arguments[1])}"
    raise TypeError(f"no words for {annotation}")


def default_text(field: FieldInfo) -> str:
    """Return a field's default as YAML would write it."""
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    assert value is not PydanticUndefined
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, (dict, list, tuple)):
        return f"`{list(value) if isinstance(value, tuple) else value}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`".replace("\n", "\\n")


def inner_model(annotation: Any) -> type[BaseModel] | None:
    """Return the model inside an annotation such as `list[SourceConfig]`, if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for a in get_args(annotation) if (found := inner_model(a)) is not None), None)


def paragraph(text: str | None) -> str:
    """Return a docstring as one line."""
    return " ".join((text or "").split())


def main() -> int:
    """Write the page, or check it."""
    text = page()
    if "--check" in sys.argv:
        return int(not TARGET.exists() or TARGET.read_text(encoding="utf-8") != text)
    TARGET.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
