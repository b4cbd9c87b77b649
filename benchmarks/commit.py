"""Commits under races, faults and damage, and what opening a large dataset costs. One JSON line per measure:

    python benchmarks/commit.py                     # all four
    python benchmarks/commit.py race --writers 16 --units 1000
    python benchmarks/commit.py open --shards 100000

`race`: processes that commit the same units on an S3 server, four at once at each; baseline: one process alone, in the
same run.
`faults`: a process that ends before or after every change it makes, by an exception or SIGKILL; and two writers and
two compactors at once while a share of the requests fails, on a folder and over HTTP. `damage`: one random change to
the files. `open`: requests, bytes and seconds of opening with and without an index. The S3 server is moto's, on
loopback; its own speed, some hundred requests a second, bounds the rates. Run it with nothing else on the machine.
"""

import argparse
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.error import URLError
from urllib.request import Request, urlopen
from uuid import uuid4

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "storage")]

from damage import build_sound, damage_trial, rows_of  # noqa: E402
from storage_faults import CountingStore, FaultyProxy  # noqa: E402
from trials import (  # noqa: E402
    end_at_step,
    faulty_store,
    identity,
    live,
    make_units,
    num_steps,
    race,
    wrong_rows,
)

from storage.catalog import Catalog  # noqa: E402
from storage.committed import write_generation  # noqa: E402
from storage.compaction import compact  # noqa: E402
from storage.gc import collect_garbage  # noqa: E402
from storage.index import EMPTY  # noqa: E402
from storage.info import read_info  # noqa: E402
from storage.manifest import ManifestRecord  # noqa: E402
from storage.object_store import Store  # noqa: E402
from storage.verify import verify_dataset  # noqa: E402
from storage.writer import DatasetWriter  # noqa: E402
from tests.storage.conftest import build_samples, build_targets  # noqa: E402

NOW = -60.0
GROUPS = 4
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None


@contextmanager
def s3_server() -> Iterator[str]:
    """Run moto's server in a process of its own; yield its address."""
    port = 20_000 + os.getpid() % 20_000
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "benchmark",
        "AWS_SECRET_ACCESS_KEY": "benchmark",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        for _ in range(1200):
            try:
                urlopen(f"http://127.0.0.1:{port}/moto-api/").close()
                break
            except URLError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def new_bucket(endpoint: str) -> str:
    """Return the URL of a dataset in an empty bucket."""
    bucket = f"bucket-{uuid4().hex[:12]}"
    urlopen(Request(f"{endpoint}/{bucket}", method="PUT")).close()
    return f"s3://{bucket}/dataset"


def write_all(url: str, writer_number: int, num_units: int, go: Any, out: Any) -> None:
    """Commit all units of a race, each a sample of a few tokens, once told to go."""
    writer = DatasetWriter.open(url, identity())
    rng = np.random.default_rng(0)
    units = []
    for _ in range(num_units):
        samples = build_samples(60, 1, rng, longest=6)
        units.append((samples, build_targets(samples, identity(), rng)))
    out.put(("ready", writer_number, 0))
    go.wait()
    # Writers start in groups of the same order, so that each unit is fought over at once, and found committed later.
    start = (writer_number % GROUPS) * num_units // GROUPS
    order = [*range(start, num_units), *range(start)]
    won = sum(writer.commit(f"u{n:05d}", *units[n], attempt=writer_number).committed for n in order)
    out.put(("done", writer_number, won))


