"""Second moments of what layers read, gathered by hooks while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from svdcli.calibration.loss import ModelLoss
from svdcli.calibration.rows import MomentSums, padding_mask, without_padding
from svdcli.calibration.stream import Visit
from svdcli.calibration.sums import Sums
from svdcli.errors import NotFiniteError
from svdcli.progress import Progress
from svdcli.text.tokens import Batch

# Outputs wider than this get the diagonal of H only: m * m numbers, and a factorisation of them,
# would dwarf the rest.
FULL_OUTPUTS = 4096

# What a unit costs: backwards its block is computed again and differentiated twice.
_STEPS_FORWARD = 1
_STEPS_BACKWARD = 3


class Gather:
    """Adds up, in rounds, what the selected layers of a model meet.

    layers maps names of weights to names of modules; loss is where gradients begin.
    """

    def __init__(
        self,
        model: Any,
        layers: Mapping[str, str],
        sums: Sums,
        loss: ModelLoss,
        progress: Progress,
        rounds: int,
    ) -> None:
        self.model = model
        self.layers = layers
        self.sums = sums
        self.loss = loss
        self.progress = progress
        self.rounds = rounds

    @contextmanager
    def round(
        self, number: int, batches: Sequence[Batch], *, backwards: bool, units: int
    ) -> Iterator[Visit]:
        """Sum what the layers meet in one run over these batches, which has to call what this
        yields before every unit (`Stream.run`)."""
        steps_a_unit = _STEPS_FORWARD
        if backwards:
            steps_a_unit += _STEPS_BACKWARD
        sums = _Round(self, number, batches, units * steps_a_unit)
        handles = []
        for name, target in self.layers.items():
            module = self.model.get_submodule(target)
            handles.append(module.register_forward_pre_hook(sums.input_hook(name)))
            handles.append(module.register_forward_hook(sums.output_hook(name)))
        try:
            yield sums.visit
        finally:
            for handle in handles:
                handle.remove()
        self.sums.events, self.sums.nats = self.loss.events, self.loss.nats


class _Round:
    """One run of the model over some batches: the sums of the unit whose turn it is. steps is how
    many there will be."""

    def __init__(self, gather: Gather, number: int, batches: Sequence[Batch], steps: int) -> None:
        self.gather = gather
        self.number = number
        self.batches = batches
        self.steps = steps
        self.phase = ""
        self.mask: Tensor | None = None
        self.steps_done = 0
        # Sums over the unit's inputs and outputs, which go on from those of the rounds before
        self.sums = MomentSums(FULL_OUTPUTS, begin=gather.sums.spool.find)
        # What its layers read so far of this batch, unchanged since, with the first that read it
        self.inputs_read: list[tuple[Tensor, int, str]] = []

    def visit(self, phase: str, unit: str, batch: int, total: int) -> None:
        """Note that what comes is of this batch in this unit; spool the sums of a unit that is
        done."""
        self.phase = phase
        self.inputs_read = []
        if not phase.endswith("done"):
            self.mask = padding_mask(self.batches[batch])
            return
        for key, value in self.sums.take().items():
            self.gather.sums.spool.put(key, value)
        self._report(unit)

    def _report(self, unit: str) -> None:
        forwards = self.phase == "forward done"
        self.steps_done += _STEPS_FORWARD if forwards else _STEPS_BACKWARD
        rounds_done = self.number + min(1.0, self.steps_done / self.steps)
        self.gather.progress("calibrate", unit, rounds_done, self.gather.rounds)

    def input_hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """Return a hook that adds what a layer reads, unless another layer read the same."""

        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if self.phase != "forward":
                return
            x = inputs[0]
            leader = self._leader(x, name)
            self.gather.sums.lead(name, leader)
            if leader == name:
                self.inputs_read.append((x, x._version, name))
                self._add_inputs(name, self._rows(x.detach(), name))

        return hook

    def _leader(self, x: Tensor, name: str) -> str:
        """Return the first layer of this unit and batch that read x: this one, if there is none
        before it."""
        for tensor, version, leader in self.inputs_read:
            if version == x._version and (tensor is x or _same_memory(tensor, x)):
                return leader
        return name

    def _add_inputs(self, name: str, rows: Tensor) -> None:
        self.gather.sums.count(name, rows.shape[0])
        self.sums.add(f"input.{name}", rows, always_full=True)
        self.sums.add_mean(f"mean.{name}", rows)

    def output_hook(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        """Return a hook that adds the gradient that arrives at a layer's output."""

        def add(gradient: Tensor) -> None:
            self.sums.add(f"output.{name}", self._rows(gradient.detach(), name))

        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if self.phase == "backward" and output.requires_grad:
                output.register_hook(add)

        return hook

    def _rows(self, values: Tensor, name: str) -> Tensor:
        """Return (tokens, width) in float32, without padding. Raises NotFiniteError where a value
        is not finite."""
        rows = without_padding(values.float(), self.mask)
        # One sum instead of a mask: a single NaN or infinity shows in it
        if not bool(torch.isfinite(rows.sum())):
            raise NotFiniteError(f"{name} meets NaN or infinity")
        return rows


def _same_memory(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors are the same view of the same memory."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
