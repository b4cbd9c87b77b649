"""Classifiers as students: losses against float64, batches against single texts, scores against plain recomputation."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from storage.errors import IdentityError, InputError
from storage.identity import CaptureIdentity, DatasetIdentity, TeacherIdentity, TokenizerIdentity
from storage.parts import Part
from storage.reader import Dataset
from storage.samples import NO_LABEL, Sample, SampleBatch
from storage.union import DatasetUnion
from storage.writer import DatasetWriter
from tests.trainer.tiny import targets_from_logits
from trainer.config import LoraConfig, StudentConfig
from trainer.evaluation import evaluate_model, evaluate_teacher
from trainer.feed import batch_of, microbatch
from trainer.flops import ModelFlops
from trainer.loss_config import LossConfig
from trainer.losses import FullTeacher, HeadTerms, chosen_divergence, class_loss
from trainer.model import DistilModel, predictor_logits
from trainer.served import require_served
from trainer.student import build_student, prepare_student

CLASSES, VOCABULARY = 4, 90
BODY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
BODY |= {"max_position_embeddings": 64, "initializer_range": 0.4}
TASKS = ("sequence_classification", "token_classification")


def identity_of(task: str, kind: str = "dense") -> DatasetIdentity:
    capture = {"kind": kind, "task": task, "classes": CLASSES, "top_k": 2 if kind == "topk" else None}
    return DatasetIdentity(
        teacher=TeacherIdentity(name="made-up", architecture="Made", weights="0" * 64, parameters=1),
        tokenizer=TokenizerIdentity(digest="0" * 64, vocab_size=VOCABULARY),
        precision="float32",
        capture=CaptureIdentity.model_validate(capture),
    )


def texts(task: str, count: int = 6) -> SampleBatch:
    chance, samples = np.random.default_rng(3), []
    for n in range(count):
        tokens = chance.integers(1, VOCABULARY, 5 + 2 * n).astype(np.int32)
        place = np.arange(len(tokens))
        supervised = place == len(tokens) - 1 if task == "sequence_classification" else place > 0
        samples.append(Sample("general", tokens, supervised, np.zeros(len(tokens), dtype=np.int16)))
    return SampleBatch.of(samples)


def part_of(task: str, kind: str = "dense", label: Sequence[Any] = ()) -> Part:
    samples, identity = texts(task), identity_of(task, kind)
    logits = np.random.default_rng(4).normal(0, 2, (int(samples.supervised.sum()), CLASSES))
    targets = targets_from_logits(samples, logits, kind, top_k=2, draws=0)
    return Part(identity.capture, np.arange(len(samples)), samples, targets, label)


def student(task: str, model_type: str = "bert", **more: Any) -> Any:
    return build_student(StudentConfig(config={"model_type": model_type, **BODY, **more}), None, identity_of(task))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_loss_and_its_gradient_are_those_of_float64(temperature: float) -> None:
    batch = batch_of([part_of("token_classification", label=[np.arange(n) % 5 % 4 for n in range(4, 16, 2)])])
    label = batch.targets.label.clone()
    label[::3] = NO_LABEL
    targets, loss = replace(batch.targets, label=label), LossConfig(temperature=temperature)
    terms = HeadTerms(0.3, [(0.7, chosen_divergence(loss))], temperature)
    logits = torch.randn(len(label), CLASSES, requires_grad=True)
    total, each = class_loss(logits, targets, terms, FullTeacher(dense=targets))
    total.backward()
    plain = logits.detach().double().requires_grad_()
    t = (targets.logprob.double().view(-1, CLASSES) / temperature).softmax(-1)
    t = t.gather(1, targets.id.view(-1, CLASSES).argsort(1))
    kl = (t * (t.log() - (plain / temperature).log_softmax(-1))).sum() * temperature**2
    ce = -torch.stack([plain[p].log_softmax(-1)[y] for p, y in enumerate(label.tolist()) if y != NO_LABEL]).sum()
    (0.3 * ce + 0.7 * kl).backward()
    torch.testing.assert_close(each.double(), torch.stack([ce, kl]).detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.grad.double(), plain.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("model_type", ["bert", "qwen2"])
def test_a_batch_gives_what_each_text_gives_by_itself(task: str, model_type: str) -> None:
    model, part = student(task, model_type, num_key_value_heads=2).eval(), part_of(task)
    before = model.config.pad_token_id
    with torch.no_grad():
        together = predictor_logits(model, batch_of([part]))
        alone = torch.cat([predictor_logits(model, batch_of([part.between(n, n + 1)])) for n in range(6)])
        plain = []
        for n in range(6):
            one = part.samples.sample(n)
            logits = model(input_ids=torch.from_numpy(one.tokens.astype(np.int64))[None]).logits
            plain.append(logits if task == TASKS[0] else logits[0][torch.from_numpy(one.supervised)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together, torch.cat(plain), rtol=1e-4, atol=1e-4)
    assert model.config.pad_token_id == before


def test_labels_are_those_of_the_data_or_the_teachers_first_choice() -> None:
    given = [np.array([1]), None, np.array([NO_LABEL]), np.array([3]), None, np.array([0])]
    part = part_of("sequence_classification", "topk", given)
    first = part.targets.id[part.targets.entry_offsets[:-1]]
    expected = [1, first[1], NO_LABEL, 3, first[4], 0]
    assert batch_of([part]).targets.label.tolist() == expected
    assert microbatch([part], range(1, 4)).targets.label.tolist() == expected[1:4]
    two = [part.between(0, 2), part.between(2, 6)]
    assert batch_of(two).targets.label.tolist() == expected
    assert batch_of(two).targets.entry_offsets.tolist() == list(range(0, 13, 2))


def test_training_goes_through_the_whole_module() -> None:
    part = part_of("sequence_classification", label=[np.array([n % CLASSES]) for n in range(6)])
    torch.manual_seed(0)
    module = DistilModel(student("sequence_classification"), LossConfig(temperature=2.0), "model", None)
    optimizer, first = torch.optim.Adam(module.parameters(), lr=1e-2), None
    for _ in range(12):
        optimizer.zero_grad()
        total, terms = module(batch_of([part]))
        total.backward()
        optimizer.step()
        first = terms if first is None else first
    assert terms[1] < 0.6 * first[1]
    assert ModelFlops.of(module.model).head == 0


def test_a_student_comes_from_a_body_without_a_head_but_not_from_another_number_of_classes(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = AutoConfig.for_model("bert", vocab_size=VOCABULARY, **BODY)
    body = AutoModel.from_config(config)
    body.save_pretrained(tmp_path / "body")
    made = [
        build_student(StudentConfig(path="x", seed=s), str(tmp_path / "body"), identity_of(TASKS[0])) for s in (0, 0, 1)
    ]
    assert torch.equal(made[0].bert.embeddings.word_embeddings.weight, body.embeddings.word_embeddings.weight)
    assert made[0].classifier.weight.shape == (CLASSES, 16)
    assert torch.equal(made[0].classifier.weight, made[1].classifier.weight)
    assert not torch.equal(made[0].classifier.weight, made[2].classifier.weight)
    config.num_labels = 7
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "seven")
    with pytest.raises(InputError, match=r"does not make a classifier of texts for the teacher's 4 classes"):
        build_student(StudentConfig(path="x"), str(tmp_path / "seven"), identity_of(TASKS[0]))


def test_adapters_leave_the_body_and_train_the_head() -> None:
    pytest.importorskip("peft")
    model = student("sequence_classification")
    prepare_student(model, StudentConfig(config={"model_type": "bert"}, lora=LoraConfig(rank=2)))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {"classifier.weight", "classifier.bias"} <= trained
    assert all(".lora_" in name for name in trained if not name.startswith("classifier"))


@pytest.mark.parametrize("kind", ["dense", "topk"])
def test_scores_are_those_of_a_plain_recomputation(tmp_path: Path, kind: str) -> None:
    task = "token_classification"
    identity, samples = identity_of(task, kind), texts(task)
    logits = np.random.default_rng(4).normal(0, 2, (int(samples.supervised.sum()), CLASSES))
    targets = targets_from_logits(samples, logits, kind, top_k=2, draws=0)
    DatasetWriter.create(str(tmp_path / "d"), identity).commit("u", samples, targets, "a")
    union = DatasetUnion([Dataset.open(str(tmp_path / "d"), identity)])
    labels = [np.arange(n) % CLASSES for n in samples.num_supervised()[:-1]]
    labels[1][:] = NO_LABEL
    union.labels = dict(zip(samples.ids(), labels, strict=False))
    model = student(task)
    model.save_pretrained(tmp_path / "m")
    ids = {"general": samples.ids()}
    scores, of_teacher = evaluate_model(tmp_path / "m", union, ids), evaluate_teacher(union, ids)
    with torch.no_grad():
        logprob = predictor_logits(model.eval(), batch_of([Part(identity.capture, np.arange(6), samples, targets)]))
    logprob = logprob.double().log_softmax(-1).numpy()
    teacher = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    given = np.concatenate([*labels, np.full(int(samples.num_supervised()[-1]), NO_LABEL)])
    label = given.copy()
    label[-int(samples.num_supervised()[-1]) :] = teacher.argmax(1)[-int(samples.num_supervised()[-1]) :]
    known, row = label != NO_LABEL, np.arange(len(label))
    assert scores["loss"]["general"] == pytest.approx(-logprob[row[known], label[known]].mean(), rel=1e-4)
    hits = logprob.argmax(1)[given >= 0] == given[given >= 0]
    assert scores["accuracy"] == pytest.approx(hits.mean())
    assert scores["top1_agreement"] == pytest.approx((logprob.argmax(1) == teacher.argmax(1)).mean())
    assert of_teacher["accuracy"] == pytest.approx((teacher.argmax(1)[given >= 0] == given[given >= 0]).mean())
    if kind == "dense":
        kl = (np.exp(teacher) * (teacher - logprob)).sum(1).mean()
        assert scores["kl_to_teacher"] == pytest.approx(kl, rel=1e-2)
        assert of_teacher["loss"]["general"] == pytest.approx(-teacher[row[known], label[known]].mean(), rel=1e-2)
    union.labels = {}
    assert evaluate_model(tmp_path / "m", union, ids)["accuracy"] is None


def test_classes_and_next_tokens_do_not_mix(tmp_path: Path) -> None:
    pair = []
    for name, identity in (("a", identity_of(TASKS[0])), ("b", identity_of(TASKS[1]))):
        DatasetWriter.create(str(tmp_path / name), identity)
        pair.append(Dataset.open(str(tmp_path / name), identity))
    with pytest.raises(IdentityError, match=r"holds 4 classes \(token_classification\).* leave it out of cache\.also"):
        DatasetUnion(pair)


@pytest.mark.parametrize(
    ("loss", "kind", "text"),
    [
        (
            {"hidden": 1.0, "hidden_map": {"final": "final"}},
            "dense",
            "train.loss.hidden needs what a dataset of classes",
        ),
        ({"exact": True}, "dense", "train.loss.exact needs what a dataset of classes"),
        ({"temperature": 2.0}, "topk", "leave it at 1, or capture with cache.kind: dense"),
    ],
)
def test_terms_that_classes_cannot_serve_are_refused(loss: dict[str, Any], kind: str, text: str) -> None:
    with pytest.raises(InputError, match=text.replace(".", r"\.")):
        require_served(LossConfig.model_validate(loss), identity_of(TASKS[0], kind).capture)
