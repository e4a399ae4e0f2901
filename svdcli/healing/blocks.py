"""Refine the factors of a compressed model: block by block, then all together.

Both models read the same text, a block at a time. A block of the compressed model gets what the
compressed blocks before it send on, and learns to give what the original block gives in the
original's own stream, so that it makes up for the errors before it, too (block refinement as in
AA-SVD, 2026): first in closed form (`models.refit`), then by gradient. An error d of a block's
output counts as d^T H d, with H the second moment of the model's loss gradient there: as much as
the model's loss will feel it. Only the factors, and biases that were refitted, change.

A model that fits into memory is then trained in one piece on its divergence from the original and,
a little, on the text.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from svdcli.calibration.loss import answer_of, excess_of
from svdcli.calibration.stream import Stream, Turn
from svdcli.errors import SvdcliError
from svdcli.healing.coordinates import Twins
from svdcli.healing.refit import Block, Side, refit
from svdcli.healing.training import Best, Course, train
from svdcli.models.modules import LOW_RANK
from svdcli.progress import Progress, silent
from svdcli.text.tokens import Batch

DAMPING = 0.1
BLOCK_RATE = 0.002  # largest step of a weight, as a share of its tensor's root mean square
# the same, times the root of the divergence at the start: errors of weights grow with that
WHOLE_RATE = 0.01
WHOLE = "whole model"
_MOMENT_BATCHES = 8
HELD_OUT = 4  # batches: more would cost as much as the training
_REFIT_SHARE = 0.8  # of a block's time


Call = Callable[[nn.Module], Callable[..., Any]]


def whole(model: nn.Module) -> Callable[..., Any]:
    """The model itself is called."""
    return model


@dataclass(frozen=True)
class Effort:
    """How long is trained: steps for each block and for the whole model, or seconds for all
    together."""

    steps: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Reading:
    """What both models read: batches to learn from, and batches that nothing is learned from."""

    batches: Sequence[Batch]
    held: Sequence[Batch]

    @staticmethod
    def of(batches: Sequence[Batch]) -> Reading:
        """Hold a few batches out, spread over the text; of a single one, half of its rows. Raises
        SvdcliError for a single row."""
        if len(batches) == 1:
            batches = list(_halves(batches[0]))
        count = min(HELD_OUT, len(batches) // 4 or len(batches) // 2)
        places = {len(batches) * (2 * i + 1) // (2 * count) for i in range(count)}
        read = [batch for place, batch in enumerate(batches) if place not in places]
        return Reading(read, [batches[place] for place in sorted(places)])

    def fewer(self, count: int) -> Reading:
        """At most count batches to learn from, spread over the text; the same ones held out."""
        step = max(1.0, len(self.batches) / max(1, count))
        return Reading(
            [self.batches[int(i * step)] for i in range(min(count, len(self.batches)))], self.held
        )


def _halves(batch: Batch) -> tuple[Batch, Batch]:
    count = len(batch["input_ids"])
    if count < 2:
        raise SvdcliError(
            "the text fills one window only, and some has to be held out",
            "give more text, or a smaller --seq-len",
        )
    first, second = (
        {name: rows[part] for name, rows in batch.items()}
        for part in (slice(count // 2), slice(count // 2, None))
    )
    return first, second


@dataclass(frozen=True)
class HealedBlock:
    """One block, or the whole model. Of a block, before and after are d^T H d of its output over
    y^T H y of the original's output y; of the whole model, what `heal_whole` trains it on; both on
    text that it was not trained on. after is never larger, and equal where nothing was found that
    is better. weights are its new factors by name."""

    name: str
    before: float
    after: float
    steps: int
    weights: Mapping[str, Tensor]


def heal_blocks(
    teacher: nn.Module,
    student: nn.Module,
    reading: Reading,
    effort: Effort,
    *,
    trainable: Callable[[str], bool],
    moments: Mapping[str, Tensor] | None = None,
    known: Callable[[str], HealedBlock | None] = lambda name: None,
    call: Call = whole,
    seed: int = 0,
    device: torch.device | None = None,
    progress: Progress = silent,
) -> Iterator[HealedBlock]:
    """Refine block after block and yield each as it is done; blocks that `known` has are taken from
    there.

    trainable tells by name which parameters and buffers of the student may change; moments are
    those of `fisher.block_moments`, without which every direction of a block's output counts the
    same; blocks that the text does not reach have none. call makes of a model what is called with
    each batch. Raises SvdcliError where the two models do not have the same blocks, and where a
    block answers with NaN.
    """
    where = device or torch.device("cpu")
    ours, theirs = (
        Stream(model, where, torch.float32, _nobody, call(model)) for model in (student, teacher)
    )
    dtypes = {name: tensor.dtype for name, tensor in _tensors(student)}
    blocks = blocks_of(student) if moments is None else blocks_of(student) & moments.keys()
    total = sum(
        bool(_trainable(unit, name, trainable))
        for name, unit in ours.units.items()
        if name in blocks
    )
    begin, number, taken = time.monotonic(), 0, 0
    batches = [*reading.batches, *reading.held]
    for mine, dense in zip(ours.turns(batches), theirs.turns(batches), strict=False):
        if mine.name != dense.name:
            raise SvdcliError(
                f"the models differ: {mine.name} meets {dense.name}",
                "give the original as --teacher",
            )
        tensors = _trainable(mine.unit, mine.name, trainable) if mine.name in blocks else {}
        arguments = dense.arguments if tensors else []
        targets = dense.go(keep=bool(tensors))
        if tensors:
            done = known(mine.name)
            if done is None:
                masks = [_mask(batches[batch.index]) for batch in mine.batches]
                ours_side, their_side = (
                    Side(mine.unit, mine.call, mine.arguments),
                    Side(dense.unit, dense.call, arguments),
                )
                block = Block(ours_side, their_side, targets, masks)
                at = _where(mine, len(reading.batches))
                healer = _Healer(
                    block, *at, tensors, dtypes, mine.name, (moments or {}).get(mine.name)
                )
                spent = time.monotonic() - begin
                share = (
                    None
                    if effort.seconds is None
                    else effort.seconds * (number + 1 - taken) / total - spent
                )
                done = healer.heal(
                    effort.steps, share, seed, partial(_tell, progress, mine.name, number, total)
                )
            else:
                taken += 1
            put(done, tensors, where)
            number += 1
            yield done
        mine.go()


def _tell(progress: Progress, name: str, number: int, total: int, done: float) -> None:
    progress("heal", name, number + done, total)


def blocks_of(model: nn.Module) -> set[str]:
    """Names of the members of every list of blocks. What lies outside them (embeddings, heads) is
    not refined: its output is as wide as a vocabulary, or has nothing before it to make up for."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    ]
    return {
        f"{name}.{child}" if name else child
        for name, module in lists
        for child, _ in module.named_children()
    }


