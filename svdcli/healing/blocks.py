"""Refine the factors of a compressed model: block by block, then all together.

Both models read the same text, a block at a time. A block of the compressed model gets what the
compressed blocks before it send on, and learns to give what the original block gives in the
original's own stream, so that it makes up for the errors before it, too (block refinement as in
AA-SVD, 2026): first in closed form (`healing.refit`), then by gradient. An error d of a block's
output counts as d^T H d, with H the second moment of the model's loss gradient there: as much as
the model's loss will feel it. Only the factors, and biases that were refitted, change.

Packed layers are rounded anew for what they really meet, and then learn their rounding: integers
and scales (`healing.learned`).

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
from svdcli.calibration.rows import padding_mask
from svdcli.calibration.stream import Stream, Turn, caches_off
from svdcli.errors import NotFiniteError, SvdcliError
from svdcli.healing.coordinates import whitened_layers
from svdcli.healing.learned import LearnedRounding
from svdcli.healing.refit import Block, BlockRun, refit, refittable
from svdcli.healing.replicas import ALONE, Replicas
from svdcli.healing.sharing import runs_always, share
from svdcli.healing.standins import StandIn, StandIns
from svdcli.healing.training import Best, Schedule, by_size, train
from svdcli.linalg.damping import damped_root
from svdcli.linalg.machine import return_free_memory
from svdcli.models.modules import LOW_RANK, SCALE, WEIGHT, PackedLinear, SharedLinear
from svdcli.progress import Progress, silent
from svdcli.text.tokens import Batch

DAMPING = 0.1
BLOCK_RATE = 0.002  # largest step of a weight, as a share of its tensor's root mean square
# the same, times the root of the divergence at the start: errors of weights grow with that
WHOLE_RATE = 0.01
# largest step of an integer, in steps of its grid
BLOCK_STEP = 0.02
WHOLE_STEP = 0.02
WHOLE = "whole model"
_MOMENT_BATCHES = 8
HELD_OUT = 4  # batches: more would cost as much as the training
_REFIT_SHARE = 0.8  # of a block's time

# The layers that are refined.
REFINED: tuple[type[nn.Module], ...] = (*LOW_RANK, PackedLinear, SharedLinear)

Call = Callable[[nn.Module], Callable[..., Any]]


def itself(model: nn.Module) -> Callable[..., Any]:
    """Call the whole model."""
    return model


@dataclass(frozen=True)
class Effort:
    """The length of the training: steps for each block and for the whole model, or seconds for all
    together."""

    steps: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Batches:
    """The text that both models read: batches to train on, and batches that are held out to judge
    by."""

    train: Sequence[Batch]
    held_out: Sequence[Batch]

    @staticmethod
    def split(batches: Sequence[Batch]) -> Batches:
        """Hold a few batches out, spread over the text; of a single one, half of its rows. Raises
        SvdcliError for a single row."""
        if len(batches) == 1:
            batches = list(_halves(batches[0]))

        # A quarter at most, but one of two or three; each from the middle of an equal part
        count = min(HELD_OUT, len(batches) // 4 or len(batches) // 2)
        held_out = {len(batches) * (2 * i + 1) // (2 * count) for i in range(count)}
        train = [batch for index, batch in enumerate(batches) if index not in held_out]
        return Batches(train, [batches[index] for index in sorted(held_out)])

    def share(self, replicas: Replicas) -> Batches:
        """Return one rank's share: of what is trained on a stretch, as long as every other one's,
        so that the last few batches may go to nobody; of what is held out every so many-th. Raises
        SvdcliError where there is too little for all."""
        count = len(self.train) // replicas.size
        if not count:
            filled = "one batch" if len(self.train) == 1 else f"{len(self.train)} batches"
            raise SvdcliError(
                f"the text fills {filled} to train on, and there are {replicas.size} ranks",
                "give more text or --samples, or start fewer ranks",
            )
        start = replicas.rank * count
        held_out = self.held_out[replicas.rank :: replicas.size]
        return Batches(self.train[start : start + count], held_out)

    def fewer(self, count: int) -> Batches:
        """Return at most count batches to train on, spread over the text; the same ones held
        out."""
        step = max(1.0, len(self.train) / max(1, count))
        count = min(count, len(self.train))
        return Batches([self.train[int(i * step)] for i in range(count)], self.held_out)

    def in_halves(self) -> Batches:
        """Return the same text in twice as many batches to train on: a step moves an integer by as
        much whatever it was told by, so that more and smaller ones get further."""
        train: list[Batch] = []
        for batch in self.train:
            train += _halves(batch) if len(batch["input_ids"]) > 1 else [batch]
        return Batches(train, self.held_out)


def _halves(batch: Batch) -> tuple[Batch, Batch]:
    """Return the first rows and the others."""
    count = len(batch["input_ids"])
    if count < 2:
        raise SvdcliError(
            "the text fills one window only, and some has to be held out",
            "give more text, or a smaller --seq-len",
        )
    middle = count // 2
    first = {name: rows[:middle] for name, rows in batch.items()}
    second = {name: rows[middle:] for name, rows in batch.items()}
    return first, second


@dataclass(frozen=True)
class HealedBlock:
    """One block, or the whole model. before and after are errors on held-out text: of a block,
    d^T H d of its output over y^T H y of the original's output y; of the whole model, the loss that
    `heal_whole` trains it on. after is never larger, and equal where nothing better was found.
    weights are its new factors by name."""

    name: str
    before: float
    after: float
    steps: int
    weights: Mapping[str, Tensor]


# Block by block -----------------------------------------------------------------------------------


def heal_blocks(
    teacher: nn.Module,
    student: nn.Module,
    batches: Batches,
    effort: Effort,
    *,
    trainable: Callable[[str], bool],
    moments: Mapping[str, Tensor] | None = None,
    finished: Callable[[str], HealedBlock | None] = lambda name: None,
    call: Call = itself,
    seed: int = 0,
    device: torch.device | None = None,
    states_on: torch.device | None = None,
    progress: Progress = silent,
    replicas: Replicas = ALONE,
) -> Iterator[HealedBlock]:
    """Refine block after block and yield each as it is done; blocks that `finished` has are taken
    from there.

    trainable tells by name which parameters and buffers of the student may change; moments are
    those of `loss.block_moments`, without which every direction of a block's output counts the
    same; blocks that the text does not reach have none. call makes of a model what is called with
    each batch. states_on is where hidden states wait between blocks, None for the device. Of
    several replicas each gives its own share of the batches. Raises SvdcliError where the two
    models do not have the same blocks, and where a block answers with NaN.
    """
    device = device or torch.device("cpu")
    stream = partial(Stream, device=device, dtype=torch.float32, states_on=states_on)
    student_stream = stream(student, call=call(student))
    teacher_stream = stream(teacher, call=call(teacher))
    dtypes = {name: tensor.dtype for name, tensor in _tensors(student) if trainable(name)}

    # The blocks that will be refined, known beforehand so that they can share the time
    to_refine = _to_refine(student_stream, trainable, moments)
    timetable = _Timetable(effort.seconds, len(to_refine))

    all_batches = [*batches.train, *batches.held_out]
    number = 0
    for student_turn, teacher_turn in _in_step(student_stream, teacher_stream, all_batches):
        name = student_turn.name
        replicas.meet_at(name)
        # A block with nothing to refine only sends its batches on
        if name not in to_refine:
            teacher_turn.send_on()
            student_turn.send_on()
            continue

        # The original's answers are what the block is to give; its arguments are gone afterwards
        teacher_arguments = teacher_turn.arguments
        targets = teacher_turn.send_on(keep=True)
        tensors = _trainable(student_turn.unit, name, trainable)
        healed = finished(name)
        if healed is None:
            block = Block(
                student=BlockRun(student_turn.unit, student_turn.call, student_turn.arguments),
                teacher=BlockRun(teacher_turn.unit, teacher_turn.call, teacher_arguments),
                targets=targets,
                masks=[padding_mask(all_batches[batch.index]) for batch in student_turn.batches],
                scale_dtypes=_scale_dtypes(student_turn.unit, name, dtypes),
            )
            read, held_out = _parted(student_turn, len(batches.train), replicas)
            moment = None if moments is None else moments[name]
            healer = _Healer(block, read, held_out, tensors, dtypes, name, moment, replicas)
            report = partial(_report, progress, name, number, len(to_refine))
            seconds = replicas.says(timetable.next_share())
            healed = healer.heal(effort.steps, seconds, seed, report)
            timetable.blocks_done += 1

        # What comes after the block meets it as it is now
        assign(healed, tensors, device)
        number += 1
        yield healed
        student_turn.send_on()
        return_free_memory()
    replicas.meet_at("the end")


def _to_refine(
    student: Stream, trainable: Callable[[str], bool], moments: Mapping[str, Tensor] | None
) -> set[str]:
    """Return the names of the blocks that the text reaches and that hold something trainable."""
    names: set[str] = set()
    for name in blocks_of(student.model):
        unit = student.units.get(name)
        reached = moments is None or name in moments
        if unit is not None and reached and _trainable(unit, name, trainable):
            names.add(name)
    return names


def _in_step(
    student: Stream, teacher: Stream, batches: Sequence[Batch]
) -> Iterator[tuple[Turn, Turn]]:
    """Yield the turns of both models' blocks, pairwise. Raises SvdcliError where their names
    differ."""
    pairs = zip(student.turns(batches), teacher.turns(batches), strict=False)
    for student_turn, teacher_turn in pairs:
        if student_turn.name != teacher_turn.name:
            raise SvdcliError(
                f"the models differ: {student_turn.name} meets {teacher_turn.name}",
                "give the original as --teacher",
            )
        yield student_turn, teacher_turn


class _Timetable:
    """The seconds for all blocks, from now on, in equal parts; what one block leaves over is for
    those after it. blocks_done counts those that took time."""

    def __init__(self, seconds: float | None, blocks: int) -> None:
        self.seconds = seconds
        self.blocks = blocks
        self.blocks_done = 0
        self._begin = time.monotonic()

    def next_share(self) -> float | None:
        """Return the seconds for the next block; None without a limit."""
        if self.seconds is None:
            return None
        spent = time.monotonic() - self._begin
        return self.seconds * (self.blocks_done + 1) / self.blocks - spent


def _report(progress: Progress, name: str, number: int, total: int, share: float) -> None:
    progress("heal", name, number + share, total)


def blocks_of(model: nn.Module) -> set[str]:
    """Return the names of the members of every list of blocks. What lies outside them (embeddings,
    heads) is not refined: its output is as wide as a vocabulary, or has nothing before it to make
    up for."""
    names = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            prefix = f"{name}." if name else ""
            names |= {f"{prefix}{child}" for child, _ in module.named_children()}
    return names


def _tensors(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers by name."""
    yield from module.named_parameters(prefix=prefix)
    yield from module.named_buffers(prefix=prefix)


