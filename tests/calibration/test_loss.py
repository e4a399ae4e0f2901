"""What draws the labels of a batch."""

from __future__ import annotations

import torch

from svdcli.calibration.loss import drawing


def test_a_batch_draws_by_its_seed_and_its_place_in_the_text_alone() -> None:
    def drawn(seed: int, index: int) -> tuple[float, ...]:
        return tuple(torch.randn(4, generator=drawing(seed, index)).tolist())

    places = [(seed, index) for seed in (-1, 0, 1, 11, 2**70) for index in (0, 1, 11, 111)]
    first = [drawn(*place) for place in places]
    assert len(set(first)) == len(places)
    torch.manual_seed(5)
    torch.randn(3)
    assert [drawn(*place) for place in reversed(places)] == first[::-1]


def test_drawing_leaves_other_random_numbers_alone() -> None:
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    torch.randn(4, generator=drawing(0, 0))
    assert torch.equal(torch.randn(3), expected)
