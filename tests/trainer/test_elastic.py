"""Which nodes an elastic training counts on."""

from typing import Any

from trainer.elastic import usable


def node(name: str, alive: bool = True, cpus: float = 2.0, **labels: str) -> dict[str, Any]:
    """A row of `ray.nodes()`."""
    return {"NodeID": name, "Alive": alive, "Resources": {"CPU": cpus}, "Labels": labels}


def test_dead_nodes_leaving_nodes_and_those_of_other_labels_do_not_count() -> None:
    nodes = [
        node("head"),
        node("teacher", role="teacher"),
        node("lost", alive=False, role="trainer"),
        node("warned", role="trainer"),
        node("left", cpus=4.0, role="trainer", market="spot"),
    ]
    assert usable(nodes, {"warned": 0}, {"role": "trainer"}) == {"left": {"CPU": 4.0}}
    assert set(usable(nodes, {}, {})) == {"head", "teacher", "warned", "left"}
    assert usable([{**node("bare"), "Labels": None}], {}, {}) == {"bare": {"CPU": 2.0}}
