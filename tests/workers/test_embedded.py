"""The embedded teacher: its tokenizer, its training data, and building it once whatever happens."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.config import DataConfig, SourceConfig
from storage.embedded_text import embedded_documents
from storage.errors import StorageError
from storage.sample_set import SampleSet, prepare_samples
from storage.tokenizer import Tokenizer
from workers.config import EmbeddedTeacherConfig
from workers.embedded import END_OF_TEXT, ensure_teacher, ensure_tokenizer, find_teacher
from workers.embedded_training import MAX_PASSES, batch_rows, learning_rate_scale, shares

TINY = EmbeddedTeacherConfig(vocab_size=320, hidden_size=32, layers=2, window_tokens=64, train_tokens=60_000)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """Two small corpora, and a cache folder of this test's own."""
    monkeypatch.setenv("LECTERN_CACHE", str(tmp_path / "cache"))
    sources = []
    for name, count in (("general", 8), ("domain", 24)):
        documents = [text for _, text in zip(range(count), embedded_documents(name), strict=False)]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
        sources.append(SourceConfig(name=name, path=str(path)))
    return DataConfig(sources=sources, window_tokens=128, heldout_fraction=0.2)


@pytest.fixture
def samples(data: DataConfig, tmp_path: Path) -> SampleSet:
    """The corpora in the teacher's windows."""
    windows = data.model_copy(update={"window_tokens": TINY.window_tokens})
    return prepare_samples(windows, Tokenizer.load(ensure_tokenizer(TINY, data)), tmp_path / "samples")


