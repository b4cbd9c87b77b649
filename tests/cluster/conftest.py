"""A small world without torch: text, its tokenizer, a teacher's folder, and a dataset that looks captured."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from cluster.checks import uses_chat_template
from cluster.config import RunConfig
from cluster.loader import check_config
from cluster.selection import capture_rows
from storage.sample_set import SampleSet, prepare_samples
from storage.samples import Int64Array, SampleBatch, offsets_of
from storage.targets import TargetBatch
from storage.tokenizer import Tokenizer
from storage.union import open_existing
from storage.writer import DatasetWriter
from workers.embedded import ensure_tokenizer
from workers.model_folder import teacher_identity

TOP_K = 4
WORDS = ("red", "green", "blue", "lamp", "table", "window", "walks", "sings", "quickly", "under", "over", "the", "a")


@dataclass
class World:
    """Where everything lies, and the config that names it."""

    folder: Path
    teacher: Path
    values: dict[str, Any]

    @property
    def config_path(self) -> str:
        """The config as a file."""
        path = self.folder / "run.yaml"
        path.write_text(yaml.safe_dump(self.values))
        return str(path)

    @property
    def config(self) -> RunConfig:
        """The config as a model."""
        return check_config(self.values, "world")

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return self.folder / "run"

    def samples(self) -> SampleSet:
        """Prepare the samples where a run would."""
        return prepare_samples(self.config.data, Tokenizer.load(self.teacher), self.run_dir / "samples")

    def capture(self, share: float = 1.0, name: str = "unit") -> None:
        """Commit made-up targets for a share of what the run needs and the dataset lacks, in two units."""
        config, samples = self.config, self.samples()
        rows = capture_rows(samples, config.evaluate.samples_per_source)
        rows = rows[: max(2, round(len(rows) * share))]
        union = open_existing(config.cache)
        self.commit(rows if union is None else rows[union.missing(samples.ids(rows))], name)

    def commit(self, rows: Int64Array, name: str = "unit") -> None:
        """Commit made-up targets for these rows of the samples, in two units."""
        config, samples = self.config, self.samples()
        identity = teacher_identity(
            self.teacher, config.teacher, config.cache, Tokenizer.load(self.teacher), uses_chat_template(config.data)
        )
        writer = DatasetWriter.create(config.cache.url, identity)
        for n, part in enumerate(np.array_split(rows, 2)):
            batch = samples.read(part)
            writer.commit(f"{name}{n}", batch, made_up_targets(batch, identity.tokenizer.vocab_size), "a1")


def made_up_targets(samples: SampleBatch, vocab_size: int) -> TargetBatch:
    """Return top-4 targets whose first choice is the token itself at every second position."""
    truth = samples.tokens[samples.supervised]
    positions = len(truth)
    rank = np.arange(TOP_K)
    first = np.where(np.arange(positions) % 2 == 0, truth, (truth + 1) % vocab_size)
    ids = (first[:, None] + rank * 3) % vocab_size
    probability = np.array([0.5, 0.2, 0.1, 0.05], dtype=np.float64)
    return TargetBatch(
        offsets=offsets_of(samples.num_supervised()),
        count=np.full(positions, TOP_K, dtype=np.int32),
        id=ids.astype(np.int32).reshape(-1),
        logprob=np.tile(np.log(probability), positions).astype(np.float16),
        draws=None,
        tail_mass=np.full(positions, 0.15, dtype=np.float16),
        teacher_nll=np.full(len(samples), 1.25, dtype=np.float32),
        teacher_entropy=np.full(len(samples), 1.5, dtype=np.float32),
    )


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """Two small sources of JSONL text and a teacher folder that fits them."""
    monkeypatch.setenv("LECTERN_CACHE", str(tmp_path / "user-cache"))
    rng = np.random.default_rng(0)
    for source in ("general", "domain"):
        lines = [json.dumps({"text": " ".join(rng.choice(WORDS, 60)) + f" {source} {n}."}) for n in range(40)]
        (tmp_path / f"{source}.jsonl").write_text("\n".join(lines) + "\n")
    values: dict[str, Any] = {
        "data": {
            "sources": [{"name": name, "path": str(tmp_path / f"{name}.jsonl")} for name in ("general", "domain")],
            "window_tokens": 64,
            "heldout_fraction": 0.3,
        },
        "teacher": {"name": str(tmp_path / "teacher"), "sharding": "none"},
        "cache": {"url": str(tmp_path / "cache"), "kind": "topk", "top_k": TOP_K},
        "student": {"config": {"model_type": "qwen2", "hidden_size": 16, "max_position_embeddings": 64}},
        "train": {"steps": 4, "global_batch_size": 4, "micro_batch_size": 2, "warmup_steps": 1},
        "evaluate": {"samples_per_source": 4},
    }
    made = World(tmp_path, tmp_path / "teacher", values)
    make_teacher(made)
    return made


def make_teacher(world: World, positions: int = 128) -> None:
    """Write a folder that says what a teacher's folder says; its weights are never loaded here."""
    world.teacher.mkdir(exist_ok=True)
    embedded = check_config({**world.values, "teacher": {"embedded": {"vocab_size": 400}}}, "world").teacher.embedded
    tokenizer = ensure_tokenizer(embedded, world.config.data)
    for file in tokenizer.iterdir():
        (world.teacher / file.name).write_bytes(file.read_bytes())
    vocab_size = Tokenizer.load(tokenizer).vocab_size
    facts = {"architectures": ["Qwen2ForCausalLM"], "vocab_size": vocab_size, "max_position_embeddings": positions}
    (world.teacher / "config.json").write_text(json.dumps(facts))
    save_file({"weight": np.ones((4, 3), dtype=np.float32)}, str(world.teacher / "model.safetensors"))


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The JSON object in the last line of stdout."""
        return json.loads(self.out.splitlines()[-1])


@pytest.fixture
def lectern() -> Callable[..., Ended]:
    """The command line, in a process of its own."""

    def run(*arguments: str, **options: Any) -> Ended:
        command = [sys.executable, "-m", "cluster.cli", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)
        return Ended(done.returncode, done.stdout, done.stderr)

    return run
