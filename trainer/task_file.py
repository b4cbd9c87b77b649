"""The examples of a task, read and checked; imports no torch."""

import json
from dataclasses import dataclass

from storage.errors import InputError
from storage.object_store import Store
from trainer.config import TaskConfig


@dataclass(frozen=True)
class Example:
    """One line of a task."""

    prompt: str
    references: list[str]
    candidates: list[str]


def read_task(task: TaskConfig) -> list[Example]:
    """Return the examples of a JSONL file: `{"prompt": …, "reference": text or list, "candidates": list}`.

    Raises:
        InputError: the file is not there, or a line is not as it should be; the message names it.
    """
    folder, _, name = task.path.rpartition("/")
    raw = Store(folder or ".").read_if_exists(name)
    if raw is None:
        raise InputError(f"evaluate.tasks: {task.path} of task {task.name} does not exist")
    lines = [(n, line) for n, line in enumerate(raw.decode("utf-8-sig").splitlines(), start=1) if line.strip()]
    examples = [_example(line, task, f"{task.path}:{n}") for n, line in lines[: task.max_examples]]
    if not examples:
        raise InputError(f"evaluate.tasks: {task.path} of task {task.name} is empty; give one JSON object a line")
    return examples


def _example(line: str, task: TaskConfig, where: str) -> Example:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not a JSON object on one line ({error})") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"]:
        raise InputError(f"{where}: needs a text `prompt`")
    references = row.get("reference")
    references = [references] if isinstance(references, str) else references
    if not isinstance(references, list) or not references or not all(isinstance(item, str) for item in references):
        raise InputError(f"{where}: needs `reference`, a text or a list of texts")
    candidates = row.get("candidates", [])
    if not isinstance(candidates, list) or not all(isinstance(item, str) and item for item in candidates):
        raise InputError(f"{where}: `candidates` must be a list of texts")
    if task.metric == "recall" and not set(references) <= set(candidates):
        raise InputError(f"{where}: recall ranks `candidates`, and each reference must be one of them")
    return Example(row["prompt"], references, candidates)
