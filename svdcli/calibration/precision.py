"""In which dtype a model runs while its layers are measured, and how fast this machine
multiplies."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from svdcli.linalg.machine import with_threads
from svdcli.plan.words import Precision

# How many times as fast bfloat16 has to be for `auto` to take it: far from the noise of measuring.
# Processors with instructions for it do twice as many operations a second, or more.
_WORTH_IT = 1.5
_TURNS = 3  # in which both are measured


@dataclass(frozen=True)
class Passes:
    """How a model is run: the name of the dtype, and why it is not a faster one that was left to
    choose."""

    precision: str
    why_not: str = ""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype itself."""
        dtype: torch.dtype = getattr(torch, self.precision)
        return dtype


def chosen(precision: Precision, device: torch.device) -> str:
    """Return the name of the dtype: as asked, and with auto bfloat16 where that is faster."""
    if precision != "auto":
        return precision
    return "bfloat16" if is_faster_in_bfloat16(device) else "float32"


def is_faster_in_bfloat16(device: torch.device) -> bool:
    """Tell whether the device multiplies bfloat16 at least 1.5 times as fast as float32. On a CPU
    one thread does: several wait for each other where others keep the cores busy."""
    fast = slow = 0.0
    with with_threads(1):
        for _ in range(_TURNS):
            fast = max(fast, operations_a_second(device, torch.bfloat16))
            slow = max(slow, operations_a_second(device, torch.float32))
    return fast >= _WORTH_IT * slow


def operations_a_second(device: torch.device, dtype: torch.dtype) -> float:
    """Return the speed of one product of this process on the device, the best of a few; 0 where it
    does not know the dtype."""
    size, times, tries = (4096, 4, 3) if device.type == "cuda" else (512, 2, 3)
    try:
        matrix = torch.ones(size, size, device=device, dtype=dtype)
        torch.mm(matrix, matrix)  # to warm up
    except (RuntimeError, TypeError):  # mps knows no bfloat16 on older systems
        return 0.0
    best = float("inf")
    for _ in range(tries):
        _wait_for(device)
        begin = time.perf_counter()
        for _ in range(times):
            torch.mm(matrix, matrix)
        _wait_for(device)
        best = min(best, time.perf_counter() - begin)
    return times * 2 * size**3 / best


def _wait_for(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
