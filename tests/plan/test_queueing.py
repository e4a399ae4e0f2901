"""The queue of jobs on several workers, simulated."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svdcli.plan.queueing import estimate


@pytest.mark.parametrize(
    ("costs", "workers", "seconds"),
    [
        ((), 3, 0),
        ((5,), 1, 5),
        ((5,), 4, 5),
        ((1, 2, 3), 1, 6),
        ((3, 2, 1), 2, 3),
        ((1, 1, 1, 1, 4), 2, 4),
        ((2, 2, 2), 2, 4),
        # the longest first is not always best: 3 + 3 beside 2 + 2 + 2 would take 6
        ((3, 3, 2, 2, 2), 2, 7),
        ((7, 1, 1, 1), 64, 7),
    ],
)
def test_cases_by_hand(costs: tuple[float, ...], workers: int, seconds: float) -> None:
    assert estimate(costs, workers) == seconds


@given(st.lists(st.floats(0, 1e6), max_size=40), st.integers(1, 50))
def test_bounds(costs: list[float], workers: int) -> None:
    """By Graham (1969) the longest first is within 4/3 of the best, which both bounds are below."""
    found, rounding = estimate(costs, workers), 1 + 1e-9
    longest, even = max(costs, default=0.0), math.fsum(costs) / workers
    assert max(longest, even) <= found * rounding
    assert found <= (even + longest) * rounding
    assert estimate(list(reversed(costs)), workers) == found


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40))
def test_one_worker_and_as_many_as_jobs(costs: list[float]) -> None:
    assert estimate(costs, 1) == pytest.approx(math.fsum(costs))
    assert estimate(costs, len(costs)) == max(costs)


def test_nobody_does_nothing() -> None:
    with pytest.raises(ValueError, match="0 workers"):
        estimate((1.0,), 0)
