"""Prices: hours × nodes × price, the guide's worked figures, and where a config is wrong."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import ClusterConfig, NodeTypeConfig
from cluster.estimate import bytes_per_token
from cluster.loader import check_config, load_config
from cluster.plan import keep_plan, make_plan
from cluster.pricing import RunCost, StageCost, num_nodes, price_of_replica, stage_costs
from cluster.rates import Rates
from cluster.rundir import RunDir
from storage.errors import InputError
from tests.cluster.conftest import World
from workers.api.config import PricesConfig
from workers.api.prices import Prices

ROOT = Path(__file__).resolve().parents[2]
GPU_NODE = NodeTypeConfig(resources={"CPU": 48, "GPU": 4}, labels={"role": "teacher"}, price_per_hour=4.5)


def costs(cluster: ClusterConfig, **changed: Any) -> list[StageCost]:
    """A run of every stage, with some figures changed."""
    figures: dict[str, Any] = {
        "capture_tokens": 3_600_000,
        "rates": Rates(1000.0, 500.0),
        "ranks": 4,
        "replicas": 2,
        "train_tokens": 1_800_000,
        "workers": 4,
        "trainings": 2,
        "evaluate_tokens": 375_000 * 36,
    }
    return stage_costs(cluster, **{**figures, **changed})


def test_hours_times_nodes_times_price() -> None:
    cluster = ClusterConfig.model_validate(
        {
            "node_types": {"t": GPU_NODE.model_dump(), "f": {"resources": {"GPU": 2}, "price_per_hour": 10}},
            "placement": {"capture": "t", "train": "f", "evaluate": "f"},
        }
    )
    capture, train, evaluate = costs(cluster)
    assert (capture.hours, capture.nodes, capture.node_hours, capture.cost) == (1.0, 2, 2.0, 9.0)
    # 4 ranks on nodes of 2; student and baseline.
    assert (train.hours, train.nodes, train.cost) == (2.0, 2, 40.0)
    # One rank trains 125 tokens/s; forward alone is three times as fast.
    assert evaluate.tokens_per_s == pytest.approx(375.0) and evaluate.cost == pytest.approx(100.0)


def test_without_node_types_a_replica_has_its_price() -> None:
    capture, train, _ = costs(ClusterConfig(price_per_hour=3.0))
    assert capture.cost == 6.0 and train.cost == 0.0


def test_a_stage_without_rate_or_work_is_said_so() -> None:
    stages = costs(ClusterConfig(), capture_tokens=0, rates=Rates(1000.0))
    assert [stage.stage for stage in stages] == ["train", "evaluate"]
    assert all(stage.hours is None and stage.cost is None for stage in stages)


@pytest.mark.parametrize(
    ("ranks", "resources", "nodes"),
    [(4, {"GPU": 4}, 1), (5, {"GPU": 4}, 2), (8, {"CPU": 48, "GPU": 4}, 2), (3, {"CPU": 2}, 2), (9, {}, 1)],
)
def test_ranks_fill_nodes(ranks: int, resources: dict[str, float], nodes: int) -> None:
    assert num_nodes(ranks, NodeTypeConfig(resources=resources), gpu=False) == nodes


def test_replicas_that_share_a_node_share_its_price() -> None:
    cluster = ClusterConfig(node_types={"t": GPU_NODE}, placement={"capture": "t"})  # type: ignore[arg-type]
    assert price_of_replica(cluster, 4) == 4.5
    assert price_of_replica(cluster, 1) == pytest.approx(1.125)
    assert price_of_replica(cluster, 8) == 9.0
    assert price_of_replica(ClusterConfig(price_per_hour=2.0), 8) == 2.0


def test_a_placement_must_name_a_node_type(world: World) -> None:
    with pytest.raises(InputError, match=r"cluster.placement.train = 'gpus' is not in cluster.node_types \(small\)"):
        check_config(
            {**world.values, "cluster": {"node_types": {"small": {}}, "placement": {"train": "gpus"}}}, "world"
        )
    with pytest.raises(InputError, match=r"unknown key cluster.node_types.small.label; did you mean .*labels"):
        check_config({**world.values, "cluster": {"node_types": {"small": {"label": {}}}}}, "world")


def test_plan_prices_the_whole_run(world: World) -> None:
    world.values["cluster"] = {
        "node_types": {"t": {"resources": {"CPU": 1}, "price_per_hour": 2.0}, "h": {"price_per_hour": 0.5}},
        "placement": {"capture": "t", "train": "t", "head": "h"},
        "storage_price_per_gb_month": 1e6,
    }
    plan = make_plan(world.config, RunDir(world.run_dir), Rates(capture=10.0, train=5.0))
    money = plan.money
    by_stage = {stage["stage"]: stage for stage in money["stages"]}
    assert by_stage["capture"]["tokens"] == plan.missing_tokens
    assert by_stage["capture"]["cost"] == pytest.approx(plan.missing_tokens / 10 / 3600 * 2.0)
    assert by_stage["train"]["tokens"] == pytest.approx(2 * 16 * plan.tokens / plan.samples, rel=0.2)
    hours = sum(stage["hours"] for stage in money["stages"])
    assert money["head"] == pytest.approx(hours * 0.5)
    machines = sum(stage["cost"] for stage in money["stages"]) + money["head"]
    assert money["machines"] == money["expected"] == pytest.approx(machines)
    assert money["storage_per_month"] == pytest.approx(plan.expected_bytes / 1000)
    assert money["priced"] and not money["unknown"]


def test_a_plan_without_rates_names_what_it_cannot_tell(world: World) -> None:
    money = make_plan(world.config, RunDir(world.run_dir)).money
    assert money["unknown"] == ["capture", "train", "evaluate"] and not money["priced"]


def test_a_plan_of_nothing_left_replaces_no_earlier_one(world: World) -> None:
    run = RunDir(world.run_dir)
    keep_plan(run, make_plan(world.config, run))
    first = run.store.read("plan.json")
    world.capture()
    keep_plan(run, make_plan(world.config, run))
    assert run.store.read("plan.json") == first


# --- the cost guide -------------------------------------------------------------------------------------------------


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading of the guide."""
    page = (ROOT / "docs" / "costs.md").read_text()
    part = page[page.index(heading) :]
    lines = re.findall(r"^\|(.+)\|$", part[: part.index("\n## ") if "\n## " in part else None], re.MULTILINE)
    return [[cell.strip() for cell in line.split("|")] for line in lines[2:]]


