"""Decoded shards on a local disk, so that each is fetched and decoded once for all processes of a machine.

An entry is named by the SHA-256 of the data file it came from, so it can never serve another file. It is laid out as
safetensors are (eight bytes of header length, a JSON header, the arrays) with a SHA-256 over all of that at its end.
It is read through a memory map: only the rows that are asked for come into memory.
"""

import contextlib
import errno
import fcntl
import json
import mmap
import os
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from storage.backends import TEMPORARY_PREFIX
from storage.open_shard import OpenShard
from storage.samples import SampleBatch
from storage.targets import TargetBatch

SUFFIX = ".shard"
_DIGEST_BYTES = 32
_ALIGNMENT = 64
_STALE_S = 3600.0
"""Age at which a half-written entry belongs to a process that is gone."""


class DiskCache:
    """Entries in one folder, at most `limit_bytes` of them, the least recently used deleted first.

    Any number of processes may share the folder. A damaged entry is deleted and counts as missing. Where the disk is
    full or read-only nothing is kept, and nothing fails.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._checked: set[str] = set()
        self._lock = Lock()

    def get(self, name: str) -> OpenShard | None:
        """Return the entry of that name, mapped; its hash is checked the first time in this process."""
        path = self.folder / (name + SUFFIX)
        try:
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            os.utime(path)
        except OSError:
            return None
        except ValueError:  # an empty file cannot be mapped
            self._drop(path)
            return None
        if name not in self._checked:
            with memoryview(mapped) as view, view[:-_DIGEST_BYTES] as content, view[-_DIGEST_BYTES:] as digest:
                sound = sha256(content).digest() == digest
            if not sound:
                self._drop(path)
                return None
            self._checked.add(name)
        return _parse(mapped)

    def put(self, name: str, shard: OpenShard) -> bool:
        """Keep a shard under that name; False when it does not fit or cannot be written."""
        header, arrays = _layout(shard)
        size = len(header) + sum(len(_padding(a.nbytes)) + a.nbytes for a in arrays) + _DIGEST_BYTES
        if size > self.limit_bytes:
            return False
        path = self.folder / (name + SUFFIX)
        temporary = self.folder / f"{TEMPORARY_PREFIX}{uuid4().hex}"
        try:
            with self._alone():
                if path.exists():
                    return True
                self._make_room(size)
                _write(temporary, header, arrays)
                temporary.rename(path)
        except OSError:
            self._drop(temporary)
            return False
        self._checked.add(name)
        return True

    def _drop(self, path: Path) -> None:
        with contextlib.suppress(OSError):
            path.unlink()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the folder's lock: among all processes, so that their entries together keep to the limit."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._lock, (self.folder / ".lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _make_room(self, size: int) -> None:
        entries = []
        for entry in os.scandir(self.folder):
            facts = entry.stat()
            if entry.name.endswith(SUFFIX):
                entries.append((facts.st_mtime_ns, facts.st_size, entry.path))
            elif entry.name.startswith(TEMPORARY_PREFIX) and time.time() - facts.st_mtime > _STALE_S:
                Path(entry.path).unlink(missing_ok=True)
        total = sum(entry[1] for entry in entries)
        for _, freed, path in sorted(entries):
            if total + size <= self.limit_bytes:
                return
            Path(path).unlink(missing_ok=True)
            total -= freed


def _layout(shard: OpenShard) -> tuple[bytes, list[NDArray[Any]]]:
    """Return the header, its length before it, and the arrays in the order of the file."""
    fields_of = vars(shard.samples) | {f"target_{name}": value for name, value in vars(shard.targets).items()}
    fields_of |= {f"hidden.{layer}": states for layer, states in shard.targets.hidden.items()}
    fields_of |= {f"attention.{layer}": weights for layer, weights in shard.targets.attention.items()}
    fields_of |= {f"bounds.{level}": bounds for level, bounds in shard.bounds.items()}
    named = {name: np.ascontiguousarray(array) for name, array in fields_of.items() if isinstance(array, np.ndarray)}
    sources = list(dict.fromkeys(shard.samples.source))
    number = {source: n for n, source in enumerate(sources)}
    named["source"] = np.asarray([number[source] for source in shard.samples.source], dtype=np.int32)
    fields: dict[str, Any] = {"__metadata__": {"sources": sources}}
    at = 0
    for name, array in named.items():
        fields[name] = {"dtype": array.dtype.str, "shape": array.shape, "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes + len(_padding(array.nbytes))
    text = json.dumps(fields).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, list(named.values())


def _padding(size: int) -> bytes:
    return bytes(-size % _ALIGNMENT)


def _write(path: Path, header: bytes, arrays: list[NDArray[Any]]) -> None:
    digest = sha256()
    with path.open("xb", buffering=0) as file:
        for part in (header, *(part for array in arrays for part in (_raw(array), _padding(array.nbytes)))):
            digest.update(part)
            if file.write(part) != len(part):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        file.write(digest.digest())


def _raw(array: NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _parse(mapped: mmap.mmap) -> OpenShard:
    length = int.from_bytes(mapped[:8], "little")
    fields = json.loads(mapped[8 : 8 + length])
    sources = fields.pop("__metadata__")["sources"]
    found = {}
    for name, field in fields.items():
        dtype, shape = np.dtype(field["dtype"]), field["shape"]
        begin = 8 + length + field["data_offsets"][0]
        found[name] = np.frombuffer(mapped, dtype, int(np.prod(shape)), begin).reshape(shape)
    groups: dict[str, dict[str, NDArray[Any]]] = {"hidden": {}, "attention": {}, "bounds": {}}
    for name in [name for name in found if "." in name]:
        group, _, key = name.partition(".")
        groups[group][key] = found.pop(name)
    targets: dict[str, Any] = {"draws": None}
    for name in [name for name in found if name.startswith("target_")]:
        targets[name.removeprefix("target_")] = found.pop(name)
    source = [sources[n] for n in found.pop("source").tolist()]
    return OpenShard(
        SampleBatch(source=source, **found),
        TargetBatch(hidden=groups["hidden"], attention=groups["attention"], **targets),
        groups["bounds"],
    )
