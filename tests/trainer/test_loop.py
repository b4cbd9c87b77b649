"""The loop on real ranks with DeepSpeed: the same numbers for any split, exact resume, errors that stop all ranks."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from storage.heads import Head, save_head
from storage.object_store import Store
from tests.trainer.ranks import loop_spec, metrics_of, run_ranks
from tests.trainer.tiny import QWEN2, TinyRun
from trainer.checkpoint import newest
from trainer.config import LoraConfig, StudentConfig
from trainer.curriculum import planned_order
from trainer.curriculum_config import CurriculumConfig
from trainer.loss_config import LossConfig
from trainer.mixing import apply
from trainer.spec import LoopSpec
from trainer.student import build_student

pytestmark = pytest.mark.slow

HIDDEN = {
    "loss": {"kl": 0.5, "ce": 0.2, "hidden": 0.3, "hidden_map": {"final": "final", "model.layers.1": "model.layers.0"}}
}


def weights(run_dir: Path) -> torch.Tensor:
    state = load_file(run_dir / "student" / "model.safetensors")
    return torch.cat([state[name].float().flatten() for name in sorted(state)])


def curve(run_dir: Path, key: str = "loss") -> np.ndarray:
    return np.array([line[key] for line in metrics_of(run_dir)])


@pytest.fixture(scope="module")
def unsplit(hidden_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("unsplit")
    run_ranks(without_dropout(hidden_run, run_dir, micro_batch_size=8, zero_stage=0))
    return run_dir


def without_dropout(run: TinyRun, run_dir: Path, **train: object):
    spec = loop_spec(run, run_dir, **{"clip_norm": 0.25, **HIDDEN, **train})
    config = {**spec.student.config, "attention_dropout": 0.0}
    return replace(spec, student=spec.student.model_copy(update={"config": config}))


@pytest.mark.parametrize(("workers", "micro", "stage"), [(1, 2, 1), (2, 4, 2), (2, 1, 0), (2, 2, 3)])
def test_any_split_and_stage_gives_the_same_curve(
    hidden_run: TinyRun, unsplit: Path, tmp_path: Path, workers: int, micro: int, stage: int
) -> None:
    spec = without_dropout(hidden_run, tmp_path, workers=workers, micro_batch_size=micro, zero_stage=stage)
    figures = run_ranks(spec)
    assert figures["digest"] == planned_order(hidden_run.samples, spec.curriculum, spec.train).digest().hex()
    for key in ("loss", "ce", "kl", "hidden", "grad_norm"):
        np.testing.assert_allclose(curve(tmp_path, key), curve(unsplit, key), rtol=1e-5, err_msg=key)
    assert curve(unsplit, "grad_norm").min() > 0.25  # clipping is at work
    # Adam divides by the gradient's own size, so rounding shows where a gradient is next to nothing.
    np.testing.assert_allclose(weights(tmp_path), weights(unsplit), atol=2e-5)


@pytest.mark.parametrize(("stage", "offload"), [(2, "optimizer"), (3, "parameters")])
def test_what_host_memory_holds_changes_no_number(
    hidden_run: TinyRun, unsplit: Path, tmp_path: Path, stage: int, offload: str
) -> None:
    run_ranks(without_dropout(hidden_run, tmp_path, workers=2, micro_batch_size=4, zero_stage=stage, offload=offload))
    np.testing.assert_allclose(curve(tmp_path), curve(unsplit), rtol=1e-5)
    np.testing.assert_allclose(weights(tmp_path), weights(unsplit), atol=2e-5)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_resumed_run_is_the_unbroken_one(hidden_run: TinyRun, tmp_path: Path, stage: int) -> None:
    train = {"workers": 2, "zero_stage": stage, "micro_batch_size": 2, "dtype": "bfloat16", **HIDDEN}
    whole = run_ranks(loop_spec(hidden_run, tmp_path / "whole", **train))
    assert (whole["resumed_from"], whole["step"]) == (0, 6)
    store = Store(tmp_path / "whole" / "checkpoints" / "student")
    name, position = newest(store)
    assert (name, position.step) == ("checkpoint_000004", 4)
    (tmp_path / "broken").mkdir()
    before = list((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines(keepends=True))[:5]
    (tmp_path / "broken" / "metrics.jsonl").write_text("".join(before))  # step 5 was logged but not kept
    resumed = run_ranks(loop_spec(hidden_run, tmp_path / "broken", **train), resume=Path(store.url) / name)
    assert resumed["resumed_from"] == 4
    assert resumed["digest"] == whole["digest"]
    assert resumed["tokens"] == whole["tokens"]
    assert [line["step"] for line in metrics_of(tmp_path / "broken")] == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "grad_norm", "lr"):
        np.testing.assert_array_equal(curve(tmp_path / "broken", key), curve(tmp_path / "whole", key))
    assert torch.equal(weights(tmp_path / "broken"), weights(tmp_path / "whole"))


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_another_number_of_ranks_goes_on_with_the_same_samples(hidden_run: TinyRun, tmp_path: Path, stage: int) -> None:
    """2 → 1 → 2 ranks, with a frozen layer, projectors and learned weights."""
    fields = {"steps": 7, "checkpoint_every": 2, "zero_stage": stage, "micro_batch_size": 2}
    loss = {**HIDDEN["loss"], "adaptive": "uncertainty"}

    def spec(name: str, workers: int) -> LoopSpec:
        made = without_dropout(hidden_run, tmp_path / name, **fields, workers=workers, loss=loss)
        return replace(made, student=made.student.model_copy(update={"frozen": ["model.layers.0.mlp.*"]}))

    def saved(name: str, step: int) -> Path:
        return tmp_path / name / "checkpoints" / "student" / f"checkpoint_{step:06d}"

    whole = run_ranks(spec("whole", 2))
    one = run_ranks(spec("one", 1), resume=saved("whole", 2))
    assert (one["resumed_from"], one["world_size"]) == (2, 1)
    two = run_ranks(spec("two", 2), resume=saved("one", 4))
    assert (two["resumed_from"], two["world_size"]) == (4, 2)
    assert whole["digest"] == one["digest"] == two["digest"]
    for name, first in (("one", 2), ("two", 4)):
        for key in ("loss", "kl", "hidden", "grad_norm"):
            np.testing.assert_allclose(curve(tmp_path / name, key), curve(tmp_path / "whole", key)[first:], rtol=1e-5)
        np.testing.assert_allclose(weights(tmp_path / name), weights(tmp_path / "whole"), atol=2e-5)


def test_a_warned_training_writes_one_checkpoint_at_once(hybrid_run: TinyRun, tmp_path: Path) -> None:
    spec = loop_spec(hybrid_run, tmp_path, workers=2, checkpoint_every=100, steps=4)
    assert run_ranks(spec, going=("node",))["step"] == 4
    assert [path.name for path in (tmp_path / "checkpoints" / "student").iterdir()] == ["checkpoint_000001"]


def test_bfloat16_training_adds_updates_to_float32_masters(hybrid_run: TinyRun, tmp_path: Path) -> None:
    """Steps far below bfloat16's resolution add up in the masters and would be lost in the weights themselves."""
    train = {"dtype": "bfloat16", "weight_decay": 0.0, "warmup_steps": 0, "checkpoint_every": 5}
    for rate in (2e-5, 1e-12):
        spec = loop_spec(hybrid_run, tmp_path / f"{rate}", **train, learning_rate=rate, steps=40)
        run_ranks(spec)
    # Same samples in the same order: what differs is the sum of the small steps.
    trained, untrained = curve(tmp_path / f"{2e-5}"), curve(tmp_path / f"{1e-12}")
    assert trained[-5:].mean() < untrained[-5:].mean() - 0.005
    exported = load_file(tmp_path / f"{2e-5}" / "student" / "model.safetensors")
    assert {tensor.dtype for tensor in exported.values()} == {torch.bfloat16}


