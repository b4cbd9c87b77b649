"""Teacher, student and baseline on held-out text."""

from typing import Any

from cluster.rundir import stage_key
from cluster.selection import heldout_rows
from cluster.stages.capture import open_dataset
from cluster.workspace import Workspace
from storage.errors import InputError

Ids = dict[str, list[bytes]]


def evaluate(work: Workspace, names: list[str]) -> dict[str, Any]:
    """Score the trained models among `names` (`student`, `baseline`) and the teacher on the same held-out samples.

    Skipped when neither the models nor the samples have changed. Returns, for the teacher and each model,
    `{loss: {source: …}, kl_to_teacher, top1_agreement, ece, …}`, and the ids of the samples that the report shows.
    Raises InputError when there is no held-out sample, or none of them was captured.
    """
    settings = work.config.evaluate
    rows = heldout_rows(work.samples, settings.samples_per_source)
    ids = {source: work.samples.ids(chosen) for source, chosen in rows.items() if len(chosen)}
    if not ids:
        raise InputError("no held-out samples to evaluate on; set data.heldout_fraction above 0")
    models = {name: work.run.result(name) or {} for name in names}
    key = stage_key(
        work.identity.fingerprint,
        {source: [sample_id.hex() for sample_id in chosen] for source, chosen in ids.items()},
        {name: [model.get("order_digest"), model.get("losses"), model.get("path")] for name, model in models.items()},
        settings.shown_samples,
    )
    with work.stage("evaluate") as outcome, work.progress.task("Evaluating on held-out text", "samples") as task:
        known = work.run.result("evaluate", key)
        if known is not None:
            outcome.skipped = True
            task.note("already evaluated")
            return known
        dataset = open_dataset(work)
        result: dict[str, Any] = {"teacher": _teacher(dataset, ids)}
        for n, name in enumerate(names):
            task.update(n * sum(map(len, ids.values())), len(names) * sum(map(len, ids.values())), name)
            result[name] = _model(work, name, dataset, ids)
        result["shown_ids"] = [i.hex() for chosen in ids.values() for i in chosen[: settings.shown_samples]]
        result["samples_per_source"] = {source: len(chosen) for source, chosen in ids.items()}
        task.note("")
    work.run.finish("evaluate", key, result)
    return result
