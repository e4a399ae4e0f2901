"""One run, or one plan, of `svdcli compress` in a process of its own, for big.py: what each job and
each phase took, and what the process read and wrote.

    python big_worker.py plan MODEL WANTED WORKERS...  estimates of the time on so many workers
    python big_worker.py run MODEL OUT WANTED THREADS  do it

WANTED are keyword arguments of `svdcli.compress` as JSON; 0 THREADS are torch's own choice. Prints
JSON.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from svdcli import startup

startup.begin()

import svdcli  # noqa: E402
from svdcli.engine import job, spectra  # noqa: E402


class Clock:
    """Notes what the jobs of a run took, and when each of its phases was last heard of."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, float]] = {"measure": {}, "write": {}}
        self.ended: dict[str, float] = {}
        self.events: dict[str, int] = {}
        self.workers: set[int] = set()

    def timed(self, phase: str, work: Callable[[Any], Any], name: Callable[[Any], str]) -> Any:
        """The same work, with the seconds of each job noted."""

        def run(item: Any) -> Any:
            begin = time.perf_counter()
            answer = work(item)
            self.jobs[phase][name(item)] = time.perf_counter() - begin
            self.workers.add(threading.get_ident())
            return answer

        return run

    def progress(self, phase: str, name: str, done: float, total: float) -> None:
        self.ended[phase] = time.perf_counter()
        self.events[phase] = self.events.get(phase, 0) + 1

    def check(self) -> None:
        """Every job that progress was told of was timed."""
        for phase, jobs in self.jobs.items():
            if len(jobs) != self.events.get(phase, 0):
                raise SystemExit(f"{len(jobs)} of {self.events.get(phase, 0)} jobs were timed")

    def phases(self, begin: float, end: float) -> dict[str, float]:
        """Seconds of each, in their order; what comes after the last event is to publish."""
        seconds = {}
        for phase, ended in sorted(self.ended.items(), key=lambda item: item[1]):
            seconds[phase] = ended - begin
            begin = ended
        return seconds | {"publish": end - begin}


def moved() -> dict[str, int]:
    """Bytes that this process has read and written until now, where Linux counts them: rchar and
    wchar by any call, read_bytes and write_bytes from and to a disk."""
    with suppress(OSError):
        lines = Path("/proc/self/io").read_text().splitlines()
        return {name: int(count) for name, _, count in (line.partition(": ") for line in lines)}
    return {}


def run(model: Path, out: Path, wanted: dict[str, Any], threads: int) -> dict[str, Any]:
    """Compress, and what it took."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    clock = Clock()
    timed = clock.timed("write", job.run_job, lambda item: item.unit.name)
    job.run_job = timed
    timed = clock.timed("measure", spectra.run_spectrum_job, lambda item: item.tensor.name)
    spectra.run_spectrum_job = timed
    startup.long_work_begins()
    before, begin = moved(), time.perf_counter()
    outcome = svdcli.compress(model, out, progress=clock.progress, **wanted)
    end, after = time.perf_counter(), moved()
    clock.check()
    return {
        "seconds": end - begin,
        "phases": clock.phases(begin, end),
        "jobs": clock.jobs["write"],
        "workers": len(clock.workers) if threads != 1 else 1,
        "moved": {name: after[name] - before[name] for name in before},
        "bytes_before": outcome.report.total.bytes_before,
        "bytes_after": outcome.report.total.bytes_after,
        "keep": outcome.report.selected.keep,
        "fell_back": sum(bool(row.fell_back) for row in outcome.report.layers),
    }


def plan(model: Path, wanted: dict[str, Any], workers: list[int]) -> dict[str, Any]:
    """Estimates, on the workers at hand under "here"."""
    costs = svdcli.compress(model, None, dry_run=True, **wanted).costs
    assert costs is not None
    found = {str(count): costs.estimate(count).to_json() for count in workers}
    return found | {"here": costs.estimate().to_json()}


def main(what: str, model: str, *rest: str) -> None:
    if what == "plan":
        found = plan(Path(model), json.loads(rest[0]), [int(count) for count in rest[1:]])
    else:
        found = run(Path(model), Path(rest[0]), json.loads(rest[1]), int(rest[2]))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