def test_exact_divergences_with_learned_weights_and_a_falling_temperature(hidden_run: TinyRun, tmp_path: Path) -> None:
    vocabulary = hidden_run.identity.tokenizer.vocab_size
    weight = torch.randn(vocabulary, 24, generator=torch.Generator().manual_seed(0)) * 0.2
    save_head(Store(hidden_run.dataset_url), Head(weight, None, vocabulary), hidden_run.identity.fingerprint)
    temperature = {"shape": "linear", "start": 2.0, "end": 1.0}
    loss = {"divergence": "jsd", "exact": True, "temperature": temperature, "adaptive": "uncertainty"}
    run_ranks(loop_spec(hidden_run, tmp_path, workers=1, zero_stage=3, steps=12, loss=loss))
    weights_of = [line["weights"] for line in metrics_of(tmp_path)]
    assert weights_of[0] == {"ce": pytest.approx(0.1), "kl": pytest.approx(0.9), "hidden": 0}
    assert weights_of[-1]["kl"] != weights_of[0]["kl"]
    assert curve(tmp_path, "ce")[-1] < curve(tmp_path, "ce")[0]
    assert (curve(tmp_path, "kl") > 0).all()


def test_an_adaptive_mixture_by_difficulty_goes_on_as_if_unbroken(hybrid_run: TinyRun, tmp_path: Path) -> None:
    curriculum = CurriculumConfig.model_validate(
        {
            "adaptive": {"every": 2, "samples": 3},
            "difficulty": {"by": "teacher_entropy", "open_first": 0.3, "open_until": 1.0},
        }
    )
    train = {"workers": 2, "zero_stage": 3, "micro_batch_size": 2, "steps": 7, "checkpoint_every": 4}
    spec = replace(loop_spec(hybrid_run, tmp_path / "whole", **train), curriculum=curriculum)
    whole = run_ranks(spec)
    assert [decision["step"] for decision in whole["mixing"]] == [2, 4, 6]
    order = planned_order(hybrid_run.samples, curriculum, spec.train, hybrid_run.union)
    assert whole["digest"] != order.digest().hex()
    apply(order, whole["mixing"])
    assert whole["digest"] == order.digest().hex()
    lines = metrics_of(tmp_path / "whole")
    assert lines[1]["planned"] != lines[2]["planned"] == pytest.approx(whole["mixing"][0]["shares"])
    saved = tmp_path / "whole" / "checkpoints" / "student" / "checkpoint_000004"
    resumed = run_ranks(replace(spec, run_dir=str(tmp_path / "broken")), resume=saved)
    assert (resumed["resumed_from"], resumed["mixing"], resumed["digest"]) == (4, whole["mixing"], whole["digest"])
    follower = replace(spec, run_dir=str(tmp_path / "follower"), mixing=tuple(whole["mixing"]))
    followed = run_ranks(replace(follower, train=spec.train.model_copy(update={"loss": LossConfig(kl=0, ce=1)})))
    assert followed["digest"] == whole["digest"]


