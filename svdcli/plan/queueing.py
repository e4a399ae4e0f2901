"""How long jobs take on several workers: a queue, of which each worker takes the longest job that
is left as soon as it is free."""

from __future__ import annotations

import heapq
from collections.abc import Iterable


def estimate(costs: Iterable[float], workers: int) -> float:
    """Seconds until the last of `workers` workers ends, for jobs that take `costs` seconds each.

    Never below the longest job, nor below all of them shared evenly. Raises ValueError where there
    is no worker.
    """
    if workers < 1:
        raise ValueError(f"{workers} workers do nothing")
    waiting = sorted(costs, reverse=True)
    free_at = [0.0] * min(workers, len(waiting))
    for cost in waiting:
        heapq.heapreplace(free_at, free_at[0] + cost)
    return max(free_at, default=0.0)
