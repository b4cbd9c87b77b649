"""report.json and report.html from what lies in the run directory."""

import json
from datetime import UTC, datetime
from typing import Any

from cluster.config import RunConfig
from cluster.report.data import collect
from cluster.rundir import RunDir
from storage.reader import Dataset
from storage.tokenizer import Tokenizer

JSON_KEY = "report.json"
HTML_KEY = "report.html"


def write_report(run: RunDir, config: RunConfig, dataset: Dataset, tokenizer: Tokenizer) -> dict[str, Any]:
    """Write both files and return the contents of report.json."""
    from cluster.report.html import render

    data = collect(run, config, dataset, tokenizer)
    made = datetime.now(UTC)
    title = run.url.rstrip("/").rpartition("/")[2]
    run.store.write(JSON_KEY, json.dumps(data.summary, indent=1, ensure_ascii=False).encode() + b"\n")
    run.store.write(HTML_KEY, render(data, title, made.strftime("%Y-%m-%d %H:%M UTC")).encode())
    return data.summary