@pytest.mark.parametrize("stage", [2, 3])
def test_adapters_alone_are_trained_and_merged_into_the_export(hybrid_run: TinyRun, tmp_path: Path, stage: int) -> None:
    spec = loop_spec(hybrid_run, tmp_path, workers=2, zero_stage=stage, steps=8, learning_rate=2e-2)
    lora = StudentConfig(config=QWEN2, lora=LoraConfig(rank=4), frozen=["model.layers.0.*"])
    spec = replace(spec, student=lora)
    figures = run_ranks(spec)
    assert curve(tmp_path, "grad_norm").min() > 0
    start = build_student(lora, None, hybrid_run.identity)
    assert figures["parameters"] == sum(p.numel() for p in start.parameters())
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)
    for (name, before), after in zip(start.named_parameters(), exported.parameters(), strict=True):
        moved = ".layers.1." in name and before.dim() == 2
        assert torch.equal(before, after) != moved, name


def test_consolidation_holds_weights_back_on_any_number_of_ranks(hybrid_run: TinyRun, tmp_path: Path) -> None:
    def run(name: str, workers: int, **train: object) -> Path:
        spec = without_dropout(hybrid_run, tmp_path / name, workers=workers, loss={}, clip_norm=1e9, **train)
        run_ranks(replace(spec, earlier={"general": 3.0, "domain": 1.0}))
        return tmp_path / name

    ewc = {"ewc": {"weight": 1e3, "samples": 6}}
    free, one, two = run("free", 1), run("one", 1, **ewc), run("two", 2, micro_batch_size=2, **ewc)
    for key in ("loss", "ewc", "grad_norm"):
        np.testing.assert_allclose(curve(two, key), curve(one, key), rtol=1e-4, atol=1e-9, err_msg=key)
    assert curve(one, "ewc")[0] == 0 < curve(one, "ewc")[-1]
    start = build_student(StudentConfig(config=QWEN2), None, hybrid_run.identity).state_dict()
    state = torch.cat([start[name].flatten() for name in sorted(load_file(one / "student" / "model.safetensors"))])
    assert (weights(one) - state).norm() < 0.9 * (weights(free) - state).norm()


def test_a_loss_that_is_not_a_number_stops_all_ranks_and_names_step_and_samples(
    hybrid_run: TinyRun, tmp_path: Path
) -> None:
    spec = loop_spec(hybrid_run, tmp_path, workers=2, learning_rate=1e30, clip_norm=1e30, warmup_steps=0)
    name, message = run_ranks(spec)["error"]
    assert name == "WorkerError"
    assert "step 2 is not finite" in message
    order = planned_order(hybrid_run.samples, spec.curriculum, spec.train)
    assert any(row.tobytes().hex() in message for row in order.step(1))
    assert not (tmp_path / "student").exists()


def test_a_damaged_shard_stops_all_ranks_with_its_own_error(hybrid_run: TinyRun, tmp_path: Path) -> None:
    copy = Store(tmp_path / "dataset")
    source = Store(hybrid_run.dataset_url)
    for key in source.list():
        data = source.read(key)
        copy.write(key, data[:-1] + b"\0" if key.startswith("data/unit1") else data)
    spec = replace(loop_spec(hybrid_run, tmp_path, workers=2), dataset_urls=(copy.url,))
    name, message = run_ranks(spec)["error"]
    assert name == "IntegrityError"
    assert "unit1" in message
