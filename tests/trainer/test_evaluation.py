"""Held-out scores against plain recomputation."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from storage.errors import InputError
from tests.trainer.tiny import QWEN2, TinyRun, make_run, teacher_logits
from trainer.config import StudentConfig
from trainer.evaluation import SHOWN_CHOICES, evaluate_model, evaluate_teacher, token_views
from trainer.student import build_student
from trainer.totals import BINS


@pytest.fixture(scope="module")
def model_folder(hybrid_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = StudentConfig(config={**QWEN2, "initializer_range": 0.5})
    build_student(config, None, hybrid_run.identity).save_pretrained(folder)
    return folder


def heldout(run: TinyRun) -> dict[str, list[bytes]]:
    samples = run.samples
    return {name: samples.ids(samples.rows("heldout", name)) for name in samples.source_names}


def calibration_error(confidence: np.ndarray, hit: np.ndarray) -> float:
    edges = np.linspace(0, 1, BINS + 1)
    total = 0.0
    for low, high in itertools.pairwise(edges):
        inside = (confidence >= low) & ((confidence < high) | (high == 1.0))
        if inside.any():
            total += inside.sum() * abs(hit[inside].mean() - confidence[inside].mean())
    return total / len(confidence)


def test_scores_agree_with_one_window_at_a_time(hybrid_run: TinyRun, model_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    ids = heldout(hybrid_run)
    events: list[dict[str, object]] = []
    scores = evaluate_model(model_folder, hybrid_run.dataset, ids, on_progress=events.append)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    confidence, hit, agreed = [], [], []
    for source, wanted in ids.items():
        nll = []
        for sample_id in wanted:
            samples, _ = hybrid_run.dataset.read([sample_id])
            teacher = teacher_logits(samples, hybrid_run.identity.tokenizer.vocab_size).argmax(-1)
            p = 0
            for document in range(int(samples.document.max()) + 1):
                tokens = torch.from_numpy(samples.tokens[samples.document == document].astype(np.int64))[None]
                supervised = samples.supervised[samples.document == document]
                with torch.no_grad():
                    logprob = model(tokens).logits[0].log_softmax(-1)
                for at in np.flatnonzero(supervised):
                    row, label = logprob[at - 1], int(tokens[0, at])
                    nll.append(-row[label].item())
                    confidence.append(row.max().exp().item())
                    hit.append(int(row.argmax()) == label)
                    agreed.append(int(row.argmax()) == int(teacher[p]))
                    p += 1
        assert scores["loss"][source] == pytest.approx(np.mean(nll), rel=1e-4)
        assert scores["tokens"][source] == len(nll)
    assert scores["top1_agreement"] == pytest.approx(np.mean(agreed), abs=2e-3)
    assert scores["ece"] == pytest.approx(calibration_error(np.array(confidence), np.array(hit)), abs=2e-3)
    assert scores["kl_to_teacher"] > 1
    assert events[-1] == {"event": "evaluate", "done": sum(map(len, ids.values())), "total": events[-1]["total"]}


def test_the_teachers_own_scores_come_from_the_dataset(hybrid_run: TinyRun) -> None:
    scores = evaluate_teacher(hybrid_run.dataset, heldout(hybrid_run))
    assert scores["loss"] == {"general": pytest.approx(1.0), "domain": pytest.approx(1.0)}
    assert (scores["kl_to_teacher"], scores["top1_agreement"]) == (0.0, 1.0)
    assert 0 < scores["ece"] < 1


def test_token_views_tell_teacher_and_student_of_each_supervised_token(hybrid_run: TinyRun, model_folder: Path) -> None:
    wanted = heldout(hybrid_run)["domain"][:2]
    views = token_views(model_folder, hybrid_run.dataset, wanted)
    assert [view["sample_id"] for view in views] == [sample_id.hex() for sample_id in wanted]
    for view, sample_id in zip(views, wanted, strict=True):
        samples, _ = hybrid_run.dataset.read([sample_id])
        assert [token["id"] for token in view["tokens"]] == samples.tokens.tolist()
        assert [token["supervised"] for token in view["tokens"]] == samples.supervised.tolist()
        for token in view["tokens"]:
            assert ("teacher" in token) == token["supervised"]
            if token["supervised"]:
                chances = [p for _, p in token["teacher"]]
                assert len(chances) == SHOWN_CHOICES
                assert chances == sorted(chances, reverse=True)
                assert token["student_best"][1] >= max(token["student"])
                assert 0 <= token["student_p"] <= token["student_best"][1]


def test_nothing_to_evaluate_and_no_model_are_told(hybrid_run: TinyRun, model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no held-out samples .* raise data.heldout_fraction"):
        evaluate_model(model_folder, hybrid_run.dataset, {"general": []})
    with pytest.raises(InputError, match="holds no causal language model"):
        evaluate_model(tmp_path, hybrid_run.dataset, heldout(hybrid_run))


def test_sampled_targets_give_the_divergence_and_text_gives_none(
    hybrid_run: TinyRun, model_folder: Path, tmp_path: Path
) -> None:
    known = evaluate_model(model_folder, hybrid_run.dataset, heldout(hybrid_run))
    sampled = make_run(tmp_path, "sampled")
    scores = evaluate_model(model_folder, sampled.dataset, heldout(sampled))
    assert scores["loss"] == pytest.approx(known["loss"], rel=1e-6)
    assert scores["kl_to_teacher"] == pytest.approx(known["kl_to_teacher"], abs=0.15)
    (tmp_path / "text").mkdir()
    text = make_run(tmp_path / "text", "text")
    scores = evaluate_model(model_folder, text.dataset, heldout(text))
    assert scores["loss"] == pytest.approx(known["loss"], rel=1e-6)
    assert scores["kl_to_teacher"] is None and scores["top1_agreement"] is None
    assert scores["ece"] == pytest.approx(known["ece"], abs=1e-6)
    assert evaluate_teacher(text.dataset, heldout(text))["ece"] is None
    assert len(token_views(model_folder, text.dataset, heldout(text)["general"][:1])) == 1
