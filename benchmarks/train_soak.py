"""A training that everything happens to: its processes are killed at random until enough was broken.

    python -m benchmarks.train_soak --kills 30          # prints one JSON line

`lectern run` of a small pipeline on two ranks, once unbroken, then again while at random moments one of these is ended
with `kill -9`, each after at least one more step was made:

* `rank`: one of the two training processes;
* `controller`: Ray Train's controller, with which the command ends; it is typed again;
* `driver`: the command itself; it is typed again.

At the end the order of samples must be the unbroken run's to the byte, and each step's loss within 1e-4 of its.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from cluster.reaper import session_processes

ROOT = Path(__file__).parent.parent
TITLES = {"rank": "ray::RayTrainWorker", "controller": "ray::TrainController"}
TOLERANCE = 1e-4


def config(folder: Path, steps: int) -> Path:
    """Write the pipeline: the quickstart's corpora, a teacher and a student small enough for many starts."""
    values = yaml.safe_load((ROOT / "examples" / "quickstart.yaml").read_text())
    for source in values["data"]["sources"]:
        source["max_documents"] = 50
    values["data"]["window_tokens"] = 128
    small = {"vocab_size": 512, "hidden_size": 64, "layers": 2, "train_tokens": 5000, "window_tokens": 128}
    values["teacher"] |= {"sharding": "none", "ranks": 1, "embedded": small}
    values["cache"] |= {"url": str(folder / "dataset"), "unit_tokens": 8192}
    values["student"]["config"] |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    values["train"] |= {"steps": steps, "checkpoint_every": 10, "max_failures": 1000, "dtype": "float32"}
    values["evaluate"] = {"samples_per_source": 8, "baseline": False}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


class Run:
    """One run directory, and the command that works in it."""

    def __init__(self, folder: Path, name: str, config_path: Path) -> None:
        self.dir, self.log, self.cache = folder / name, folder / f"{name}.log", folder / "home"
        self._command = [sys.executable, "-m", "cluster.cli", "run", str(config_path), "--run-dir", str(self.dir)]
        self._command.append("--json")
        self.start()

    def start(self) -> None:
        """Type the command."""
        environment = {**os.environ, "LECTERN_CACHE": str(self.cache)}
        with self.log.open("ab") as log:
            self.driver = subprocess.Popen(self._command, stdout=log, stderr=log, env=environment, cwd=ROOT)

    def losses(self) -> dict[int, float]:
        """Return the loss of each step so far."""
        path = self.dir / "metrics.jsonl"
        whole = path.read_text().split("\n")[:-1] if path.exists() else []
        return {line["step"]: line["loss"] for line in map(json.loads, whole) if line["run"] == "student"}

    def pids(self, what: str) -> list[int]:
        """Return the processes of one kind."""
        if what == "driver":
            return [self.driver.pid]
        found = []
        for pid in session_processes(f"LECTERN_CACHE={self.cache}", self.driver.pid):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/cmdline").read_text().startswith(TITLES[what]):
                    found.append(pid)
        return found

    def order(self) -> str:
        """Return the digest of the order in which samples were trained on, once the run has ended well."""
        if self.driver.wait() != 0:
            raise SystemExit(f"a run ended with {self.driver.returncode}:\n{self.log.read_text()[-3000:]}")
        return str(json.loads(self.log.read_text().splitlines()[-1])["student"]["order_digest"])


def broken_run(run: Run, kills: int, chance: random.Random, deadline: float) -> Counter[str]:
    """Break a run until it ends; return what was killed."""
    broken: Counter[str] = Counter()
    while run.driver.poll() is None:
        time.sleep(chance.uniform(0.2, 3.0))
        if broken.total() >= kills or time.monotonic() > deadline or not run.losses():
            continue
        what = chance.choice(["rank", "rank", "controller", "driver"])
        pids = run.pids(what)
        if not pids:
            continue
        with contextlib.suppress(ProcessLookupError):
            os.kill(chance.choice(pids), signal.SIGKILL)
            broken[what] += 1
        if what in {"controller", "driver"}:
            run.driver.wait(120)
            run.start()
        before, until = max(run.losses()), time.monotonic() + 120
        seen = run.dir.joinpath("metrics.jsonl").stat().st_mtime_ns
        # Things break only after something was done: otherwise there may never be an end.
        while run.driver.poll() is None and time.monotonic() < until:
            if run.dir.joinpath("metrics.jsonl").stat().st_mtime_ns != seen and max(run.losses(), default=0) > before:
                break
            time.sleep(0.1)
    return broken


def main() -> None:
    """Run both and print the JSON line; exits with 1 where they differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--limit-s", type=float, default=1800, help="nothing breaks after that")
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(1000) if options.seed is None else options.seed
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="train-soak-") as temporary:
        folder = Path(temporary)
        path = config(folder, options.steps)
        unbroken = Run(folder, "unbroken", path)
        order, losses = unbroken.order(), unbroken.losses()
        broken: Counter[str] = Counter()
        apart, same, rounds = 0.0, True, 0
        deadline = began + options.limit_s
        while broken.total() < options.kills and time.monotonic() < deadline:
            rounds += 1
            run = Run(folder, f"broken-{rounds}", path)
            broken += broken_run(run, options.kills - broken.total(), random.Random(seed + rounds), deadline)
            same = same and run.order() == order
            found = run.losses()
            same = same and found.keys() == losses.keys()
            apart = max([apart, *(abs(found[step] - losses[step]) for step in found.keys() & losses.keys())])
    line: dict[str, Any] = {"benchmark": "train_soak", "broken": broken.total(), "of_these": dict(broken)}
    line |= {"rounds": rounds, "steps": options.steps, "same_order": same, "largest_loss_difference": apart}
    met = same and apart <= TOLERANCE and broken.total() >= options.kills
    line |= {"goal": TOLERANCE, "goal_met": met, "seed": seed, "seconds": round(time.monotonic() - began, 1)}
    print(json.dumps(line), flush=True)
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
