"""A chain of stages: each starts where the one before ended, is skipped when done, and is told from another."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from cluster.config import RunConfig
from cluster.loader import check_config
from cluster.progress import Progress
from cluster.rundir import RunDir
from cluster.stages import train as stage
from cluster.workspace import Workspace
from storage.errors import InputError
from storage.object_store import Store
from tests.cluster.conftest import World
from trainer.result import RESULT_FILE, TrainResult, run_facts
from trainer.spec import Training

STAGES: list[dict[str, Any]] = [
    {"name": "pretrain", "train": {"steps": 6, "loss": {"kl": 0, "ce": 1}}, "curriculum": {"start": {"general": 1}}},
    {"name": "distil", "curriculum": {"start": {"domain": 1}}},
    {"name": "finetune", "train": {"steps": 2, "learning_rate": 1e-4}, "lora": {"rank": 2}, "curriculum": {}},
]


class Trainer:
    """Trains nothing, but leaves behind what a training does."""

    def __init__(self) -> None:
        self.done: list[tuple[Training, str | None]] = []

    def __call__(self, work: Workspace, training: Training, before: str | None, task: Any) -> TrainResult:
        self.done.append((training, before))
        result = TrainResult(
            training.name, "", 1, training.train.steps, 1, 1.0, 1.0, 0.0, {"loss": 1.0}, training.name, [], 0
        )
        record = {"config": run_facts(training, work.samples.key), "result": result.to_json()}
        work.run.store.write(f"{training.name}/{RESULT_FILE}", json.dumps(record).encode())
        return result


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    made = Trainer()
    monkeypatch.setattr(stage, "_fit", made)
    return made


def trained(world: World, *names: str, **changes: Any) -> RunConfig:
    from workers.model_folder import teacher_identity

    config = check_config({**world.values, "stages": STAGES, **changes}, "world")
    with Workspace(config, RunDir(world.run_dir), Progress(io.StringIO())) as work:
        work.samples, work.model_folder = world.samples(), world.teacher
        from storage.tokenizer import Tokenizer

        work.identity = teacher_identity(
            world.teacher, config.teacher, config.cache, Tokenizer.load(world.teacher), uses_chat_template=True
        )
        for model in config.models:
            if model.name in names:
                assert stage.train(work, model)["name"] == model.name
    return config


def test_each_stage_starts_from_the_one_before_and_the_baseline_shares_what_is_the_same(
    world: World, trainer: Trainer
) -> None:
    trained(world, "student", "baseline")
    assert [(training.name, before) for training, before in trainer.done] == [
        ("student-pretrain", None),
        ("student-distil", "student-pretrain"),
        ("student", "student-distil"),
        # Its first stage is on hard labels as well: trained once.
        ("baseline-distil", "student-pretrain"),
        ("baseline", "baseline-distil"),
    ]
    pretrain, distil, finetune = (training for training, _ in trainer.done[:3])
    assert [training.train.steps for training in (pretrain, distil, finetune)] == [6, 4, 2]
    assert pretrain.earlier == {}
    assert distil.earlier == pytest.approx({"general": 24, "domain": 0})
    assert finetune.earlier == pytest.approx({"general": 24 + 0.1 * 16, "domain": 0.9 * 16})
    assert finetune.student.lora is not None and distil.student.lora is None
    assert len({training.after for training in (pretrain, distil, finetune)}) == 3
    for name in ("student-pretrain", "student-distil", "student", "baseline-distil", "baseline"):
        assert RunDir(world.run_dir).result(name) is not None


def test_done_stages_are_skipped_and_a_change_is_named_in_the_first_stage_that_it_touches(
    world: World, trainer: Trainer
) -> None:
    trained(world, "student")
    trainer.done.clear()
    trained(world, "student")
    assert trainer.done == []
    for key in Store(world.run_dir).list("student/"):
        Store(world.run_dir).delete(key)
    longer = [*STAGES[:2], {**STAGES[2], "train": {"steps": 3}}]
    trained(world, "student", stages=longer)
    assert [training.name for training, _ in trainer.done] == ["student"]
    other = [STAGES[0], {**STAGES[1], "train": {"seed": 5}}, STAGES[2]]
    with pytest.raises(InputError, match=r"student-distil was made with train.seed = 0, this run has 5"):
        trained(world, "student", stages=other)


def test_each_seed_trains_both_models_with_its_own_weights_and_order(world: World, trainer: Trainer) -> None:
    first = trained(world, "student", "baseline", stages=[])
    names = ["student", "baseline", "student-seed7", "baseline-seed7"]
    config = trained(world, *names, stages=[], train={**world.values["train"], "seeds": [0, 7]})
    assert [model.name for model in config.models] == names
    # Those of the first seed are what a run without seeds has trained.
    assert [training.name for training, _ in trainer.done] == names
    assert [config.chain(model) for model in config.models[:2]] == [first.chain(model) for model in first.models]
    seeds = [(training.train.seed, training.student.seed) for training, _ in trainer.done]
    assert seeds == [(0, 0), (0, 0), (7, 7), (7, 7)]
    assert trainer.done[3][0].train.loss.kl == 0


def test_the_stages_of_a_further_seed_bear_it(world: World, trainer: Trainer) -> None:
    names = ["student", "baseline", "student-seed7", "baseline-seed7"]
    trained(world, *names, train={**world.values["train"], "seeds": [0, 7]})
    assert [(training.name, before) for training, before in trainer.done[5:]] == [
        ("student-seed7-pretrain", None),
        ("student-seed7-distil", "student-seed7-pretrain"),
        ("student-seed7", "student-seed7-distil"),
        ("baseline-seed7-distil", "student-seed7-pretrain"),
        ("baseline-seed7", "baseline-seed7-distil"),
    ]


def test_a_config_without_stages_is_one_stage(world: World, trainer: Trainer) -> None:
    trained(world, "student", "baseline", stages=[])
    assert [(training.name, before) for training, before in trainer.done] == [("student", None), ("baseline", None)]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"name": "distil", "train": {"lerning_rate": 1}}], r"unknown key stages.0.train.lerning_rate; did you mean"),
        ([{"name": "distil"}, {"name": "distil"}], r"the name 'distil' is given twice"),
        ([{"train": {}}], r"stages.0.name is missing"),
        ([{"name": "distil", "train": {"steps": 0}}], r"stages.0.train.steps = 0"),
        ([{"name": "../x"}], r"stages.0.name"),
        (3, r"stages = 3: must be a list"),
        ([{"name": "distil", "train": {"seeds": [1]}}], r"train.seeds holds for all stages"),
    ],
)
def test_mistakes_in_stages_are_named(world: World, stages: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_config({**world.values, "stages": stages}, "world")


def test_the_resolved_config_says_the_same_when_it_is_read_again(world: World, tmp_path: Path) -> None:
    config = check_config({**world.values, "stages": STAGES}, "world")
    run = RunDir(tmp_path / "run")
    run.write_config(config)
    from cluster.loader import load_config

    again = load_config(str(tmp_path / "run" / "config.resolved.yaml"))
    assert again.stages == config.stages
    assert [again.chain(model) for model in again.models] == [config.chain(model) for model in config.models]


@pytest.mark.parametrize("name", ["stages.yaml", "quickstart.yaml"])
def test_examples_are_valid(name: str) -> None:
    from cluster.loader import load_config

    config = load_config(str(Path(__file__).resolve().parents[2] / "examples" / name))
    runs = [stage.run for stage in config.chain()]
    assert runs == (["student-pretrain", "student-distil", "student"] if config.stages else ["student"])