def _trainable(unit: nn.Module, name: str, allowed: Callable[[str], bool]) -> dict[str, Tensor]:
    """Return the parameters, row orders, integers and scales of the low-rank and packed modules in
    one unit that may change, by their names in the whole model."""
    tensors: dict[str, Tensor] = {}
    for path, module in unit.named_modules(prefix=name):
        if not isinstance(module, REFINED):
            continue
        for full_name, tensor in _tensors(module, path):
            if allowed(full_name):
                tensors[full_name] = tensor
    return tensors


def _scale_dtypes(
    unit: nn.Module, name: str, dtypes: Mapping[str, torch.dtype]
) -> dict[str, torch.dtype]:
    """Return the stored dtype of the scales of every packed matrix in a unit of this name whose
    scales are among `dtypes`, by the matrix's name in the unit."""
    found: dict[str, torch.dtype] = {}
    for path, module in unit.named_modules():
        scale = f"{name}.{path}.{WEIGHT}{SCALE}".lstrip(".")
        if isinstance(module, PackedLinear) and scale in dtypes:
            found[path] = dtypes[scale]
    return found


def _learned_roundings(
    model: nn.Module,
    scale_dtypes: Mapping[str, torch.dtype],
    made: Callable[[str, StandIn], None] = lambda name, layer: None,
) -> dict[str, LearnedRounding]:
    """Return a stand-in for each of these packed matrices of a model; made is told of each."""
    roundings: dict[str, LearnedRounding] = {}
    for name, dtype in scale_dtypes.items():
        module = model.get_submodule(name)
        assert isinstance(module, PackedLinear)
        roundings[name] = LearnedRounding(module, dtype)
        made(name, roundings[name])
    return roundings


