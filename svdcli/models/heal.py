"""Refine the factors of a compressed model block by block, so that each block answers as the original's does.

Both models read the same text, a block at a time. A block of the compressed model gets what the compressed blocks before it
send on, and learns to give what the original block gives in the original's own stream: it makes up for the errors before it,
too (block refinement as in AA-SVD, 2026). An error d of a block's output counts as d^T H d, with H the second moment of the
model's loss gradient there: as much as the model's loss will feel it. Only the factors, and biases that were refitted, change.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from svdcli.errors import SvdcliError
from svdcli.models.fisher import Batch
from svdcli.models.modules import LOW_RANK
from svdcli.models.stream import Stream, Turn, first_tensor
from svdcli.progress import Progress, silent

DAMPING = 0.1
RATE = 0.002  # largest step of a weight, as a share of its tensor's root mean square
WARM_UP = 0.05
HELD_OUT_ONE_IN = 8
_MOST_HELD_OUT = 4  # batches: more would cost as much as the training
_CHECKS = 10
_PATIENCE = 5


@dataclass(frozen=True)
class Effort:
    """How long each block is trained: a number of steps, or seconds for all blocks together, shared out evenly."""

    steps: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class HealedBlock:
    """One block. before and after are d^T H d of its output, over y^T H y of the original's output y, on text that it was not
    trained on; after is never larger, and equal where nothing was found that is better. weights are its new factors by name."""

    name: str
    before: float
    after: float
    steps: int
    weights: Mapping[str, Tensor]


def heal_blocks(
    teacher: nn.Module,
    student: nn.Module,
    batches: Sequence[Batch],
    effort: Effort,
    *,
    trainable: Callable[[str], bool],
    moments: Mapping[str, Tensor] | None = None,
    known: Callable[[str], HealedBlock | None] = lambda name: None,
    seed: int = 0,
    device: torch.device | None = None,
    progress: Progress = silent,
) -> Iterator[HealedBlock]:
    """Train block after block and yield each as it is done; blocks that `known` has are taken from there.

    trainable tells by name which parameters of the student may change; moments are those of `fisher.block_moments`, without
    which every direction of a block's output counts the same. Raises SvdcliError where the two models do not have the
    same blocks, and where a block answers with NaN.
    """
    where = device or torch.device("cpu")
    ours, theirs = (Stream(model, where, torch.float32, _nobody) for model in (student, teacher))
    stored = {name: parameter.dtype for name, parameter in student.named_parameters()}
    blocks = blocks_of(student)
    total = sum(bool(_trainable(unit, name, trainable)) for name, unit in ours.units.items() if name in blocks)
    begin, number, taken = time.monotonic(), 0, 0
    for mine, dense in zip(ours.turns(batches), theirs.turns(batches), strict=False):
        if mine.name != dense.name:
            raise SvdcliError(f"the models differ: {mine.name} meets {dense.name}", "give the original as --teacher")
        weights = _trainable(mine.unit, mine.name, trainable) if mine.name in blocks else {}
        targets = dense.go(keep=bool(weights))
        if weights:
            block = known(mine.name)
            if block is None:
                spent = time.monotonic() - begin
                share = None if effort.seconds is None else effort.seconds * (number + 1 - taken) / total - spent
                course = _Course(effort.steps, share, partial(_tell, progress, mine.name, number, total))
                block = _Trainer(mine, targets, batches, weights, stored, course, seed, (moments or {}).get(mine.name)).train()
            else:
                taken += 1
            for name, parameter in weights.items():
                parameter.data = block.weights[name].to(where, torch.float32)
            number += 1
            yield block
        mine.go()


def _tell(progress: Progress, name: str, number: int, total: int, done: float) -> None:
    progress("heal", name, number + done, total)


def blocks_of(model: nn.Module) -> set[str]:
    """Names of the members of every list of blocks. What lies outside them (embeddings, heads) is not refined: its output is
    as wide as a vocabulary, or has nothing before it to make up for."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return {f"{name}.{child}" if name else child for name, module in lists for child, _ in module.named_children()}


def _nobody(phase: str, unit: str, batch: int, total: int) -> None:
    """Nobody looks at the units."""


def _trainable(unit: nn.Module, name: str, allowed: Callable[[str], bool]) -> dict[str, nn.Parameter]:
    """The parameters of the low-rank modules in one unit that may change, by their names in the whole model."""
    found: dict[str, nn.Parameter] = {}
    for path, module in unit.named_modules(prefix=name):
        if isinstance(module, LOW_RANK):
            found |= {full: p for full, p in module.named_parameters(prefix=path) if allowed(full)}
    return found


