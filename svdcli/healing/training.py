"""The training that healing does, of a block or of the whole model: AdamW on float32 masters, and
the best weights on the way.

What is kept is what would be stored: weights are judged rounded to their stored dtype, on text that
they were not trained on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from svdcli.errors import SvdcliError
from svdcli.healing.replicas import ALONE, Replicas
from svdcli.healing.sharing import is_shared, whole

WARM_UP = 0.05  # of the training
_CHECKS = 6  # looks at the held-out text, evenly spread
# Checks in a row that may find nothing better. Those of the first half do not count: steps are
# large there, and what they find is hidden in their noise.
_PATIENCE = 3


class Schedule:
    """Progress of a training from 0 to 1, by steps or by the clock, whichever is further; the clock
    starts when the schedule is made, and is read after every step: rank 0's counts for all. report
    is told the progress now and then."""

    def __init__(
        self,
        steps: int | None,
        seconds: float | None,
        report: Callable[[float], None],
        replicas: Replicas = ALONE,
    ) -> None:
        self.steps = steps
        self.seconds = seconds
        self.report = report
        self.replicas = replicas
        self.step = 0
        self._begin = time.monotonic()
        self._clock = self._by_clock()

    def step_done(self) -> None:
        """Note that one more step is done."""
        self.step += 1
        self._clock = self._by_clock()

    def progress(self) -> float:
        """Return how far the training is, 1 at the end."""
        by_steps = self.step / self.steps if self.steps else 0.0
        return min(1.0, max(by_steps, self._clock))

    def _by_clock(self) -> float:
        if self.seconds is None:
            return 0.0
        if self.seconds <= 0:
            return 1.0
        share = self.replicas.says((time.monotonic() - self._begin) / self.seconds)
        assert share is not None
        return share

    def rate(self) -> float:
        """Return the learning rate as a share of the largest: up in a straight line, down along a
        cosine."""
        progress = self.progress()
        if progress < WARM_UP:
            return progress / WARM_UP
        return 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))


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
        self.tensors = tensors
        self.dtypes = dtypes
        self._error = error
        self.first = self.error = self._held_out_error()
        self.weights = self._rounded()

    def keep_if_better(self) -> bool:
        """Keep the present state where it is better than all before it."""
        error = self._held_out_error()
        better = error < self.error
        if better:
            self.error = error
            self.weights = self._rounded()
        return better

    @torch.no_grad()
    def _held_out_error(self) -> float:
        """Return the error of the weights as they would be stored; the weights themselves stay."""
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


@dataclass(frozen=True)
class Trained:
    """A tensor that is trained, and the largest step of an entry of it."""

    weight: nn.Parameter
    step: float


def by_size(weights: Iterable[nn.Parameter], rate: float) -> list[Trained]:
    """Let the steps of each weight follow the size of its entries: rate is the largest one, as a
    share of their root mean square."""
    trained: list[Trained] = []
    for weight in weights:
        size = float(whole(weight.detach()).square().mean().sqrt())
        trained.append(Trained(weight, rate * size))
    return trained


def train(
    weights: Sequence[Trained],
    schedule: Schedule,
    indices: Sequence[int],
    loss: Callable[[int], Tensor],
    keep_if_better: Callable[[], bool],
    seed: int,
    replicas: Replicas = ALONE,
) -> None:
    """Minimise loss(index) over batches drawn at random from `indices`, until the schedule is over
    or late checks find nothing better.

    A step takes a batch of every rank, each of its own indices. keep_if_better keeps the present
    state where it is better. The weights themselves end where the training ended. Raises
    SvdcliError where a rank has nothing to draw from.
    """
    # A group for each weight, which has steps of its own size
    groups: list[dict[str, Any]] = []
    for trained in weights:
        groups.append({"params": [trained.weight], "lr": 0.0, "step": trained.step})
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    parameters = [trained.weight for trained in weights]
    for parameter in parameters:
        parameter.requires_grad_()

    # Batches of one step lie as far apart in the text as shares of it do; gradients of weights that
    # the ranks share are averaged on the way
    average = replicas.averaging([weight for weight in parameters if not is_shared(weight)])
    count = replicas.least(len(indices)) // replicas.accumulated
    if not count:
        raise SvdcliError("a rank has no batch to train on", "give more text, or start fewer ranks")

    next_check = 1 / _CHECKS
    checks_in_vain = 0
    while schedule.progress() < 1 and checks_in_vain < _PATIENCE:
        # One step on one batch; all batches are drawn once before one comes again
        for group in optimiser.param_groups:
            group["lr"] = schedule.rate() * group["step"]
        order = order or torch.randperm(count, generator=generator).tolist()
        first = order.pop()
        with torch.enable_grad():
            for part in range(replicas.accumulated):
                loss(indices[first + part * count]).backward()
        average()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        schedule.step_done()

        # A look at the held-out text; only those in the second half count for giving up
        if schedule.progress() >= next_check:
            next_check += 1 / _CHECKS
            schedule.report(schedule.progress())
            if keep_if_better() or schedule.progress() < 0.5:
                checks_in_vain = 0
            else:
                checks_in_vain += 1

    # The weights as they came: without gradients
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
    schedule.report(1.0)
