"""The states kept as `final` and the kept head, against the teacher's own softmax."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from storage.errors import InputError
from storage.heads import full_logprobs, load_head, save_head
from storage.hidden import states_tensor
from storage.object_store import Store
from tests.workers.test_scoring import SAMPLES, settings, targets
from tests.workers.tiny import PADDED_SIZE, VOCAB_SIZE, tiny_model
from workers.local.batching import model_inputs, predicting_rows
from workers.local.head import output_head

FINGERPRINT = "ab" * 16


def own_logits(model: nn.Module) -> torch.Tensor:
    """Return the logits of the model itself at every supervised position, [P, VOCAB_SIZE]."""
    inputs = model_inputs(SAMPLES)
    with torch.no_grad():
        logits = model(inputs.input_ids, inputs.attention_mask, inputs.position_ids, use_cache=False).logits
    return logits.flatten(0, 1)[torch.from_numpy(predicting_rows(SAMPLES)[0]), :VOCAB_SIZE].float()


def stored_logprobs(model: nn.Module, dtype: str, temperature: float, folder: Path) -> torch.Tensor:
    """Return what states and head give after a way through the store."""
    store = Store(folder)
    save_head(store, output_head(model, VOCAB_SIZE), FINGERPRINT)
    states = targets(model, replace(settings(hidden=("final",)), hidden_dtype=dtype)).hidden["final"]
    return torch.cat(list(full_logprobs(states_tensor(states), load_head(store, FINGERPRINT), temperature, 2000)))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("model_type", ["qwen2", "deepseek_v3"])
def test_float32_states_give_the_teachers_softmax_back(model_type: str, temperature: float, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    expected = torch.log_softmax(own_logits(model) / temperature, -1)
    torch.testing.assert_close(stored_logprobs(model, "float32", temperature, tmp_path), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_bfloat16_states_of_a_bfloat16_teacher_are_right_within_rounding(temperature: float, tmp_path: Path) -> None:
    model = tiny_model("qwen2").to(torch.bfloat16)
    logits = own_logits(model)
    found = stored_logprobs(model, "bfloat16", temperature, tmp_path)
    # One rounding of a logit (8 bits), and the shift it makes in the normaliser.
    bound = 2 * logits.abs().max() * 2**-8 / temperature
    assert (found - torch.log_softmax(logits / temperature, -1)).abs().max() <= bound


@pytest.mark.parametrize("family,field", [("gemma2", "final_logit_softcapping"), ("granite", "logits_scaling")])
def test_soft_capped_and_scaled_logits_come_back(family: str, field: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        family,
        vocab_size=PADDED_SIZE,
        head_dim=8,
        num_key_value_heads=2,
        initializer_range=0.2,
        **sizes,
        **{field: 3.0},
    )
    config.pad_token_id = 0
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    head = output_head(model, VOCAB_SIZE)
    assert (head.softcap, head.scale) == ((3.0, 1.0) if family == "gemma2" else (None, pytest.approx(1 / 3)))
    with torch.no_grad():
        output = model(torch.arange(9)[None], output_hidden_states=True)
    [found] = full_logprobs(output.hidden_states[-1][0], head, 0.5)
    expected = torch.log_softmax(output.logits[0, :, :VOCAB_SIZE].float() / 0.5, -1)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_logits_that_are_not_those_of_the_head_are_refused() -> None:
    model = tiny_model("qwen2")
    model.config.logits_scaling = 4.0  # Qwen2 scales nothing
    with pytest.raises(InputError, match="are not its output head applied"):
        output_head(model, VOCAB_SIZE)
