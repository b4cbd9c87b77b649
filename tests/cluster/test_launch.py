"""The files that start a cluster: valid, and as safe as they say."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.kuberay_schema import SCHEMAS, problems

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ("ray_cluster.yaml", "cluster/launch/gcp.yaml")
KUBERNETES = ("cluster/launch/kuberay-cluster.yaml", "cluster/launch/kuberay-job.yaml")


def load(name: str) -> Any:
    """Return a file's value."""
    return yaml.safe_load((ROOT / name).read_text())


def spec_of(document: dict[str, Any]) -> dict[str, Any]:
    """The cluster of a RayCluster or RayJob."""
    spec: dict[str, Any] = document["spec"]
    return spec.get("rayClusterSpec", spec)


@pytest.mark.parametrize("name", LAUNCHER)
def test_rays_own_validator_takes_it(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(load(name)))


@pytest.mark.parametrize("name", LAUNCHER)
def test_rays_own_validator_is_no_yes_man(name: str) -> None:
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    broken = load(name)
    broken["available_node_types"]["teacher"]["min_workerz"] = 0
    with pytest.raises(ValidationError, match="min_workerz"):
        validate_config(prepare_config(broken))


@pytest.mark.parametrize("name", LAUNCHER)
def test_autoscaler_v2_reads_the_node_types(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

    read = AutoscalingConfig(prepare_config(load(name)), skip_content_hash=True).get_node_type_configs()
    assert {"head", "cpu_worker", "teacher", "trainer"} == set(read)
    assert read["teacher"].labels == {"role": "teacher", "ray.io/market-type": "spot"}
    assert read["trainer"].labels["ray.io/market-type"] == "on-demand"
    assert read["teacher"].resources["GPU"] == 4 and read["head"].resources["CPU"] == 0


@pytest.mark.parametrize("name", LAUNCHER)
def test_it_costs_nothing_while_nothing_runs_and_is_closed(name: str) -> None:
    config = load(name)
    types = config["available_node_types"]
    workers = {kind: facts for kind, facts in types.items() if kind != config["head_node_type"]}
    assert all(facts["min_workers"] == 0 for facts in workers.values())
    assert sum(facts["max_workers"] for facts in workers.values()) >= config["max_workers"]
    assert config["provider"]["use_internal_ips"] is True
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        start = config[commands][-1]
        assert "RAY_AUTH_MODE=token" in start and "0.0.0.0" not in start
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
    assert any("--constraint constraints.txt" in command for command in config["setup_commands"])


def test_aws_opens_no_port_and_asks_for_no_key() -> None:
    types = load("ray_cluster.yaml")["available_node_types"]
    for facts in types.values():
        node = facts["node_config"]
        assert node["SecurityGroupIds"] and node["SubnetIds"], "without a group Ray makes one open to the world"
        assert node["IamInstanceProfile"]["Arn"] and node["MetadataOptions"]["HttpTokens"] == "required"
        assert None not in node.values(), "boto3 refuses a null"
    assert types["teacher"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in types["trainer"]["node_config"]
    assert "InstanceMarketOptions" not in types["head"]["node_config"]


def test_gcp_machines_have_no_public_address() -> None:
    for facts in load("cluster/launch/gcp.yaml")["available_node_types"].values():
        node = facts["node_config"]
        assert all("accessConfigs" not in interface for interface in node["networkInterfaces"])
        assert node["serviceAccounts"]


@pytest.mark.parametrize("name", KUBERNETES)
def test_kuberays_schema_takes_it(name: str) -> None:
    document = load(name)
    assert problems(document, SCHEMAS[document["kind"]]) == []


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("spec", "rayClusterSpec", "authOptions", "mode"), "tokens", "is none of"),
        (("spec", "backoffLimit"), "3", "must be int"),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0, "must be text"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "minReplica"), 0, "unknown"),
        (("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers"), {}, "must be a list"),
    ],
)
def test_the_schema_finds_mistakes(path: tuple[Any, ...], value: Any, message: str) -> None:
    document = copy.deepcopy(load(KUBERNETES[1]))
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    found = problems(document, SCHEMAS["RayJob"])
    assert any(message in problem for problem in found), found
    del document["spec"]["rayClusterSpec"]["headGroupSpec"]
    assert any("headGroupSpec: missing" in problem for problem in problems(document, SCHEMAS["RayJob"]))


@pytest.mark.parametrize("name", KUBERNETES)
def test_kubernetes_clusters_want_a_token_and_scale_from_zero(name: str) -> None:
    spec = spec_of(load(name))
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] and spec["autoscalerOptions"]["version"] == "v2"
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert all(group["minReplicas"] == group["replicas"] == 0 for group in groups.values())
    assert groups["teacher"]["labels"]["ray.io/market-type"] == "spot"
    assert groups["trainer"]["labels"]["ray.io/market-type"] == "on-demand"


def test_a_ray_job_resumes_from_storage() -> None:
    spec = load("cluster/launch/kuberay-job.yaml")["spec"]
    assert spec["backoffLimit"] >= 1 and spec["shutdownAfterJobFinishes"]
    assert re.search(r"--run-dir (s3|gs)://", spec["entrypoint"])


@pytest.mark.parametrize("name", [*LAUNCHER, *KUBERNETES])
def test_versions_are_the_tested_ones(name: str) -> None:
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    named = re.findall(r"rayVersion: \"(.+)\"|lectern:([0-9.]+)", (ROOT / name).read_text())
    assert {version for pair in named for version in pair if version} <= {pinned[1]}


def test_the_dashboard_shows_every_metric_and_no_other() -> None:
    import json

    from workers.metrics import _GAUGES

    board = json.loads((ROOT / "cluster/launch/grafana.json").read_text())
    asked = " ".join(target["expr"] for panel in board["panels"] for target in panel["targets"])
    named = set(re.findall(r"ray_lectern_(\w+)", asked))
    assert named == {*_GAUGES, "replicas"}
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    places = [panel["gridPos"] for panel in board["panels"]]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
