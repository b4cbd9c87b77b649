"""A whole run: prepare → teacher → capture → train student and baseline → evaluate → report."""

import os
from typing import Any

from cluster.config import RunConfig
from cluster.plan import PLAN_KEY, keep_plan, make_plan
from cluster.progress import Progress
from cluster.report.seeds import over_seeds
from cluster.rundir import RunDir
from cluster.stages.capture import capture, open_dataset
from cluster.stages.evaluate import evaluate
from cluster.stages.prepare import prepare, teacher
from cluster.stages.report import write_report
from cluster.stages.train import train
from cluster.workspace import Workspace

_QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
"""Other libraries' bars and remarks, which would tear ours apart; the environment's own values win."""


def run_pipeline(config: RunConfig, run: RunDir, progress: Progress, until: str) -> dict[str, Any]:
    """Do the stages that `until` needs, each skipped when already done, and return their figures as JSON values.

    `capture` scores; `train` trains the student (and baseline) on what is captured; `evaluate` scores the trained
    models; `run` does all of it and writes the report. Raises what the stages raise.
    """
    os.environ.update({**_QUIET, **os.environ})
    figures: dict[str, Any] = {"run_dir": run.store.shown()}
    with run.locked(), Workspace(config, run, progress) as work:
        run.event("command_started", command=until)
        prepare(work)
        teacher(work)
        if until == "run" and not run.store.exists(PLAN_KEY):
            keep_plan(run, make_plan(config, run))
        if until in {"capture", "run"}:
            figures["capture"] = capture(work)
        if until in {"train", "run"}:
            for model in config.models:
                figures[model.name] = train(work, model)
        if config.cluster.joins is None:
            # An evaluation of one machine runs in this process: Ray would only take its memory.
            work.close_ray()
        if until in {"evaluate", "run"}:
            figures["eval"] = evaluate(work, [model.name for model in config.models])
            figures["seeds"] = over_seeds(config.models, figures["eval"])
        if until == "run":
            with work.stage("report"):
                figures["report"] = write_report(run, config, open_dataset(work), work.tokenizer)
        run.event("command_finished", command=until)
    return figures
