"""Whether a teacher fits is told before it is loaded, and placement before waiting."""

import json
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from ray.core.generated import autoscaler_pb2
from safetensors.numpy import save_file

from storage.errors import InputError
from workers.config import ReplicasConfig, TeacherConfig
from workers.local.fit import check_fit, host_free_bytes, memory_need, stored_dtypes
from workers.meter import FleetMeter
from workers.metrics import FleetMetrics
from workers.resources import NodeShape, describe, names_infeasible, placement_strategy

GIB = 2**30


def model_folder(folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps({"vocab_size": 1000}))
    save_file({"w": np.zeros((1000, 500), dtype=np.float16)}, str(folder / "model.safetensors"))
    return folder


def test_need_follows_precision_sharding_and_batch(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    whole = memory_need(folder, TeacherConfig(dtype="float32", sharding="none", batch_tokens=100))
    assert (whole.weights, whole.logits, whole.loading) == (2_000_000, 400_000, 2_000_000)
    half = memory_need(folder, TeacherConfig(dtype="bfloat16", sharding="zero3", ranks=4, batch_tokens=100))
    assert (half.weights, half.logits, half.loading) == (250_000, 200_000, 1_000_000)


def test_weights_that_are_kept_elsewhere_or_rounded_need_less(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    split = {"dtype": "float16", "sharding": "zero3", "ranks": 2, "batch_tokens": 100}
    there = memory_need(folder, TeacherConfig.model_validate({**split, "offload": {}}))
    assert (there.weights, there.offloaded, there.scoring) == (0, 500_000, 200_000)
    on_disk = {"to": "nvme", "folder": "/fast"}
    disk = memory_need(folder, TeacherConfig.model_validate({**split, "offload": on_disk}))
    assert (disk.weights, disk.offloaded) == (0, 0)
    (folder / "config.json").write_text(json.dumps({"vocab_size": 300}))
    embeddings = np.zeros((300, 500), dtype=np.float16)
    save_file({"w": np.zeros((1000, 500), dtype=np.float16), "e": embeddings}, str(folder / "model.safetensors"))
    for how, size in (("int8", 500_000 + 300_000), ("int4", 250_000 + 300_000)):
        assert memory_need(folder, TeacherConfig(dtype="float16", sharding="none", quantize=how)).weights == size


def test_ranks_of_a_node_load_the_same_pages(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    assert stored_dtypes(folder) == {"float16"}
    mapped = TeacherConfig(name="m", dtype="float16", sharding="zero3", ranks=4, batch_tokens=1)
    need = memory_need(folder, mapped)
    assert need.loading_is_shared
    check_fit(need, mapped, host_free=1_100_000, device_free=GIB, ranks_here=4)
    copied = mapped.model_copy(update={"dtype": "bfloat16"})
    with pytest.raises(InputError, match=r"each of the 4 ranks on this node needs 1\.0 MiB of host memory"):
        check_fit(memory_need(folder, copied), copied, host_free=1_100_000, device_free=GIB, ranks_here=4)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"sharding": "tensor_parallel", "offload": {}}, "offload is a part of sharding zero3"),
        ({"sharding": "zero3", "offload": {"to": "nvme"}}, "folder names where the files go"),
        ({"sharding": "zero3", "offload": {"folder": "/x"}}, "folder names where the files go"),
        ({"sharding": "zero3", "quantize": "int8"}, "set sharding: none and ranks: 1"),
    ],
)
def test_what_does_not_go_together_is_refused(fields: dict[str, object], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        TeacherConfig.model_validate(fields)


def test_rounded_weights_are_another_teacher() -> None:
    assert TeacherConfig(dtype="bfloat16").precision == "bfloat16"
    assert TeacherConfig(dtype="bfloat16", sharding="none", quantize="int4").precision == "bfloat16, weights int4"


def test_a_model_too_large_is_refused_with_both_numbers(tmp_path: Path) -> None:
    teacher = TeacherConfig(name="big", dtype="float32", sharding="none", batch_tokens=100)
    need = memory_need(model_folder(tmp_path), teacher)
    check_fit(need, teacher, host_free=GIB, device_free=None, ranks_here=1)
    check_fit(need, teacher, host_free=GIB, device_free=2_400_000, ranks_here=1)
    with pytest.raises(InputError, match=r"teacher big does not fit.*needs 2\.3 MiB of host memory.*1\.9 MiB is there"):
        check_fit(need, teacher, host_free=2_000_000, device_free=None, ranks_here=1)
    with pytest.raises(InputError, match=r"its accelerator has 2\.2 MiB free; raise teacher\.ranks \(now 1"):
        check_fit(need, teacher, host_free=GIB, device_free=2_300_000, ranks_here=1)
    with pytest.raises(InputError, match="each of the 600 ranks on this node"):
        check_fit(need, teacher, host_free=GIB, device_free=None, ranks_here=600)


def test_a_container_limit_counts_as_the_memory_there_is(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       2000 kB\nMemAvailable:   1000 kB\n")
    assert host_free_bytes(meminfo, tmp_path) == 1000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5\n")
    assert host_free_bytes(meminfo, tmp_path) == 1000 * 1024
    (tmp_path / "memory.max").write_text("400\n")
    assert host_free_bytes(meminfo, tmp_path) == 395


GPU_RANK = {"CPU": 1.0, "GPU": 1.0}


@pytest.mark.parametrize(
    "shapes,expected",
    [
        ([NodeShape({"CPU": 8, "GPU": 4}, 1)], "STRICT_PACK"),
        ([NodeShape({"CPU": 8, "GPU": 2}, 2)], "PACK"),
        ([NodeShape({"CPU": 8}, 1), NodeShape({"CPU": 8, "GPU": 4}, 3)], "STRICT_PACK"),
        ([NodeShape({"CPU": 1, "GPU": 1}, 1), NodeShape({"CPU": 3, "GPU": 8}, 1)], "PACK"),
    ],
)
def test_one_node_where_one_node_can(shapes: list[NodeShape], expected: str) -> None:
    assert placement_strategy(GPU_RANK, 4, shapes) == expected


def test_what_no_node_can_give_is_said_at_once() -> None:
    shapes = [NodeShape({"CPU": 8.0, "memory": 1e9}, 1), NodeShape({"CPU": 4.0, "GPU": 1.0}, 3)]
    with pytest.raises(InputError) as caught:
        placement_strategy(GPU_RANK, 4, shapes)
    assert "a replica needs 4 × {CPU: 1, GPU: 1}" in str(caught.value)
    assert "1 × {CPU: 8}; 3 × {CPU: 4, GPU: 1}" in str(caught.value)
    with pytest.raises(InputError, match="can never give that"):
        placement_strategy(GPU_RANK, 1, [NodeShape({"CPU": 4.0, "GPU": 1.0}, 0)])
    assert describe({"CPU": 1.0}, 2) == "2 × {CPU: 1}"


def test_a_cluster_that_may_grow_is_asked_instead_of_refused() -> None:
    assert placement_strategy(GPU_RANK, 4, [NodeShape({"CPU": 8.0}, 1)], may_grow=True) == "PACK"


def test_the_autoscalers_verdict_counts_for_the_same_bundle_only() -> None:
    reply = autoscaler_pb2.GetClusterStatusReply()
    gang = reply.autoscaling_state.infeasible_gang_resource_requests.add()
    assert not names_infeasible(reply.SerializeToString(), GPU_RANK)
    request = gang.bundle_selectors.add().resource_requests.add()
    request.resources_bundle.update({"CPU": 1.0, "GPU": 1.0})
    assert names_infeasible(reply.SerializeToString(), GPU_RANK)
    assert names_infeasible(reply.SerializeToString(), {**GPU_RANK, "TPU": 0.0})
    assert not names_infeasible(reply.SerializeToString(), {"CPU": 1.0})


def test_every_figure_of_the_fleet_is_a_gauge() -> None:
    status = FleetMeter(units_total=3, tokens_total=30).status(in_flight=1, now=0.0).to_json()
    metrics = FleetMetrics()
    metrics.take({"event": "unit_done"})
    metrics.take({"event": "fleet", **status})
    assert set(metrics._gauges) == set(status) - {"replicas", "seconds_left"}


def test_replicas_are_a_number_or_a_range() -> None:
    assert TeacherConfig.model_validate({"replicas": 3}).replicas == ReplicasConfig(min=1, max=3)
    assert TeacherConfig.model_validate({"replicas": {"min": 2, "max": 4}}).replicas.min == 2
    with pytest.raises(ValueError, match="min 4 is more than max 2"):
        ReplicasConfig(min=4, max=2)