def _nobody(phase: str, unit: str, batch: int, total: int) -> None:
    """Nobody looks at the units."""


def _tensors(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name."""
    yield from module.named_parameters(prefix=prefix)
    yield from module.named_buffers(prefix=prefix)


def _trainable(unit: nn.Module, name: str, allowed: Callable[[str], bool]) -> dict[str, Tensor]:
    """The parameters and row orders of the low-rank modules in one unit that may change, by their
    names in the whole model."""
    found: dict[str, Tensor] = {}
    for path, module in unit.named_modules(prefix=name):
        if isinstance(module, LOW_RANK):
            found |= {full: tensor for full, tensor in _tensors(module, path) if allowed(full)}
    return found


def put(healed: HealedBlock, tensors: Mapping[str, Tensor], where: torch.device) -> None:
    """Set the tensors to what was found, in float32."""
    for name, value in healed.weights.items():
        tensors[name].data = value.to(
            where, torch.float32 if value.is_floating_point() else value.dtype
        )


def _mask(batch: Batch) -> Tensor | None:
    mask = batch.get("attention_mask")
    return None if mask is None or bool(mask.all()) else mask.bool()


def _where(turn: Turn, count: int) -> tuple[list[int], list[int]]:
    """Places in the turn of batches to learn from (the first `count` of all) and of those held out.

    Raises SvdcliError for a block that the model does not run on every text, where one of the two
    is empty.
    """
    places = range(len(turn.batches))
    read = [place for place in places if turn.batches[place].index < count]
    held = [place for place in places if place not in read]
    if not read or not held:
        raise SvdcliError(
            f"{turn.name} saw {len(turn.batches)} of the batches, too few to hold some out",
            "give more text",
        )
    return read, held


class _Healer:
    """One block: what it should answer, and how far it is from that."""

    def __init__(
        self,
        block: Block,
        read: list[int],
        held: list[int],
        tensors: Mapping[str, Tensor],
        dtypes: Mapping[str, torch.dtype],
        name: str,
        moment: Tensor | None,
    ) -> None:
        self.block, self.read, self.held, self.tensors, self.name = block, read, held, tensors, name
        self.root = None if moment is None else _root(moment)
        self.best = Best(tensors, dtypes, self._error)

    def heal(
        self, steps: int | None, seconds: float | None, seed: int, tell: Callable[[float], None]
    ) -> HealedBlock:
        """In closed form, then by gradient for what is left of the time. The block itself ends as
        it was."""
        original = {name: tensor.data for name, tensor in self.tensors.items()}
        begin = time.monotonic()
        places = self.read[:: self._stride(seconds)]
        refit(
            self.block,
            places,
            self.root,
            lambda name: f"{self.name}.{name}" in self.tensors,
            self.best.look,
        )
        left = None if seconds is None else seconds - (time.monotonic() - begin)
        course = Course(steps, left, tell)
        weights = [tensor for tensor in self.tensors.values() if isinstance(tensor, nn.Parameter)]
        train(weights, course, BLOCK_RATE, self.read, self._loss, self.best.look, seed)
        for name, tensor in self.tensors.items():
            tensor.data = original[name]
        return HealedBlock(
            self.name, self.best.first, self.best.error, course.step, self.best.weights
        )

    def _stride(self, seconds: float | None) -> int:
        """Every so many-th batch is read to refit, so that it takes no more than its share of the
        time."""
        if seconds is None:
            return 1
        begin = time.monotonic()
        self._error()
        a_batch = (time.monotonic() - begin) / len(self.held)
        passes = 2 * sum(isinstance(module, LOW_RANK) for module in self.block.ours.unit.modules())
        return max(
            1, math.ceil(passes * a_batch * len(self.read) / max(1e-9, _REFIT_SHARE * seconds))
        )

    def _loss(self, place: int) -> Tensor:
        wrong, energy = self._errors(place)
        return wrong / energy

    def _errors(self, place: int) -> tuple[Tensor, Tensor]:
        """Squared error of the block's output for one batch, and the energy of what it should be;
        padding is left out."""
        output, target = (
            self.block.rows(value, place)
            for value in (self.block.ours.answer(place), self.block.targets[place])
        )
        wrong, whole = output - target, target
        if self.root is not None:
            wrong, whole = wrong @ self.root, whole @ self.root
        return wrong.square().sum(), whole.square().sum()

    @torch.no_grad()
    def _error(self) -> float:
        """The relative error on the batches that are not trained on."""
        wrong = energy = 0.0
        for place in self.held:
            error, whole = self._errors(place)
            wrong, energy = wrong + float(error), energy + float(whole)
        if not math.isfinite(wrong):
            raise SvdcliError(f"{self.name} answers with NaN or infinity", "see `svdcli verify`")
        return wrong / max(energy, 1e-300)


def _root(moment: Tensor) -> Tensor:
    """L with L L^T = H, damped as in `linalg.whitening`: ||d L||^2 is d^T H d."""
    h = moment.to(torch.float64)
    damped = h + DAMPING * h.diagonal().mean() * torch.eye(
        h.shape[0], dtype=h.dtype, device=h.device
    )
    root: Tensor = torch.linalg.cholesky(damped).to(torch.float32)
    return root


class _Whole:
    """The whole model, and what it is trained on: (1 - hard) times its distance from the original,
    plus hard times its excess loss on the text itself (distillation with soft and hard targets;
    Hinton, Vinyals and Dean, 2015, section 2)."""

    def __init__(
        self,
        teacher: Callable[..., Any],
        student: Callable[..., Any],
        reading: Reading,
        hard: float,
        device: torch.device,
    ) -> None:
        self.teacher, self.student, self.hard = teacher, student, hard
        self.read, self.held, self.device = reading.batches, reading.held, device
        self.distance = math.nan

    def loss(self, place: int) -> Tensor:
        distance, excess, _ = self._means(self.read[place])
        return (1 - self.hard) * distance + self.hard * excess

    def error(self) -> float:
        """The loss on text that nothing is learned from; notes the distance alone, too."""
        means = [self._means(batch) for batch in self.held]
        rows = sum(count for *_, count in means)
        self.distance = sum(float(distance) * count for distance, _, count in means) / rows
        found = (1 - self.hard) * self.distance + self.hard * sum(
            float(excess) * count for _, excess, count in means
        ) / rows
        if not math.isfinite(found):
            raise SvdcliError("the model answers with NaN or infinity", "see `svdcli verify`")
        return found

    def _means(self, batch: Batch) -> tuple[Tensor, Tensor, int]:
        """Distance and excess loss of one batch, and of how many rows; no excess loss where it does
        not count."""
        batch = {key: value.to(self.device) for key, value in batch.items()}
        with torch.no_grad():
            wanted, distance = answer_of(self.teacher(**batch), batch)
        found, _ = answer_of(self.student(**batch), batch)
        excess = excess_of(wanted, found, batch["input_ids"]) if self.hard else found.new_zeros(())
        return distance(wanted, found) / len(wanted), excess, len(wanted)


def heal_whole(
    teacher: nn.Module,
    student: nn.Module,
    reading: Reading,
    effort: Effort,
    *,
    trainable: Callable[[str], bool],
    dtypes: Mapping[str, torch.dtype],
    hard_labels: float = 0.0,
    call: Call = whole,
    seed: int = 0,
    progress: Progress = silent,
) -> HealedBlock:
    """Train all factors together, so that the student answers as the teacher does: both in memory,
    in float32.

    dtypes has the stored dtype of the student's tensors. The error is the KL divergence in nats a
    prediction, or, for encoders, 1 - cosine of the sentence embeddings; a decoder's is mixed with
    its excess loss on the text, which counts hard_labels, a share from 0 to 1. call makes of a
    model what is called with each batch. Raises SvdcliError where that is not finite.
    """
    tensors = _trainable(student, "", trainable)
    device = next(iter(tensors.values())).device
    goal = _Whole(call(teacher), call(student), reading, hard_labels, device)
    best = Best(tensors, dtypes, goal.error)
    rate = WHOLE_RATE * math.sqrt(max(0.0, goal.distance))
    few = [
        {key: value.to(device) for key, value in batch.items()}
        for batch in reading.fewer(_MOMENT_BATCHES).batches
    ]
    twins = Twins(teacher, student, tensors, few, call(teacher))

    def look() -> bool:
        with twins.stored():
            return best.look()

    course = Course(effort.steps, effort.seconds, partial(_tell, progress, WHOLE, 0, 1))
    with twins.training():
        train(twins.weights, course, rate, range(len(goal.read)), goal.loss, look, seed)
    return HealedBlock(WHOLE, best.first, best.error, course.step, best.weights)
