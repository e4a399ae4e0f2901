"""Work is spread over two workers, never more, and nothing is lost on the way."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from helpers import weight

from svdcli.engine.compute import Compute
from svdcli.engine.executor import DONE_ALONE, Local
from svdcli.engine.solve import solve_layer
from svdcli.errors import UsageError
from svdcli.linalg.layouts import CODECS
from svdcli.linalg.machine import keeping_temporaries
from svdcli.plan.plan import LayerPlan
from svdcli.plan.tensors import TensorInfo

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

    assert sorted(Local(CPU).map_unordered(work, range(20))) == [item * item for item in range(20)]
    assert most == min(2, threads)


def test_an_error_ends_the_work_and_is_told(threads: int) -> None:
    started = []

    def work(item: int) -> int:
        started.append(item)
        if item == 3:
            raise ValueError("three")
        return item

    with pytest.raises(ValueError, match="three"):
        list(Local(CPU).map_unordered(work, range(100)))
    assert len(started) < 10


def test_what_runs_out_of_memory_is_done_again_with_nothing_beside_it(threads: int) -> None:
    under_way, failed, noted = set(), [], []

    def work(item: int) -> int:
        under_way.add(item)
        try:
            time.sleep(0.002)
            if item in (1, 4) and (item not in failed or len(under_way) > 1):
                failed.append(item)
                raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            under_way.remove(item)
        return item

    local = Local(CPU)
    answers = local.map_unordered(work, range(8), noted.append)
    if threads < 2:
        with pytest.raises(MemoryError):
            list(answers)
        return
    found = list(answers)
    assert sorted(found) == sorted(noted) == list(range(8))
    assert set(found[-2:]) == {1, 4}
    assert sorted(failed) == [1, 4]
    assert local.told == [DONE_ALONE] * 2


def test_memory_that_never_suffices_is_an_error() -> None:
    def work(item: int) -> int:
        raise MemoryError

    with pytest.raises(MemoryError):
        list(Local(CPU).map_unordered(work, range(8)))


@pytest.mark.parametrize("solver", ["svd", "gram"])
@pytest.mark.parametrize("layout", ["factored", "pivoted"])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_layers_are_solved_whichever_side_is_long(solver: str, layout: str, dtype: str) -> None:
    """A weight that is converted is laid on its long side first; the same memory serves one after
    the other."""
    kinds = {"BF16": torch.bfloat16, "F32": torch.float32}
    with keeping_temporaries():
        for shape in ((300, 170), (170, 300), (200, 200), (300, 170)):
            w = weight(*shape, dtype=kinds[dtype])
            layer = LayerPlan(TensorInfo("a.weight", dtype, shape), 40, layout, dtype, solver)
            stored, result = solve_layer(w, layer, 0, CPU)
            rebuilt = CODECS[layout].rows(stored, torch.float64, slice(None))
            measured = float((w.double() - rebuilt).norm() / w.double().norm())
            best = float(torch.linalg.svdvals(w.double())[40:].norm() / w.double().norm())
            rounding = {"BF16": 0.02 if layout == "pivoted" else 0.003, "F32": 1e-6}[dtype]
            assert result.fell_back == ()
            assert result.relative_error == pytest.approx(measured, rel=1e-4)
            assert best - 1e-9 <= measured <= best + rounding


def test_a_device_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UsageError, match=r"--device mps is not available here; use cpu"):
        Compute("mps").start()
