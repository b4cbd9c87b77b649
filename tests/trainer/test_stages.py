"""Stages: what they inherit, what they replay, and what tells one chain from another."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage.errors import InputError
from tests.trainer.tiny import TinyRun, train_config
from trainer.config import LoraConfig, StageConfig, StudentConfig, inherited
from trainer.curriculum import planned_shares
from trainer.curriculum_config import CurriculumConfig
from trainer.result import run_facts
from trainer.spec import Training
from trainer.stages import Stage, chain, consumed, on_hard_labels

SECTIONS = {
    "student": {"config": {"model_type": "qwen2"}, "frozen": ["lm_head.*"], "lora": {"rank": 2}},
    "train": {
        "steps": 50,
        "global_batch_size": 8,
        "warmup_steps": 2,
        "loss": {"kl": 0.5, "ce": 0.5, "divergence": "jsd"},
    },
    "curriculum": {"start": {"general": 1}},
}
SAMPLES = {"general": 30, "domain": 10, "chats": 5}


def test_a_stage_takes_from_the_sections_what_it_does_not_give() -> None:
    plain = inherited({"name": "distil"}, SECTIONS)
    assert {key: plain[key] for key in ("train", "curriculum", "frozen", "lora")} == {
        "train": SECTIONS["train"],
        "curriculum": SECTIONS["curriculum"],
        "frozen": ["lm_head.*"],
        "lora": {"rank": 2},
    }
    own = {
        "name": "pretrain",
        "train": {"steps": 9, "loss": {"kl": 0, "ce": 1}},
        "curriculum": {"table": {0: {"domain": 1}}},
        "frozen": [],
        "lora": None,
    }
    stage = StageConfig.model_validate(inherited(own, SECTIONS) | {"train": inherited(own, SECTIONS)["train"]})
    assert (stage.train.steps, stage.train.global_batch_size) == (9, 8)
    assert (stage.train.loss.kl, stage.train.loss.ce, stage.train.loss.divergence) == (0, 1, "jsd")
    assert (stage.curriculum.start, stage.frozen, stage.lora) == ({}, [], None)
    assert "start" in SECTIONS["curriculum"] and SECTIONS["train"]["steps"] == 50
    assert inherited(own | {"train": 3}, SECTIONS)["train"] == 3  # left for the models to refuse


def test_a_chain_ends_with_the_name_that_is_asked_for() -> None:
    student, train = StudentConfig(config={"model_type": "qwen2"}), train_config()
    mixture = CurriculumConfig()
    assert chain("student", student, train, mixture) == [Stage("student", student, train, mixture)]
    stages = [StageConfig(name="pretrain"), StageConfig(name="finetune", frozen=["a"], lora=LoraConfig(rank=3))]
    first, last = chain("student", student, train, mixture, stages)
    assert (first.run, last.run) == ("student-pretrain", "student")
    assert (first.student.frozen, last.student.frozen, last.student.lora) == ([], ["a"], LoraConfig(rank=3))
    hard = on_hard_labels(last)
    assert (hard.train.loss.kl, hard.train.loss.ce, hard.train.steps) == (0, 1, last.train.steps)


def test_sources_of_earlier_stages_keep_their_part_of_every_step() -> None:
    first = Stage(
        "student-pretrain",
        StudentConfig(config={"model_type": "qwen2"}),
        train_config(steps=10),
        CurriculumConfig(start={"general": 3, "chats": 1}),
    )
    used = consumed(first, SAMPLES, {})
    assert used == pytest.approx({"general": 60, "domain": 0, "chats": 20})
    ramp = {"start": {"domain": 1}, "end": {"domain": 0.5, "chats": 0.5}}
    shares = planned_shares(CurriculumConfig.model_validate(ramp), SAMPLES, 5, used)
    np.testing.assert_allclose(shares[:, 0], 0.1)  # general; chats has a share of its own in the end
    np.testing.assert_allclose(shares[:, 2], 0.9 * np.linspace(0, 0.5, 5))
    np.testing.assert_allclose(shares.sum(axis=1), 1)
    both = planned_shares(CurriculumConfig(start={"domain": 1}, replay=0.2), SAMPLES, 5, used)
    np.testing.assert_allclose(both, np.tile([0.15, 0.8, 0.05], (5, 1)))
    none = planned_shares(CurriculumConfig(start={"domain": 1}, replay=0), SAMPLES, 5, used)
    np.testing.assert_allclose(none, np.tile([0, 1, 0], (5, 1)))
    # Nothing to replay: the first stage, or one that names everything.
    for curriculum, earlier in ((CurriculumConfig(start={"domain": 1}), {}), (CurriculumConfig(), used)):
        np.testing.assert_allclose(
            planned_shares(curriculum, SAMPLES, 5, earlier), planned_shares(curriculum, SAMPLES, 5)
        )
    later = Stage("student", first.student, train_config(steps=10), CurriculumConfig(start={"domain": 1}))
    assert consumed(later, SAMPLES, used) == pytest.approx({"general": 66, "domain": 72, "chats": 22})


def test_replay_of_a_source_that_lost_its_samples_is_refused() -> None:
    with pytest.raises(InputError, match="gives 'general' a share, but it has no training samples"):
        planned_shares(CurriculumConfig(start={"domain": 1}), SAMPLES | {"general": 0}, 5, {"general": 3})


def test_facts_of_a_later_stage_hang_on_those_before_and_not_on_a_folder(hybrid_run: TinyRun, tmp_path: Path) -> None:
    def facts(**changes: Any) -> dict[str, Any]:
        return run_facts(Training(**{**hybrid_run.arguments(tmp_path), **changes}), "key")

    here, there = (StudentConfig(path=str(tmp_path / name)) for name in ("a", "b"))
    assert facts(student=here) != facts(student=there)
    assert facts(student=here, after="x") == facts(student=there, after="x") != facts(student=here, after="y")
    lora = here.model_copy(update={"lora": LoraConfig()})
    assert facts(student=here, after="x") != facts(student=lora, after="x")
    replay = CurriculumConfig(replay=0.3)
    assert facts(curriculum=replay) == facts(curriculum=CurriculumConfig())
    assert facts(curriculum=replay, after="x") != facts(curriculum=CurriculumConfig(), after="x")
