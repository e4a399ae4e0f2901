"""Where the mathematics runs, and how jobs are handed to workers."""

from __future__ import annotations

import ctypes
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import torch

from svdcli.errors import UsageError
from svdcli.linalg.scratch import keep_scratch, keeping_scratch
from svdcli.plan.words import Device

Item = TypeVar("Item")


Answer = TypeVar("Answer")


_WORKERS = 2


_MMAP_THRESHOLD = -3  # mallopt's name for it in glibc's malloc.h


@dataclass(frozen=True)
class Compute:
    """Where and how fast the mathematics runs. device is cpu, cuda, mps or auto; threads None
    leaves torch's choice."""

    device: Device = "auto"
    threads: int | None = None

    def start(self) -> torch.device:
        """Set the threads and find the device. Raises UsageError where this machine has no such
        device."""
        if self.threads is not None:
            if not 1 <= self.threads <= 4096:
                raise UsageError(
                    f"--threads {self.threads} is outside [1, 4096]",
                    "leave it out for torch's own choice",
                )
            torch.set_num_threads(self.threads)
        available = {
            "cpu": True,
            "cuda": torch.cuda.is_available(),
            "mps": torch.backends.mps.is_available(),
        }
        if self.device == "auto":
            return torch.device("cuda" if available["cuda"] else "cpu")
        if not available.get(self.device, False):
            raise UsageError(
                f"--device {self.device} is not available here",
                f"use {', '.join(d for d in available if available[d])}",
            )
        return torch.device(self.device)


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
