"""Public benchmarks through EleutherAI's lm-evaluation-harness, an optional package; heavy imports are in functions."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from storage.errors import InputError
from trainer.config import LmEvalConfig

_ERROR = "_stderr"


def require_harness(config: LmEvalConfig | None) -> None:
    """Raise InputError when the harness is asked for and not installed."""
    if config is not None and find_spec("lm_eval") is None:
        raise InputError("evaluate.lm_eval needs the package lm-eval; `pip install 'lectern[eval]'`, or drop the key")


def require_tasks(config: LmEvalConfig | None) -> None:
    """Raise InputError for tasks that the installed harness does not know; loads it, which takes seconds."""
    if config is None:
        return
    known = _tasks(config).all_tasks
    unknown = [name for name in config.tasks if name not in known]
    if unknown:
        place = f" or in {config.include_path}" if config.include_path else ""
        raise InputError(
            f"evaluate.lm_eval.tasks: {', '.join(unknown)} is not among the {len(known):,} tasks of lm-eval{place}; "
            "`lm-eval ls tasks` lists its own"
        )


def run_harness(folder: Path, config: LmEvalConfig, device: str) -> dict[str, dict[str, dict[str, float | None]]]:
    """Return the scores of an exported model: task → metric → `{score, stderr}`; stderr None where there is none.

    A metric's name holds the harness's filter where it is not `none`, e.g. `exact_match,strict-match`.
    """
    from lm_eval import simple_evaluate

    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "trust_remote_code": False},
        tasks=list(config.tasks),
        task_manager=_tasks(config),
        num_fewshot=config.num_fewshot,
        limit=config.limit,
        batch_size=config.batch_size,
        device=device,
        log_samples=False,
    )
    return {task: _scores(values) for task, values in found["results"].items()}


def _tasks(config: LmEvalConfig) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=config.include_path)


def _scores(values: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Pair scores with their standard errors: the harness has `acc,none` beside `acc_stderr,none`."""
    scores = {}
    for key, value in values.items():
        metric, comma, how = key.partition(",")
        if not comma or metric.endswith(_ERROR) or not isinstance(value, (int, float)):
            continue
        error = values.get(f"{metric}{_ERROR},{how}")
        name = metric if how == "none" else key
        scores[name] = {"score": float(value), "stderr": float(error) if isinstance(error, (int, float)) else None}
    return scores
