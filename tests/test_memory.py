"""What memory there is, told by files like those of Linux; threads that wait for it."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import contents

import svdcli
from svdcli.cli.process import explain
from svdcli.engine import job
from svdcli.memory import ROOM, Room, free_memory, is_out_of_memory

GB = 10**9
FILE = "model.safetensors"
MACHINE = {"proc/meminfo": f"MemTotal: 99999999 kB\nMemAvailable: {16 * GB // 1024} kB\n"}
HAS = 16 * GB // 1024 * 1024


def laid_out(folder: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def v2(group: str, limit: str, usage: int, cached: int = 0) -> dict[str, str]:
    folder = f"sys/fs/cgroup{group}"
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{usage}\n",
        f"{folder}/memory.stat": f"anon 5\ninactive_file {cached}\nactive_file 7\n",
    }


V1 = {
    "proc/self/cgroup": "4:cpu,cpuacct:/x\n3:memory:/job/7\n0::/x\n",
    "sys/fs/cgroup/memory/job/7/memory.limit_in_bytes": f"{6 * GB}",
    "sys/fs/cgroup/memory/job/7/memory.usage_in_bytes": f"{2 * GB}",
    "sys/fs/cgroup/memory/job/7/memory.stat": f"inactive_file 3\ntotal_inactive_file {GB}\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{40 * GB}",
    "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 0\n",
}
IN_JOB = {"proc/self/cgroup": "0::/jobs/7\n"}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 4 * GB),
        (MACHINE, HAS),
        (MACHINE | {"proc/self/cgroup": "0::/jobs/7\n"}, HAS),
        (MACHINE | IN_JOB | v2("/jobs/7", str(8 * GB), 3 * GB, GB), 6 * GB),
        (MACHINE | IN_JOB | v2("/jobs/7", "max", 3 * GB), HAS),
        (MACHINE | IN_JOB | v2("/jobs/7", "max", GB) | v2("/jobs", str(4 * GB), GB), 3 * GB),
        (MACHINE | IN_JOB | v2("/jobs/7", str(64 * GB), GB), HAS),
        (MACHINE | IN_JOB | v2("/jobs/7", str(GB), 2 * GB), 0),
        (MACHINE | {"proc/self/cgroup": "0::/\n"} | v2("", str(2 * GB), GB), GB),
        (MACHINE | V1, 5 * GB),
    ],
)
def test_the_least_that_the_machine_and_its_groups_leave(
    files: Mapping[str, str], free: int, tmp_path: Path
) -> None:
    assert free_memory(laid_out(tmp_path, files)) == free


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("unable to mmap 9 bytes from file <a>: Cannot allocate memory (12)"), True),
        (RuntimeError("std::bad_alloc"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOENT, "No such file"), False),
        (RuntimeError("expected a matrix"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_ways_to_say_that_memory_is_short(error: Exception, is_it: bool) -> None:
    assert is_out_of_memory(error) == is_it
    line, code = explain(error)
    assert line.startswith("out of memory; ") == is_it
    assert code == 1


def test_what_is_taken_never_exceeds_what_is_free_but_for_one_alone() -> None:
    room, taken, together = Room(lambda: 10), list[int](), list[tuple[int, ...]]()
    lock = threading.Lock()

    def work(need: int) -> None:
        with room.taking(need):
            with lock:
                taken.append(need)
                together.append(tuple(taken))
            time.sleep(0.002)
            with lock:
                taken.remove(need)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, [4, 4, 4, 25, 1, 9, 2, 10, 0, 11] * 6))
    assert len(together) == 60
    assert all(sum(needs) <= 10 or len([need for need in needs if need]) == 1 for needs in together)
    assert max(map(len, together)) > 1


def test_sharers_have_a_share_each() -> None:
    room, begun = Room(lambda: 10), threading.Event()

    def work() -> None:
        with room.taking(3):
            begun.set()

    with ThreadPoolExecutor(1) as pool:
        with room.shared_by(2), room.taking(3):
            pool.submit(work)
            assert not begun.wait(0.05)
            with room.taking(2):  # five of ten
                pass
            assert not begun.is_set()
        assert begun.wait(10)


def test_an_error_gives_back_what_was_taken() -> None:
    room = Room(lambda: 10)
    with pytest.raises(ValueError, match="no"), room.taking(8):
        raise ValueError("no")
    with room.taking(9):
        pass


@pytest.mark.parametrize(("free", "at_once"), [(0, 1), (64 * GB, 2)])
def test_layers_are_solved_one_after_the_other_where_memory_holds_no_more(
    free: int,
    at_once: int,
    written: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What two workers write does not depend on it."""
    compress = partial(
        svdcli.compress, written("llama"), keep=0.5, compute=svdcli.Compute(threads=2)
    )
    compress(tmp_path / "before")

    inside, most = set[int](), list[int]()
    solve = job.solve

    def watched(what: job.Job, *rest: Any) -> Any:
        if what.unit.kind != "factor":
            return solve(what, *rest)
        inside.add(threading.get_ident())
        most.append(len(inside))
        time.sleep(0.02)
        most.append(len(inside))
        try:
            return solve(what, *rest)
        finally:
            inside.discard(threading.get_ident())

    monkeypatch.setattr(job, "solve", watched)
    monkeypatch.setattr(ROOM, "_free", lambda: free)
    compress(tmp_path / "after")
    assert max(most) == at_once
    before, after = (contents(tmp_path / name / FILE) for name in ("before", "after"))
    assert after == before
