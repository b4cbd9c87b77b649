"""Loading a teacher: damaged, incomplete or foreign weights are refused, and so is sharding that shards nothing."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from storage.errors import InputError
from tests.workers.tiny import TINY, tiny_model
from workers.config import TeacherConfig
from workers.local import sharding
from workers.local.sharding import ShardReport, check_split, load_model, shard_model

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("qwen2").save_pretrained(tmp_path)
    return tmp_path


def teacher(folder: Path) -> TeacherConfig:
    return TeacherConfig(name=str(folder), dtype="float32", sharding="none")


def test_a_sound_folder_loads_for_scoring(folder: Path) -> None:
    model = load_model(folder, teacher(folder), CPU)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    _, report = shard_model(model, teacher(folder), 0)
    assert report.parameters_held == report.parameters_total > 0 and not report.replicated


@pytest.mark.parametrize("model_type", sorted(TINY))
def test_no_sound_class_is_taken_for_incomplete(tmp_path: Path, model_type: str) -> None:
    tiny_model(model_type).save_pretrained(tmp_path)
    load_model(tmp_path, teacher(tmp_path), CPU)


def test_a_head_tied_to_the_embeddings_is_not_missing(tmp_path: Path) -> None:
    config = AutoConfig.for_model("qwen2", vocab_size=72, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    config.tie_word_embeddings, config.num_key_value_heads, config.intermediate_size = True, 2, 64
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    load_model(tmp_path, teacher(tmp_path), CPU)


@pytest.mark.parametrize("kept", [0, 7, 2000])
def test_a_truncated_file_is_refused(folder: Path, kept: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(InputError, match="cannot be loaded as a causal language model"):
        load_model(folder, teacher(folder), CPU)


def test_weights_that_are_missing_are_not_made_up(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 of its weights.*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(folder, teacher(folder), CPU)


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 32}))
    with pytest.raises(InputError, match=r"another shape|cannot be loaded"):
        load_model(folder, teacher(folder), CPU)


def test_a_class_that_is_not_split_is_refused() -> None:
    config = TeacherConfig(sharding="tensor_parallel", ranks=4)
    check_split(ShardReport(0, 40, 100, []), config, "Qwen2ForCausalLM")
    with pytest.raises(InputError, match=r"does not split OddModel: each of 4 ranks holds 97%.*model\.odd.*zero3"):
        check_split(ShardReport(0, 97, 100, ["model.odd"]), config, "OddModel")


@pytest.mark.parametrize("lacking", [["bitsandbytes"], ["accelerate", "bitsandbytes"]])
def test_rounding_without_its_packages_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, lacking: list[str]
) -> None:
    monkeypatch.setattr(sharding, "find_spec", lambda name: None if name in lacking else object())
    with pytest.raises(InputError, match=rf"quantize int8 needs {' and '.join(lacking)}.*pip install"):
        load_model(folder, teacher(folder).model_copy(update={"quantize": "int8"}), CPU)


def test_weights_on_disk_need_an_accelerator(folder: Path) -> None:
    fields = {"name": str(folder), "dtype": "float32", "sharding": "zero3", "offload": {"to": "nvme", "folder": "/x"}}
    config = TeacherConfig.model_validate(fields)
    with pytest.raises(InputError, match=r"needs an accelerator and DeepSpeed's async_io.*use `to: cpu`"):
        shard_model(load_model(folder, config, CPU), config, 0)
