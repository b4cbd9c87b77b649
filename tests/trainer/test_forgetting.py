"""What a student has lost, against its own evaluation."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM

from tests.trainer.test_evaluation import heldout
from tests.trainer.tiny import QWEN2, TinyRun
from trainer.batches import make_batch
from trainer.config import StudentConfig
from trainer.evaluation import evaluate_model
from trainer.forgetting import forgetting
from trainer.model import predictor_logits
from trainer.student import build_student


def test_losses_are_those_of_evaluation_and_the_divergence_is_of_whole_distributions(
    hybrid_run: TinyRun, tmp_path: Path
) -> None:
    for name, seed in (("start", 0), ("student", 1)):
        config = StudentConfig(config={**QWEN2, "initializer_range": 0.3}, seed=seed)
        build_student(config, None, hybrid_run.identity).save_pretrained(tmp_path / name)
    ids, dataset = heldout(hybrid_run), hybrid_run.dataset
    events: list[dict[str, object]] = []
    found = forgetting(tmp_path / "student", tmp_path / "start", dataset, ids, on_progress=events.append)
    before, after = (evaluate_model(tmp_path / name, dataset, ids)["loss"] for name in ("start", "student"))
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("start", "student")]
    for source in ("general", "domain"):
        assert found[source]["before"] == pytest.approx(before[source], rel=1e-5)
        assert found[source]["after"] == pytest.approx(after[source], rel=1e-5)
        sums = torch.zeros(2)
        for sample_id in ids[source]:
            batch = make_batch(*dataset.read([sample_id]), "hybrid")
            with torch.no_grad():
                start, student = (predictor_logits(model, batch).log_softmax(-1) for model in models)
            sums += torch.stack([kl_div(student, start, log_target=True, reduction="sum"), torch.tensor(len(start))])
        assert found[source]["kl"] == pytest.approx(float(sums[0] / sums[1]), rel=1e-4)
        assert found[source]["kl"] > 0.1
    assert events[-1]["done"] == events[-1]["total"]
    same = forgetting(tmp_path / "start", tmp_path / "start", dataset, ids | {"domain": []})
    assert set(same) == {"general"}
    assert same["general"]["kl"] == pytest.approx(0, abs=1e-6)
    assert same["general"]["before"] == same["general"]["after"]
