"""The page of plain PyTorch in examples/: it reads what the reader reads, and learns."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.trainer.tiny import QWEN2, TinyRun
from trainer.batches import make_batch
from trainer.config import StudentConfig
from trainer.model import predictor_states
from trainer.student import build_student

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "minimal.py"


@pytest.fixture(scope="module")
def minimal() -> ModuleType:
    spec = importlib.util.spec_from_file_location("minimal", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_reads_the_same_targets_and_states(minimal: ModuleType, hybrid_run: TinyRun, hidden_run: TinyRun) -> None:
    for run in (hybrid_run, hidden_run):
        model = build_student(StudentConfig(config=QWEN2), None, run.identity).eval()
        for row in list(minimal.read_samples(Path(run.dataset_url)))[:3]:
            samples, targets = run.dataset.read([row["sample_id"]])
            batch = make_batch(samples, targets, run.identity.capture.kind)
            found = minimal.read_targets(row)
            assert found.kind == batch.targets.kind
            for name in ("label", "entry_offsets", "id", "estimate", "logprob", "tail_mass", "entropy"):
                torch.testing.assert_close(getattr(found, name), getattr(batch.targets, name))
            with torch.no_grad():
                torch.testing.assert_close(minimal.hidden_states(model, row), predictor_states(model, batch))


def test_it_learns(minimal: ModuleType, hybrid_run: TinyRun, tmp_path: Path) -> None:
    build_student(StudentConfig(config=QWEN2), None, hybrid_run.identity).save_pretrained(tmp_path / "student")
    losses = minimal.train(Path(hybrid_run.dataset_url), tmp_path / "student", tmp_path / "out", learning_rate=1e-2)
    assert np.mean(losses[-2:]) < losses[0] - 0.2
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.isfinite(trained(torch.arange(8)[None]).logits).all()
