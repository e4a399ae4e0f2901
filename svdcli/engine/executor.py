"""How jobs are handed to workers."""

from __future__ import annotations

import ctypes
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import TypeVar

import torch

from svdcli.linalg.scratch import keep_scratch, keeping_scratch

Item = TypeVar("Item")


Answer = TypeVar("Answer")


_WORKERS = 2


_MMAP_THRESHOLD = -3  # mallopt's name for it in glibc's malloc.h


def _give_memory_back() -> None:
    """Let glibc return every buffer of a megabyte or more when it is freed.

    Its threshold grows with what it sees, up to 32 MB: freed matrices then stay in the heaps of the
    two workers, in pieces. Reading and training, which need the same small buffers again and again,
    do better without.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**20)


def spread(
    work: Callable[[Item], Answer], items: Iterable[Item], device: torch.device
) -> Iterator[Answer]:
    """Do `work` on every item, two at a time on a CPU with two threads or more, and yield the
    answers as they come.

    Each worker gets its share of the threads: reading and writing one layer then hides behind the
    mathematics of the other. Two, so that memory still follows the largest layer. An error, or an
    interrupt, lets the work under way end first.
    """
    _give_memory_back()
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads < 2:
        with keeping_scratch():
            yield from map(work, items)
        return
    queue, running = iter(items), set[Future[Answer]]()
    pool = ThreadPoolExecutor(_WORKERS, initializer=_start_worker, initargs=(threads_each(device),))
    try:
        running = {pool.submit(work, item) for item in itertools.islice(queue, _WORKERS)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            running |= {pool.submit(work, item) for item in itertools.islice(queue, len(done))}
            for future in done:
                yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def threads_each(device: torch.device) -> int:
    """Threads of one worker on a CPU: products of several are rounded in another order."""
    return max(1, torch.get_num_threads() // _WORKERS) if device.type == "cpu" else 0


def _start_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    keep_scratch()
