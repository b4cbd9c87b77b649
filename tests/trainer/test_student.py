"""Building students, their checks, and the module that turns batches into losses."""

from pathlib import Path

import pytest
import torch
from torch import nn

from storage.errors import InputError
from tests.storage.tiny_tokenizers import write_tokenizer
from tests.trainer.tiny import QWEN2, TinyRun
from trainer.anatomy import examine
from trainer.batches import Batch, make_batch
from trainer.config import StudentConfig
from trainer.feed import channel_variance
from trainer.loss_config import LossConfig
from trainer.losses.hidden import HiddenTransfer
from trainer.model import DistilModel
from trainer.student import build_student, freeze, resolve_student


def fresh(run: TinyRun, **fields: object) -> nn.Module:
    config = StudentConfig.model_validate({"config": {**QWEN2, **fields}})
    return build_student(config, None, run.identity)


def batch_of(run: TinyRun, rows: slice, layers: tuple[str, ...] = ()) -> Batch:
    samples, targets = run.dataset.read(run.dataset.catalog.sample_ids[rows])
    return make_batch(samples, targets, run.identity.capture.kind, layers)


def test_fresh_students_depend_on_their_seed_alone(hybrid_run: TinyRun) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = fresh(hybrid_run), fresh(hybrid_run)
    assert torch.equal(torch.get_rng_state(), before)
    other = build_student(StudentConfig(config=QWEN2, seed=1), None, hybrid_run.identity)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(next(first.parameters()), next(other.parameters()))
    assert first.config.vocab_size == hybrid_run.identity.tokenizer.vocab_size


def test_a_vocabulary_that_is_too_small_is_refused(hybrid_run: TinyRun) -> None:
    with pytest.raises(InputError, match=r"vocabulary has 100 entries, but its tokenizer needs \d+"):
        resolve_student(StudentConfig(config={**QWEN2, "vocab_size": 100}), hybrid_run.identity)
    assert resolve_student(StudentConfig(config=QWEN2), hybrid_run.identity) == (None, None)


def test_a_config_that_makes_no_model_is_refused(hybrid_run: TinyRun) -> None:
    with pytest.raises(InputError, match=r"student.config is not a transformers config"):
        resolve_student(StudentConfig(config={"model_type": "no-such-model"}), hybrid_run.identity)


def test_a_student_from_a_folder_needs_the_tokenizer_of_the_dataset(hybrid_run: TinyRun, tmp_path: Path) -> None:
    fresh(hybrid_run).save_pretrained(tmp_path)
    config = StudentConfig(path=str(tmp_path))
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        resolve_student(config, hybrid_run.identity)
    write_tokenizer(tmp_path)
    with pytest.raises(InputError, match="is not the one that the dataset is captured with"):
        resolve_student(config, hybrid_run.identity, LossConfig())
    (tmp_path / "tokenizer.json").write_bytes((hybrid_run.tokenizer_folder / "tokenizer.json").read_bytes())
    folder, own = resolve_student(config, hybrid_run.identity)
    assert own is not None and own.digest == hybrid_run.identity.tokenizer.digest
    loaded = build_student(config, folder, hybrid_run.identity)
    assert torch.equal(next(loaded.parameters()), next(fresh(hybrid_run).parameters()))


def test_a_folder_that_is_not_there_is_refused(hybrid_run: TinyRun) -> None:
    with pytest.raises(InputError, match=r"student.path \./nowhere is no folder"):
        resolve_student(StudentConfig(path="./nowhere"), hybrid_run.identity)


def test_examine_finds_widths_and_the_way_to_the_logits(hybrid_run: TinyRun) -> None:
    model = fresh(hybrid_run)
    assert examine(model, ["final", "model.layers.0"], 2).widths == {"final": 32, "model.layers.0": 32}
    assert examine(model, [], 2).head_path == "fused"
    assert examine(model, [], 3).head_path == "module"
    gemma = {"model_type": "gemma2", "final_logit_softcapping": 5.0, "head_dim": 8, "initializer_range": 1.0}
    assert examine(fresh(hybrid_run, **gemma), [], 2).head_path == "model"
    with pytest.raises(InputError, match=r"no layer 'model.layers.9'; .*model.layers.0"):
        examine(model, ["model.layers.9"], 2)


@pytest.mark.parametrize("loss", [LossConfig(kl=0.9, ce=0.1), LossConfig(kl=0.0, ce=1.0)])
def test_the_three_ways_to_the_logits_agree(hybrid_run: TinyRun, loss: LossConfig) -> None:
    batch = batch_of(hybrid_run, slice(0, 6))
    assert batch.attention is not None
    results = []
    for path in ("fused", "module", "model"):
        module = DistilModel(fresh(hybrid_run), loss, path, None)
        total, terms = module(batch)
        total.backward()
        results.append([total.detach()[None], terms, *(p.grad.flatten() for p in module.parameters())])
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert float(results[0][1][1]) == 0 if loss.kl == 0 else float(results[0][1][1]) > 0


