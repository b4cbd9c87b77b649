"""The run at a glance."""

from typing import Any

from cluster.figures import count, duration, size

Card = dict[str, str]


def cards(summary: dict[str, Any]) -> list[Card]:
    """Return the cards of a summary (see `data.collect`); figures that are not there yet give no card."""
    made = [
        _gain(summary["eval"]),
        _agreement(summary["eval"]),
        _model("Teacher", summary["teacher"], summary["teacher"].get("name")),
        _student(summary),
        _dataset(summary["cache"]),
        _scored(summary["cache"]),
        _capture(summary["capture"]),
        _training(summary["train"]),
        _time(summary["run"]),
        _spent(summary["cost"]),
        _survived(summary["failures"]),
    ]
    return [card for card in made if card is not None]


def mean_loss(entry: dict[str, Any]) -> float:
    """Return the mean held-out loss over the sources, nats per token or byte."""
    losses = entry["loss"].values()
    return float(sum(losses) / len(losses))


def _card(label: str, value: str, unit: str = "", note: str = "", tone: str = "") -> Card:
    return {"label": label, "value": value, "unit": unit, "note": note, "tone": tone}


def _gain(evaluation: dict[str, Any]) -> Card | None:
    student, baseline = evaluation["student"], evaluation["baseline"]
    if not student:
        return None
    unit = f"nats/{student.get('unit', 'token')}"
    if not baseline:
        return _card("Student's held-out loss", f"{mean_loss(student):.3f}", unit)
    gaps = {name: student["loss"][name] - baseline["loss"][name] for name in student["loss"]}
    mean = sum(gaps.values()) / len(gaps)
    note = ", ".join(f"{name} {_signed(gap)}" for name, gap in gaps.items())
    return _card("Student against baseline", _signed(mean), unit, note, "good" if mean < 0 else "bad")


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _agreement(evaluation: dict[str, Any]) -> Card | None:
    student, baseline = evaluation["student"], evaluation["baseline"]
    if not student or student["kl_to_teacher"] is None:
        return None
    kl = f"KL to teacher {student['kl_to_teacher']:.3f}"
    note = (
        f"{kl}; baseline {100 * baseline['top1_agreement']:.1f}%, {baseline['kl_to_teacher']:.3f}" if baseline else kl
    )
    return _card("Agrees with the teacher", f"{100 * student['top1_agreement']:.1f}%", "first choice", note)


def _model(label: str, model: dict[str, Any], name: str | None) -> Card | None:
    if not model.get("parameters"):
        return None
    return _card(label, count(model["parameters"]), "parameters", name or "")


def _student(summary: dict[str, Any]) -> Card | None:
    card = _model("Student", summary["student"], None)
    teacher = summary["teacher"].get("parameters")
    if card is not None and teacher:
        card["note"] = f"{teacher / summary['student']['parameters']:.1f} times smaller than the teacher"
    return card


def _dataset(cache: dict[str, Any]) -> Card:
    note = f"{cache['bytes_per_token']:.1f} bytes per supervised token; {size(cache['bytes'])}"
    return _card("Dataset", count(cache["tokens"]), "tokens", note)


def _scored(cache: dict[str, Any]) -> Card:
    return _card(
        "Scored by this run", count(cache["scored_samples"]), "samples", f"{count(cache['reused_samples'])} reused"
    )


def _capture(capture: dict[str, Any]) -> Card | None:
    if not capture.get("tokens_per_s"):
        return None
    efficiency = capture.get("efficiency")
    note = f"{100 * efficiency:.0f}% of the work is forward passes" if efficiency else ""
    return _card("Capture", count(capture["tokens_per_s"]), "tokens/s", note)


def _training(train: dict[str, Any]) -> Card | None:
    if not train.get("tokens_per_s"):
        return None
    waited = train.get("data_wait_fraction")
    parts = [f"{train['steps']} steps"] if train.get("steps") else []
    parts += [f"in {duration(train['seconds'])}"] if train.get("seconds") else []
    parts += [f"{100 * waited:.1f}% waiting for data"] if waited is not None else []
    return _card("Training", count(train["tokens_per_s"]), "tokens/s", ", ".join(parts))


def _time(run: dict[str, Any]) -> Card | None:
    return _card("Time at work", duration(run["hours"] * 3600), note="pauses left out") if run["hours"] else None


def _spent(cost: dict[str, Any]) -> Card | None:
    if not cost["spent"]:
        return None
    parts = [f"machines {cost['machines']:,.2f}"] if cost["machines"] else []
    parts += [f"API {cost['api']:,.2f}"] if cost["api"] else []
    parts += [f"cap {cost['cap']:,.2f}"] if cost["cap"] else []
    return _card("Spent", f"{cost['spent']:,.2f}", cost["currency"], ", ".join(parts))


def _survived(failures: list[dict[str, str]]) -> Card | None:
    if not failures:
        return None
    return _card("Failures survived", f"{len(failures):,}", note="each is listed below, with what became of it")
