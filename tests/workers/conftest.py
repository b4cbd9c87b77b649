"""A small text, its tokenizer, its samples and a random teacher, for captures through real Ray."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from storage.config import CacheConfig, DataConfig, SourceConfig
from storage.sample_set import SampleSet, prepare_samples
from storage.tokenizer import Tokenizer
from tests.workers.tiny import tiny_model
from workers.config import EmbeddedTeacherConfig
from workers.embedded import ensure_tokenizer


@dataclass(frozen=True)
class TinyRun:
    """Where the pieces of a tiny run lie."""

    folder: Path
    tokenizer_folder: Path
    samples: SampleSet

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of teacher and samples."""
        return Tokenizer.load(self.tokenizer_folder)

    def model(self, model_type: str, width: int = 64, spread: float = 0.2) -> Path:
        """Return the folder of a random teacher with this vocabulary, padded; `spread` is its weights' deviation."""
        folder = self.folder / f"{model_type}-{width}-{spread}"
        if not folder.exists():
            vocab_size = self.tokenizer.vocab_size + 8
            tiny_model(model_type, width=width, vocab_size=vocab_size, spread=spread).save_pretrained(folder)
        return folder

    def cache(self, name: str, **settings: object) -> CacheConfig:
        """Return a cache section for a dataset of its own."""
        defaults = {"kind": "hybrid", "top_k": 6, "draws": 5, "unit_tokens": 600}
        return CacheConfig.model_validate({"url": str(self.folder / "caches" / name), **defaults, **settings})


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """64 or more windows of real prose."""
    from storage.embedded_text import embedded_documents

    folder = tmp_path_factory.mktemp("tiny-run")
    documents = [text for _, text in zip(range(10), embedded_documents("general"), strict=False)]
    corpus = folder / "text.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    data = DataConfig(sources=[SourceConfig(name="general", path=str(corpus))], window_tokens=96, heldout_fraction=0.1)
    before = os.environ.get("LECTERN_CACHE")
    os.environ["LECTERN_CACHE"] = str(folder / "user-cache")
    try:
        tokenizer_folder = ensure_tokenizer(EmbeddedTeacherConfig(vocab_size=512), data)
    finally:
        os.environ.pop("LECTERN_CACHE")
        if before is not None:
            os.environ["LECTERN_CACHE"] = before
    samples = prepare_samples(data, Tokenizer.load(tokenizer_folder), folder / "samples")
    return TinyRun(folder, tokenizer_folder, samples)


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A Ray of this module's own with two CPUs."""
    import ray

    os.environ["DS_ACCELERATOR"] = "cpu"
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200 << 20)
    yield
    ray.shutdown()
