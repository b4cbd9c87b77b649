"""From a YAML file and `--set` overrides to one checked `RunConfig`; every mistake gets one clear message."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from cluster.config import RunConfig
from cluster.config_messages import describe
from cluster.precision import resolve_precision
from cluster.urls import check_urls
from storage.errors import InputError


class _YamlLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice and reads `1e-3` as a number."""


def _mapping_without_repeats(loader: _YamlLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    mapping: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        try:
            repeated = key in mapping
        except TypeError as error:
            raise yaml.constructor.ConstructorError(
                None, None, "a key must be plain text", key_node.start_mark
            ) from error
        if repeated:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} appears twice", key_node.start_mark)
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


_YamlLoader.add_constructor("tag:yaml.org,2002:map", _mapping_without_repeats)
# YAML 1.1 takes `1e-3` for text because it has no point; every other reader takes it for a number.
_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_config(path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the checked config of a YAML file with `a.b=value` overrides applied in order.

    Raises InputError for a missing or unreadable file, YAML that does not parse (with its line), an unknown key
    (with the nearest valid name), and values that do not fit.
    """
    values = parse_yaml(_read_text(path), path)
    if not isinstance(values, dict):
        sections = ", ".join(RunConfig.model_fields)
        raise InputError(f"{path}: a config is a mapping of sections ({sections}), this one is {_kind(values)}")
    for override in overrides:
        apply_override(values, override)
    return check_config(values, path)


def check_config(values: dict[str, Any], where: str) -> RunConfig:
    """Return the model of already parsed values, `auto` precisions settled.

    Raises InputError that lists every problem in one message.
    """
    try:
        config = RunConfig.model_validate(values)
        check_urls(config)
        return resolve_precision(config)
    except ValidationError as error:
        problems = [describe(detail) for detail in error.errors(include_url=False)]
    if len(problems) == 1:
        raise InputError(f"{where}: {problems[0]}")
    listed = "".join(f"\n  - {problem}" for problem in problems)
    raise InputError(f"{where}: {len(problems)} problems:{listed}")


def parse_yaml(text: str, where: str) -> Any:
    """Return the value of a YAML text; raises InputError with the line where it does not parse."""
    try:
        return yaml.load(text, Loader=_YamlLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        since = f" that began in line {error.context_mark.line + 1}" if error.context_mark else ""
        context = f" ({error.context}{since})" if error.context else ""
        raise InputError(f"{where}: not valid YAML: {place}{error.problem or 'cannot be parsed'}{context}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{where}: not valid YAML: {error}") from error


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one dotted key in place, e.g. `train.steps=20` or `data.sources.general.max_documents=5`.

    The value is read as YAML. An item of a list is named by its index or, where items have a `name`, by that.
    """
    path, equals, raw = override.partition("=")
    keys = [key.strip() for key in path.split(".")]
    if not equals or not all(keys):
        raise InputError(f"--set {override!r}: write it as section.key=value, e.g. --set train.steps=100")
    value = parse_yaml(raw, f"--set {path}")
    target: Any = values
    for depth, key in enumerate(keys[:-1]):
        target = _enter(target, key, ".".join(keys[: depth + 1]))
    if isinstance(target, list):
        target[_list_index(target, keys[-1], path)] = value
    elif isinstance(target, dict):
        target[keys[-1]] = value
    else:
        raise InputError(f"--set {path}: {'.'.join(keys[:-1])} is {_kind(target)}, it has no keys")


def _read_text(path: str) -> str:
    if "://" in path:
        from storage.object_store import Store

        folder, _, name = path.rpartition("/")
        data = Store(folder).read(name)
    else:
        file = Path(path).expanduser()
        if not file.exists():
            raise InputError(f"config {path} does not exist{_similar_file(file)}")
        if file.is_dir():
            raise InputError(f"config {path} is a folder; name the YAML file itself")
        try:
            data = file.read_bytes()
        except OSError as error:
            raise InputError(f"config {path} cannot be read: {error.strerror}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"config {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def _similar_file(file: Path) -> str:
    folder = file.parent
    names = [p.name for p in folder.glob("*.y*ml")] if folder.is_dir() else []
    close = difflib.get_close_matches(file.name, names, n=1, cutoff=0.5)
    return f"; did you mean {folder / close[0]}?" if close else ""


def _enter(target: Any, key: str, path: str) -> Any:
    if isinstance(target, list):
        return target[_list_index(target, key, path)]
    if not isinstance(target, dict):
        raise InputError(f"--set {path}: the part before .{key} is {_kind(target)}, it has no keys")
    if target.get(key) is None:
        target[key] = {}
    return target[key]


def _list_index(items: list[Any], key: str, path: str) -> int:
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if key in names:
        return names.index(key)
    if key.isdigit() and int(key) < len(items):
        return int(key)
    known = [str(name) for name in names if name is not None] or [f"0 to {len(items) - 1}"]
    raise InputError(f"--set {path}: the list has no item {key!r}; it has {', '.join(known)}")


def _kind(value: Any) -> str:
    if value is None:
        return "empty"
    return {dict: "a section", list: "a list", str: "text", bool: "true/false"}.get(type(value), "a single value")
