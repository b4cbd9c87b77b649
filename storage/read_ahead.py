"""Reads batches in threads before they are asked for, within a number of bytes."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from storage.open_shard import Shard, num_bytes

Asked = TypeVar("Asked")


_FAR = 8
"""Batches that are looked at ahead, per thread."""


def read_ahead(
    read: Callable[[Asked], Shard],
    batches: Iterable[Asked],
    num_threads: int,
    most_bytes: int,
    at_hand: Callable[[Asked], bool] = lambda _: False,
) -> Iterator[Shard]:
    """Yield `read(batch)` of every batch, in order.

    Args:
        read: reads one batch; called in several threads at once.
        batches: what to read; taken from only as far as is read ahead.
        num_threads: batches that are read at once.
        most_bytes: of the batches that wait to be taken, taking each for as large as the largest so far; one batch
            may always wait.
        at_hand: tells that a batch is only to be copied. Handing it from thread to thread would cost more than that:
            it is read when it is taken, and those after it are looked at.
    """
    left = iter(batches)
    ahead: deque[Asked | Future[Shard]] = deque()
    pending = largest = 0
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="lectern-read")
    try:
        while True:
            # Until the first batch is here its size is unknown: only one is read.
            room = max(1, min(most_bytes // largest, 2 * num_threads)) if largest else 1
            while pending < room and len(ahead) < _FAR * num_threads and (batch := next(left, None)) is not None:
                late = not at_hand(batch)
                ahead.append(pool.submit(read, batch) if late else batch)
                pending += late
            if not ahead:
                return
            first = ahead.popleft()
            if isinstance(first, Future):
                pending -= 1
                shard = first.result()
                largest = max(largest, num_bytes(shard))
                yield shard
            else:
                yield read(first)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
