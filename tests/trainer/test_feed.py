"""The feed: steps in order, read ahead within its bound, errors at the step that has them."""

import threading
import time
from typing import Any

import pytest

from storage.errors import IntegrityError
from trainer.feed import READ_AHEAD, Feed


def test_steps_come_in_order_however_long_each_takes_to_read() -> None:
    began: list[int] = []
    lock = threading.Lock()

    def load(step: int) -> Any:
        with lock:
            began.append(step)
        time.sleep(0.02 * (step % 3 == 0))
        return step

    with Feed(load, 5, 25) as feed:
        for step in range(5, 25):
            assert feed.next() == step  # type: ignore[comparison-overlap]
            assert max(began) <= step + READ_AHEAD + 1
    assert sorted(began) == list(range(5, 25))


def test_an_error_is_raised_at_its_own_step() -> None:
    def load(step: int) -> Any:
        if step == 2:
            raise IntegrityError("damaged")
        return step

    with Feed(load, 0, 6) as feed:
        assert [feed.next(), feed.next()] == [0, 1]
        with pytest.raises(IntegrityError, match="damaged"):
            feed.next()
