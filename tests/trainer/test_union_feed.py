"""A training fed from several datasets: the same loss as from each by itself, whatever kinds share a micro-batch."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from storage.errors import InputError
from storage.identity import TeacherIdentity
from storage.samples import SampleBatch
from storage.union import DatasetUnion
from storage.writer import DatasetWriter
from tests.trainer.tiny import QWEN2, TinyRun, made_up_targets, make_run, train_config
from trainer.batches import join_batches, make_batch
from trainer.curriculum import planned_order
from trainer.curriculum_config import CurriculumConfig
from trainer.feed import step_loader
from trainer.losses import ForwardKL, HeadTerms, head_loss
from trainer.model import predictor_states
from trainer.runner import train_student
from trainer.spec import Training

TERMS = HeadTerms(cross_entropy=0.1, divergences=[(0.9, ForwardKL())])


@pytest.fixture(scope="module")
def union_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyRun, list[str]]:
    """Return a run whose general samples lie in one dataset and the others, of another teacher and kind, in two."""
    run = make_run(tmp_path_factory.mktemp("run"), "hybrid")
    folder = tmp_path_factory.mktemp("datasets")
    whole = run.dataset
    samples, targets = whole.read(whole.catalog.sample_ids)
    domain = np.asarray([source == "domain" for source in samples.source])
    rows = {"own": np.flatnonzero(~domain), "topk": np.flatnonzero(domain)[::2], "sampled": np.flatnonzero(domain)}
    urls = []
    for name, picked in rows.items():
        own = samples.take(picked.tolist())
        if name == "own":
            identity, kept = run.identity, targets.take(picked.tolist())
        else:
            kept = made_up_targets(own, name, run.identity.tokenizer.vocab_size)
            teacher = TeacherIdentity(name=name, architecture="Made", weights=f"{len(name)}" * 64, parameters=1)
            capture = run.identity.capture.model_copy(
                update={"kind": name, "draws": None, "seed": None} if name == "topk" else {"kind": name, "top_k": None}
            )
            identity = run.identity.model_copy(update={"teacher": teacher, "capture": capture})
        url = str(folder / name)
        DatasetWriter.create(url, identity).commit("u", own, kept, attempt=1)
        urls.append(url)
    return replace(run, dataset_url=urls[0]), urls


def loss_of(model: torch.nn.Module, batches: list) -> torch.Tensor:
    head = model.get_output_embeddings()
    return sum(
        head_loss(predictor_states(model, batch), head.weight, head.bias, batch.targets, TERMS)[0] for batch in batches
    )


def student(vocab_size: int) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**QWEN2, vocab_size=vocab_size))


def test_steps_of_several_datasets_have_the_loss_and_gradient_of_their_samples(
    union_run: tuple[TinyRun, list[str]],
) -> None:
    run, urls = union_run
    train = train_config()
    shares = CurriculumConfig(start={"general": 0.5, "domain": 0.5})
    order = planned_order(run.samples, shares, train)
    union = DatasetUnion.open(urls, run.identity)
    model = student(run.identity.tokenizer.vocab_size)
    load = step_loader(union, order, train, rank=0, world_size=1)
    kinds = set()
    for step in range(2):
        data = load(step)
        assert np.array_equal(data.sample_id, order.step(step))
        assert [len(batch.ids) for batch in data.batches] == [4, 4]
        for n, batch in enumerate(data.batches):
            assert sorted(batch.ids) == sorted(bytes(row) for row in order.step(step)[n * 4 : n * 4 + 4])
            kinds.add(batch.targets.kind)
        model.zero_grad()
        loss_of(model, data.batches).backward()
        found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        alone = [make_batch(part.samples, part.targets, part.capture.kind) for part in union.parts(order.step(step))]
        loss_of(model, alone).backward()
        expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        assert torch.linalg.norm(found - expected) <= 1e-4 * torch.linalg.norm(expected)
    assert "mixed" in kinds


def test_joined_batches_give_each_sample_what_it_gives_alone() -> None:
    from tests.workers.tiny import VOCAB_SIZE, window

    model = student(VOCAB_SIZE)
    groups = [[[20, 15], [7]], [[40]], [[5, 9, 3]]]
    batches = []
    for n, group in enumerate(groups):
        samples = SampleBatch.of([window(documents, 10 * n + m) for m, documents in enumerate(group)])
        kind = ("topk", "text", "hybrid")[n]
        batches.append(make_batch(samples, made_up_targets(samples, kind, VOCAB_SIZE), kind))
    joined = join_batches(batches)
    assert joined.targets.kind == "mixed"
    with torch.no_grad():
        together = predictor_states(model, joined)
        apart = torch.cat([predictor_states(model, batch) for batch in batches])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(loss_of(model, [joined]), loss_of(model, batches), rtol=1e-5, atol=1e-4)


def test_hidden_states_of_another_teacher_are_refused(union_run: tuple[TinyRun, list[str]], tmp_path: Path) -> None:
    run, urls = union_run
    arguments = run.arguments(tmp_path, loss={"hidden": 0.1, "hidden_map": {"final": "model.norm"}})
    with pytest.raises(InputError, match=r"holds (another teacher's|no) hidden states"):
        train_student(Training(**arguments, also=urls[1:]), lambda _event: None)


def test_samples_in_none_of_the_datasets_are_refused(union_run: tuple[TinyRun, list[str]], tmp_path: Path) -> None:
    run, urls = union_run
    with pytest.raises(InputError, match=r"samples that the curriculum uses are not in .*own, .*topk; run the capture"):
        train_student(Training(**run.arguments(tmp_path), also=urls[1:2]), lambda _event: None)
