"""How much memory the weights take in each of the ranks that share them (`healing.sharing`)."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor, nn

from svdcli.healing.blocks import REFINED, blocks_of
from svdcli.healing.coordinates import numbers_of_stand_in
from svdcli.healing.sharing import SharedModel, runs_always
from svdcli.models.modules import LOW_RANK, SCALE, UP, WEIGHT, PackedLinear, is_packed, numbers_of


@dataclass(frozen=True)
class SharedPair:
    """Both models as ranks can share them, and the numbers of the student's stand-ins."""

    teacher: SharedModel
    student: SharedModel
    standins: StandInNumbers

    @staticmethod
    def of(
        teacher: nn.Module,
        student: nn.Module,
        root: str,
        ran: Collection[str],
        trained: Collection[str],
    ) -> SharedPair:
        """Choose what is shared. root is the name of the module that is called, ran has those of
        the modules that run with it, trained those of the student's tensors that are trained."""
        names = frozenset(trained)
        return SharedPair(
            SharedModel.of(teacher, root, blocks_of(teacher) & set(ran)),
            SharedModel.of(student, root, blocks_of(student) & set(ran), _refined(student, names)),
            StandInNumbers.of(student, names),
        )

    def bytes(self, ranks: int) -> int:
        """Return the bytes that the weights take in each of so many ranks, at most, to train the
        student on the teacher's answers in one piece and in float32."""
        # What stays as it is; one model is gathered at a time
        teacher, student, standins = self.teacher, self.student, self.standins
        numbers = teacher.held(ranks) + student.held(ranks)
        numbers += max(teacher.gathered, student.gathered + 2 * standins.largest)
        numbers += numbers_of(teacher.model) - teacher.shared

        # What is refined: as it is stored, and what each pass makes of it; of packed layers the
        # integers, and the weights that these and the scales make
        packed = numbers_of(student.model) - sum(map(Tensor.numel, student.model.parameters()))
        numbers += 2 * (numbers_of(student.model) - student.shared) + packed

        # The stand-ins, with gradients and AdamW's two moments; sums for coordinates come before
        sums = 2 * (standins.coordinates + standins.coordinates_of_experts)
        training = standins.coordinates_of_experts + 4 * standins.trained_of_experts
        training += math.ceil((standins.coordinates + 4 * standins.trained) / ranks)
        return 4 * (numbers + max(sums, training))


@dataclass(frozen=True)
class StandInNumbers:
    """How many numbers stand-ins have: what is trained, and coordinates; those of experts, which
    are not shared; and the largest of those that are."""

    trained: int
    coordinates: int
    trained_of_experts: int
    coordinates_of_experts: int
    largest: int

    @staticmethod
    def of(student: nn.Module, trained: frozenset[str]) -> StandInNumbers:
        """Count them for the layers of which these tensors are trained."""
        shared, experts = [(0, 0)], [(0, 0)]
        for path, module in student.named_modules():
            counts = None
            if isinstance(module, LOW_RANK) and f"{path}.{UP}" in trained:
                counts = None if is_packed(module) else numbers_of_stand_in(module)
            elif isinstance(module, PackedLinear) and f"{path}.{WEIGHT}{SCALE}" in trained:
                counts = numbers_of(module) + module.scales.numel(), 0
            if counts is not None:
                (shared if runs_always(path) else experts).append(counts)
        (a, b), (c, d) = [map(sum, zip(*counts, strict=True)) for counts in (shared, experts)]
        return StandInNumbers(a, b, c, d, max(map(sum, shared)))


def _refined(model: nn.Module, trained: frozenset[str]) -> set[nn.Parameter]:
    """Return the parameters of all layers of which something is trained."""
    weights: set[nn.Parameter] = set()
    for path, module in model.named_modules():
        if not isinstance(module, REFINED):
            continue
        tensors = dict(module.named_parameters(path)) | dict(module.named_buffers(path))
        if not trained.isdisjoint(tensors):
            weights.update(module.parameters())
    return weights
