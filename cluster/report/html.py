"""The report as one HTML file that needs no network and runs no script."""

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from cluster.figures import duration
from cluster.report.cards import cards
from cluster.report.data import ReportData, StudentToken
from cluster.report.sections import sections
from cluster.sample_view import SampleView, TokenView, visible

_MAX_ROWS = 256


def render(data: ReportData, title: str, made: str) -> str:
    """Return the page. `made` tells when; everything from data is escaped by the template."""
    seconds = sum(data.summary["run"]["seconds"].values())
    page = {
        "title": title,
        "lead": _lead(data),
        "cards": cards(data.summary),
        "sections": sections(data),
        "samples": [_sample(view, data.student.get(view.sample_id) or []) for view in data.samples],
        "config": data.config_text,
        "footer": f"Made {made} by Lectern; stages ran for {duration(seconds)} in all. The same as data: report.json.",
    }
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    folder = files("cluster.report")
    template = environment.from_string((folder / "report.html.j2").read_text(encoding="utf-8"))
    return template.render(page=page, css=(folder / "report.css").read_text(encoding="utf-8"))


def _lead(data: ReportData) -> str:
    name, cache = data.summary["teacher"]["name"], data.summary["cache"]
    teacher = "the embedded teacher" if name == "embedded" else name or "its teacher"
    return (
        f"A student distilled from {teacher} through {cache['samples']:,} cached samples "
        f"({cache['tokens']:,} tokens, {cache['kind']} targets)."
    )


def _sample(view: SampleView, student: Sequence[StudentToken | None]) -> dict[str, Any]:
    said = student if len(student) == len(view.tokens) else [None] * len(view.tokens)
    return {
        "sample_id": view.sample_id[:12],
        "source": view.source,
        "num_tokens": len(view.tokens),
        "agreement": f"{100 * view.agreement:.0f}%",
        "nll": f"{view.teacher_nll:.2f}",
        "entropy": f"{view.teacher_entropy:.2f}",
        "tokens": [_token(token) for token in view.tokens],
        "has_student": any(said),
        "rows": [_row(token, own) for token, own in zip(view.tokens, said, strict=True) if token.supervised][
            :_MAX_ROWS
        ],
    }


def _token(token: TokenView) -> dict[str, Any]:
    if not token.supervised:
        return {"text": token.text, "css": "given", "wash": "", "title": "", "opens": token.opens_document}
    told = ", ".join(f"{visible(choice.text)} {_share(choice.probability)}" for choice in token.choices)
    own = _share(token.probability) if token.probability is not None else f"in the tail ({_share(token.tail)})"
    # Steeper at first, so that what was merely likely can be told from what was not.
    wash = 0.6 * (token.probability or 0.0) ** 0.6
    return {
        "text": token.text,
        "css": "hit" if token.agrees else "",
        "wash": f"{wash:.2f}" if wash >= 0.005 else "",
        "title": f"{visible(token.text)}  {own}\nteacher: {told}",
        "opens": token.opens_document,
    }


def _row(token: TokenView, student: StudentToken | None) -> dict[str, Any]:
    return {
        "position": token.position,
        "token": visible(token.text),
        "probability": _share(token.probability) if token.probability is not None else "tail",
        "choices": [(visible(choice.text), _share(choice.probability)) for choice in token.choices],
        "student": None if student is None else (visible(student.best), _share(student.best_probability)),
        "student_own": "" if student is None else _share(student.probability),
        "tail": _share(token.tail),
        "entropy": f"≥ {token.entropy:.2f}" if token.tail > 0 else f"{token.entropy:.2f}",
    }


def _share(value: float) -> str:
    return f"{value:.3f}" if value < 0.9995 else "1"
