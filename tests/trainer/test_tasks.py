"""Tasks on a model whose answers are known."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from storage.errors import InputError
from storage.tokenizer import Tokenizer
from tests.trainer.tiny import QWEN2, TinyRun
from trainer.config import StudentConfig, TaskConfig
from trainer.evaluation import load_model
from trainer.export import TOKENIZER_FILES
from trainer.student import build_student
from trainer.task_file import Example, read_task
from trainer.tasks import generate, rank_candidates, run_tasks


@pytest.fixture(scope="module")
def folder(hybrid_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    config = StudentConfig(config={**QWEN2, "initializer_range": 0.4, "tie_word_embeddings": False})
    build_student(config, None, hybrid_run.identity).save_pretrained(folder)
    for file in TOKENIZER_FILES:
        if (hybrid_run.tokenizer_folder / file).is_file():
            (folder / file).write_bytes((hybrid_run.tokenizer_folder / file).read_bytes())
    return folder


def lines(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def greedy(model: Any, tokenizer: Tokenizer, prompt: str, count: int) -> str:
    """Continue one prompt token by token, without a cache or padding."""
    ids = tokenizer.encode_batch([prompt])[0].tolist()
    ids = ids if tokenizer.bos_id is None else [tokenizer.bos_id, *ids]
    new: list[int] = []
    for _ in range(count):
        with torch.no_grad():
            token = int(model(torch.tensor([ids + new])).logits[0, -1].argmax())
        if token == tokenizer.eos_id:
            break
        new.append(token)
    return tokenizer.decode(new).split("\n", 1)[0].strip()


PROMPTS = ["the quick brown fox", "a", "the lazy old dog sleeps over the river and then"]


def test_answers_are_the_greedy_ones_whatever_they_are_padded_with(folder: Path) -> None:
    model, tokenizer = load_model(folder, "cpu"), Tokenizer.load(folder)
    expected = [greedy(model, tokenizer, prompt, 6) for prompt in PROMPTS]
    assert generate(model, tokenizer, PROMPTS, 6, "\n") == expected
    cut = expected[0][1:3]
    assert generate(model, tokenizer, PROMPTS[:1], 6, cut) == [expected[0].split(cut, 1)[0].strip()]


def test_candidates_are_ranked_by_their_probability_after_the_prompt(folder: Path) -> None:
    model, tokenizer = load_model(folder, "cpu"), Tokenizer.load(folder)
    candidates = [" river", " the old hill", " fox", " dog jumps", " sleeps"] * 4 + [" a"]
    candidates = [f"{text}{n}" for n, text in enumerate(candidates)]

    def logprob(candidate: str) -> float:
        head, tail = (tokenizer.encode_batch([text])[0].tolist() for text in (PROMPTS[0], candidate))
        head = head if tokenizer.bos_id is None else [tokenizer.bos_id, *head]
        with torch.no_grad():
            rows = model(torch.tensor([head + tail])).logits[0].log_softmax(-1)
        return sum(float(rows[len(head) - 1 + n, token]) for n, token in enumerate(tail))

    found = rank_candidates(model, tokenizer, Example(PROMPTS[0], ["x"], candidates))
    assert sorted(found) == sorted(candidates)
    scores = [logprob(candidate) for candidate in found]
    np.testing.assert_array_less(np.diff(scores), 1e-4)


def test_tasks_are_scored_with_their_intervals(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(folder, "cpu"), Tokenizer.load(folder)
    answers = [greedy(model, tokenizer, prompt, 8) for prompt in PROMPTS]
    rows = [{"prompt": prompt, "reference": [answer, "else"]} for prompt, answer in zip(PROMPTS, answers, strict=True)]
    wrong = {"prompt": PROMPTS[0], "reference": "something else"}
    ranked = {"prompt": PROMPTS[0], "reference": " river", "candidates": [" river", " hill", " dog"]}
    written = lines(tmp_path / "written.jsonl", *rows, wrong)
    tasks = [
        TaskConfig(name="exact", path=written, max_new_tokens=8),
        TaskConfig(name="bleu", path=written, metric="bleu", max_new_tokens=8),
        TaskConfig(name="first", path=written, metric="f1", max_new_tokens=8, max_examples=2),
        TaskConfig(name="all", path=lines(tmp_path / "ranked.jsonl", ranked), metric="recall", k=3),
        TaskConfig(name="picked", path=lines(tmp_path / "mixed.jsonl", ranked, rows[1]), max_new_tokens=8),
    ]
    seen: list[tuple[str, int, int]] = []
    found = run_tasks(
        folder, [(task, read_task(task)) for task in tasks], on_progress=lambda *event: seen.append(event)
    )
    assert found["exact"]["score"] == 0.75
    assert found["exact"]["low"] < 0.75 <= found["exact"]["high"]
    assert (found["exact"]["metric"], found["exact"]["examples"]) == ("accuracy", 4)
    assert 0 < found["bleu"]["score"] < 1
    assert (found["first"]["score"], found["first"]["examples"]) == (1, 2)
    assert found["all"]["score"] == 1
    best = rank_candidates(model, tokenizer, Example(ranked["prompt"], [], ranked["candidates"]))[0]  # type: ignore[arg-type]
    assert found["picked"]["score"] == (1.0 if best == " river" else 0.5)
    assert seen[0] == ("exact", 4, 4)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"reference": "x"}, r"task.jsonl:2: needs a text `prompt`"),
        ({"prompt": "x"}, r"task.jsonl:2: needs `reference`"),
        ({"prompt": "x", "reference": [3]}, r"needs `reference`, a text or a list of texts"),
        ({"prompt": "x", "reference": "y", "candidates": ["z"]}, r"each reference must be one of them"),
        ({"prompt": "x", "reference": "y", "candidates": "y"}, r"`candidates` must be a list of texts"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    good = {"prompt": "x", "reference": "y", "candidates": ["y"]}
    task = TaskConfig(name="task", path=lines(tmp_path / "task.jsonl", good, row), metric="recall")
    with pytest.raises(InputError, match=message):
        read_task(task)


def test_files_that_are_not_there_or_say_nothing_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "broken.jsonl").write_text("{\n")
    for name, message in (("none", "does not exist"), ("empty", "is empty"), ("broken", r"broken.jsonl:1: not a JSON")):
        with pytest.raises(InputError, match=message):
            read_task(TaskConfig(name="task", path=str(tmp_path / f"{name}.jsonl")))
