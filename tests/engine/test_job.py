"""A job is a value: what does it in another process writes the same bytes."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tree, write_model

import svdcli
from svdcli.engine import job as module
from svdcli.engine.executor import Local
from svdcli.engine.job import Job, Line, run_job

Mapping = Callable[..., Iterator[Any]]


@pytest.fixture(scope="module")
def in_another_process() -> Iterator[Mapping]:
    """`Local.map_unordered`, with a process that shares nothing but the files."""
    pool = ProcessPoolExecutor(
        1, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    )

    def map_unordered(
        _: Local,
        work: Callable[[Any], Any],
        jobs: Iterable[Any],
        done: Callable[[Any], None] = print,
    ) -> Iterator[Any]:
        for line in pool.map(work, jobs):
            done(line)
            yield line

    with pool:
        yield map_unordered


@pytest.mark.parametrize("calibrated", [False, True])
def test_another_process_writes_the_same_bytes(
    calibrated: bool,
    readable: Callable[[str], Path],
    in_another_process: Mapping,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    model, recipe = readable("gpt2"), svdcli.Recipe("keep", 0.5, layout="pivoted")
    how: dict[str, Any] = {}
    if calibrated:
        text = svdcli.Texts("words", (" ".join(f"w{i % 90 + 2}" for i in range(2000)),))
        svdcli.calibrate(model, tmp_path / "m.safetensors", text, samples=8, seq_len=32)
        how["calibration"] = tmp_path / "m.safetensors"
    svdcli.compress(model, tmp_path / "here", recipe, **how)
    svdcli.expand(tmp_path / "here", tmp_path / "here-dense")
    monkeypatch.setattr(Local, "map_unordered", in_another_process)
    svdcli.compress(model, tmp_path / "there", recipe, **how)
    svdcli.expand(tmp_path / "there", tmp_path / "there-dense")
    for name in ("", "-dense"):
        assert tree(tmp_path / f"here{name}") == tree(tmp_path / f"there{name}")


def test_jobs_hold_small_values(tmp_path: Path, monkeypatch: Any) -> None:
    jobs: list[Job] = []

    def keep(job: Job) -> Line:
        jobs.append(job)
        return run_job(job)

    monkeypatch.setattr(module, "run_job", keep)
    svdcli.compress(write_model(tmp_path / "m"), tmp_path / "o", svdcli.Recipe("rank", 9))
    assert {job.unit.kind for job in jobs} == {"copy", "factor", "warn"}
    assert max(len(pickle.dumps(job)) for job in jobs) < 2000
    assert all(pickle.loads(pickle.dumps(job)) == job for job in jobs)
