"""Whole captures through real Ray and real DeepSpeed."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from storage.config import CacheConfig
from storage.errors import InputError, WorkerError
from storage.heads import full_logprobs, load_head
from storage.hidden import states_tensor
from storage.identity import DatasetIdentity
from storage.object_store import Store
from storage.reader import Dataset
from storage.targets import TargetBatch
from storage.union import DatasetUnion
from storage.verify import verify_dataset
from tests.processes import own_processes
from tests.workers.conftest import TinyRun
from workers.config import TeacherConfig
from workers.coordinator import capture
from workers.model_folder import teacher_identity
from workers.result import CaptureResult

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]


def run_capture(
    run: TinyRun, folder: Path, teacher: TeacherConfig, cache: CacheConfig, on_event: Any = None
) -> tuple[CaptureResult, DatasetIdentity]:
    identity = teacher_identity(folder, teacher, cache, run.tokenizer, uses_chat_template=False)
    rows = run.samples.rows()
    return capture(teacher, cache, folder, run.samples, rows, identity, on_event=on_event), identity


def stored(run: TinyRun, cache: CacheConfig, identity: DatasetIdentity) -> TargetBatch:
    dataset = Dataset.open(cache.url, identity)
    assert len(dataset.catalog) == run.samples.num_samples
    assert sum(record.rows for record in dataset.manifests) == run.samples.num_samples
    return dataset.read(run.samples.ids(run.samples.rows()))[1]


def reference_logprobs(run: TinyRun, folder: Path) -> np.ndarray:
    """Return float64 log-probabilities [P, V] of an unsharded float32 model, one document at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    samples, rows = run.samples.read(run.samples.rows()), []
    for n in range(len(samples)):
        sample = samples.sample(n)
        for document in np.unique(sample.document):
            inside = sample.document == document
            tokens = torch.from_numpy(sample.tokens[inside].astype(np.int64))
            with torch.no_grad():
                logits = model(input_ids=tokens[None]).logits[0, :-1, : run.tokenizer.vocab_size]
            keep = torch.from_numpy(sample.supervised[inside][1:].copy())
            rows.append(torch.log_softmax(logits.double(), -1)[keep])
    return torch.cat(rows).numpy()


def assert_targets_are_right(targets: TargetBatch, expected: np.ndarray) -> None:
    position = np.repeat(np.arange(targets.num_positions), targets.count)
    wanted = expected[position, targets.id]
    error = np.abs(targets.logprob.astype(np.float64) - wanted)
    assert (error <= np.abs(wanted) * 2**-10 + 1e-3).all()
    tail = 1 - np.bincount(position, weights=np.exp(wanted))
    np.testing.assert_allclose(targets.tail_mass.astype(np.float64), tail, atol=2e-3)


@pytest.mark.parametrize(
    "model_type,sharding,ranks",
    [
        ("deepseek_v3", "none", 1),
        ("deepseek_v3", "zero3", 2),
        ("qwen2", "zero3", 2),
        ("qwen2", "tensor_parallel", 2),
        ("llama", "tensor_parallel", 2),
        ("qwen2", "zero3 offloaded", 1),
        ("llama", "zero3 offloaded", 2),
    ],
)
def test_float32_targets_match_plain_transformers(
    tiny_run: TinyRun, model_type: str, sharding: str, ranks: int
) -> None:
    folder = tiny_run.model(model_type, 256)
    how, _, offloaded = sharding.partition(" ")
    teacher = TeacherConfig(
        name=str(folder),
        dtype="float32",
        sharding=how,
        ranks=ranks,
        batch_tokens=512,
        offload={} if offloaded else None,
    )
    cache = tiny_run.cache(f"{model_type}-{sharding}-{ranks}", hidden=["final"])
    result, identity = run_capture(tiny_run, folder, teacher, cache)
    assert result.scored_samples == tiny_run.samples.num_samples >= 64
    assert not result.failed_units
    assert_targets_are_right(stored(tiny_run, cache, identity), reference_logprobs(tiny_run, folder))
    if ranks > 1:
        for rank in result.ranks:
            share = rank["parameters_held"] / rank["parameters_total"]
            assert 0.45 < share < (0.55 if how == "zero3" else 0.65)
            assert rank["replicated"]
    again, _ = run_capture(tiny_run, folder, teacher, cache)
    assert (again.scored_samples, again.reused_samples) == (0, tiny_run.samples.num_samples)


def test_attention_states_and_head_of_two_ranks_are_those_of_one(tiny_run: TinyRun) -> None:
    folder = tiny_run.model("qwen2", 256)
    found = []
    for how, ranks in (("none", 1), ("tensor_parallel", 2)):
        teacher = TeacherConfig(name=str(folder), dtype="float32", sharding=how, ranks=ranks, batch_tokens=512)
        kept = {"hidden": ["final"], "hidden_dtype": "float32", "hidden_every": 4, "attention": ["model.layers.1"]}
        cache = tiny_run.cache(f"attention-{ranks}", **kept)
        _, identity = run_capture(tiny_run, folder, teacher, cache)
        assert verify_dataset(cache.url).ok
        found.append(stored(tiny_run, cache, identity))
        head = load_head(Store(cache.url), identity.fingerprint)
    one, two = found
    assert one.attention_count is not None and 0 < (one.attention_count > 0).mean() < 0.3
    np.testing.assert_array_equal(one.attention_count, two.attention_count)
    for layer, weights in one.attention.items():
        np.testing.assert_allclose(weights, two.attention[layer], atol=1e-3)
    expected = reference_logprobs(tiny_run, folder)[one.hidden_kept]
    for targets in found:
        [logprobs] = full_logprobs(states_tensor(targets.hidden["final"]), head)
        np.testing.assert_allclose(logprobs.numpy(), expected, atol=2e-4)


