"""Public benchmarks: scores and errors as the harness gives them, and what is told where it is not there."""

import json
from pathlib import Path

import pytest

from storage.errors import InputError
from tests.trainer.test_tasks import folder  # noqa: F401
from trainer import harness
from trainer.config import LmEvalConfig

TASK = """
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def test_without_the_package_the_key_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    harness.require_harness(None)
    with pytest.raises(
        InputError, match=r"evaluate.lm_eval needs the package lm-eval; `pip install 'lectern\[eval\]'`"
    ):
        harness.require_harness(LmEvalConfig(tasks=["colours"]))


def test_scores_are_paired_with_their_errors() -> None:
    values = {
        "alias": "colours",
        "acc,none": 0.5,
        "acc_stderr,none": 0.1,
        "exact_match,strict-match": 1,
        "exact_match_stderr,strict-match": "N/A",
        "sample_len": 4,
    }
    assert harness._scores(values) == {
        "acc": {"score": 0.5, "stderr": 0.1},
        "exact_match,strict-match": {"score": 1.0, "stderr": None},
    }


@pytest.mark.slow
def test_a_task_of_ones_own_scores_a_model(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    """With the real harness: of twins that differ in which choice is right, one is right where the other is wrong."""
    pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    for name, answer in (("first", 0), ("second", 1)):
        rows = [{"question": f"the {c} fox", "choices": [" red", " blue"], "answer": answer} for c in "abcdefgh"]
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / f"{name}.yaml").write_text(TASK.replace("colours", name) % data)
    config = LmEvalConfig(tasks=["first", "second"], include_path=str(tmp_path), limit=5, batch_size=2)
    harness.require_harness(config)
    harness.require_tasks(config)
    found = harness.run_harness(folder, config, "cpu")
    assert list(found) == ["first", "second"]
    scores = [found[name]["acc"]["score"] for name in found]
    assert sum(score for score in scores if score is not None) == pytest.approx(1.0)
    # Of five examples: the limit holds.
    assert all(round(score * 5, 6).is_integer() for score in scores if score is not None)
    assert found["first"]["acc"]["stderr"] is not None
    with pytest.raises(InputError, match=r"evaluate.lm_eval.tasks: nosuch is not among the [\d,]+ tasks of lm-eval or"):
        harness.require_tasks(config.model_copy(update={"tasks": ["first", "nosuch"]}))
