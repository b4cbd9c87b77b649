"""The plan's figures: what is counted, what is assumed, what is said to be unknown."""

import pytest

from cluster.plan import Rates, make_plan
from cluster.rundir import RunDir
from cluster.selection import capture_rows, heldout_rows
from tests.cluster.conftest import World


def test_everything_is_missing_before_the_first_capture(world: World) -> None:
    plan = make_plan(world.config, RunDir(world.run_dir))
    assert plan.cached_samples == 0 and plan.missing_samples == plan.samples
    assert plan.missing_tokens == plan.tokens >= plan.supervised_tokens > 0
    assert not plan.bytes_measured and plan.tokens_per_s is None and plan.teacher_hours is None
    assert plan.train_samples == 16 and sum(plan.passes.values()) > 0
    assert plan.unknown == []


def test_after_a_capture_nothing_is_missing_and_bytes_are_measured(world: World) -> None:
    world.capture()
    plan = make_plan(world.config, RunDir(world.run_dir), Rates(capture=1000))
    assert plan.missing_samples == plan.units == plan.expected_bytes == 0
    assert plan.bytes_measured and plan.bytes_per_token > 0
    assert plan.teacher_hours == 0


def test_the_rate_of_an_earlier_capture_gives_hours_and_cost(world: World) -> None:
    run = RunDir(world.run_dir)
    run.finish("capture", "k", {"last": {"tokens_per_s": 100.0}})
    world.values["cluster"] = {"price_per_hour": 36.0}
    plan = make_plan(world.config, run)
    assert plan.tokens_per_s == 100
    assert plan.teacher_hours == pytest.approx(plan.missing_tokens / 360_000, abs=1e-4)
    assert plan.cost == pytest.approx(plan.missing_tokens / 10_000, abs=2e-3)
    assert make_plan(world.config, run, Rates(capture=200)).tokens_per_s == 200


def test_units_are_those_that_the_capture_would_score(world: World) -> None:
    plan = make_plan(world.config, RunDir(world.run_dir))
    assert plan.units == 1
    world.values["cache"]["unit_tokens"] = 256
    again = make_plan(world.config, RunDir(world.run_dir))
    assert again.units == -(-again.missing_tokens // 256)


def test_more_entries_and_hidden_states_take_more_bytes(world: World) -> None:
    def assumed(**cache: object) -> float:
        world.values["cache"].update(cache)
        return make_plan(world.config, RunDir(world.run_dir)).bytes_per_token

    assert assumed(codec="compact") < assumed(codec="plain")
    assert assumed(kind="sampled") < assumed(kind="hybrid")
    assumed(kind="topk")
    assert assumed(top_k=4) < assumed(top_k=12) < assumed(kind="hybrid", draws=6)
    world.values["teacher"] = {"embedded": {"vocab_size": 400, "hidden_size": 32}}
    assert assumed(hidden=["final"]) == pytest.approx(assumed(hidden=[]) + 64, abs=0.1)


def test_without_the_teachers_weights_the_cache_is_unknown(world: World) -> None:
    world.values["teacher"] = {"embedded": {"vocab_size": 400}}
    plan = make_plan(world.config, RunDir(world.run_dir))
    assert plan.cached_samples == 0
    assert plan.unknown and "not trained yet" in plan.unknown[0]


def test_the_samples_of_a_plan_are_those_of_the_run(world: World) -> None:
    make_plan(world.config, RunDir(world.run_dir))
    before = (world.run_dir / "samples" / "samples.json").stat().st_mtime_ns
    world.samples()
    assert (world.run_dir / "samples" / "samples.json").stat().st_mtime_ns == before


def test_captured_are_all_training_samples_and_the_held_out_ones_that_are_evaluated(world: World) -> None:
    samples = world.samples()
    held = heldout_rows(samples, 4)
    assert {source: len(rows) for source, rows in held.items()} == {"general": 4, "domain": 4}
    rows = set(capture_rows(samples, 4).tolist())
    assert rows == {*samples.rows("train").tolist(), *(row for part in held.values() for row in part.tolist())}
    ids = samples.ids(samples.rows("heldout", "general"))
    assert sorted(samples.ids(held["general"])) == sorted(ids)[:4]
