"""A tiny run for the tests of this room: text, samples, and a dataset of made-up targets."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.config import DataConfig, SourceConfig
from storage.draws import drawn_logprob
from storage.hidden import attention_lengths
from storage.identity import (
    DRAWN_KINDS,
    HEAD_KINDS,
    CaptureIdentity,
    DatasetIdentity,
    TeacherIdentity,
    TokenizerIdentity,
)
from storage.reader import Dataset
from storage.sample_set import SampleSet, prepare_samples
from storage.samples import SampleBatch
from storage.targets import TargetBatch
from storage.tokenizer import Tokenizer
from storage.union import DatasetUnion
from storage.writer import DatasetWriter
from tests.storage.tiny_tokenizers import write_tokenizer
from trainer.config import StudentConfig, TrainConfig
from trainer.curriculum_config import CurriculumConfig

WORDS = [
    "the",
    "a",
    "quick",
    "slow",
    "brown",
    "red",
    "fox",
    "dog",
    "jumps",
    "runs",
    "over",
    "under",
    "lazy",
    "old",
    "river",
    "hill",
    "and",
    "then",
    "sleeps",
]

QWEN2 = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class TinyRun:
    """Where the pieces lie."""

    folder: Path
    tokenizer_folder: Path
    samples: SampleSet
    dataset_url: str
    identity: DatasetIdentity

    @property
    def dataset(self) -> Dataset:
        """The dataset, opened anew."""
        return Dataset.open(self.dataset_url, self.identity)

    @property
    def union(self) -> DatasetUnion:
        """The dataset, as the trainer opens it."""
        return DatasetUnion.open([self.dataset_url], self.identity)

    def arguments(self, run_dir: Path, **train: Any) -> dict[str, Any]:
        """Return the arguments of `train_student`; `train` replaces fields of the train section."""
        return {
            "student": StudentConfig(config=QWEN2),
            "train": train_config(**train),
            "curriculum": CurriculumConfig(start={"general": 0.9, "domain": 0.1}, end={"general": 0.1, "domain": 0.9}),
            "dataset_url": self.dataset_url,
            "identity": self.identity,
            "samples_url": self.samples.url,
            "run_dir": str(run_dir),
            "name": "student",
            "device": "cpu",
            "tokenizer_folder": self.tokenizer_folder,
        }


def train_config(**fields: Any) -> TrainConfig:
    """Return a short float32 training on one rank; `fields` replace its own."""
    return TrainConfig.model_validate(
        {
            "steps": 6,
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "workers": 1,
            "warmup_steps": 2,
            "dtype": "float32",
            "learning_rate": 3e-3,
            "checkpoint_every": 2,
            **fields,
        }
    )


def make_run(
    folder: Path,
    kind: str = "hybrid",
    hidden: tuple[str, ...] = (),
    pack: bool = True,
    documents: int = 60,
    draw_sets: int = 1,
    attention: tuple[str, ...] = (),
) -> TinyRun:
    """Write text of two sources, its samples, and targets of a made-up teacher for all of them."""
    rng = np.random.default_rng(0)
    sources = []
    for name, words in (("general", WORDS[:12]), ("domain", WORDS[8:])):
        texts = [" ".join(rng.choice(words, int(rng.integers(20, 60)))) + f" {name} {n}" for n in range(documents)]
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        sources.append(SourceConfig(name=name, path=str(path)))
    tokenizer_folder = write_tokenizer(folder / "tokenizer", corpus=[" ".join(WORDS)] * 50)
    tokenizer = Tokenizer.load(tokenizer_folder)
    data = DataConfig(sources=sources, window_tokens=48, heldout_fraction=0.2, pack=pack)
    samples = prepare_samples(data, tokenizer, str(folder / "samples"))
    identity = DatasetIdentity(
        teacher=TeacherIdentity(name="made-up", architecture="Made", weights="0" * 64, parameters=1),
        tokenizer=TokenizerIdentity.of(tokenizer),
        precision="float32",
        capture=CaptureIdentity.model_validate(
            {
                "kind": kind,
                "top_k": 6 if kind in HEAD_KINDS else None,
                "draws": 5 if kind in DRAWN_KINDS else None,
                "draw_sets": draw_sets,
                "seed": 0 if kind in DRAWN_KINDS else None,
                "hidden": sorted(hidden),
                "hidden_dtype": "float16" if hidden else None,
                "attention": sorted(attention),
            }
        ),
    )
    url = str(folder / f"dataset-{kind}{len(hidden)}")
    writer = DatasetWriter.create(url, identity)
    for n, rows in enumerate(np.array_split(np.arange(samples.num_samples), 3)):
        batch = samples.read(rows)
        targets = made_up_targets(batch, kind, tokenizer.vocab_size, hidden, draw_sets)
        if attention:
            targets = replace(targets, **made_up_attention(batch, attention))
        writer.commit(f"unit{n}", batch, targets, attempt=0)
    return TinyRun(folder, tokenizer_folder, samples, url, identity)


def teacher_logits(samples: SampleBatch, vocab_size: int) -> NDArray[np.float64]:
    """Return the made-up teacher's logits at the supervised positions: likes the token itself and its neighbours."""
    tokens = samples.tokens[np.flatnonzero(samples.supervised)]
    previous = samples.tokens[np.flatnonzero(samples.supervised) - 1]
    table = np.random.default_rng(1).normal(0.0, 1.5, (vocab_size, vocab_size))
    logits = table[previous]
    logits[np.arange(len(tokens)), tokens] += 3.0
    return np.asarray(logits)


