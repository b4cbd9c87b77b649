"""Tokens per second of one process into ready torch tensors, beside other loaders that hold the same rows; and memory.

    python benchmarks/reader.py                        # all readers, folder and S3 server, both orders
    python benchmarks/reader.py --readers lectern,litdata --stores folder
    python benchmarks/reader.py --memory               # peak memory against the size of the dataset

Install the peers with the extra `bench` and `pip install --no-deps mosaicml-streaming==0.13.0`; those that are missing
are left out.

Every measurement runs in a process of its own, after one of each library that nobody counts. `first_pass` is from
opening to the end of the first pass with nothing kept from before (the system's page cache is warm, libraries are
imported); `next_passes` is the median of the passes after it. The same per second of the process's own CPU time, all
its threads together, ends in `_cpu`: it holds on a busy machine too. A random order is another permutation of all
samples in every pass, or the reader's own shuffle. `tokens` are those of the windows. The S3 server is moto's, in a
process of its own. The dataset is compacted, for the others have their index too.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
from reading.rows import identity, make_rows

from storage.compaction import compact
from storage.open_shard import num_bytes
from storage.reader import Dataset
from storage.shard_source import Reading
from storage.writer import DatasetWriter

GOAL = 2.0
WINDOW_TOKENS = 1024
PER_UNIT = 64
BATCH = 16
CHILD_LIMIT_S = 60
VARIANTS = (
    "lectern",
    "mds",
    "mds-index",
    "mds-zstd",
    "mds-checked",
    "litdata",
    "litdata-index",
    "litdata-zstd",
    "datasets",
)
"""Readers; `-zstd`: compressed by its own option, `-checked`: with a SHA-256 of each file besides, which it checks as
Lectern does, `-index`: a random order by index instead of its own shuffle."""


@dataclass(frozen=True)
class Task:
    """One measurement."""

    reader: str
    store: str
    order: str
    url: str
    num_samples: int
    passes: int


def main() -> None:
    """Run the measurements and print one JSON line each, then the ratios."""
    args = _arguments()
    if args.child:
        print(json.dumps(_measure(Task(**json.loads(args.child)))))
        return
    if args.memory:
        print(json.dumps(memory_figures(args.times)))
        return
    with tempfile.TemporaryDirectory(prefix="lectern-bench-") as name:
        folder = Path(args.folder or name)
        args.readers = [reader for reader in args.readers.split(",") if _installed(reader)]
        sizes = _write_all(folder, args.samples, args.readers)
        print(json.dumps({"bytes": sizes, "samples": args.samples, "window_tokens": WINDOW_TOKENS}), flush=True)
        for reader in {reader.partition("-")[0]: reader for reader in args.readers}.values():
            _run(Task(reader, "folder", "stored", f"{folder}/{_form(reader)}", args.samples, 1))
        results = []
        for store in args.stores.split(","):
            with _served(folder, store) as place:
                results += list(_run_all(args, store, place))
        for line in _ratios(results):
            print(json.dumps(line), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--readers", default=",".join(VARIANTS))
    parser.add_argument("--stores", default="folder,s3")
    parser.add_argument("--orders", default="stored,random")
    parser.add_argument("--passes", type=int, default=3, help="passes after the first one")
    parser.add_argument("--folder", help="keep the rows here and find them again; none: a temporary folder")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--times", type=int, default=100, help="size of the larger dataset of --memory")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def _installed(reader: str) -> bool:
    library = {"mds": "streaming", "litdata": "litdata", "datasets": "datasets"}.get(reader.partition("-")[0])
    return library is None or find_spec(library) is not None


def _write_all(folder: Path, num_samples: int, readers: list[str]) -> dict[str, int]:
    """Write the same rows in every format; returns the bytes of each."""
    from reading.readers import row_of, write_litdata, write_mds

    num_units = num_samples // PER_UNIT
    forms = {"lectern", *(_form(reader) for reader in readers)}
    if all((folder / form).exists() for form in forms):
        return _sizes(folder)
    units = [make_rows(PER_UNIT, WINDOW_TOKENS, seed) for seed in range(num_units)]
    writer = DatasetWriter.create(str(folder / "lectern"), identity())
    for n, unit in enumerate(units):
        writer.commit(f"u{n:04d}", *unit, attempt=1)
    compact(writer.store, writer.info)
    (folder / "spec.json").write_text(json.dumps({"per_unit": PER_UNIT, "window_tokens": WINDOW_TOKENS}))
    for form in sorted(forms - {"lectern"}):
        compression = "zstd" if "-" in form else None
        if form.startswith("mds"):
            hashes = ["sha256"] if form.endswith("-checked") else []
            write_mds(folder / form, (row_of(*unit, n) for unit in units for n in range(PER_UNIT)), compression, hashes)
        elif form.startswith("litdata"):
            write_litdata(folder / form, folder, num_units, compression)
    return _sizes(folder)


def _sizes(folder: Path) -> dict[str, int]:
    return {
        part.name: sum(file.stat().st_size for file in part.rglob("*") if file.is_file())
        for part in sorted(folder.iterdir())
        if part.is_dir()
    }


def _run_all(args: argparse.Namespace, store: str, place: str) -> Iterator[dict[str, Any]]:
    for order in args.orders.split(","):
        for reader in args.readers:
            if order == "stored" and reader.endswith("-index"):
                continue
            task = Task(reader, store, order, f"{place}/{_form(reader)}", args.samples, args.passes)
            line = {"reader": reader, "store": store, "order": order, **_run(task)}
            print(json.dumps(line), flush=True)
            yield line


def _form(reader: str) -> str:
    """Return the folder of the rows that a reader reads."""
    return "lectern" if reader == "datasets" else reader.removesuffix("-index")


def _run(task: Task) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", json.dumps(asdict(task))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CHILD_LIMIT_S)
    except subprocess.TimeoutExpired:
        return {"error": [f"not done within {CHILD_LIMIT_S} s"]}
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1:]}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def _measure(task: Task) -> dict[str, Any]:
    """Read in this process; returns tokens/s of the first and of the later passes, and a digest of the rows."""
    from reading import readers

    kind, _, option = task.reader.partition("-")
    readers.import_peer(kind)
    orders = [
        None if task.order == "stored" else np.random.default_rng(n).permutation(task.num_samples)
        for n in range(task.passes + 2)
    ]
    with tempfile.TemporaryDirectory(prefix="lectern-scratch-") as name:
        began, cpu_began = time.perf_counter(), time.process_time()
        if kind in {"lectern", "datasets"}:
            read = getattr(readers, kind)(task.url, Path(name), BATCH)
        else:
            read = getattr(readers, kind)(task.url, Path(name), BATCH, own_shuffle=option != "index")
        seconds, cpu_s = [], []
        for n in range(1 + task.passes):
            count = sum(len(batch["tokens"]) for batch in read(orders[n]))
            seconds.append(time.perf_counter() - began)
            cpu_s.append(time.process_time() - cpu_began)
            assert count == task.num_samples * WINDOW_TOKENS, f"{count} tokens"
            began, cpu_began = time.perf_counter(), time.process_time()
        digest = _digest(read(orders[-1]))
    return {
        "first_pass": round(count / seconds[0]),
        "next_passes": round(count / median(seconds[1:])),
        "first_pass_cpu": round(count / cpu_s[0]),
        "next_passes_cpu": round(count / median(cpu_s[1:])),
        "digest": digest,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }


def _digest(batches: Any) -> list[float]:
    """Return sums over all columns, the same for any order of the samples."""
    sums: dict[str, float] = {}
    for batch in batches:
        for name in (
            "tokens",
            "supervised",
            "target_count",
            "target_id",
            "target_logprob",
            "target_draws",
            "tail_mass",
        ):
            sums[name] = sums.get(name, 0.0) + float(batch[name].double().sum())
        sums["sample_id"] = sums.get("sample_id", 0.0) + float(batch["sample_id"].double().sum())
    return [round(sums[name], 1) for name in sorted(sums)]


def _ratios(results: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    digests = {json.dumps(result["digest"]) for result in results if "digest" in result}
    yield {"same_rows": len(digests) == 1}
    for store, order in dict.fromkeys((result["store"], result["order"]) for result in results):
        group = {r["reader"]: r for r in results if (r["store"], r["order"]) == (store, order) and "digest" in r}
        own = group.pop("lectern", None)
        if own is None or not group:
            continue
        line: dict[str, Any] = {"store": store, "order": order, "goal": GOAL}
        for what in ("first_pass", "next_passes", "first_pass_cpu", "next_passes_cpu"):
            best = max(group, key=lambda name, what=what: group[name][what])  # type: ignore[misc]
            line[what] = {"ratio": round(own[what] / group[best][what], 2), "best_peer": best}
        yield line


@contextmanager
def _served(folder: Path, store: str) -> Iterator[str]:
    """Give the place of the formats: the folder itself, or a bucket of an S3 server that holds its files."""
    if store == "folder":
        yield str(folder)
        return
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"], stderr=subprocess.PIPE, text=True
    )
    try:
        assert server.stderr is not None
        endpoint = next(line.split()[-1] for line in server.stderr if "Running on" in line)
        threading.Thread(target=server.stderr.read, daemon=True).start()
        os.environ |= {
            "AWS_ENDPOINT_URL": endpoint,
            "S3_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "bench",
            "AWS_SECRET_ACCESS_KEY": "bench",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        urlopen(Request(f"{endpoint}/bench", method="PUT")).close()
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            key = file.relative_to(folder).as_posix()
            # Without a type of its own the server would parse the bytes as a form.
            plain = {"Content-Type": "application/octet-stream"}
            urlopen(Request(f"{endpoint}/bench/{key}", file.read_bytes(), plain, method="PUT")).close()
        yield "s3://bench"
    finally:
        server.terminate()
        server.wait()


# --- memory ----------------------------------------------------------------------------------------------------------

MEMORY_BYTES = 16 << 20
SMALL_UNITS = 8


def memory_figures(times: int) -> dict[str, Any]:
    """Return the peak memory of reading a dataset, and one `times` as large, all samples in a random order."""
    figures: dict[str, Any] = {"memory_bytes": MEMORY_BYTES}
    for name, factor in (("small", 1), ("large", times)):
        with tempfile.TemporaryDirectory(prefix="lectern-bench-") as folder:
            tokens = _write_many(folder, SMALL_UNITS * factor)
            code = f"import sys; sys.path[:0] = {sys.path!r}; import reader; print(reader.peak_memory({folder!r}))"
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            figures[name] = {"tokens": tokens, **json.loads(done.stdout.replace("'", '"'))}
    figures["growth_mib"] = round(figures["large"]["peak_mib"] - figures["small"]["peak_mib"], 1)
    return figures


def _write_many(url: str, num_units: int) -> int:
    """Write units of 8 windows with the same targets and different tokens; returns the tokens."""
    from storage.samples import Sample, SampleBatch

    samples, targets = make_rows(8, WINDOW_TOKENS, 0)
    writer = DatasetWriter.create(url, identity())
    for n in range(num_units):
        windows = []
        for row in range(len(samples)):
            sample = samples.sample(row)
            tokens = sample.tokens.copy()
            tokens[:2] = n, row
            windows.append(Sample(sample.source, tokens, sample.supervised, sample.document))
        writer.commit(f"u{n:05d}", SampleBatch.of(windows), targets, attempt=1)
    return num_units * samples.num_tokens


def peak_memory(url: str) -> dict[str, Any]:
    """Read every sample once in a random order; returns the peak of this process above what it was before."""
    before = _resident_mib()
    dataset = Dataset.open(url, reading=Reading(memory_bytes=MEMORY_BYTES))
    ids = dataset.catalog.sample_ids[np.random.default_rng(0).permutation(len(dataset.catalog))]
    decoded = sum(num_bytes(shard) for shard in dataset.iterate(ids[n : n + 4] for n in range(0, len(ids), 4)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"decoded_mib": round(decoded / 2**20, 1), "peak_mib": round(peak - before, 1)}


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    main()
