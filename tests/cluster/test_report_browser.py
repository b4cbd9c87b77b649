"""The report in a real browser, on a desk and on a phone, light and dark."""

import os
import shutil
from pathlib import Path

import pytest

from cluster.rundir import RunDir
from cluster.stages.report import write_report
from storage.reader import Dataset
from storage.tokenizer import Tokenizer
from tests.cluster.browser import look_at
from tests.cluster.conftest import World
from tests.cluster.test_report import finished_run
from tests.cluster.test_timeline import RUN, plan

CHROMIUM = os.environ.get("LECTERN_TEST_CHROMIUM") or shutil.which("chromium") or ""
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")]

ASK = {
    "wide": """[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, pre, svg, details') &&
        e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))""",
    "plots": "[...document.querySelectorAll('svg.plot')].map(e => [e.getAttribute('aria-label'), e.clientHeight])",
    "empty": "[...document.querySelectorAll('svg.plot')].filter(e => /nothing was/.test(e.textContent)).length",
    "background": "getComputedStyle(document.body).backgroundColor",
    "titles": "[...document.querySelectorAll('h2')].map(e => e.textContent)",
}


@pytest.fixture
def report(world: World) -> Path:
    """The report of a run on a cluster that lost a node, with a plan."""
    import json

    world.values["cluster"] = {"node_types": {"spot": {"labels": {"role": "t"}, "price_per_hour": 4.0}}}
    run: RunDir = finished_run(world)
    run.store.write("plan.json", json.dumps(plan()).encode())
    run.store.write("events.jsonl", "".join(json.dumps(event) + "\n" for event in RUN).encode())
    write_report(run, world.config, Dataset.open(world.values["cache"]["url"]), Tokenizer.load(world.teacher))
    return world.run_dir / "report.html"


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_whole_on_every_screen(report: Path, width: int, scheme: str) -> None:
    page = look_at(CHROMIUM, report, width, scheme, ASK)
    if folder := os.environ.get("LECTERN_TEST_PICTURES"):
        Path(folder, f"report-{width}-{scheme}.png").write_bytes(page.picture)
    assert page.messages == []
    assert page.requests == [report.as_uri()]
    assert page.scroll_width == width and page.values["wide"] == []
    assert len(page.values["plots"]) >= 8 and page.values["empty"] == 0
    flat = [plot for plot in page.values["plots"] if plot[1] < 15]  # one row of bars on a phone has 20 pixels
    assert flat == []
    assert {"Machines", "Failures survived", "The run"} <= set(page.values["titles"])
    channels = [int(part) for part in page.values["background"].removeprefix("rgb(").rstrip(")").split(",")]
    assert (sum(channels) > 600) == (scheme == "light")