def volumes() -> dict[str, int]:
    """The guide's volumes."""
    return {"10M": 10**7, "100M": 10**8, "1B": 10**9}


def test_the_worked_figures_of_the_32b_teacher_are_the_formulas() -> None:
    config = load_config(str(ROOT / "examples" / "cluster.yaml"))
    capture_rate = 4 * 362e12 * 0.30 / (2 * 32.8e9)
    train_rate = 4 * 362e12 * 0.35 / (6 * 1.5e9)
    assert round(capture_rate, -2) == 6600 and round(train_rate, -3) == 56_000
    per_token = bytes_per_token(config.cache, vocab_size=152_064)
    assert f"{per_token:.1f} bytes per token" in (ROOT / "docs" / "costs.md").read_text()
    table = rows("## Worked: R1-Distill-Qwen-32B")
    assert [row[0] for row in table] == list(volumes())
    for row in table:
        tokens = volumes()[row[0]]
        stages = stage_costs(
            config.cluster,
            capture_tokens=tokens,
            rates=Rates(6600.0, 56_000.0),
            ranks=config.teacher.ranks,
            replicas=1,
            train_tokens=tokens,
            workers=config.train.workers,
            trainings=1,
            evaluate_tokens=0,
        )
        head = config.cluster.node_types["head"].price_per_hour
        storage = config.cluster.storage_price_per_gb_month
        whole = RunCost("USD", stages, head, 0.0, 0.0, round(tokens * per_token), storage)
        capture, train = stages
        figures = [capture.node_hours, capture.cost, train.hours, train.cost, whole.hours * head]
        figures += [tokens * per_token / 1e9, whole.storage_per_month, whole.machines + whole.storage_per_month]
        told = [float(cell.removesuffix(" GB")) for cell in row[1:]]
        assert told == [pytest.approx(figure, abs=0.006) for figure in figures]


def test_the_worked_figures_of_the_api_are_the_formulas() -> None:
    prices = Prices(PricesConfig.model_validate({"input": 0.55, "output": 2.19}))
    for row in rows("## Worked: DeepSeek-R1"):
        tokens = volumes()[row[0]]
        requests = -(-tokens // 4096)
        scoring = prices.expected(tokens, requests, requests).currency
        writing = prices.expected(tokens // 20, tokens, requests).currency
        assert int(row[1].replace(",", "")) == requests
        assert float(row[2]) == pytest.approx(scoring, abs=0.006)
        assert float(row[4].replace(",", "")) == pytest.approx(writing, abs=0.006)


def test_the_example_names_the_machines_of_the_launch_files() -> None:
    config = load_config(str(ROOT / "examples" / "cluster.yaml"))
    types = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())["available_node_types"]
    for name, node_type in config.cluster.node_types.items():
        assert node_type.labels.items() <= types[name]["labels"].items()
        assert not node_type.resources or node_type.resources == types[name]["resources"]
