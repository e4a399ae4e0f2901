"""Memory that is used again: fresh pages are cleared by the kernel first, which took a twentieth of
the time of `compress`."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class _Kept(threading.local):
    """One buffer for each use, in threads that keep them."""

    buffers: dict[str, Tensor] | None = None


_kept = _Kept()


def keep_scratch() -> None:
    """From now on, and for as long as it lives, this thread keeps what `scratch` gives it."""
    _kept.buffers = {}


@contextmanager
def keeping_scratch() -> Iterator[None]:
    """`keep_scratch` for a while."""
    keep_scratch()
    try:
        yield
    finally:
        _kept.buffers = None


def scratch(use: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialised tensor of that shape, in the dtype and on the device of `like`.

    In a thread that keeps its scratch it is the memory of the last one for the same use, which is
    then void.
    """
    if _kept.buffers is None or like.device.type != "cpu":
        return like.new_empty(shape)
    count = math.prod(shape) * like.element_size()
    buffer = _kept.buffers.get(use)
    if buffer is None or buffer.numel() < count:
        del buffer
        _kept.buffers.pop(use, None)  # before its successor is there
        buffer = _kept.buffers[use] = torch.empty(count, dtype=torch.uint8)
    return buffer[:count].view(like.dtype).view(shape)
