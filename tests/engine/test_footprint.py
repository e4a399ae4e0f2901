"""What a layer takes grows with it; compared with what was seen at the width of Llama-7B."""

from __future__ import annotations

import pytest

from svdcli.engine.footprint import bytes_to_solve

MLP, DOWN = (11008, 4096), (4096, 11008)


@pytest.mark.parametrize(("shapes", "peak"), [([MLP], 3.2e9), ([DOWN], 3.9e9), ([MLP, MLP], 5.6e9)])
def test_what_was_seen_fits_and_is_not_guessed_far_too_high(
    shapes: list[tuple[int, int]], peak: float
) -> None:
    """The growth of a process that looked at such a layer for rounding."""
    assert 0.95 * peak < bytes_to_solve(shapes, "full", rounding=True) < 1.6 * peak


def test_more_takes_more() -> None:
    def needed(metric: str, *, rounding: bool) -> int:
        return bytes_to_solve([MLP], metric, rounding=rounding)

    plain = needed("", rounding=False)
    for metric, more in (("inputs", "diagonal"), ("diagonal", "full")):
        assert plain < needed(metric, rounding=False) <= needed(more, rounding=False)
    assert needed("full", rounding=False) < needed("full", rounding=True)
    assert needed("full", rounding=True) < bytes_to_solve([MLP] * 2, "full", rounding=True)