def timed_race(url: str, num_writers: int, num_units: int) -> tuple[float, list[int]]:
    """Let writers commit the same units at once; return seconds and what each has won."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["storage.writer", "s3fs", "numpy"])
    go, out = context.Event(), context.Queue()
    DatasetWriter.create(url, identity())
    workers = [context.Process(target=write_all, args=(url, n, num_units, go, out)) for n in range(num_writers)]
    for worker in workers:
        worker.start()
    for _ in workers:
        assert out.get(timeout=300)[0] == "ready"
    start = time.perf_counter()
    go.set()
    won = [out.get(timeout=900)[2] for _ in workers]
    seconds = time.perf_counter() - start
    for worker in workers:
        worker.join()
    return seconds, won


def measure_race(options: argparse.Namespace) -> None:
    """Race, then check that each unit is there once and that a clean-up leaves no orphan."""
    with s3_server() as endpoint:
        alone_s, _ = timed_race(new_bucket(endpoint), 1, options.units)
        url = new_bucket(endpoint)
        seconds, won = timed_race(url, options.writers, options.units)
        before = opening(url, "s3")
        info = read_info(Store(url))
        compact(Store(url), info)
        after = opening(url, "s3")
        orphans = len(verify_dataset(url).orphans)
        collect_garbage(Store(url), info, NOW)
        report = verify_dataset(url)
    tell(
        "commit race",
        writers=options.writers,
        units=options.units,
        committed=sum(won),
        committed_once=sum(won) == options.units == report.units and not report.problems,
        writers_that_won=sum(n > 0 for n in won),
        rows=report.rows,
        distinct_samples=report.samples,
        orphans_before_gc=orphans,
        orphans_after_gc=len(report.orphans),
        seconds=round(seconds, 1),
        attempts_per_s=round(options.writers * options.units / seconds, 1),
        alone_per_s=round(options.units / alone_s, 1),
        ratio=round(options.writers * alone_s / seconds, 2),
    )
    tell("open", store="s3", shards=options.units, index=False, **before)
    tell("open", store="s3", shards=options.units, index=True, **after)


def opening(url: str, kind: str) -> dict[str, Any]:
    """Open a dataset with counted requests."""
    store = CountingStore(url)
    start = time.perf_counter()
    catalog = Catalog.open(store, read_info(store))
    return {
        "samples": len(catalog),
        "requests": sum(store.requests.values()),
        "objects_read": store.requests["read"],
        "listings": store.requests["list"],
        "bytes": store.bytes,
        "seconds": round(time.perf_counter() - start, 3),
    }


def measure_open(options: argparse.Namespace) -> None:
    """Open datasets of growing size through an index of made-up records: nothing but it and dataset.json is there."""
    with s3_server() as endpoint, tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        for num_shards in (options.shards // 100, options.shards // 10, options.shards):
            for kind, url in (("folder", f"{folder}/{num_shards}"), ("s3", new_bucket(endpoint))):
                store = DatasetWriter.create(url, identity()).store
                index = made_up_index(num_shards, options.samples)
                assert write_generation(store, index, read_info(store).fingerprint)
                found = opening(url, kind)
                tell("open", store=kind, shards=num_shards, index=True, made_up=True, **found)


def made_up_index(num_shards: int, samples_each: int) -> Any:
    """Return an index of shards that do not exist."""
    rng = np.random.default_rng(0)
    fingerprint = identity().fingerprint
    records = [
        ManifestRecord.seal(
            unit=rng.bytes(16).hex(),
            attempt="1",
            size_bytes=1_000_000,
            sha256=rng.bytes(32).hex(),
            rows=samples_each,
            tokens=65_536,
            digest=rng.bytes(16).hex(),
            fingerprint=fingerprint,
        )
        for _ in range(num_shards)
    ]
    ids = rng.integers(0, 256, (num_shards * samples_each, 16), dtype=np.uint8)
    return EMPTY.extended(records, [ids], [60_000] * num_shards)


def measure_faults(options: argparse.Namespace) -> None:
    """Count wrong or missing rows after faults of every kind."""
    units = make_units(identity())
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        steps = num_steps(Path(folder) / "counted", units)
        ended = [
            (step, after, kill) for step in range(1, steps + 1) for after in (False, True) for kill in (False, True)
        ]
        wrong: list[str] = []
        for n, (step, after, kill) in enumerate(ended):
            url = Path(folder) / f"ended{n}"
            end_at_step(url, units, step, after, kill)
            live(Store(url), units, attempt=2)
            wrong += wrong_rows(str(url), units)
        tell("faults", kind="process ends at a step", steps=steps, trials=len(ended), wrong_or_missing=len(wrong))
        num_faults = num_folder = 0
        with patch("storage.object_store.wait_random_exponential", lambda **_: lambda _state: 0.0):
            for trial in within(options):
                url, rng, stores = Path(folder) / f"race{trial}", random.Random(trial), []
                DatasetWriter.create(str(url), identity())

                def make(url: Path = url, rng: random.Random = rng, stores: list[Any] = stores) -> Store:
                    stores.append(faulty_store(url, options.rate, rng))
                    return stores[-1]  # type: ignore[no-any-return]

                race(make, units, rng)
                num_faults += sum(store._backend.num_faults for store in stores)
                wrong += wrong_rows(str(url), units)
                num_folder += 1
        tell("faults", kind="requests to a folder", rate=options.rate, trials=num_folder, faults=num_faults,
             wrong_or_missing=len(wrong))  # fmt: skip
    num_faults = 0
    with s3_server() as endpoint:
        for trial in range(options.http_trials):
            url = new_bucket(endpoint)
            DatasetWriter.create(url, identity())
            with FaultyProxy(endpoint, options.rate, trial) as proxy:
                with patch.dict(os.environ, AWS_ENDPOINT_URL=proxy.endpoint):
                    race(lambda url=url: Store(url), units, random.Random(trial))  # type: ignore[misc]
                num_faults += proxy.num_faults
            wrong += wrong_rows(url, units)
    tell("faults", kind="requests over HTTP: 500, 503, short body, lost reply, hang-up", rate=options.rate,
         trials=options.http_trials, faults=num_faults, wrong_or_missing=len(wrong))  # fmt: skip
    tell("faults", kind="all", trials=len(ended) + num_folder + options.http_trials, wrong_or_missing=len(wrong),
         first=wrong[:3])  # fmt: skip


def measure_damage(options: argparse.Namespace) -> None:
    """Count what reader and verify make of random damage."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        sound = build_sound(Path(folder))
        truth = rows_of(sound)
        outcomes: Counter[str] = Counter()
        kinds: Counter[str] = Counter()
        for trial in within(options, options.damages):
            what, outcome, verified = damage_trial(sound, Path(folder) / "copy", truth, trial)
            outcomes[f"reader_{outcome}"] += 1
            outcomes["verify_found"] += verified
            kinds[what.split()[0]] += 1
    missed = {"reader_wrong": 0, **outcomes}
    tell("damage", trials=sum(kinds.values()), **missed, kinds=dict(kinds))


