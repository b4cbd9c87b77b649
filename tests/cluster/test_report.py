"""The report: the promised keys, one self-contained page, everything escaped, nothing made up."""

import json
from html.parser import HTMLParser
from typing import Any

import pytest

from cluster.report.data import collect, curves_of, mixture_of, stage_seconds
from cluster.report.html import render
from cluster.report.sections import _capture_rows
from cluster.report.seeds import over_seeds
from cluster.rundir import RunDir
from cluster.sample_view import view_sample, visible
from cluster.stages.report import write_report
from cluster.tables import show_result
from cluster.terminal import Terminal
from storage.reader import Dataset
from storage.tokenizer import Tokenizer
from tests.cluster.conftest import World

EVIL = '<img src=x onerror="alert(1)">'


def finished_run(world: World) -> RunDir:
    """A run directory as the stages leave it, with made-up figures."""
    world.capture()
    run = RunDir(world.run_dir)
    run.write_config(world.config)
    ids = [row.tobytes().hex() for row in Dataset.open(world.values["cache"]["url"]).catalog.sample_ids[:2]]
    scores = {"loss": {"general": 2.0, "domain": 3.0}, "kl_to_teacher": 0.5, "top1_agreement": 0.75, "ece": 0.02}
    run.finish("prepare", "k", {"sources": world.samples().summary(), "counters": {}})
    run.finish("teacher", "k", {"name": EVIL, "path": str(world.teacher), "fingerprint": "f" * 32, "parameters": 5000})
    ranks = [{"rank": 0, "parameters_held": 60, "parameters_total": 100, "replicated": ["norm"]}]
    last = {"tokens_per_s": 900.0, "forward_tokens_per_s": 1000.0, "efficiency": 0.9, "seconds": 3.0, "ranks": ranks}
    run.finish("capture", "k", {"scored_samples": 7, "reused_samples": 2, "last": last})
    student = {"path": "x/student", "parameters": 1000, "steps": 4, "tokens_per_s": 50.0, "data_wait_fraction": 0.01}
    mixture = [{"step": n, "planned": {"general": 0.5}, "realised": {"general": 0.4}} for n in (2, 4)]
    run.finish("student", "k", {**student, "seconds": 2.0, "order_digest": "ab" * 16, "mixture": mixture})
    run.finish("evaluate", "k", {"teacher": scores, "student": scores, "baseline": scores, "shown": shown(ids, run)})
    for name in ("student", "baseline"):
        lines = [{"run": name, "step": n, "ce": 5.0 - n, "loss": 4.0 - n, "tokens_per_s": 10.0} for n in range(1, 5)]
        before = run.store.read_if_exists("metrics.jsonl") or b""
        run.store.write("metrics.jsonl", before + "".join(json.dumps(line) + "\n" for line in lines).encode())
    run.event("stage_finished", stage="capture", seconds=3.5, skipped=False)
    run.event("stage_finished", stage="capture", seconds=0.1, skipped=True)
    return run


def shown(ids: list[str], run: RunDir) -> list[dict[str, Any]]:
    """What `trainer.evaluation.token_views` returns, in miniature: too short for the sample, so it is left out."""
    return [
        {"sample_id": sample_id, "source": "general", "tokens": [{"id": 1, "supervised": False}]} for sample_id in ids
    ]


@pytest.fixture
def page(world: World) -> str:
    run = finished_run(world)
    dataset, tokenizer = Dataset.open(world.values["cache"]["url"]), Tokenizer.load(world.teacher)
    return render(collect(run, world.config, dataset, tokenizer), EVIL, "today")


def test_report_json_holds_the_promised_keys(world: World) -> None:
    run = finished_run(world)
    dataset, tokenizer = Dataset.open(world.values["cache"]["url"]), Tokenizer.load(world.teacher)
    write_report(run, world.config, dataset, tokenizer)
    found = json.loads((world.run_dir / "report.json").read_text())
    assert set(found["teacher"]) >= {"name", "path", "fingerprint", "parameters"}
    assert set(found["student"]) >= {"path", "parameters"}
    assert set(found["cache"]) >= {"url", "samples", "tokens", "bytes", "bytes_per_token"}
    assert (found["cache"]["scored_samples"], found["cache"]["reused_samples"]) == (7, 2)
    assert set(found["capture"]) >= {"tokens_per_s", "forward_tokens_per_s", "efficiency"}
    assert set(found["train"]) >= {"steps", "tokens_per_s", "data_wait_fraction", "mixture"}
    assert set(found["train"]["mixture"][0]) == {"step", "planned", "realised"}
    for name in ("teacher", "student", "baseline"):
        assert set(found["eval"][name]) >= {"loss", "kl_to_teacher", "top1_agreement", "ece"}
    assert set(found["cost"]) == {"currency", "spent", "reserved", "cap", "machines", "api"}
    assert {"plan", "nodes", "failures"} <= set(found)
    totals = dataset.totals()
    assert (found["cache"]["samples"], found["cache"]["bytes"]) == (totals.samples, totals.bytes)
    assert (world.run_dir / "report.html").stat().st_size > 10_000


