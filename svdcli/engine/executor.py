"""Who does the jobs of a run, in this process: threads, behind the interface that ranks have,
too."""

from __future__ import annotations

import errno
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from svdcli.files.source import Source
from svdcli.linalg.machine import keep_temporaries, keeping_temporaries, return_freed_memory
from svdcli.memory import is_out_of_memory
from svdcli.ranks import Team

Item = TypeVar("Item")
Answer = TypeVar("Answer")

_WORKERS = 2
# On an accelerator one layer is read and another is written while a third one is solved.
_STAGES = 3

# What a file system on the network says when it is late, or a disk once: it may pass.
_PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EREMOTEIO)
_PAUSES = (0.2, 1.0, 3.0)  # seconds before it is tried again

DONE_ALONE = "a layer ran out of memory, and was done again with nothing beside it"


class Workers(Protocol):
    """Those that do the jobs of a run. device is where each computes, threads with how many, 0
    where an accelerator does; ranks is in how many processes they are; told says, in a line each,
    what went wrong and was done again."""

    device: torch.device
    threads: int
    ranks: int
    told: list[str]

    def map_unordered(
        self,
        work: Callable[[Item], Answer],
        items: Iterable[Item],
        done: Callable[[Answer], None] | None = None,
    ) -> Iterator[Answer]:
        """Do `work` on every item and yield the answers as they come.

        done is told each answer even where nobody takes it any more: an error, or an interrupt,
        lets the work under way in this process end first.
        """

    def check_shared(self, folder: Path | None, source: Source) -> None:
        """Raise SvdcliError where one of them does not see this folder, or another source."""

    def meet(self, about: Any) -> Team | None:
        """Have all ranks of a launch do what they follow for, beside this one (`Follower.follow`):
        the team to do it with, None where this process is by itself."""

    def all_threads(self) -> AbstractContextManager[None]:
        """Surround what this process does alone, while other processes of its machine wait."""

    def end(self, outcome: Any) -> None:
        """Tell all of them what came of it, and let them end."""


class Inline(Executor):
    """Does what is submitted at once, in this thread."""

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


class Local:
    """Threads of this process: two on a CPU with two threads or more, each with its share of them,
    so that reading and writing one layer hides behind the mathematics of the other. Two, so that
    memory still follows the largest layer."""

    def __init__(self, device: torch.device, threads: int | None = None) -> None:
        self.device = device
        self.threads = threads_each(device) if threads is None else threads
        self.ranks = 1
        self.told: list[str] = []

    def executor(self) -> tuple[Executor, int]:
        """Return (who does the jobs, how many at a time)."""
        if self.device.type == "cpu" and torch.get_num_threads() < 2:
            return_freed_memory()
            return Inline(), 1
        return self.pool()

    def pool(self) -> tuple[ThreadPoolExecutor, int]:
        """Return (threads that do the jobs, how many)."""
        return_freed_memory()
        count = _STAGES
        if self.device.type == "cpu":
            count = min(_WORKERS, max(1, torch.get_num_threads() // self.threads))
        how = (self.threads, self.device)
        return ThreadPoolExecutor(count, initializer=_start_worker, initargs=how), count

    def map_unordered(
        self,
        work: Callable[[Item], Answer],
        items: Iterable[Item],
        done: Callable[[Answer], None] | None = None,
    ) -> Iterator[Answer]:
        """Do `work` on every item and yield the answers as they come (`Workers`). One that runs out
        of memory beside others is done again at the end, by itself."""
        executor, at_once = self.executor()
        queue = iter(items)
        running: dict[Future[tuple[Answer, str] | None], Item] = {}
        alone: list[Item] = []

        def submit(items: Iterable[Item], attempt: Callable[..., Any]) -> None:
            for item in items:
                future = executor.submit(attempt, work, item)
                if done is not None:
                    future.add_done_callback(partial(_tell, done))
                running[future] = item

        try:
            attempt = _attempted_beside_others if at_once > 1 else attempted
            submit(itertools.islice(queue, at_once), attempt)
            while running:
                ended = wait(running, return_when=FIRST_COMPLETED).done
                submit(itertools.islice(queue, len(ended)), attempt)
                for future in ended:
                    item, found = running.pop(future), future.result()
                    if found is None:
                        alone.append(item)
                        continue
                    answer, trouble = found
                    if trouble:
                        self.told.append(trouble)
                    yield answer
                if alone and not running:
                    self.told.append(DONE_ALONE)
                    submit([alone.pop()], attempted)
        finally:
            executor.shutdown(wait=True, cancel_futures=True)

    def check_shared(self, folder: Path | None, source: Source) -> None:
        """Nothing: this process sees what it sees."""

    def meet(self, about: Any) -> Team | None:
        """Nobody."""
        return None

    def all_threads(self) -> AbstractContextManager[None]:
        """Nothing: it has them."""
        return nullcontext()

    def end(self, outcome: Any) -> None:
        """Nothing: nobody else waits for it."""


def attempted(
    work: Callable[[Item], Answer],
    item: Item,
    *,
    late: float = 0.0,
    check: Callable[[], None] = lambda: None,
) -> tuple[Answer, str]:
    """Do the work, and once more where an error of the file system may pass: (the answer, what went
    wrong before it).

    late is for how many seconds a file may be missing that another machine has made; meanwhile
    check may raise that nobody waits any more. Raises what the work raises, and MemoryError for
    every way of saying that.
    """
    trouble = ""
    missing_since = time.monotonic()
    pauses = iter(_PAUSES)
    while True:
        try:
            return work(item), trouble
        except Exception as error:
            if is_out_of_memory(error):
                raise MemoryError from error
            if not isinstance(error, OSError):
                raise
            if error.errno == errno.ENOENT and time.monotonic() - missing_since < late:
                check()
                time.sleep(_PAUSES[0])
                continue
            pause = next(pauses, None)
            if error.errno not in _PASSING or pause is None:
                raise
            where = f"{error.filename}: " if error.filename else ""
            trouble = f"{where}{error.strerror}, once; it passed when tried again"
        time.sleep(pause)


def _attempted_beside_others(
    work: Callable[[Item], Answer], item: Item
) -> tuple[Answer, str] | None:
    """`attempted`; None where memory was too little, without the error, which would hold on to what
    there is of it."""
    try:
        return attempted(work, item)
    except MemoryError:
        return None


def _tell(done: Callable[[Answer], None], future: Future[tuple[Answer, str] | None]) -> None:
    if not future.cancelled() and future.exception() is None:
        found = future.result()
        if found is not None:
            done(found[0])


def threads_each(device: torch.device) -> int:
    """Threads of one worker on a CPU: products of several are rounded in another order."""
    return max(1, torch.get_num_threads() // _WORKERS) if device.type == "cpu" else 0


def _start_worker(threads: int, device: torch.device) -> None:
    if device.type == "cpu":
        torch.set_num_threads(threads)
    elif device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # which each thread has for itself
    keep_temporaries()


# An accelerator has memory for one layer at a time.
_SOLVING = threading.Lock()


def solving(device: str) -> AbstractContextManager[Any]:
    """Surround the mathematics of a job: on an accelerator one job at a time."""
    return nullcontext() if device == "cpu" else _SOLVING