def hidden_model(run: TinyRun, path: str = "fused") -> DistilModel:
    loss = LossConfig(kl=0.5, ce=0.2, hidden=0.3, hidden_map={"final": "final", "model.layers.1": "model.layers.0"})
    variance = channel_variance(run.dataset, run.dataset.catalog.sample_ids[:8], list(loss.hidden_map))
    torch.manual_seed(0)
    return DistilModel(fresh(run), loss, path, HiddenTransfer(dict.fromkeys(loss.hidden_map, (32, 24)), variance))


@pytest.mark.parametrize("path", ["fused", "model"])
def test_hidden_states_are_compared_in_units_of_the_teachers_variance(hidden_run: TinyRun, path: str) -> None:
    layers = ("final", "model.layers.1")
    batch = batch_of(hidden_run, slice(0, 6), layers)
    module = hidden_model(hidden_run, path)
    total, terms = module(batch)
    total.backward()
    hard, soft, states = terms.tolist()
    assert float(total) == pytest.approx(0.2 * hard + 0.5 * soft + 0.3 * states, rel=1e-5)
    # The teacher's states have variance 4 and the fresh student says next to nothing of them.
    assert states / batch.num_supervised == pytest.approx(1.0, abs=0.3)
    assert all(p.grad.abs().sum() > 0 for p in module.transfer.parameters())


def transfer(distance: str, norm: bool) -> tuple[HiddenTransfer, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    widths = {"final": (6, 4), "middle": (5, 3)}
    student = {name: torch.randn(7, width[0]) * 3 for name, width in widths.items()}
    teacher = {name: torch.randn(7, width[1]) for name, width in widths.items()}
    variance = {name: torch.rand(width[1]) + 0.5 for name, width in widths.items()}
    return HiddenTransfer(widths, variance, distance, norm), student, teacher  # type: ignore[arg-type]


@pytest.mark.parametrize("norm", [False, True])
def test_adapters_compare_by_squared_error_or_by_angle(norm: bool) -> None:
    def projected(module: HiddenTransfer, n: int, states: torch.Tensor) -> torch.Tensor:
        if norm:
            states = (states - states.mean(-1, keepdim=True)) / (
                states.var(-1, keepdim=True, correction=0) + 1e-5
            ).sqrt()
        return states @ module.projectors[n].weight.T

    for distance in ("mse", "cosine"):
        module, student, teacher = transfer(distance, norm)
        expected = 0.0
        for n, layer in enumerate(module.layers):
            mine, other = projected(module, n, student[layer]).double(), teacher[layer].double()
            if distance == "mse":
                expected += float(((mine - other) ** 2 / module._variance[layer]).mean(-1).sum())
            else:
                expected += float((1 - (mine * other).sum(-1) / (mine.norm(dim=-1) * other.norm(dim=-1))).sum())
        assert float(module(student, teacher)) == pytest.approx(expected / 2, rel=1e-5)
        scaled = float(module({name: 10 * states for name, states in student.items()}, teacher))
        same = scaled == pytest.approx(expected / 2, rel=1e-3)
        # A norm takes the student's scale away, and so does an angle.
        assert same == (norm or distance == "cosine")
        kept = torch.tensor([1, 4])
        part = module(student, {name: states[kept] for name, states in teacher.items()}, kept, 3.5)
        whole = [
            module({k: v[[i]] for k, v in student.items()}, {k: v[[i]] for k, v in teacher.items()}) for i in (1, 4)
        ]
        assert float(part) == pytest.approx(3.5 * float(sum(whole)), rel=1e-5)


def test_splitting_a_batch_changes_neither_loss_nor_gradient(hidden_run: TinyRun) -> None:
    layers = ("final", "model.layers.1")
    gradients = []
    for size in (6, 3, 2, 1):
        module = hidden_model(hidden_run)
        for first in range(0, 6, size):
            module(batch_of(hidden_run, slice(first, first + size), layers))[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
    for other in gradients[1:]:
        assert float((other - gradients[0]).norm() / gradients[0].norm()) < 1e-5


def test_frozen_parameters_get_no_gradient_and_patterns_must_fit(hybrid_run: TinyRun) -> None:
    model = fresh(hybrid_run, tie_word_embeddings=False)
    before = sum(p.numel() for n, p in model.named_parameters() if "layers.0" in n or "lm_head" in n)
    assert freeze(model, ["model.layers.0.*", "lm_head.weight"]) == before
    module = DistilModel(model, LossConfig(), "fused", None)
    total, _ = module(batch_of(hybrid_run, slice(0, 3)))
    total.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == ("layers.0" in name or "lm_head" in name), name
    with pytest.raises(InputError, match=r"student.frozen 'model.layer\.\*' matches no parameter .* model.embed"):
        freeze(model, ["model.layer.*"])
    with pytest.raises(InputError, match="leaves nothing to train"):
        freeze(model, ["*"])