def test_several_seeds_are_told_by_mean_and_standard_deviation(world: World) -> None:
    world.values["train"] = {**world.values["train"], "seeds": [3, 4, 5]}
    run = finished_run(world)
    evaluation = dict(run.result("evaluate") or {})
    for n, model in enumerate(world.config.models):
        evaluation[model.name] = {**evaluation["teacher"], "loss": {"general": 2.0 + n, "domain": 3.0 - n}}
    run.finish("evaluate", "k", evaluation)
    dataset, tokenizer = Dataset.open(world.values["cache"]["url"]), Tokenizer.load(world.teacher)
    data = collect(run, world.config, dataset, tokenizer)
    found = data.summary["seeds"]
    assert [(row["seed"], row["student"]["loss"]["general"]) for row in found["seeds"]] == [
        (3, 2.0),
        (4, 4.0),
        (5, 6.0),
    ]
    assert found["student"]["loss"]["general"] == {"mean": 4.0, "stdev": 2.0}
    assert found["baseline"]["loss"]["domain"] == {"mean": 0.0, "stdev": 2.0}
    assert found["gap"] == {
        "general": {"mean": 1.0, "stdev": 0.0, "won": 3},
        "domain": {"mean": -1.0, "stdev": 0.0, "won": 0},
    }
    page = render(data, "x", "today")
    assert "3 seeds" in page and "4.000 ± 2.000" in page and "−1.000 ± 0.000, 0 of 3 seeds" in page
    del evaluation["student-seed4"]
    assert over_seeds(world.config.models, evaluation) is None


def test_the_page_is_well_formed_and_needs_no_network(page: str) -> None:
    parser = _Balance()
    parser.feed(page)
    assert parser.open == []
    assert parser.links and all(link.startswith("#") for link in parser.links)
    assert "@import" not in page and "url(" not in page and "<script" not in page


def test_everything_from_data_is_escaped(page: str) -> None:
    assert EVIL not in page
    assert "&lt;img src=x onerror=" in page


def test_the_page_shows_figures_samples_and_config(page: str) -> None:
    for text in ("Held-out loss", "Fidelity to the teacher", "Mixture of sources", "Where the bytes go"):
        assert text in page
    assert page.count('class="panel sample"') == 2
    assert "prefers-color-scheme: dark" in page and "max-width: 560px" in page
    assert "window_tokens: 64" in page


def test_failed_units_and_idle_time_are_listed(world: World) -> None:
    run = finished_run(world)
    failed = [{"unit": "ab12", "samples": 3, "attempts": 3, "error": f"NaN {EVIL}"}]
    fleet = {"machine_s": 100.0, "idle_s": 25.0, "idle_cost": 1.5}
    last = {"tokens_per_s": 9.0, "padding": 0.125, "replicas_lost": 2, "failed_units": failed, "fleet": fleet}
    run.finish("capture", "k", {"scored_samples": 7, "reused_samples": 2, "last": last})
    write_report(run, world.config, Dataset.open(world.values["cache"]["url"]), Tokenizer.load(world.teacher))
    found = json.loads((world.run_dir / "report.json").read_text())
    assert found["capture"]["failed_units"] == failed
    page = (world.run_dir / "report.html").read_text()
    for text in ("unit ab12 failed", "3 samples: NaN", "25.0%, 1.50 USD", "12.5%", "replicas lost and replaced"):
        assert text in page
    assert EVIL not in page


def test_a_run_that_has_only_captured_shows_that_and_no_more(world: World) -> None:
    world.capture()
    run = RunDir(world.run_dir)
    run.write_config(world.config)
    dataset, tokenizer = Dataset.open(world.values["cache"]["url"]), Tokenizer.load(world.teacher)
    data = collect(run, world.config, dataset, tokenizer)
    assert data.summary["eval"] == {"teacher": None, "student": None, "baseline": None}
    text = render(data, "early", "today")
    assert "Where the bytes go" in text and "Held-out loss" not in text and "None" not in text


def test_of_a_step_logged_twice_the_last_counts() -> None:
    lines = [{"run": "student", "step": 2, "ce": 1.0}, {"run": "student", "step": 1, "ce": 3.0}]
    lines += [{"run": "student", "step": 2, "ce": 2.0}, {"run": "baseline", "step": 1, "ce": 9.0}, {"note": "x"}]
    curves = curves_of(lines)
    assert [line["ce"] for line in curves["student"]] == [3.0, 2.0]
    assert len(curves["baseline"]) == 1


