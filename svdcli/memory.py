"""How much memory this process can have, and work of its threads that waits until there is enough.

A control group (of a container, a batch system, a service) may allow less than the machine has:
what takes more is killed, not refused.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

# What groups call their limit, what they use, and what of that is given back for the asking, in
# both versions of control groups.
_NAMES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
_UNKNOWN = 4 * 10**9


def free_memory(root: Path = Path("/")) -> int:
    """Return the bytes of memory that can be had without swapping: what the machine has, or less
    where a control group allows less; 4 GB where the system does not tell."""
    return min([_of_the_machine(root), *_of_the_groups(root)])


def _of_the_machine(root: Path) -> int:
    with suppress(OSError, ValueError):  # not Linux
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return _UNKNOWN


def _of_the_groups(root: Path) -> Iterator[int]:
    """What is left of the limit of each group that this process is in."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            top = root / "sys/fs/cgroup" / controllers
            group = PurePosixPath(path.lstrip("/"))
            for folder in (group, *group.parents):
                yield from _left_in(top / folder)


def _left_in(group: Path) -> Iterator[int]:
    for limit, usage, cached in _NAMES:
        # one that has no limit says "max"; one that is hidden says nothing
        with suppress(OSError, ValueError):
            left = int((group / limit).read_text()) - int((group / usage).read_text())
            for line in (group / "memory.stat").read_text().splitlines():
                if line.startswith(f"{cached} "):
                    left += int(line.split()[1])
            yield max(0, left)


# Of torch, and of C++.
_WORDS = ("allocate memory", "bad_alloc")


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether an error says that memory was too little: libraries say so in many classes."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


class Room:
    """Memory that threads share: what one of them needs is left to it, while others wait. One that
    is alone never waits, whatever it needs.

    free tells the bytes that there are, which processes of this machine may have to share.
    """

    def __init__(self, free: Callable[[], int] = free_memory) -> None:
        self._free = free
        self._sharers = 1
        self._changed = threading.Condition()
        self._total = 0
        self._taken: list[int] = []

    @contextmanager
    def shared_by(self, processes: int) -> Iterator[None]:
        """Leave to each of so many processes its share, for a while."""
        self._sharers = processes
        try:
            yield
        finally:
            self._sharers = 1

    @contextmanager
    def taking(self, need: int) -> Iterator[None]:
        """Wait until so many bytes are left, and have them for a while."""
        with self._changed:
            while self._taken and sum(self._taken) + need > self._total:
                self._changed.wait()
            if not self._taken:
                self._total = self._free() // self._sharers
            self._taken.append(need)
        try:
            yield
        finally:
            with self._changed:
                self._taken.remove(need)
                self._changed.notify_all()


# That of this process.
ROOM = Room()
