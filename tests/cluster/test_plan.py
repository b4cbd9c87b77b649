"""The plan's figures: what is counted, what is assumed, what is said to be unknown."""

import json
from pathlib import Path

import pytest

from cluster import commands
from cluster.estimate import bytes_per_token
from cluster.plan import make_plan
from cluster.rates import Rates, measured_rates
from cluster.rundir import RunDir
from cluster.selection import capture_rows, heldout_rows
from cluster.terminal import Terminal
from storage.config import CacheConfig
from storage.errors import InputError
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


def test_a_finished_run_tells_rates_and_the_time_around_the_work(world: World) -> None:
    run = RunDir(world.folder / "earlier")
    run.finish("capture", "k", {"last": {"tokens_per_s": 100.0}})
    run.event("stage_finished", stage="capture", seconds=30.0, skipped=False, work_s=20.0)
    for name, seconds, start in (("student", 60.0, 12.0), ("baseline", 40.0, 8.0)):
        facts = {"tokens": 1000, "order_digest": "d", "work_s": seconds}
        run.event("stage_finished", stage=name, seconds=seconds + start, skipped=False, **facts)
    run.event("stage_finished", stage="evaluate", seconds=4.0, skipped=False, tokens=800)
    run.event("stage_finished", stage="capture", seconds=0.1, skipped=True)
    rates = measured_rates(run)
    assert rates == Rates(100.0, 20.0, 200.0, 10.0, 10.0)
    assert rates.given(None, 50.0) == Rates(100.0, 50.0, 200.0, 10.0, 10.0)
    plan = make_plan(world.config, RunDir(world.run_dir), rates)
    stages = {stage["stage"]: stage for stage in plan.money["stages"]}
    assert stages["capture"]["hours"] * 3600 == pytest.approx(plan.missing_tokens / 100 + 10)
    assert stages["train"]["hours"] * 3600 == pytest.approx(stages["train"]["tokens"] / 20 + 2 * 10)
    assert stages["evaluate"]["hours"] * 3600 == pytest.approx(stages["evaluate"]["tokens"] / 200)


def test_rates_are_taken_from_a_run_alone(world: World, tmp_path: Path) -> None:
    earlier = RunDir(tmp_path / "earlier")
    earlier.write_config(world.config)
    earlier.finish("capture", "k", {"last": {"tokens_per_s": 100.0}})
    out = Terminal(True, False)
    found = commands.plan(out, world.config_path, [], str(world.run_dir), like=earlier.url)
    assert found["tokens_per_s"] == 100
    found = commands.plan(out, world.config_path, [], str(world.run_dir), capture_rate=7.0, like=earlier.url)
    assert found["tokens_per_s"] == 7
    with pytest.raises(InputError, match=r"--like .*nowhere is no run directory: it holds no config.resolved.yaml"):
        commands.plan(out, world.config_path, [], str(world.run_dir), like=str(tmp_path / "nowhere"))


def test_bytes_are_those_of_datasets_of_the_quickstarts_teacher() -> None:
    """Measured on 40 windows of each source: entries of kinds and codecs within 8%."""
    measured = [
        (31.69, {"kind": "topk", "top_k": 12}),
        (152.99, {"kind": "topk", "top_k": 64}),
        (69.40, {"kind": "hybrid", "top_k": 12, "draws": 12}),
        (174.56, {"kind": "hybrid", "top_k": 32, "draws": 32}),
        (35.07, {"kind": "sampled", "draws": 32}),
        (6045.0, {"kind": "dense"}),
        (15.58, {"kind": "topk", "top_k": 12, "codec": "compact"}),
        (66.76, {"kind": "topk", "top_k": 64, "codec": "compact"}),
        (41.13, {"kind": "hybrid", "top_k": 12, "draws": 12, "codec": "compact"}),
        (14.57, {"kind": "hybrid_counts", "top_k": 2, "draws": 10, "codec": "compact"}),
        (28.37, {"kind": "hybrid_counts", "top_k": 12, "draws": 12, "codec": "compact"}),
        (22.60, {"kind": "sampled", "draws": 32, "codec": "compact"}),
    ]
    for found, settings in measured:
        assumed = bytes_per_token(CacheConfig.model_validate({"url": "x", **settings}), 4096)
        assert assumed == pytest.approx(found, rel=0.08), settings


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


def test_a_classifiers_targets_are_its_classes_and_a_texts_tokens_stand_behind_one_position(world: World) -> None:
    facts = json.loads((world.teacher / "config.json").read_text())
    facts |= {"architectures": ["BertForSequenceClassification"], "num_labels": 5}
    (world.teacher / "config.json").write_text(json.dumps(facts))
    world.values["teacher"]["task"] = "sequence_classification"
    world.values["data"] |= {"pack": False, "supervise": "last"}
    world.values["cache"] = {"url": world.values["cache"]["url"], "kind": "dense"}
    plan = make_plan(world.config, RunDir(world.run_dir))
    tokens = plan.tokens / plan.samples
    assert 5 < tokens <= 64
    assert plan.bytes_per_token == pytest.approx(1.25 * tokens + 1.5 * 5, rel=0.05)
    assert plan.expected_bytes == pytest.approx(plan.bytes_per_token * plan.samples, rel=0.01)


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
