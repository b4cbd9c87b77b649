"""Where stages may run, and what is said when a cluster has no such machines."""

from typing import Any

import pytest

from cluster.config import ClusterConfig
from cluster.placement import Machines, require_placed
from storage.errors import InputError

HEAD = Machines("head", {"CPU": 0.0}, {"role": "head"})
SPOT = Machines("spot", {"CPU": 48.0, "GPU": 4.0}, {"role": "teacher", "zone": "a"})


def placed(**node_type: Any) -> ClusterConfig:
    """A config whose capture runs on one node type."""
    return ClusterConfig.model_validate({"node_types": {"teacher": node_type}, "placement": {"capture": "teacher"}})


@pytest.mark.parametrize(
    "node_type",
    [
        {"labels": {"role": "teacher"}},
        {"resources": {"GPU": 4}},
        {"labels": {"zone": "a"}, "resources": {"CPU": 8}},
        {},
    ],
)
def test_machines_that_fit(node_type: dict[str, Any]) -> None:
    require_placed(placed(**node_type), [HEAD, SPOT])


@pytest.mark.parametrize(
    "node_type", [{"labels": {"role": "trainer"}}, {"resources": {"GPU": 8}}, {"resources": {"TPU": 1}}]
)
def test_machines_that_no_one_has_are_named_with_those_there_are(node_type: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"cluster.placement.capture asks for teacher \{") as caught:
        require_placed(placed(**node_type), [HEAD, SPOT])
    assert "head {role=head}; spot {CPU: 48, GPU: 4, role=teacher, zone=a}" in str(caught.value)


def test_a_stage_without_a_place_goes_anywhere() -> None:
    require_placed(ClusterConfig(), [])


def test_labels_of_a_stage() -> None:
    assert placed(labels={"role": "teacher"}).labels("capture") == {"role": "teacher"}
    assert placed().labels("train") == {}
