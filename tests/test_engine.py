"""Work is spread over two workers, never more, and nothing is lost on the way."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from svdcli.engine import spread

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 2, 4])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_every_answer_comes_and_at_most_two_are_under_way(threads: int) -> None:
    under_way, most, lock = 0, 0, threading.Lock()

    def work(item: int) -> int:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.002)
        assert torch.get_num_threads() == max(1, threads // 2)
        with lock:
            under_way -= 1
        return item * item

    assert sorted(spread(work, range(20), CPU)) == [item * item for item in range(20)]
    assert most == min(2, threads)


def test_an_error_ends_the_work_and_is_told(threads: int) -> None:
    started = []

    def work(item: int) -> int:
        started.append(item)
        if item == 3:
            raise ValueError("three")
        return item

    with pytest.raises(ValueError, match="three"):
        list(spread(work, range(100), CPU))
    assert len(started) < 10
