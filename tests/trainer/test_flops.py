"""Operations of a step, against a count by torch itself."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.trainer.tiny import QWEN2, TinyRun, train_config
from trainer.config import StudentConfig
from trainer.engine import Place
from trainer.flops import ModelFlops, peak_flops
from trainer.student import build_student


@pytest.mark.parametrize("tied", [True, False])
def test_the_count_is_that_of_the_matrix_products(hybrid_run: TinyRun, tied: bool) -> None:
    config = {**QWEN2, "hidden_size": 64, "num_key_value_heads": 4, "tie_word_embeddings": tied}
    model = build_student(StudentConfig(config={**config, "attn_implementation": "eager"}), None, hybrid_run.identity)
    model.set_attn_implementation("eager")
    ids = torch.arange(96).reshape(2, 48)
    with FlopCounterMode(display=False) as counter:
        model(ids).logits.sum().backward()
    ours = ModelFlops.of(model).step(num_tokens=96, num_supervised=96, num_samples=2)
    # The first layer's input needs no gradient of its own matrices' inputs but that of the embedding: within a little.
    assert counter.get_total_flops() == pytest.approx(ours, rel=0.03)


def test_of_a_mixture_only_the_visited_experts_count(hybrid_run: TinyRun) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    config = {"model_type": "qwen3_moe", **sizes, **heads, "num_experts": 8}

    def body(visited: int) -> float:
        student = StudentConfig(config={**config, "num_experts_per_tok": visited})
        return ModelFlops.of(build_student(student, None, hybrid_run.identity)).body

    experts = 2 * 8 * 3 * 32 * 16
    assert body(8) - body(2) == pytest.approx(6 * experts * 6 / 8)


def test_the_peak_is_given_or_unknown_on_a_cpu() -> None:
    place = Place(0, 2, 0, 2, "cpu")
    assert peak_flops(train_config(), place) is None
    assert peak_flops(train_config(peak_flops=1e12), place) == 2e12
