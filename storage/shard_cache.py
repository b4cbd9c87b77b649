"""Shards held in memory, least recently used first, within a number of bytes that counts those being loaded too."""

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from threading import Condition

from storage.open_shard import OpenShard


class ShardCache:
    """Loads shards by number and keeps what fits; a shard asked for twice at once is loaded once. Thread-safe."""

    def __init__(self, load: Callable[[int], OpenShard], expected: Callable[[int], int], memory_bytes: int) -> None:
        """Keep at most `memory_bytes`, or one shard.

        Args:
            load: returns a shard.
            expected: tells the bytes that loading a shard will need.
            memory_bytes: of all shards kept and being loaded.
        """
        self._load = load
        self._expected = expected
        self._limit = memory_bytes
        self._state = Condition()
        self._entries: OrderedDict[int, Future[OpenShard]] = OrderedDict()
        self._sizes: dict[int, int] = {}
        self._kept = 0
        self._reserved = 0

    def holds(self, unit: int) -> bool:
        """Tell whether a shard is here or on its way."""
        return unit in self._entries

    def get(self, unit: int) -> OpenShard:
        """Return a shard, from memory or by loading it; raises what loading raised."""
        with self._state:
            future = self._entries.get(unit)
            mine = future is None
            if future is None:
                future = self._entries[unit] = Future()
            self._entries.move_to_end(unit)
        if mine:
            self._fill(unit, future)
        return future.result()

    def _fill(self, unit: int, future: "Future[OpenShard]") -> None:
        size = 0
        expected = self._expected(unit)
        self._reserve(expected)
        try:
            shard = self._load(unit)
            size = shard.num_bytes
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(shard)
        with self._state:
            self._reserved -= expected
            if future.exception() is None:
                self._sizes[unit] = size
                self._kept += size
                self._evict(self._limit - self._reserved, newest=unit)
            else:
                del self._entries[unit]
            self._state.notify_all()

    def _reserve(self, expected: int) -> None:
        """Wait until `expected` bytes fit; alone, a shard may be larger than all the room there is."""
        with self._state:
            while True:
                self._evict(self._limit - self._reserved - expected)
                if self._reserved == 0 or self._kept + self._reserved + expected <= self._limit:
                    self._reserved += expected
                    return
                self._state.wait()

    def _evict(self, room: int, newest: int | None = None) -> None:
        """Let go of the least recently used shards, never of `newest`, until what is kept fits into `room`."""
        for unit in list(self._entries) if self._kept > room else ():
            if unit in self._sizes and unit != newest:
                del self._entries[unit]
                self._kept -= self._sizes.pop(unit)
                if self._kept <= room:
                    return
