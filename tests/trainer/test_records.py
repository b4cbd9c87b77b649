"""Metrics, checkpoints on storage, and the record of a finished run."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from storage.errors import InputError, IntegrityError
from storage.object_store import Store
from tests.trainer.tiny import TinyRun
from trainer.checkpoint import POSITION_FILE, SNAPSHOT_FILE, Position, keep_only, newest
from trainer.curriculum import planned_order
from trainer.metrics import Follower, MetricsLog, parse_lines
from trainer.result import mixture, recorded_result, require_same_config, run_facts
from trainer.spec import Training


def lines_of(folder: Path | str) -> list[tuple[str, int]]:
    raw = Store(folder).read("metrics.jsonl")
    return [(line["run"], line["step"]) for line in parse_lines(raw)]


@pytest.mark.parametrize("remote", [False, True])
def test_a_resumed_run_writes_each_step_once_and_leaves_other_runs_alone(tmp_path: Path, remote: bool) -> None:
    url = f"memory://{tmp_path.name}" if remote else str(tmp_path)
    with MetricsLog(url, "student", 0) as log:
        for step in range(1, 6):
            log.write({"step": step, "loss": 1.0 / step})
    with MetricsLog(url, "baseline", 0) as log:
        log.write({"step": 1})
    if not remote:
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"run": "student", "st')  # torn by a crash
    with MetricsLog(url, "student", 3) as log:
        for step in (4, 5, 6):
            log.write({"step": step})
    expected = [("student", 1), ("student", 2), ("student", 3), ("baseline", 1), *(("student", n) for n in (4, 5, 6))]
    assert lines_of(url) == expected


def test_the_follower_gives_each_step_once_and_waits_for_whole_lines(tmp_path: Path) -> None:
    follower = Follower(str(tmp_path), "student")
    assert list(follower.new_lines()) == []
    with MetricsLog(str(tmp_path), "student", 0) as log:
        log.write({"step": 1})
        assert [line["step"] for line in follower.new_lines()] == [1]
        log.write({"step": 2})
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"run": "student", ')
        assert [line["step"] for line in follower.new_lines()] == [2]
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('"step": 3}\n{"run": "baseline", "step": 9}\n')
        assert [line["step"] for line in follower.new_lines()] == [3]
    with MetricsLog(str(tmp_path), "student", 1) as log:
        for step in (2, 3, 4):
            log.write({"step": step})
        assert [line["step"] for line in follower.new_lines()] == [4]


def position(step: int, world_size: int = 2) -> Position:
    return Position(step, "00", 10 * step, 1.0, 0.0, world_size, {"train.seed": 0})


def write_checkpoint(root: Path, name: str, step: int) -> Path:
    folder = root / name
    (folder / "state").mkdir(parents=True)
    (folder / POSITION_FILE).write_text(position(step).to_json())
    for rank in range(2):
        (folder / "state" / f"part{rank}.pt").write_bytes(b"x" * (100 + rank))
        (folder / f"rank-{rank}.json").write_text(json.dumps({f"state/part{rank}.pt": 100 + rank}))
    return folder


def test_the_newest_whole_checkpoint_counts(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert newest(store) is None
    write_checkpoint(tmp_path, "checkpoint_b", 10)
    write_checkpoint(tmp_path, "checkpoint_a", 20)
    assert newest(store) == ("checkpoint_a", position(20))
    for name, spoil in (
        ("checkpoint_c", lambda folder: os.truncate(folder / "state" / "part1.pt", 3)),
        ("checkpoint_d", lambda folder: (folder / "rank-1.json").unlink()),
        ("checkpoint_e", lambda folder: (folder / POSITION_FILE).unlink()),
        ("checkpoint_f", lambda folder: (folder / POSITION_FILE).write_text("{")),
        ("checkpoint_g", lambda folder: (folder / "rank-0.json").write_text("{")),
        ("checkpoint_h", lambda folder: (folder / "state" / "part0.pt").unlink()),
    ):
        spoil(write_checkpoint(tmp_path, name, 99))
    assert newest(store) == ("checkpoint_a", position(20))
    (tmp_path / SNAPSHOT_FILE).write_text("half of a li")
    keep_only(store, "checkpoint_a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_a"]
    assert newest(store) == ("checkpoint_a", position(20))


def test_a_damaged_position_names_itself() -> None:
    with pytest.raises(IntegrityError, match=r"lectern.json is damaged"):
        Position.from_json('{"step": 1}')


def test_facts_name_the_first_difference_but_not_operational_ones(hybrid_run: TinyRun, tmp_path: Path) -> None:
    kwargs = hybrid_run.arguments(tmp_path)

    def facts(**train: object) -> dict[str, object]:
        return run_facts(
            Training(**{**kwargs, "train": kwargs["train"].model_copy(update=train)}), hybrid_run.samples.key
        )

    require_same_config(facts(), facts(max_failures=9, checkpoint_every=1, log_every=3, keep_checkpoints=5), "there")
    # Written by a release that kept the number of ranks.
    require_same_config(facts(), {**facts(workers=2, micro_batch_size=1), "train.workers": 2}, "there")
    # Fields that joined later say nothing while they mean what their absence meant.
    assert "train.loss.hidden_distance" not in facts()
    with pytest.raises(InputError, match=r"there was made with train.learning_rate = 0.5, this run has 0.003"):
        require_same_config(facts(), facts(learning_rate=0.5), "there")
    assert recorded_result(str(tmp_path), "student", facts()) is None


def test_mixture_points_average_what_lies_between_them(hybrid_run: TinyRun, tmp_path: Path) -> None:
    kwargs = hybrid_run.arguments(tmp_path, steps=50, global_batch_size=8)
    order = planned_order(hybrid_run.samples, kwargs["curriculum"], kwargs["train"])
    points = mixture(order, points=7)
    assert [point["step"] for point in points][-1] == 50
    assert len(points) == 7
    assert points[0]["planned"]["general"] > 0.8 > 0.2 > points[-1]["planned"]["general"]
    for point in points:
        assert sum(point["planned"].values()) == pytest.approx(1)
        assert point["realised"]["domain"] == pytest.approx(point["planned"]["domain"], abs=1 / 8)
    assert len(mixture(order)) == 50


def test_position_survives_json() -> None:
    there = replace(position(3), digest="ab")
    assert Position.from_json(there.to_json()) == there