def made_up_attention(
    samples: SampleBatch, layers: Sequence[str], kept: NDArray[np.bool_] | None = None
) -> dict[str, Any]:
    """Return the fields of attention of a `TargetBatch`, random rows at the `kept` positions."""
    lengths = attention_lengths(samples)
    count = (lengths if kept is None else np.where(kept, lengths, 0)).astype(np.int32)
    rng = np.random.default_rng(2)
    rows = {layer: [rng.dirichlet(np.ones(n)) for n in count if n] for layer in layers}
    maps = {layer: np.concatenate(own).astype(np.float16) for layer, own in rows.items()}
    return {"attention": maps, "attention_count": count}


def made_up_targets(
    samples: SampleBatch, kind: str, vocab_size: int, hidden: tuple[str, ...] = (), draw_sets: int = 1
) -> TargetBatch:
    """Return targets of `kind` (6 kept, 5 draws) from the made-up teacher."""
    logits = teacher_logits(samples, vocab_size)
    return targets_from_logits(samples, logits, kind, top_k=6, draws=5, hidden=hidden, draw_sets=draw_sets)


def targets_from_logits(
    samples: SampleBatch,
    logits: NDArray[np.float64],
    kind: str,
    top_k: int,
    draws: int,
    hidden: tuple[str, ...] = (),
    seed: int = 0,
    draw_sets: int = 1,
) -> TargetBatch:
    """Return sparse targets of dense logits [P, V], by plain sorting and sampling."""
    rng = np.random.default_rng(seed)
    logprob = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
    logprob -= logits.max(1, keepdims=True)
    ids, logs, drawn, counts, tails = [], [], [], [], []
    draws_of = draws if kind in DRAWN_KINDS else 0
    for row in logprob:
        order = np.argsort(-row, kind="stable")
        head = order if kind == "dense" else order[: {"sampled": 0, "text": 0}.get(kind, top_k)]
        times = np.zeros((draw_sets, len(head)), dtype=np.int64)
        if draws_of:
            rest = np.sort(order[len(head) :])
            mass = np.exp(row[rest])
            points = (rng.random((draw_sets, 1)) + np.arange(draws_of)) * mass.sum() / draws_of
            found = np.searchsorted(np.cumsum(mass), points).clip(max=len(rest) - 1)
            hits = np.stack([np.bincount(one, minlength=len(rest)) for one in found])
            head = np.concatenate([head, rest[hits.any(0)]])
            times = np.concatenate([times, hits[:, hits.any(0)]], axis=1)
        if kind == "hybrid_counts":
            row = np.where(np.isin(np.arange(len(row)), rest), -np.inf, row)
            row[rest[hits.any(0)]] = np.log(mass.sum() * hits.sum(0)[hits.any(0)] / hits.sum())
        ids.append(head)
        logs.append(row[head])
        drawn.append(times)
        counts.append(len(head))
        tails.append(max(0.0, 1.0 - np.exp(row[head]).sum()))
    num_samples = len(samples)
    positions = len(logits)
    count = np.array(counts, dtype=np.int32)
    times = np.concatenate(drawn, axis=1).astype(np.uint8)
    if kind == "sampled":
        logs, tails = [drawn_logprob(times, count)], [0.0] * positions
    return TargetBatch(
        offsets=np.concatenate([[0], np.cumsum(samples.num_supervised())]).astype(np.int64),
        count=count,
        id=np.concatenate(ids).astype(np.int32),
        logprob=np.minimum(np.concatenate(logs), 0.0).astype(np.float16),
        draws=times if draws_of else None,
        tail_mass=np.array(tails, dtype=np.float16),
        teacher_nll=np.ones(num_samples, dtype=np.float32),
        teacher_entropy=_mean_entropy(logprob, samples),
        hidden={layer: rng.normal(0, 2, (positions, 24)).astype(np.float16) for layer in hidden},
    )


def _mean_entropy(logprob: NDArray[np.float64], samples: SampleBatch) -> NDArray[np.float32]:
    """Return the mean entropy over each sample's positions, [N]."""
    entropy = -(np.exp(logprob) * logprob).sum(1)
    owner = np.repeat(np.arange(len(samples)), samples.num_supervised())
    sums = np.bincount(owner, weights=entropy, minlength=len(samples))
    return (sums / np.maximum(samples.num_supervised(), 1)).astype(np.float32)
