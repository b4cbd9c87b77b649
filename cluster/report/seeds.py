"""Several seeds of one config: mean and standard deviation over them."""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from trainer.stages import Model

MEASURES = ("kl_to_teacher", "top1_agreement", "ece", "accuracy")


def over_seeds(models: Sequence[Model], evaluation: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what the models of several seeds came to; None for one seed, or where one is not evaluated yet.

    `{seeds: [{seed, student, baseline}], student, baseline, gap}`: each seed's evaluation as under `eval`; for each
    kind `{loss: {source: {mean, stdev}}, kl_to_teacher: {mean, stdev}, …}`; and `gap {source: {mean, stdev, won}}`,
    baseline − student in nats per token, positive in `won` of the seeds. The standard deviation is that of a sample
    (n − 1).
    """
    seeds = list(dict.fromkeys(model.seed for model in models))
    if len(seeds) < 2 or any(not evaluation.get(model.name) for model in models):
        return None
    rows = [{model.kind: evaluation[model.name] for model in models if model.seed == seed} for seed in seeds]
    result: dict[str, Any] = {"seeds": [{"seed": seed, **row} for seed, row in zip(seeds, rows, strict=True)]}
    for kind in rows[0]:
        entries = [row[kind] for row in rows]
        loss = {source: _spread([entry["loss"][source] for entry in entries]) for source in entries[0]["loss"]}
        others = {key: [entry.get(key) for entry in entries] for key in MEASURES}
        spreads = {key: _spread(values) for key, values in others.items() if None not in values}
        result[kind] = {"loss": loss, **spreads}
    if "baseline" in rows[0]:
        gaps = {
            source: [row["baseline"]["loss"][source] - row["student"]["loss"][source] for row in rows]
            for source in rows[0]["student"]["loss"]
        }
        result["gap"] = {
            source: {**_spread(values), "won": sum(value > 0 for value in values)} for source, values in gaps.items()
        }
    return result


def plus_minus(spread: Mapping[str, float]) -> str:
    """Return `mean ± standard deviation`, three digits behind the point."""
    return f"{spread['mean']:.3f} ± {spread['stdev']:.3f}".replace("-", "−")


def _spread(values: Sequence[Any]) -> dict[str, float]:
    return {"mean": mean(values), "stdev": stdev(values)}
