"""Low-rank adapters: they begin as nothing, are all that is trained, and merge into what they computed."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from storage.errors import InputError
from tests.trainer.tiny import QWEN2, TinyRun
from trainer.config import LoraConfig, StudentConfig
from trainer.lora import is_adapter, merged
from trainer.student import build_student, prepare_student

IDS = torch.arange(24).reshape(2, 12)


def student(run: TinyRun, seed: int = 0, **lora: Any) -> tuple[Any, StudentConfig]:
    config = StudentConfig(config=QWEN2, seed=seed, lora=LoraConfig(rank=4, alpha=6.0, **lora))
    return build_student(config, None, run.identity), config


def test_adapters_change_nothing_at_first_and_are_all_that_is_trained(hybrid_run: TinyRun) -> None:
    model, config = student(hybrid_run)
    names = [name for name, _ in model.named_parameters()]
    before = model(IDS).logits
    prepare_student(model, config)
    torch.testing.assert_close(model(IDS).logits, before)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if is_adapter(name)}
    # A and B in each of the seven linear layers of both blocks; the head, tied to the embedding, has none.
    assert len(trained) == 2 * 7 * 2
    assert not any("lm_head" in name or "embed" in name for name in trained)
    plain = {name.replace(".base_layer.", ".") for name, _ in model.named_parameters() if not is_adapter(name)}
    assert plain == set(names)
    again, _ = student(hybrid_run)
    prepare_student(again, config)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_merged_weights_compute_what_the_adapters_did(hybrid_run: TinyRun) -> None:
    model, config = student(hybrid_run)
    prepare_student(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.normal_(std=0.2)
    plain, _ = student(hybrid_run, seed=1)
    assert not torch.allclose(plain(IDS).logits, model(IDS).logits, atol=1e-2)
    plain.load_state_dict(merged(model.state_dict(), config.lora))
    torch.testing.assert_close(plain(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_targets_and_frozen_patterns_narrow_what_is_trained(hybrid_run: TinyRun) -> None:
    model, config = student(hybrid_run, targets=["q_proj"])
    prepare_student(model, config.model_copy(update={"frozen": ["model.layers.0.*"]}))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == [f"model.layers.1.self_attn.q_proj.lora_{part}.default.weight" for part in "AB"]


def test_what_cannot_be_adapted_is_told(hybrid_run: TinyRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, config = student(hybrid_run, targets=["query"])
    with pytest.raises(InputError, match=r"student.lora.targets query fits no linear layer of the student"):
        prepare_student(model, config)
    with pytest.raises(InputError, match="leaves nothing to train"):
        prepare_student(student(hybrid_run)[0], student(hybrid_run)[1].model_copy(update={"frozen": ["*"]}))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"needs the package peft; install it with `pip install 'lectern\[lora\]'`"):
        prepare_student(*student(hybrid_run))