@dataclass
class _Course:
    """How far the training of one block is, from 0 to 1, by steps or by the clock."""

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
        return done / WARM_UP if done < WARM_UP else 0.5 * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP)))


class _Trainer:
    """One block, what goes into it, and what should come out."""

    def __init__(
        self,
        turn: Turn,
        targets: Sequence[Tensor],
        batches: Sequence[Batch],
        weights: Mapping[str, nn.Parameter],
        stored: Mapping[str, torch.dtype],
        course: _Course,
        seed: int,
        moment: Tensor | None,
    ) -> None:
        self.turn, self.calls, self.targets, self.weights, self.course = turn, turn.arguments, targets, weights, course
        self.dtypes = {name: stored[name] for name in weights}
        masks = [batches[batch.index].get("attention_mask") for batch in turn.batches]
        self.masks = [None if mask is None or bool(mask.all()) else mask.bool() for mask in masks]
        places = range(len(self.calls))
        self.held = [p for p in places if p % HELD_OUT_ONE_IN == HELD_OUT_ONE_IN - 1][:_MOST_HELD_OUT] or list(places)
        self.read = [place for place in places if place not in self.held] or self.held
        self.generator = torch.Generator().manual_seed(seed)
        self.root = None if moment is None else _root(moment)

    def train(self) -> HealedBlock:
        original = {name: weight.data.clone() for name, weight in self.weights.items()}
        before = best = self._score()
        kept, waited = self._rounded(), 0
        groups = [{"params": [weight], "lr": 0.0, "scale": RATE * _rms(weight)} for weight in self.weights.values()]
        optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)
        for weight in self.weights.values():
            weight.requires_grad_()
        next_check = 1 / _CHECKS
        while self.course.done() < 1 and waited < _PATIENCE:
            self._step(optimiser)
            if self.course.done() >= next_check:
                next_check += 1 / _CHECKS
                self.course.tell(self.course.done())
                score = self._score()
                waited = 0 if score < best else waited + 1
                if score < best:
                    best, kept = score, self._rounded()
        for name, weight in self.weights.items():
            weight.requires_grad_(False)
            weight.grad = None
            weight.data = original[name]
        self.course.tell(1.0)
        return HealedBlock(self.turn.name, before, best, self.course.step, kept)

    def _step(self, optimiser: torch.optim.Optimizer) -> None:
        rate = self.course.rate()
        for group in optimiser.param_groups:
            group["lr"] = rate * group["scale"]
        place = self.read[int(torch.randint(len(self.read), (1,), generator=self.generator))]
        with torch.enable_grad():
            wrong, energy = self._errors(place)
            (wrong / energy).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        self.course.step += 1

    def _errors(self, place: int) -> tuple[Tensor, Tensor]:
        """Squared error of the block's output for one batch, and the energy of what it should be; padding is left out."""
        args, kwargs = self.calls[place]
        output, target = first_tensor(self.turn.call(*args, **kwargs)), self.targets[place]
        mask = self.masks[place]
        if mask is not None and mask.shape == target.shape[:2]:
            output, target = output[mask.to(output.device)], target[mask.to(target.device)]
        wrong, whole = output - target, target
        if self.root is not None:
            wrong, whole = wrong @ self.root, whole @ self.root
        return wrong.square().sum(), whole.square().sum()

    @torch.no_grad()
    def _score(self) -> float:
        """The relative error on the batches that are not trained on, with the weights as they would be stored."""
        masters = {name: weight.data for name, weight in self.weights.items()}
        for name, weight in self.weights.items():
            weight.data = masters[name].to(self.dtypes[name]).float()
        wrong = energy = 0.0
        for place in self.held:
            error, whole = self._errors(place)
            wrong, energy = wrong + float(error), energy + float(whole)
        for name, weight in self.weights.items():
            weight.data = masters[name]
        if not math.isfinite(wrong):
            raise SvdcliError(f"{self.turn.name} answers with NaN or infinity", "see `svdcli verify`")
        return wrong / max(energy, 1e-300)

    def _rounded(self) -> dict[str, Tensor]:
        return {name: weight.detach().to("cpu", self.dtypes[name], copy=True) for name, weight in self.weights.items()}


def _root(moment: Tensor) -> Tensor:
    """L with L L^T = H, damped as in `linalg.whitening`: ||d L||^2 is d^T H d."""
    h = moment.to(torch.float64)
    damped = h + DAMPING * h.diagonal().mean() * torch.eye(h.shape[0], dtype=h.dtype, device=h.device)
    root: Tensor = torch.linalg.cholesky(damped).to(torch.float32)
    return root


def _rms(weight: Tensor) -> float:
    return float(weight.detach().square().mean().sqrt())
