"""Second moments of what layers read, gathered by hooks while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from svdcli.calibration.loss import ModelLoss
from svdcli.calibration.memory import state_bytes
from svdcli.calibration.moments import LayerMoments, Spool
from svdcli.calibration.rows import MomentSums, padding_mask, without_padding
from svdcli.calibration.sensitivity import sensitivities
from svdcli.calibration.siblings import lend
from svdcli.calibration.stream import Stream, Visit
from svdcli.errors import SvdcliError
from svdcli.progress import Progress
from svdcli.text.tokens import Batch

# Outputs wider than this get the diagonal of H only: m * m numbers, and a factorisation of them,
# would dwarf the rest.
FULL_OUTPUTS = 4096

# Sensitivities compare whole distributions, which says much with little text.
SENSITIVITY_BATCHES = 4

# What a unit costs: backwards its block is computed again and differentiated twice.
_STEPS_FORWARD = 1
_STEPS_BACKWARD = 3


class Gather:
    """The sums of all rounds: moments of the selected layers, in the spool.

    layers maps names of weights to names of modules; width is that of the hidden states. rows
    counts what each layer read. leaders names, for each layer, the first layer that reads the same
    input: the moments of a shared input are summed once.
    """

    def __init__(
        self,
        model: Any,
        width: int,
        layers: dict[str, str],
        spool: Spool,
        progress: Progress,
        rounds: int,
    ) -> None:
        self.model = model
        self.width = width
        self.layers = layers
        self.spool = spool
        self.progress = progress
        self.rounds = rounds
        self.loss = ModelLoss()
        self.rows: dict[str, int] = {}
        self.leaders: dict[str, str] = {}

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

    def share_among_experts(self) -> list[str]:
        """Have the experts of each layer lend each other what they saw; return the names of weights
        that read fewer tokens than they have inputs."""
        return lend(self.layers, self.leaders, self.rows, self.spool)

    def add_sensitivities(self, stream: Stream, batches: Sequence[Batch], memory: int) -> None:
        """Measure the sensitivities on batches spread over the text, and put them beside the
        moments. memory is what hidden states may take, in bytes."""
        count = min(SENSITIVITY_BATCHES, len(batches))
        sample = [batches[len(batches) * i // SENSITIVITY_BATCHES] for i in range(count)]

        # As many copies of them at a time as their hidden states fit into the memory
        copy_bytes = 0
        for batch in sample:
            copy_bytes += state_bytes(self.model, self.width, [batch], gradients=False)
        at_a_time = max(1, memory // copy_bytes)
        reached = {name: self.layers[name] for name in self.leaders}
        results = sensitivities(stream, sample, reached, self._moments_of, at_a_time, self.progress)
        for name, values in results.items():
            self.spool.add(f"sensitivity.{name}", torch.tensor(values))

    def _moments_of(self, name: str) -> LayerMoments:
        """Return a layer's moments as they will be in the file."""
        keys = self.keys()[name]
        scales = self.scales()

        def scaled(key: str) -> Tensor:
            return self.spool.get(key) * scales[key]

        outputs = None if keys["output"] is None else scaled(keys["output"])
        return LayerMoments(
            inputs=scaled(f"input.{keys['input']}"),
            mean=scaled(f"mean.{keys['input']}"),
            outputs=outputs,
            transposed=keys["transposed"],
        )

    def keys(self) -> dict[str, dict[str, Any]]:
        """Return the keys of the moments of every layer that was reached, as they are in the
        file."""
        keys = {}
        for name, leader in self.leaders.items():
            output = f"output.{name}"
            module = self.model.get_submodule(self.layers[name])
            keys[name] = {
                "input": leader,
                "output": output if output in self.spool.shapes else None,
                "transposed": not isinstance(module, nn.Linear),
            }
        return keys

    def scales(self) -> dict[str, float]:
        """Return the factor of every sum: inputs are averaged over rows, gradients summed over the
        losses, so that an error counts for every row that a loss reads."""
        scales = {}
        for key in self.spool.shapes:
            quantity, name = key.split(".", 1)
            if quantity == "output":
                count = self.loss.events or self.rows[name]
            elif quantity == "sensitivity":
                count = 1
            else:
                count = self.rows[name]
            scales[key] = 1 / max(1, count)
        return scales


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
        # Sums over the unit's inputs and outputs
        self.sums = MomentSums(FULL_OUTPUTS)
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
            self.gather.spool.add(key, value)
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
            if self.gather.leaders.setdefault(name, leader) != leader:
                raise SvdcliError(
                    f"{name} shares its input only sometimes",
                    "calibrate it alone with --include",
                )
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
        self.gather.rows[name] = self.gather.rows.get(name, 0) + rows.shape[0]
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
        """Return (tokens, width) in float32, without padding. Raises SvdcliError where a value is
        not finite."""
        rows = without_padding(values.float(), self.mask)
        # One sum instead of a mask: a single NaN or infinity shows in it
        if not bool(torch.isfinite(rows.sum())):
            raise SvdcliError(
                f"{name} meets NaN or infinity",
                "the model itself answers so on this text; check it with `svdcli eval`",
            )
        return rows


def _same_memory(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors are the same view of the same memory."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