def assign(healed: HealedBlock, tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Set the tensors to the healed weights, in float32; orders of rows stay integers."""
    for name, value in healed.weights.items():
        dtype = torch.float32 if value.is_floating_point() else value.dtype
        tensors[name].data = value.to(device, dtype)


def _parted(turn: Turn, count: int, replicas: Replicas) -> tuple[list[int], list[int]]:
    """Return the indices in the turn of batches to train on (the first `count` of all) and of those
    held out.

    Raises SvdcliError for a block that the model does not run on every text, where one of the two
    is empty.
    """
    read: list[int] = []
    held_out: list[int] = []
    for index, batch in enumerate(turn.batches):
        if batch.index < count:
            read.append(index)
        else:
            held_out.append(index)
    if not replicas.least(len(read)) or not any(replicas.gather(len(held_out))):
        raise SvdcliError(
            f"{turn.name} saw {len(turn.batches)} of the batches, too few to hold some out",
            "give more text",
        )
    return read, held_out


class _Healer:
    """One block: what it should answer, and how far it is from that. read and held_out are indices
    of batches; tensors are those that may change, by their names in the model; moment is H at the
    block's output, None where every direction counts the same."""

    def __init__(
        self,
        block: Block,
        read: list[int],
        held_out: list[int],
        tensors: Mapping[str, Tensor],
        dtypes: Mapping[str, torch.dtype],
        name: str,
        moment: Tensor | None,
        replicas: Replicas = ALONE,
    ) -> None:
        self.block = block
        self.read = read
        self.held_out = held_out
        self.tensors = tensors
        self.dtypes = dtypes
        self.name = name
        self.replicas = replicas
        # ||d L||^2 is d^T H d for H = L L^T
        self.root: Tensor | None = None
        if moment is not None:
            self.root = damped_root(moment, DAMPING).to(torch.float32)

    def heal(
        self, steps: int | None, seconds: float | None, seed: int, report: Callable[[float], None]
    ) -> HealedBlock:
        """Refine in closed form, then by gradient for what is left of the time. The block itself
        ends as it was."""
        before = {name: tensor.data for name, tensor in self.tensors.items()}
        # Not of this object: in a circle they would keep the block's hidden states past its time
        best = Best(self.tensors, self.dtypes, self._error)

        # In closed form, from as many batches as there is time for
        begin = time.monotonic()
        indices = self.read[:: self._stride(seconds)]
        judge = best.keep_if_better
        refit(self.block, indices, self.root, self._may_change, judge, self.replicas)

        # By gradient, from where the closed form ended
        remaining = None if seconds is None else seconds - (time.monotonic() - begin)
        schedule = Schedule(steps, self.replicas.says(remaining), report, self.replicas)
        unit = self.block.student.unit
        roundings = _learned_roundings(unit, self.block.scale_dtypes)
        parameters = [t for t in self.tensors.values() if isinstance(t, nn.Parameter)]
        weights = by_size(parameters, BLOCK_RATE)
        for rounding in roundings.values():
            weights += rounding.weights(BLOCK_STEP)
        layers = StandIns(unit, roundings)

        def keep_if_better() -> bool:
            with layers.stored():
                return best.keep_if_better()

        with layers.training():
            train(weights, schedule, self.read, self._loss, keep_if_better, seed, self.replicas)

        # The best weights are on record; the caller decides when they take effect
        for name, tensor in self.tensors.items():
            tensor.data = before[name]
        weights_kept = self.replicas.same(best.weights)
        return HealedBlock(self.name, best.first, best.error, schedule.step, weights_kept)

    def _may_change(self, name: str) -> bool:
        """Tell whether a tensor may change, by its name in the block."""
        return f"{self.name}.{name}" in self.tensors

    def _stride(self, seconds: float | None) -> int:
        """Return the step between the batches that are read to refit, so that it takes no more than
        its share of the time."""
        if seconds is None:
            return 1
        # What one batch takes, by a pass over those that are held out
        begin = time.monotonic()
        self._error()
        seconds_a_batch = (time.monotonic() - begin) / max(1, len(self.held_out))

        # Each layer takes about two passes over the batches, one in either model
        passes = 2 * len(refittable(self.block.student.unit))
        needed = passes * seconds_a_batch * len(self.read)
        stride = self.replicas.says(math.ceil(needed / max(1e-9, _REFIT_SHARE * seconds)))
        assert stride is not None
        return max(1, stride)

    def _loss(self, index: int) -> Tensor:
        """Return what one batch is trained on: its relative error."""
        error, energy = self._errors(index)
        return error / energy

    def _errors(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the squared error of the block's output for one batch, and the energy of what it
        should be; padding is left out."""
        answer = self.block.student.answer(index)
        output = self.block.rows(answer, index)
        target = self.block.rows(self.block.target(index, answer), index)
        difference = output - target
        if self.root is not None:
            difference = difference @ self.root
            target = target @ self.root
        return difference.square().sum(), target.square().sum()

    @torch.no_grad()
    def _error(self) -> float:
        """Return the relative error on the batches that all ranks hold out. Raises
        NotFiniteError where it is not finite."""
        error = 0.0
        energy = 0.0
        for index in self.held_out:
            batch_error, batch_energy = self._errors(index)
            error += float(batch_error)
            energy += float(batch_energy)
        error, energy = self.replicas.total((error, energy))
        if not math.isfinite(error):
            raise NotFiniteError(f"{self.name} answers with NaN or infinity")
        return error / max(energy, 1e-300)


# The whole model ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Means:
    """Of one batch: mean distance from the original and mean excess loss on the text, over `rows`
    predictions."""

    distance: Tensor
    excess: Tensor
    rows: int


class _Whole:
    """The whole model, and what it is trained on: (1 - hard) times its distance from the original,
    plus hard times its excess loss on the text itself (distillation with soft and hard targets;
    Hinton, Vinyals and Dean, 2015, section 2)."""

    def __init__(
        self,
        teacher: Callable[..., Any],
        student: Callable[..., Any],
        batches: Batches,
        hard: float,
        device: torch.device,
        replicas: Replicas = ALONE,
        in_step: bool = False,
    ) -> None:
        self.teacher = teacher
        self.student = student
        self.hard = hard
        self.batches = batches
        self.device = device
        self.replicas = replicas
        # Passes that this rank runs only because others do: held-out batches that it lacks
        count = len(batches.held_out)
        self.idle_passes = replicas.most(count) - count if in_step else 0

    def loss(self, index: int) -> Tensor:
        """Return what one batch is trained on."""
        means = self._means(self.batches.train[index])
        return (1 - self.hard) * means.distance + self.hard * means.excess

    def meet_all(self, layers: StandIns) -> None:
        """Run a pass with the stand-ins in place, in which torch meets all modules whose weights
        the ranks share: it does so once, in the first one."""
        with layers.training(), torch.no_grad():
            self._means(self.batches.train[0])

    def errors(self) -> tuple[float, float]:
        """Return (loss, distance alone) on what all ranks hold out. Raises NotFiniteError where
        the loss is not finite."""
        means = [self._means(batch) for batch in self.batches.held_out]
        for _ in range(self.idle_passes):
            self._means(self.batches.train[0])
        # A batch counts by its predictions: the last one may be smaller
        counts = sum(batch.rows for batch in means)
        distances = sum(float(batch.distance) * batch.rows for batch in means)
        excesses = sum(float(batch.excess) * batch.rows for batch in means)
        rows, distance, excess = self.replicas.total((counts, distances, excesses))
        distance /= rows
        loss = (1 - self.hard) * distance + self.hard * excess / rows
        if not math.isfinite(loss):
            raise NotFiniteError("the model answers with NaN or infinity")
        return loss, distance

    def _means(self, batch: Batch) -> _Means:
        """Return how far the student is from the teacher on one batch; the excess loss is 0 where
        it does not count, as an encoder has none."""
        batch = _moved(batch, self.device)
        with torch.no_grad():
            target, distance = answer_of(self.teacher(**batch), batch)
        answer, _ = answer_of(self.student(**batch), batch)
        if self.hard:
            excess = excess_of(target, answer, batch["input_ids"])
        else:
            excess = answer.new_zeros(())
        return _Means(distance(target, answer) / len(target), excess, len(target))


def _moved(batch: Batch, device: torch.device) -> Batch:
    return {key: value.to(device) for key, value in batch.items()}


def heal_whole(
    teacher: nn.Module,
    student: nn.Module,
    batches: Batches,
    effort: Effort,
    *,
    trainable: Callable[[str], bool],
    dtypes: Mapping[str, torch.dtype],
    hard_labels: float = 0.0,
    call: Call = itself,
    seed: int = 0,
    progress: Progress = silent,
    replicas: Replicas = ALONE,
    in_step: bool = False,
) -> HealedBlock:
    """Train all factors together, so that the student answers as the teacher does: both in memory,
    in float32.

    dtypes has the stored dtype of the student's tensors. The error is the KL divergence in nats a
    prediction, or, for encoders, 1 - cosine of the sentence embeddings; a decoder's is mixed with
    its excess loss on the text, which counts hard_labels, a share from 0 to 1. call makes of a
    model what is called with each batch. Of several replicas each gives its own share of the
    batches; in_step says that they share weights (`healing.sharing`), so that each has to run as
    many passes as the others. Raises NotFiniteError where that is not finite.
    """
    tensors = _trainable(student, "", trainable)
    device = next(iter(tensors.values())).device
    with caches_off(teacher), caches_off(student):
        scale_dtypes = _scale_dtypes(student, "", {name: dtypes[name] for name in tensors})
        read = batches.in_halves() if scale_dtypes else batches
        goal = _Whole(call(teacher), call(student), read, hard_labels, device, replicas, in_step)

        # Coordinates in which all steps cost alike, learned from a few batches
        few = batches.fewer(max(1, _MOMENT_BATCHES // replicas.size)).train
        sample = [_moved(batch, device) for batch in few]
        made = _sharer(student, replicas, in_step)
        whitened = whitened_layers(
            teacher, student, tensors, sample, call(teacher), seed, replicas, made
        )
        roundings = _learned_roundings(student, scale_dtypes, made)
        layers = StandIns(student, {**whitened, **roundings})
        if in_step:
            goal.meet_all(layers)

        # What it is trained on; the further it is from the original, the larger its steps
        distances: list[float] = []

        def error() -> float:
            loss, distance = goal.errors()
            distances.append(distance)
            return loss

        best = Best(tensors, dtypes, error)
        rate = WHOLE_RATE * math.sqrt(max(0.0, distances[0]))

        # What is trained: their weights, and the biases that may change
        biases = [tensor for name, tensor in tensors.items() if name.endswith(".bias")]
        weights = by_size((bias for bias in biases if isinstance(bias, nn.Parameter)), rate)
        for layer in whitened.values():
            weights += by_size(layer.trained, rate)
        for rounding in roundings.values():
            weights += rounding.weights(WHOLE_STEP)

        def keep_if_better() -> bool:
            with layers.stored():
                return best.keep_if_better()

        report = partial(_report, progress, WHOLE, 0, 1)
        schedule = Schedule(effort.steps, effort.seconds, report, replicas)
        indices = range(len(read.train))
        with layers.training():
            train(weights, schedule, indices, goal.loss, keep_if_better, seed, replicas)
    weights_kept = replicas.same(best.weights)
    return HealedBlock(WHOLE, best.first, best.error, schedule.step, weights_kept)


def _sharer(
    student: nn.Module, replicas: Replicas, in_step: bool
) -> Callable[[str, StandIn], None]:
    """Return what has the ranks share a stand-in, by the name of its layer, if they share weights
    at all and that layer runs on all texts."""

    def made(name: str, layer: StandIn) -> None:
        if not in_step or not runs_always(name):
            return
        assert isinstance(layer, nn.Module)
        for weight in layer.trained:
            weight.requires_grad_()
        # A bias stays with the layer
        own = set(layer.parameters()) - set(student.get_submodule(name).parameters())
        share(layer, own, replicas)

    return made
