"""In which dtype a model runs while its layers are measured, and how fast this machine
multiplies."""

from __future__ import annotations

import time

import torch

from svdcli.plan.words import Precision

# How many times as fast bfloat16 has to be for `auto` to take it: far from the noise of measuring.
_WORTH_IT = 1.5


def chosen(precision: Precision, device: torch.device) -> torch.dtype:
    """Return the dtype of the passes: as asked, and with auto bfloat16 where the device multiplies
    it at least 1.5 times as fast as float32."""
    if precision == "bfloat16":
        return torch.bfloat16
    if precision == "float32":
        return torch.float32
    fast = operations_a_second(device, torch.bfloat16)
    slow = operations_a_second(device, torch.float32)
    return torch.bfloat16 if fast >= _WORTH_IT * slow else torch.float32


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