def test_bfloat16_targets_stay_close(tiny_run: TinyRun) -> None:
    # Logits of a few nats, like a trained model's: bfloat16 has an error relative to their size.
    folder = tiny_run.model("qwen2", 256, spread=0.05)
    teacher = TeacherConfig(name=str(folder), dtype="bfloat16", sharding="none", ranks=1)
    cache = tiny_run.cache("bfloat16", kind="topk", top_k=8)
    _, identity = run_capture(tiny_run, folder, teacher, cache)
    targets, expected = stored(tiny_run, cache, identity), reference_logprobs(tiny_run, folder)
    position = np.repeat(np.arange(targets.num_positions), targets.count)
    difference = np.abs(targets.logprob.astype(np.float64) - expected[position, targets.id])
    assert np.median(difference) <= 0.01


def test_a_killed_rank_costs_no_row(tiny_run: TinyRun) -> None:
    folder = tiny_run.model("qwen2", 64)
    teacher = TeacherConfig(name=str(folder), dtype="float32", sharding="zero3", ranks=2)
    cache = tiny_run.cache("killed", unit_tokens=300)
    events: list[dict[str, Any]] = []

    def kill_one_rank(event: dict[str, Any]) -> None:
        events.append(event)
        done = sum(e["event"] == "unit_done" for e in events)
        if event["event"] == "unit_done" and done in (2, 5):
            os.kill(own_processes("ray::Rank")[-1], signal.SIGKILL)

    result, identity = run_capture(tiny_run, folder, teacher, cache, kill_one_rank)
    assert sum(e["event"] == "replica_lost" for e in events) >= 2
    assert not result.failed_units
    stored(tiny_run, cache, identity)
    assert verify_dataset(cache.url).ok


def test_unknown_layer_is_one_clear_error(tiny_run: TinyRun) -> None:
    folder = tiny_run.model("qwen2", 64)
    teacher = TeacherConfig(name=str(folder), dtype="float32", sharding="none")
    with pytest.raises(InputError, match=r"no layer 'model\.layers\.99'"):
        run_capture(tiny_run, folder, teacher, tiny_run.cache("layer", hidden=["model.layers.99"]))


def broken(run: TinyRun, name: str, head: bool) -> Path:
    """Return a teacher with a NaN in its output head, or in the embedding of the rarest token."""
    model = AutoModelForCausalLM.from_pretrained(run.model("qwen2", 64))
    counts = np.bincount(run.samples.read(run.samples.rows()).tokens)
    rarest = int(np.flatnonzero(counts == counts[counts > 0].min())[0])
    with torch.no_grad():
        layer = model.get_output_embeddings() if head else model.get_input_embeddings()
        layer.weight[rarest] = float("nan")
    folder = run.folder / name
    model.save_pretrained(folder)
    return folder


def test_a_teacher_of_nan_ends_the_capture_and_stores_nothing(tiny_run: TinyRun) -> None:
    folder = broken(tiny_run, "nan-teacher", head=True)
    teacher = TeacherConfig(name=str(folder), dtype="float32", sharding="none")
    cache = tiny_run.cache("nan")
    samples = tiny_run.samples
    with pytest.raises(WorkerError, match=r"refuses \d+ of \d+ samples .*NaN or infinite.*the last are [0-9a-f]{32}"):
        run_capture(tiny_run, folder, teacher, cache)
    dataset = DatasetUnion.open([cache.url])
    assert len(dataset.datasets[0].catalog) == 0
    assert 0 < len(dataset.refused(samples.sample_ids)) < samples.num_samples, "it goes on although all is refused"


def test_single_refused_samples_are_left_out_on_two_ranks_and_not_asked_again(tiny_run: TinyRun) -> None:
    folder = broken(tiny_run, "half-nan-teacher", head=False)
    teacher = TeacherConfig(name=str(folder), dtype="float32", sharding="tensor_parallel", ranks=2)
    cache = tiny_run.cache("half-nan", unit_tokens=1000)
    samples = tiny_run.samples
    result, identity = run_capture(tiny_run, folder, teacher, cache)
    refused = sum(result.refused.values())
    assert 0 < refused <= 3 and not result.failed_units and not result.replicas_lost
    assert result.scored_samples == samples.num_samples - refused == len(Dataset.open(cache.url, identity).catalog)
    assert verify_dataset(cache.url).ok
    events: list[dict[str, Any]] = []
    again, _ = run_capture(tiny_run, folder, teacher, cache, events.append)
    assert again.scored_samples == 0 and again.refused == result.refused
    assert [event["event"] for event in events] == ["units_planned"]
