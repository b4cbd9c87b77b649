"""A short piece of the soak: real Ray nodes and processes are killed, and no row is lost or twice."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.soak


def soak(*options: str) -> dict[str, Any]:
    """Run it in a process of its own and return its figures; it fails where a check fails."""
    command = [sys.executable, "-m", "benchmarks.soak", "--documents", "40", "--limit-s", "150", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def test_kills_cost_no_row() -> None:
    figures = soak("--kills", "5", "--nodes", "2", "--seed", "4")
    assert figures["broken"] >= 5 and len(figures["of_these"]) > 1


def test_two_coordinators_share_a_dataset() -> None:
    figures = soak("--kills", "0", "--nodes", "2", "--drivers", "2")
    first, second = figures["scored_by_driver"]
    assert second > 0 and first + second >= figures["rows"]