def within(options: argparse.Namespace, most: int | None = None) -> Iterator[int]:
    """Yield the seeds of so many trials as were asked for, as far as the time goes."""
    start = time.monotonic()
    for trial in range(options.first, options.first + (options.trials if most is None else most)):
        if trial > options.first and time.monotonic() - start > options.seconds:
            return
        yield trial


def tell(benchmark: str, **figures: Any) -> None:
    """Print one line."""
    print(json.dumps({"benchmark": benchmark, **figures}), flush=True)


MEASURES = {"race": measure_race, "faults": measure_faults, "damage": measure_damage, "open": measure_open}


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measure", nargs="*", choices=[[], *MEASURES], help="default: all")
    parser.add_argument("--writers", type=int, default=16)
    parser.add_argument("--units", type=int, default=1000)
    parser.add_argument("--trials", type=int, default=400, help="races on a folder under faults")
    parser.add_argument("--http-trials", type=int, default=60, help="races over HTTP under faults")
    parser.add_argument("--rate", type=float, default=0.2, help="share of the requests that fail")
    parser.add_argument("--damages", type=int, default=1000)
    parser.add_argument(
        "--first", type=int, default=0, help="seed of the first trial, to go on where another run ended"
    )
    parser.add_argument("--seconds", type=float, default=600.0, help="no further trial begins after this time")
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--samples", type=int, default=64, help="samples of a shard")
    options = parser.parse_args()
    for name in options.measure or MEASURES:
        MEASURES[name](options)


if __name__ == "__main__":
    main()
