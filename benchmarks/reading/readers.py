"""The readers that are compared: how each writes the rows, and its fastest documented way of reading them.

Every reader hands over the same batches: a dict of torch tensors that own their memory, the samples of a batch one
after the other (`tokens`, `supervised`, `target_count`, `target_id`, `target_logprob`, `target_draws`, `tail_mass`)
and the sample ids. Each runs in one process with the threads that it starts by itself.
"""

import json
import os
import shutil
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from storage.reader import Dataset
from storage.samples import SampleBatch
from storage.shard_source import Reading
from storage.targets import TargetBatch
from storage.torch_dataset import tensors

DTYPES = {
    "sample_id": np.uint8,
    "tokens": np.int32,
    "supervised": np.bool_,
    "target_count": np.uint8,
    "target_id": np.int32,
    "target_logprob": np.float16,
    "target_draws": np.uint8,
    "tail_mass": np.float16,
}
Batches = Iterator[dict[str, torch.Tensor]]
CHUNK_BYTES = 64 << 20


def row_of(samples: SampleBatch, targets: TargetBatch, n: int) -> dict[str, np.ndarray]:
    """Return sample `n` as arrays."""
    one, own = samples.take([n]), targets.take([n])
    assert own.draws is not None
    arrays = (one.sample_id[0], one.tokens, one.supervised, own.count, own.id, own.logprob, own.draws[0], own.tail_mass)
    return {name: array.astype(DTYPES[name]) for name, array in zip(DTYPES, arrays, strict=True)}


