"""Reads batches in threads before they are asked for, within a number of bytes."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from storage.open_shard import Shard, num_bytes

Asked = TypeVar("Asked")


def read_ahead(
    read: Callable[[Asked], Shard], batches: Iterable[Asked], num_threads: int, most_bytes: int
) -> Iterator[Shard]:
    """Yield `read(batch)` of every batch, in order.

    Args:
        read: reads one batch; called in several threads at once.
        batches: what to read; taken from only as far as is read ahead.
        num_threads: batches that are read at once.
        most_bytes: of the batches that wait to be taken, taking each for as large as the largest so far; one batch
            may always wait.
    """
    left = iter(batches)
    ahead: deque[Future[Shard]] = deque()
    largest = 0
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="lectern-read")
    try:
        while True:
            # Until the first batch is here its size is unknown: so many at once as there are threads.
            room = max(1, min(most_bytes // largest, 2 * num_threads)) if largest else 1
            while len(ahead) < room and (batch := next(left, None)) is not None:
                ahead.append(pool.submit(read, batch))
            if not ahead:
                return
            shard = ahead.popleft().result()
            largest = max(largest, num_bytes(shard))
            yield shard
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
