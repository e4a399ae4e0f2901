"""How jobs are handed to workers, behind the interface of `concurrent.futures`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any, TypeVar

import torch

from svdcli.linalg.machine import keep_temporaries, keeping_temporaries, return_freed_memory

Item = TypeVar("Item")


Answer = TypeVar("Answer")


_WORKERS = 2


class Inline(Executor):
    """Does what is submitted at once, in this thread: for accelerators, and for one thread."""

    def __init__(self) -> None:
        self._memory = keeping_temporaries()
        self._memory.__enter__()

    def submit(self, fn: Callable[..., Answer], /, *args: Any, **kwargs: Any) -> Future[Answer]:
        future: Future[Answer] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._memory.__exit__(None, None, None)


def executor_for(device: torch.device) -> tuple[Executor, int]:
    """(who does the jobs, how many at a time): two workers on a CPU with two threads or more.

    Each gets its share of the threads: reading and writing one layer then hides behind the
    mathematics of the other. Two, so that memory still follows the largest layer.
    """
    return_freed_memory()
    if device.type != "cpu" or torch.get_num_threads() < 2:
        return Inline(), 1
    share = (threads_each(device),)
    return ThreadPoolExecutor(_WORKERS, initializer=_start_worker, initargs=share), _WORKERS


def map_unordered(
    work: Callable[[Item], Answer],
    items: Iterable[Item],
    device: torch.device,
    done: Callable[[Answer], None] | None = None,
) -> Iterator[Answer]:
    """Do `work` on every item and yield the answers as they come.

    done is told each answer even where nobody takes it any more: an error, or an interrupt, lets
    the work under way end first.
    """
    executor, at_once = executor_for(device)
    queue, running = iter(items), set[Future[Answer]]()

    def submit(count: int) -> set[Future[Answer]]:
        futures = {executor.submit(work, item) for item in itertools.islice(queue, count)}
        if done is not None:
            for future in futures:
                future.add_done_callback(partial(_tell, done))
        return futures

    try:
        running = submit(at_once)
        while running:
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            running |= submit(len(ended))
            for future in ended:
                yield future.result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _tell(done: Callable[[Answer], None], future: Future[Answer]) -> None:
    if not future.cancelled() and future.exception() is None:
        done(future.result())


def threads_each(device: torch.device) -> int:
    """Threads of one worker on a CPU: products of several are rounded in another order."""
    return max(1, torch.get_num_threads() // _WORKERS) if device.type == "cpu" else 0


def _start_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    keep_temporaries()