def collate(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Join the rows of a batch."""
    return {name: torch.from_numpy(np.concatenate([row[name] for row in rows])) for name in DTYPES}


def batches_of(order: Sequence[int] | np.ndarray, size: int) -> list[list[int]]:
    """Cut an order into batches."""
    return [[int(n) for n in order[first : first + size]] for first in range(0, len(order), size)]


def import_peer(kind: str) -> None:
    """Import the library of a reader, so that no measurement counts it, and those that are taken when first needed."""
    for name in ("pandas", "s3fs", "boto3"):
        import_module(name)
    if kind == "mds":
        import_streaming()
    elif kind in {"litdata", "datasets"}:
        import_module(kind)


# --- Lectern ---------------------------------------------------------------------------------------------------------


def lectern(url: str, scratch: Path, size: int, **settings: Any) -> Callable[[np.ndarray | None], Batches]:
    """Read by sample id, ahead of time; `order` counts samples as they are stored."""
    reading = Reading(disk_bytes=8 << 30, disk_folder=str(scratch / "lectern"), **settings)
    dataset = Dataset.open(url, reading=reading)
    ids = dataset.catalog.sample_ids

    def read(order: np.ndarray | None) -> Batches:
        wanted = ids if order is None else ids[order]
        return map(tensors, dataset.iterate(wanted[n : n + size] for n in range(0, len(wanted), size)))

    return read


# --- mosaicml-streaming ----------------------------------------------------------------------------------------------


def import_streaming() -> Any:
    """Import streaming. It asks for torchvision only for its image classes: an empty one stands in for it."""
    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
        module: Any = types.ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.VisionDataset, module.to_tensor = object, None
        sys.modules.setdefault(name, module)
    import streaming

    return streaming


def write_mds(folder: Path, rows: Iterator[dict[str, np.ndarray]], compression: str | None, hashes: list[str]) -> None:
    """Write shards of raw bytes, which decode fastest."""
    columns = dict.fromkeys(DTYPES, "bytes")
    with import_streaming().MDSWriter(
        out=str(folder), columns=columns, compression=compression, hashes=hashes, size_limit=CHUNK_BYTES
    ) as out:
        for row in rows:
            out.write({name: array.tobytes() for name, array in row.items()})


def mds(url: str, scratch: Path, size: int, own_shuffle: bool) -> Callable[[np.ndarray | None], Batches]:
    """Iterate; a random order either by its own shuffle or by index, as `own_shuffle` says."""
    streaming = import_streaming()
    streaming.base.util.clean_stale_shared_memory()
    # Compressed files are read from where the uncompressed ones are kept, which is not beside them.
    remote = None if url.startswith("/") and url.endswith("/mds") else url
    validate_hash = "sha256" if url.endswith("-checked") else None
    local = str(scratch / "mds") if remote else url
    made: dict[bool, Any] = {}

    def dataset(shuffle: bool) -> Any:
        if shuffle not in made:
            made[shuffle] = streaming.StreamingDataset(
                remote=remote,
                local=local,
                shuffle=shuffle,
                batch_size=size,
                num_canonical_nodes=1,
                keep_zip=False,
                validate_hash=validate_hash,
            )
        return made[shuffle]

    def read(order: np.ndarray | None) -> Batches:
        if order is None or own_shuffle:
            yield from _collected(iter(dataset(order is not None)), size)
            return
        source = dataset(False)
        for batch in batches_of(order, size):
            yield collate([_from_bytes(source[n]) for n in batch])

    return read


def _from_bytes(row: dict[str, bytes]) -> dict[str, np.ndarray]:
    return {name: np.frombuffer(row[name], dtype) for name, dtype in DTYPES.items()}


def _collected(rows: Iterator[dict[str, bytes]], size: int) -> Batches:
    batch: list[dict[str, np.ndarray]] = []
    for row in rows:
        batch.append(_from_bytes(row))
        if len(batch) == size:
            yield collate(batch)
            batch = []
    if batch:
        yield collate(batch)


# --- litdata ---------------------------------------------------------------------------------------------------------


def _to_tensors(row: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in row.items()}


class _RowsOf:
    """Gives `optimize` the rows of one part of the work."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self, part: int) -> Iterator[dict[str, torch.Tensor]]:
        from reading.rows import make_rows

        spec = json.loads((Path(self.folder) / "spec.json").read_text())
        samples, targets = make_rows(spec["per_unit"], spec["window_tokens"], part)
        for n in range(len(samples)):
            yield _to_tensors(row_of(samples, targets, n))


def write_litdata(folder: Path, spec_folder: Path, num_units: int, compression: str | None) -> None:
    """Write chunks of 1-D tensors, which litdata stores without a header of their own."""
    import litdata

    litdata.optimize(
        fn=_RowsOf(str(spec_folder)),
        inputs=list(range(num_units)),
        output_dir=str(folder),
        chunk_bytes=CHUNK_BYTES,
        compression=compression,
        num_workers=1,
        reorder_files=False,
        verbose=False,
    )


def litdata(url: str, scratch: Path, size: int, own_shuffle: bool) -> Callable[[np.ndarray | None], Batches]:
    """Iterate; a random order either by its own shuffle or by index, as `own_shuffle` says."""
    import litdata as lib

    options: dict[str, Any] = {"cache_dir": str(scratch / "litdata"), "max_cache_size": "50GB"}
    if not url.startswith("/"):
        options["storage_options"] = {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]}
        # A server without TLS is refused, and no option of litdata's reaches the client that refuses it.
        import_module("litdata.streaming.downloader")._OBSTORE_CLIENT_OPTIONS["allow_http"] = "true"
    else:
        del options["cache_dir"]

    def joined(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {name: torch.cat([row[name] for row in rows]) for name in DTYPES}

    def read(order: np.ndarray | None) -> Batches:
        source = lib.StreamingDataset(url, shuffle=order is not None and own_shuffle, **options)
        if order is None or own_shuffle:
            rows: list[dict[str, torch.Tensor]] = []
            for row in source:
                rows.append(row)
                if len(rows) == size:
                    yield joined(rows)
                    rows = []
            if rows:
                yield joined(rows)
            return
        for batch in batches_of(order, size):
            yield joined([source[n] for n in batch])

    return read


# --- datasets --------------------------------------------------------------------------------------------------------


def datasets(url: str, scratch: Path, size: int) -> Callable[[np.ndarray | None], Batches]:
    """Load the plain Parquet files of the Lectern dataset into its memory-mapped cache and read Arrow tables."""
    import datasets as lib

    lib.disable_progress_bars()
    options = {} if url.startswith("/") else {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]}
    dataset = Dataset.open(url)
    files = [f"{url}/{record.data_key}" for record in dataset.manifests]
    loaded = lib.load_dataset(
        "parquet",
        data_files=files,
        split="train",
        columns=list(DTYPES),
        cache_dir=str(scratch / "datasets"),
        storage_options=options or None,
    ).with_format("arrow")

    def read(order: np.ndarray | None) -> Batches:
        if order is None:
            yield from map(_from_arrow, loaded.iter(batch_size=size))
            return
        for batch in batches_of(order, size):
            yield _from_arrow(loaded[batch])

    return read


def _from_arrow(table: Any) -> dict[str, torch.Tensor]:
    found = {}
    for name in DTYPES:
        parts = []
        for chunk in table.column(name).chunks:
            if name == "sample_id":
                parts.append(np.frombuffer(b"".join(chunk.to_pylist()), np.uint8))
            else:
                parts.append(chunk.flatten().to_numpy(zero_copy_only=False))
        found[name] = torch.from_numpy(np.concatenate(parts))
    return found


def forget(folder: Path) -> None:
    """Delete what a reader kept."""
    shutil.rmtree(folder, ignore_errors=True)
