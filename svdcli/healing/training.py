"""The training that healing does, of a block or of the whole model: AdamW on float32 masters, and
the best weights that were met.

What is kept is what would be stored: weights are judged rounded to their stored dtype, on text that
they were not trained on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

WARM_UP = 0.05
_CHECKS = 6
# checks in the second half: before that, steps are large, and what they find is hidden in their
# noise
_PATIENCE = 3


@dataclass
class Course:
    """How far a training is, from 0 to 1, by steps or by the clock, which starts here."""

    steps: int | None
    seconds: float | None
    tell: Callable[[float], None]

    def __post_init__(self) -> None:
        self.step, self.begin = 0, time.monotonic()

    def done(self) -> float:
        by_steps = self.step / self.steps if self.steps else 0.0
        by_clock = 0.0
        if self.seconds is not None:
            by_clock = (time.monotonic() - self.begin) / self.seconds if self.seconds > 0 else 1.0
        return min(1.0, max(by_steps, by_clock))

    def rate(self) -> float:
        """Up in a straight line, down along a cosine."""
        done = self.done()
        return (
            done / WARM_UP
            if done < WARM_UP
            else 0.5 * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP)))
        )


class Best:
    """The best state of some weights so far, by `error`, with everything rounded to its stored
    dtype.

    tensors are parameters, and buffers that belong to them; dtypes has the stored dtype of each.
    first and error are the errors at the start and of the best; weights is the best state, on the
    CPU.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        dtypes: Mapping[str, torch.dtype],
        error: Callable[[], float],
    ) -> None:
        self.tensors, self.dtypes, self._error = tensors, dtypes, error
        self.first = self.error = self._measure()
        self.weights = self._rounded()

    def look(self) -> bool:
        """Keep the present state where it is better than all before it."""
        error = self._measure()
        better = error < self.error
        if better:
            self.error, self.weights = error, self._rounded()
        return better

    @torch.no_grad()
    def _measure(self) -> float:
        masters = {name: tensor.data for name, tensor in self.tensors.items()}
        for name, tensor in self.tensors.items():
            tensor.data = masters[name].to(self.dtypes[name]).to(masters[name].dtype)
        try:
            return self._error()
        finally:
            for name, tensor in self.tensors.items():
                tensor.data = masters[name]

    def _rounded(self) -> dict[str, Tensor]:
        return {
            name: tensor.detach().to("cpu", self.dtypes[name], copy=True)
            for name, tensor in self.tensors.items()
        }


def train(
    weights: Sequence[nn.Parameter],
    course: Course,
    rate: float,
    places: Sequence[int],
    loss: Callable[[int], Tensor],
    look: Callable[[], bool],
    seed: int,
) -> None:
    """Minimise loss(place) over places drawn at random, until the course is over or late checks
    find nothing better.

    rate is the largest step of a weight, as a share of its tensor's root mean square; look keeps
    the present state where it is better. The weights themselves end where the training ended.
    """
    groups = [{"params": [weight], "lr": 0.0, "scale": rate * _rms(weight)} for weight in weights]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for weight in weights:
        weight.requires_grad_()
    next_check, waited = 1 / _CHECKS, 0
    while course.done() < 1 and waited < _PATIENCE:
        for group in optimiser.param_groups:
            group["lr"] = course.rate() * group["scale"]
        order = order or torch.randperm(len(places), generator=generator).tolist()
        with torch.enable_grad():
            loss(places[order.pop()]).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        course.step += 1
        if course.done() >= next_check:
            next_check += 1 / _CHECKS
            course.tell(course.done())
            waited = 0 if look() or course.done() < 0.5 else waited + 1
    for weight in weights:
        weight.requires_grad_(False)
        weight.grad = None
    course.tell(1.0)


def _rms(weight: Tensor) -> float:
    return float(weight.detach().square().mean().sqrt())
