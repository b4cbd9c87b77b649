"""A whole training whose run directory lies on an object store."""

from pathlib import Path
from typing import Any

import pytest

from cluster.config import ClusterConfig
from cluster.ray_session import ray_session
from storage.object_store import Store
from tests.trainer.tiny import TinyRun
from trainer.metrics import parse_lines
from trainer.runner import train_student
from trainer.spec import Training


@pytest.mark.slow
def test_a_run_on_an_object_store_is_taken_up_again_when_its_export_was_cut_off(
    hybrid_run: TinyRun,
    s3_url: str,
) -> None:
    arguments = {**hybrid_run.arguments(Path("unused"), steps=9, checkpoint_every=4, workers=2), "run_dir": s3_url}
    with ray_session(ClusterConfig(device="cpu"), 2):
        check(arguments, s3_url)


def check(arguments: dict[str, Any], s3_url: str) -> None:
    """Train, lose the end of the export, and train again."""
    first = train_student(Training(**arguments), print)
    store = Store(s3_url)
    assert {"student/config.json", "student/model.safetensors", "student/tokenizer.json"} <= set(store.list("student/"))
    lines = store.read("metrics.jsonl")
    store.delete("student/train_result.json")
    store.delete("student/tokenizer.json")
    events: list[dict[str, Any]] = []
    again = train_student(Training(**arguments), events.append)
    assert (events[0]["step"], again.resumed_from) == (8, 8)
    assert (again.order_digest, again.tokens) == (first.order_digest, first.tokens)
    assert again.losses == pytest.approx(first.losses, rel=1e-5)
    assert store.exists("student/tokenizer.json")
    assert [line["step"] for line in parse_lines(store.read("metrics.jsonl"))] == list(range(1, 10))
    assert parse_lines(lines)[:8] == parse_lines(store.read("metrics.jsonl"))[:8]
