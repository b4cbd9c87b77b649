"""Which completions are planned, and one rank that writes them, without Ray."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from storage.errors import InputError, WorkerError
from storage.object_store import Store
from storage.tokenizer import Tokenizer
from tests.workers.conftest import TinyRun
from workers.api.answers import AnswerStore
from workers.api.config import GenerateConfig
from workers.api.generation import Author
from workers.api.prompts import Prompt
from workers.config import TeacherConfig
from workers.local.base_rank import RankPlace
from workers.local.ending import decoding_settings, end_ids
from workers.local.writing import WritingPlan, prompt_ids
from workers.local.writing_rank import WritingJob, WritingRank, WritingUnit

AUTHOR = Author.of_local("tiny", "0" * 64, "float32")
PROMPTS = [Prompt(({"role": "user", "content": "The library " * (n + 1)},)) for n in range(7)]


def config(**values: Any) -> GenerateConfig:
    return GenerateConfig.model_validate({"max_tokens": 6, "samples": 2, "batch_tokens": 60, **values})


def plan(run: TinyRun, url: Path, own: GenerateConfig, prompts: list[Prompt] | None = None) -> WritingPlan:
    asked = PROMPTS if prompts is None else prompts
    return WritingPlan(lambda: asked, own, AUTHOR, run.tokenizer, AnswerStore(Store(url)))


@pytest.fixture
def rank(tiny_run: TinyRun, tmp_path: Path) -> WritingRank:
    """A loaded rank."""
    folder = tmp_path / "teacher"
    for part in (tiny_run.model("qwen2"), tiny_run.tokenizer_folder):
        shutil.copytree(part, folder, dirs_exist_ok=True)
    made = WritingRank()
    job = WritingJob(TeacherConfig(name="tiny", dtype="float32", sharding="none"), config(), folder, str(tmp_path))
    made.load(job, RankPlace(0, 1, 0, 1, "", 0, "cpu", 1))
    return made


def write(rank: WritingRank, units: Iterator[WritingUnit] | list[WritingUnit]) -> None:
    for unit in units:
        assert rank.score(unit) == []
        rank.commit(unit, "a1")


def test_a_plan_bounds_batches_and_lacks_what_is_there(tiny_run: TinyRun, tmp_path: Path, rank: WritingRank) -> None:
    own = config()
    made = plan(tiny_run, tmp_path, own)
    units = list(made)
    assert len(units) == len(made) > 2 and made.wanted == made.missing == 14
    for unit in units:
        longest = max(len(ids) for ids in unit.prompts)
        assert len(unit.keys) == 1 or len(unit.keys) * (longest + own.max_tokens) <= own.batch_tokens
    assert sum(unit.num_tokens for unit in units) == made.tokens
    write(rank, units[:2])
    left = plan(tiny_run, tmp_path, own)
    done = {key for unit in units[:2] for key in unit.keys}
    assert {key for unit in left for key in unit.keys} == {key for unit in units for key in unit.keys} - done
    again = plan(tiny_run, tmp_path, own, [*reversed(PROMPTS), PROMPTS[0]])
    assert again.missing == left.missing, "order counts, or a prompt is written twice"
    assert plan(tiny_run, tmp_path, config(temperature=0.1)).missing == 14


def test_answers_do_not_depend_on_units(tiny_run: TinyRun, tmp_path: Path, rank: WritingRank) -> None:
    texts = []
    for name, batch_tokens in (("small", 1), ("large", 10_000)):
        rank.store = Store(tmp_path / name)
        units = list(plan(tiny_run, tmp_path / name, config(batch_tokens=batch_tokens)))
        write(rank, units)
        answers = AnswerStore(Store(tmp_path / name))
        keys = [key for unit in units for key in unit.keys]
        found = [answers.get(key) for key in keys]
        texts.append([answer.reply.text for answer in found if answer is not None and answer.reply is not None])
        usage = [answer.reply.usage for answer in found if answer is not None and answer.reply is not None]
        assert all(use is not None and 1 <= use.output <= 6 for use in usage)
    assert texts[0] == texts[1] and len(texts[0]) == 14 and len(set(texts[0])) > 7


def test_a_unit_on_disk_is_not_written_again(tiny_run: TinyRun, tmp_path: Path, rank: WritingRank) -> None:
    (unit, *_) = plan(tiny_run, tmp_path, config())
    write(rank, [unit])
    rank.model = None
    write(rank, [unit])


def test_prompts_that_do_not_fit_are_set_aside(tiny_run: TinyRun, tmp_path: Path, rank: WritingRank) -> None:
    rank.settings = replace(rank.settings, max_positions=20)
    units = list(plan(tiny_run, tmp_path, config(samples=1)))
    write(rank, units)
    answers = AnswerStore(Store(tmp_path))
    for unit in units:
        for key, ids in zip(unit.keys, unit.prompts, strict=True):
            answer = answers.get(key)
            assert answer is not None
            if len(ids) >= 20:
                assert answer.reply is None and f"a prompt of {len(ids)} tokens" in str(answer.set_aside)
            else:
                assert answer.reply is not None
                assert answer.reply.usage is not None and answer.reply.usage.output <= 20 - len(ids)


def test_batches_are_halved_when_memory_runs_out(tiny_run: TinyRun, tmp_path: Path, rank: WritingRank) -> None:
    forward = rank.model.forward

    def small(input_ids: torch.Tensor, **rest: Any) -> Any:
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("tried to allocate")
        return forward(input_ids=input_ids, **rest)

    rank.model.forward = small
    own = config(batch_tokens=400)
    rank.batch_tokens = 400
    units = list(plan(tiny_run, tmp_path, own))
    write(rank, units)
    assert rank.batch_tokens <= 100
    assert plan(tiny_run, tmp_path, own).missing == 0
    rank.model.forward = lambda input_ids, **rest: small(input_ids.repeat(3, 1))
    with pytest.raises(WorkerError, match=r"one completion of \d+ tokens runs out of.*generate.max_tokens"):
        rank.store = Store(tmp_path / "other")
        rank.score(next(iter(plan(tiny_run, tmp_path / "other", own))))


def test_prompts_go_through_the_chat_template(tiny_run: TinyRun, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((tiny_run.tokenizer_folder / "tokenizer.json").read_bytes())
    plain = Tokenizer.load(folder)
    chat = Tokenizer.load(folder, "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>")
    asked = Prompt(({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}))
    assert chat.decode(prompt_ids(asked, chat)) == "<system>Be brief.<user>Why?<assistant>"
    assert plain.decode(prompt_ids(PROMPTS[0], plain)) == "The library "
    with pytest.raises(InputError, match=r"no chat template.*\(system, user\).*data\.chat_template"):
        prompt_ids(asked, plain)


@pytest.mark.parametrize(("named", "expected"), [(7, {7}), ([7, 9], {7, 9}), (None, set())])
def test_ends_are_those_of_the_folder(tiny_run: TinyRun, tmp_path: Path, named: Any, expected: set[int]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 600, "eos_token_id": 3}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": named} if named else {}))
    own = tiny_run.tokenizer.eos_id
    wanted = (expected or {3}) | (set() if own is None else {own})
    assert end_ids(tmp_path, tiny_run.tokenizer) == wanted
    assert decoding_settings(tmp_path, config(), tiny_run.tokenizer).end_ids == wanted