def test_the_mixture_of_a_run_under_way_is_averaged() -> None:
    curve = [{"step": n + 1, "planned": {"a": n / 200}, "realised": {"a": float(n % 2)}} for n in range(200)]
    rows = mixture_of(curve)
    assert len(rows) <= 60 and rows[-1]["step"] == 200
    assert rows[0]["realised"]["a"] == pytest.approx(0.5)


def test_times_are_those_of_stages_that_really_ran(world: World) -> None:
    assert stage_seconds(finished_run(world)) == {"capture": 3.5}


def test_a_sample_view_tells_choices_tail_and_entropy(world: World) -> None:
    world.capture()
    dataset = Dataset.open(world.values["cache"]["url"])
    samples, targets = dataset.read([row.tobytes() for row in dataset.catalog.sample_ids[:3]])
    for row in range(3):
        view = view_sample(samples, targets, row, str)
        told = [token for token in view.tokens if token.supervised]
        assert len(view.tokens) == samples.lengths()[row] and len(told) == samples.num_supervised()[row]
        for token in told:
            shares = [choice.probability for choice in token.choices]
            assert shares == sorted(shares, reverse=True)
            assert sum(shares) + token.tail == pytest.approx(1.0, abs=2e-3)
            assert token.entropy == pytest.approx(1.325, abs=0.01)
            assert token.agrees == (token.choices[0].text == token.text)
            assert token.probability is None or token.probability in shares
        assert view.agreement == pytest.approx(sum(token.agrees for token in told) / len(told))


def test_what_the_student_said_stands_beside_the_teacher(world: World) -> None:
    run = finished_run(world)
    dataset, tokenizer = Dataset.open(world.values["cache"]["url"]), Tokenizer.load(world.teacher)
    sample_id = dataset.catalog.sample_ids[0].tobytes()
    samples, _ = dataset.read([sample_id])
    tokens: list[dict[str, Any]] = [{"id": 1, "supervised": bool(flag)} for flag in samples.supervised]
    for token in tokens:
        if token["supervised"]:
            token.update(student_p=0.123, student_best=[5, 0.456])
    evaluation = run.result("evaluate")
    assert evaluation is not None
    evaluation["shown"] = [{"sample_id": sample_id.hex(), "source": "general", "tokens": tokens}]
    run.finish("evaluate", "k", evaluation)
    text = render(collect(run, world.config, dataset, tokenizer), "x", "today")
    assert text.count("<td>0.123</td>") == int(samples.supervised.sum()) and "0.456" in text


def test_tasks_and_what_was_forgotten_are_shown(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished_run(world)
    evaluation = run.result("evaluate")
    assert evaluation is not None
    score = {"metric": "accuracy", "score": 0.625, "low": 0.5, "high": 0.75, "examples": 8}
    for name in ("student", "baseline"):
        evaluation[name]["tasks"] = {"quiz": score}
    sources = {"general": {"before": 3.25, "after": 3.5, "kl": 0.125}}
    evaluation["student"]["forgetting"] = {"from": "student-pretrain", "sources": sources}
    run.finish("evaluate", "k", evaluation)
    dataset, tokenizer = Dataset.open(world.values["cache"]["url"]), Tokenizer.load(world.teacher)
    text = render(collect(run, world.config, dataset, tokenizer), "x", "today")
    for shown in ("quiz", "0.500 to 0.750", "What the last stage changed", "student-pretrain", "KL(before ‖ after)"):
        assert shown in text
    show_result(Terminal(False, False), {"eval": evaluation, "run_dir": "x"})
    printed = capsys.readouterr().out
    for shown in ("0.625 (0.500 to 0.750)", "since student-pretrain", "3.5000"):
        assert shown in printed


def test_white_space_is_made_visible() -> None:
    assert visible(" ") == "␣" and visible("\n\t") == "⏎⇥" and visible(" word") == " word"


class _Balance(HTMLParser):
    """Keeps the stack of open elements; a page that closes all of them leaves it empty."""

    VOID = frozenset({"meta", "line", "rect", "circle", "polyline", "polygon", "path", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.links += [value for name, value in attrs if name in {"src", "href"}]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open and self.open[-1] == tag, (tag, self.open[-3:])
            self.open.pop()


def test_a_capture_through_an_endpoint_has_no_ranks() -> None:
    capture = {"ranks": [{"endpoint": "http://localhost/v1", "model": "m"}], "replicas_lost": 1}
    assert _capture_rows(capture, "USD") == [["replicas lost and replaced", "1"]]
