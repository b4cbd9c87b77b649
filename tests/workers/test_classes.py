"""Classifiers as teachers: encoders and decoders, whole texts and single tokens, against plain transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_tokenizers import write_tokenizer
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification

from storage.classes import ClassifierInputs, class_rows
from storage.config import CacheConfig
from storage.contract import check_contract
from storage.errors import InputError, IntegrityError
from storage.identity import Task
from storage.reader import Dataset
from storage.samples import Sample, SampleBatch
from storage.tokenizer import Tokenizer
from storage.verify import verify_dataset
from storage.writer import DatasetWriter
from tests.workers.tiny import TINY
from workers.config import TeacherConfig
from workers.local.rank import CaptureJob, scoring_settings
from workers.local.scoring import merge_parts, score_part
from workers.local.sharding import load_model
from workers.model_folder import check_teacher, model_facts, teacher_identity

CPU = torch.device("cpu")
CLASSES = 5
BUILDERS = {
    "sequence_classification": AutoModelForSequenceClassification,
    "token_classification": AutoModelForTokenClassification,
}


def texts(task: Task, count: int = 9) -> SampleBatch:
    """Samples of one document each, of several lengths."""
    chance, samples = np.random.default_rng(0), []
    for n in range(count):
        tokens = chance.integers(1, 200, 4 + 3 * n).astype(np.int32)
        supervised = np.arange(len(tokens)) == len(tokens) - 1 if task.startswith("seq") else np.arange(len(tokens)) > 0
        samples.append(Sample("general", tokens, supervised, np.zeros(len(tokens), dtype=np.int16)))
    return SampleBatch.of(samples)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer.load(write_tokenizer(tmp_path / "tokenizer"))


def classifier(folder: Path, model_type: str, task: Task, **more: Any) -> Path:
    """Save a random classifier and return its folder."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=264,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        num_labels=CLASSES,
        initializer_range=0.3,
        **TINY.get(model_type, {}),
        **more,
    )
    BUILDERS[task].from_config(config).save_pretrained(folder / "model")
    return folder / "model"


@pytest.mark.parametrize("num_ranks,sharding", [(1, "none"), (2, "tensor_parallel"), (2, "zero3")])
@pytest.mark.parametrize("kind", ["dense", "topk"])
@pytest.mark.parametrize(
    ("model_type", "task"),
    [
        ("bert", "sequence_classification"),
        ("bert", "token_classification"),
        ("qwen2", "sequence_classification"),
        ("qwen2", "token_classification"),
    ],
)
def test_classes_are_those_of_plain_transformers(
    tmp_path: Path, tokenizer: Tokenizer, model_type: str, task: Task, kind: Any, num_ranks: int, sharding: Any
) -> None:
    folder = classifier(tmp_path, model_type, task)
    teacher = TeacherConfig(name="c", task=task, dtype="float32", sharding=sharding, ranks=num_ranks, batch_tokens=60)
    cache = CacheConfig(url=str(tmp_path / "dataset"), kind=kind, top_k=2)
    identity = teacher_identity(folder, teacher, cache, tokenizer, uses_chat_template=False)
    assert (identity.num_targets, identity.capture.task) == (CLASSES, task)
    settings = scoring_settings(CaptureJob(teacher, folder, "", cache.url, identity))
    model, samples = load_model(folder, teacher, CPU), texts(task)
    parts = [score_part(model, samples, settings, rank, num_ranks, CPU) for rank in range(num_ranks)]
    targets = merge_parts(samples, parts, settings)
    check_contract(samples, targets, identity)
    rows = []
    for n in range(len(samples)):
        sample = samples.sample(n)
        with torch.no_grad():
            model.config.pad_token_id = 263
            logits = model(input_ids=torch.from_numpy(sample.tokens.astype(np.int64))[None]).logits
        rows.append(logits if task.startswith("seq") else logits[0][torch.from_numpy(sample.supervised)])
    expected = torch.log_softmax(torch.cat(rows).double(), -1).numpy()
    position = np.repeat(np.arange(targets.num_positions), targets.count)
    assert len(expected) == targets.num_positions
    np.testing.assert_allclose(targets.logprob.astype(np.float64), expected[position, targets.id], atol=2e-3, rtol=1e-3)
    assert set(targets.count.tolist()) == {CLASSES if kind == "dense" else 2}
    wanted = np.tile(np.arange(CLASSES), (len(expected), 1)) if kind == "dense" else (-expected).argsort(-1)[:, :2]
    np.testing.assert_array_equal(targets.id.reshape(wanted.shape), wanted)
    best = np.split(-expected.max(-1), np.cumsum(samples.num_supervised())[:-1])
    np.testing.assert_allclose(targets.teacher_nll, [part.mean() for part in best], atol=1e-4)


