"""Where shards come from: the local disk cache, or the store, hashed at the first read and decoded."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Self

from storage.config import CacheConfig
from storage.disk_cache import DiskCache
from storage.identity import DatasetIdentity, cache_folder
from storage.manifest import ManifestRecord
from storage.object_store import Store
from storage.open_shard import OpenShard
from storage.shard import read_shard

_FIRST_GUESS = 8.0
"""Decoded bytes per byte of a data file, before one has been decoded."""


@dataclass(frozen=True)
class Reading:
    """How a dataset is read."""

    verify_hashes: bool = True
    """Check each data file's SHA-256 the first time that this process reads it."""
    memory_bytes: int = 1 << 30
    """Bound of decoded shards in memory, those being loaded and batches read ahead included; at least one shard."""
    disk_bytes: int = 0
    """Bound of decoded shards on the local disk, all processes together; 0 keeps none there."""
    disk_folder: str | None = None
    """Where they lie; none means `shards` in Lectern's cache folder."""
    layers: tuple[str, ...] | None = None
    """Layers whose hidden states and attention are wanted; none means all. The others are neither fetched nor
    decoded."""

    @classmethod
    def of(cls, cache: CacheConfig, layers: Collection[str] | None = None) -> Self:
        """Take the settings from the config."""
        return cls(
            verify_hashes=cache.verify_hashes,
            memory_bytes=cache.read_memory_bytes,
            disk_bytes=cache.read_disk_bytes,
            disk_folder=cache.read_disk_folder,
            layers=None if layers is None else tuple(sorted(layers)),
        )

    def divided(self, count: int) -> Self:
        """Return the settings of one of `count` readers that share the memory."""
        return replace(self, memory_bytes=max(1, self.memory_bytes // count))


DEFAULT_READING = Reading()


class ShardSource:
    """Loads the shards of one dataset. Thread-safe.

    Decoded shards go to the disk cache where the store is remote; local ones only when memory did not hold them
    until they were needed again.
    """

    def __init__(
        self, store: Store, records: Sequence[ManifestRecord], identity: DatasetIdentity, reading: Reading
    ) -> None:
        self._store, self._records, self._reading = store, records, reading
        held = list(dict.fromkeys([*identity.capture.hidden, *identity.capture.attention]))
        layers = held if reading.layers is None else [layer for layer in held if layer in reading.layers]
        self._layers = None if layers == held else layers
        self._suffix = ""
        if self._layers is not None:
            self._suffix = "-" + blake2b("\0".join(layers).encode(), digest_size=8).hexdigest()
        self._disk = _disk(reading)
        self._ratio = _FIRST_GUESS
        self._loaded: set[int] = set()

    def expected_bytes(self, unit: int) -> int:
        """Return about how much memory loading a shard takes: the file, its decoded pieces, the arrays of all."""
        return int(self._records[unit].bytes * (1 + 2 * self._ratio))

    def load(self, unit: int) -> OpenShard:
        """Return a shard; IntegrityError when it is damaged."""
        record = self._records[unit]
        name = record.sha256 + self._suffix
        cached = self._disk.get(name) if self._disk is not None else None
        if cached is not None:
            return cached
        again = unit in self._loaded
        shard = OpenShard.of(read_shard(self._store, record, self._reading.verify_hashes and not again, self._layers))
        self._ratio = max(shard.num_bytes / record.bytes, self._ratio if self._loaded else 0.0)
        self._loaded.add(unit)
        wanted = self._disk is not None and self._reading.verify_hashes and (again or not self._store.is_local)
        if self._disk is not None and wanted:
            self._disk.put(name, shard)
        return shard


def _disk(reading: Reading) -> DiskCache | None:
    if not reading.disk_bytes:
        return None
    folder = Path(reading.disk_folder).expanduser() if reading.disk_folder else cache_folder() / "shards"
    return DiskCache(folder, reading.disk_bytes)