def test_tokenizer_is_made_once_and_always_the_same(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ensure_tokenizer(TINY, data)
    stamp = (first / "tokenizer.json").stat().st_mtime_ns
    assert ensure_tokenizer(TINY, data) == first
    assert (first / "tokenizer.json").stat().st_mtime_ns == stamp
    monkeypatch.setenv("LECTERN_CACHE", str(tmp_path / "elsewhere"))
    other = ensure_tokenizer(TINY, data)
    assert other != first
    assert Tokenizer.load(other).digest == Tokenizer.load(first).digest


def test_tokenizer_follows_the_text(data: DataConfig) -> None:
    first = ensure_tokenizer(TINY, data)
    path = Path(str(data.sources[0].path))
    path.write_text(path.read_text() + json.dumps({"text": "another document about lecterns"}) + "\n")
    assert ensure_tokenizer(TINY, data) != first


def test_tokenizer_serves_text_chat_and_transformers(data: DataConfig) -> None:
    from transformers import AutoTokenizer

    folder = ensure_tokenizer(TINY, data)
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.vocab_size == TINY.vocab_size
    text = "Prose, code = 1\n\tund Übung 漢字"
    assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text
    assert tokenizer.token_text(tokenizer.eos_id or 0) == END_OF_TEXT
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    rendered = tokenizer.render_chat(chat, add_generation_prompt=True)
    assert rendered == "<|user|>Hi<|endoftext|><|assistant|>Ho<|endoftext|><|assistant|>"
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode_batch([text])[0].tolist()
    assert theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == rendered


def test_heldout_text_is_never_trained_on(samples: SampleSet) -> None:
    rows = np.concatenate(list(batch_rows(samples, TINY, 40)))
    assert set(rows.tolist()) <= set(samples.rows("train").tolist())
    assert len(samples.rows("heldout")) > 0


@given(
    sizes=st.lists(st.integers(1, 500), min_size=1, max_size=4),
    drawn=st.integers(1, 3000),
)
def test_sources_share_evenly_until_one_is_used_up(sizes: list[int], drawn: int) -> None:
    counts = shares([np.zeros(size, dtype=np.int64) for size in sizes], drawn)
    assert sum(counts) == drawn
    assert min(counts) >= 0
    if drawn <= MAX_PASSES * min(sizes) * len(sizes):
        assert max(counts) - min(counts) <= len(sizes)
    if drawn <= MAX_PASSES * sum(sizes):
        within = [count <= MAX_PASSES * size + len(sizes) for count, size in zip(counts, sizes, strict=True)]
        assert all(within)


def test_passes_repeat_a_small_source_evenly(samples: SampleSet) -> None:
    rows = np.concatenate(list(batch_rows(samples, TINY, 30)))
    for name in samples.source_names:
        used = np.bincount(rows, minlength=samples.num_samples)[samples.rows("train", name)]
        assert used.max() - used.min() <= 1


def test_learning_rate_warms_up_and_decays() -> None:
    scales = [learning_rate_scale(step, 400) for step in range(400)]
    assert scales[0] < 0.06
    assert max(scales) > 0.95
    assert scales[-1] < 0.06
    assert np.argmax(scales) < 30


@pytest.mark.slow
def test_teacher_learns_and_is_reused(data: DataConfig) -> None:
    from transformers import AutoModelForCausalLM

    assert find_teacher(TINY, data) is None
    events: list[dict[str, object]] = []
    folder = ensure_teacher(TINY, data, events.append)
    facts = json.loads((folder / "lectern-teacher.json").read_text())
    assert set(facts["heldout_loss"]) == {"general", "domain"}
    assert all(0 < loss < math.log(TINY.vocab_size) - 0.3 for loss in facts["heldout_loss"].values())
    progress = [event for event in events if event.get("stage") == "teacher"]
    assert progress[-1]["step"] == progress[-1]["steps"] == facts["steps"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.model_type == "deepseek_v3"
    assert sum(p.numel() for p in model.parameters()) == facts["parameters"]
    assert any("experts" in name for name, _ in model.named_parameters())
    assert Tokenizer.load(folder).digest == Tokenizer.load(ensure_tokenizer(TINY, data)).digest
    assert not (folder / "samples").exists()

    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert find_teacher(TINY, data) == ensure_teacher(TINY, data) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert find_teacher(TINY, data.model_copy(update={"heldout_fraction": 0.3})) is None
    assert find_teacher(TINY.model_copy(update={"seed": 1}), data) is None


def test_cache_folder_that_cannot_be_written_is_named(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LECTERN_CACHE", str(data.sources[0].path))
    with pytest.raises(StorageError, match="LECTERN_CACHE"):
        ensure_tokenizer(TINY, data)


_BUILD = """
import sys
from storage.config import DataConfig
from workers.config import EmbeddedTeacherConfig
from workers.embedded import ensure_teacher

def show(event):
    if event.get("stage") == "teacher":
        print("step" if "step" in event else "waiting", flush=True)

teacher, data = EmbeddedTeacherConfig.model_validate_json(sys.argv[1]), DataConfig.model_validate_json(sys.argv[2])
print(ensure_teacher(teacher, data, show), flush=True)
"""


def start_build(teacher: EmbeddedTeacherConfig, data: DataConfig) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", _BUILD, teacher.model_dump_json(), data.model_dump_json()]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def next_line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.slow
def test_two_at_once_build_one_and_a_killed_one_leaves_nothing_behind(data: DataConfig) -> None:
    teacher = TINY.model_copy(update={"train_tokens": 200_000})
    first = start_build(teacher, data)
    assert next_line(first) == "step"
    first.send_signal(signal.SIGSTOP)
    second = start_build(teacher, data)
    assert next_line(second) == "waiting"
    assert find_teacher(teacher, data) is None
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert next_line(second) == "step"
    third = start_build(teacher, data)
    outputs = [process.communicate(timeout=120)[0].split() for process in (second, third)]
    folder = find_teacher(teacher, data)
    assert [output[-1] for output in outputs] == [str(folder), str(folder)]
    assert "step" not in outputs[1]
    assert not list(Path(os.environ["LECTERN_CACHE"]).glob("*.draft"))