def test_a_dataset_of_classes_is_read_back_and_verified(tmp_path: Path, tokenizer: Tokenizer) -> None:
    task: Task = "sequence_classification"
    folder = classifier(tmp_path, "bert", task)
    teacher = TeacherConfig(name="c", task=task, dtype="float32", sharding="none")
    cache = CacheConfig(url=str(tmp_path / "dataset"), kind="dense")
    identity = teacher_identity(folder, teacher, cache, tokenizer, uses_chat_template=False)
    settings = scoring_settings(CaptureJob(teacher, folder, "", cache.url, identity))
    samples = texts(task)
    part = score_part(load_model(folder, teacher, CPU), samples, settings, 0, 1, CPU)
    written = merge_parts(samples, [part], settings)
    DatasetWriter.create(cache.url, identity).commit("u", samples, written, "a")
    assert verify_dataset(cache.url).ok
    dataset = Dataset.open(cache.url, identity)
    assert dataset.identity.capture.classes == CLASSES
    _, read = dataset.read(samples.ids())
    np.testing.assert_array_equal(read.id, written.id)
    np.testing.assert_array_equal(read.logprob, written.logprob)
    next_token = teacher_identity(
        folder, teacher.model_copy(update={"task": "next_token"}), cache, tokenizer, uses_chat_template=False
    )
    assert next_token.fingerprint != identity.fingerprint
    assert "task" not in next_token.model_dump(mode="json")["capture"], "an old fingerprint would change"
    wrong = written.id.copy()
    wrong[0] = CLASSES
    with pytest.raises(IntegrityError, match=f"outside the {CLASSES} classes"):
        check_contract(samples, type(written)(**{**vars(written), "id": wrong}), identity)


def test_padding_is_a_token_that_occurs_nowhere() -> None:
    samples = texts("token_classification", 2)
    tokens = samples.tokens.copy()
    tokens[:3] = [0, 1, 2]
    inputs = ClassifierInputs.of(SampleBatch(**{**vars(samples), "tokens": tokens}), CPU)
    assert inputs.pad_id not in tokens
    assert inputs.attention_mask.sum().item() == len(tokens)
    assert (inputs.input_ids[inputs.attention_mask == 0] == inputs.pad_id).all()
    assert class_rows(samples, "sequence_classification").tolist() == [0] * 3 + [1] * 6
    packed = samples.document.copy()
    packed[2:4] = 1
    with pytest.raises(IntegrityError, match=r"data\.pack false"):
        ClassifierInputs.of(SampleBatch(**{**vars(samples), "document": packed}), CPU)


@pytest.mark.parametrize("more", [{"problem_type": "multi_label_classification"}, {"num_labels": 1}])
def test_scores_that_are_no_classes_are_refused(tmp_path: Path, tokenizer: Tokenizer, more: dict[str, Any]) -> None:
    folder = classifier(tmp_path, "bert", "sequence_classification")
    path = folder / "config.json"
    fields = json.loads(path.read_text()) | more
    if "num_labels" in more:
        fields.pop("id2label")
    path.write_text(json.dumps(fields))
    teacher = TeacherConfig(name="c", task="sequence_classification", sharding="none")
    with pytest.raises(InputError, match="no distribution over classes"):
        check_teacher(model_facts(folder), teacher, tokenizer, 16)


def test_a_model_without_a_classifiers_head_is_refused(tmp_path: Path) -> None:
    folder = classifier(tmp_path, "qwen2", "token_classification")
    with pytest.raises(InputError, match=r"lacks .* of its weights"):
        load_model(folder, TeacherConfig(name="c", task="next_token", dtype="float32", sharding="none"), CPU)
