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
from svdcli.calibration.stream import Stream, Visit
from svdcli.errors import SvdcliError
from svdcli.progress import Progress
from svdcli.text.tokens import Batch

# Outputs wider than this get the diagonal of H only: m * m numbers, and a factorisation of them,
# would dwarf the rest.
FULL_OUTPUTS = 4096


# Sensitivities compare whole distributions, which says much with little text.
SENSITIVITY_BATCHES = 4


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
        self.model, self.width, self.layers = model, width, layers
        self.spool, self.progress, self.rounds = spool, progress, rounds
        self.loss = ModelLoss()
        self.rows: dict[str, int] = {}
        self.leaders: dict[str, str] = {}

    @contextmanager
    def round(
        self, number: int, batches: Sequence[Batch], *, backwards: bool, units: int
    ) -> Iterator[Visit]:
        """Sum what the layers meet in one run over these batches, which has to call what this
        yields before every unit (`Stream.run`)."""
        one = _Round(self, number, batches, units * (4 if backwards else 1))
        handles = []
        for name, target in self.layers.items():
            module = self.model.get_submodule(target)
            handles.append(module.register_forward_pre_hook(one.input_hook(name)))
            handles.append(module.register_forward_hook(one.output_hook(name)))
        try:
            yield one.visit
        finally:
            for handle in handles:
                handle.remove()

    def add_sensitivities(self, stream: Stream, batches: Sequence[Batch], room: int) -> None:
        """Measure them on batches spread over the text, and put them beside the moments."""
        count = min(SENSITIVITY_BATCHES, len(batches))
        few = [batches[len(batches) * i // SENSITIVITY_BATCHES] for i in range(count)]

        # As many copies of them at a time as their hidden states fit into the room
        each = sum(state_bytes(self.model, self.width, [batch], gradients=False) for batch in few)
        at_a_time = max(1, room // each)
        reached = {name: self.layers[name] for name in self.leaders}
        measured = sensitivities(stream, few, reached, self._moments_of, at_a_time, self.progress)
        for name, values in measured.items():
            self.spool.add(f"sensitivity.{name}", torch.tensor(values))

    def _moments_of(self, name: str) -> LayerMoments:
        keys, scales = self.keys()[name], self.scales()

        def get(key: str) -> Tensor:
            return self.spool.get(key) * scales[key]

        outputs = None if keys["output"] is None else get(keys["output"])
        return LayerMoments(
            get(f"input.{keys['input']}"), get(f"mean.{keys['input']}"), outputs, keys["transposed"]
        )

    def keys(self) -> dict[str, dict[str, Any]]:
        """For every layer that was reached, the keys of its moments, as in the file."""
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
        """Inputs are averaged over rows, gradients summed over the losses: an error counts for
        every row that a loss reads."""
        scales = {}
        for key in self.spool.shapes:
            kind, name = key.split(".", 1)
            if kind == "output":
                count = self.loss.events or self.rows[name]
            elif kind == "sensitivity":
                count = 1
            else:
                count = self.rows[name]
            scales[key] = 1 / max(1, count)
        return scales


class _Round:
    """One run of the model over some batches: the sums of the unit whose turn it is. steps is how
    many there will be."""

    def __init__(self, gather: Gather, number: int, batches: Sequence[Batch], steps: int) -> None:
        self.gather, self.number, self.batches, self.steps = gather, number, batches, steps
        self.phase = ""
        self.mask: Tensor | None = None
        self.steps_done = 0
        # Inputs and outputs of the unit, and the inputs that its layers read so far
        self.sums = MomentSums(FULL_OUTPUTS)
        self.seen: list[tuple[Tensor, str]] = []

    def visit(self, phase: str, unit: str, batch: int, total: int) -> None:
        """What comes is of this batch in this unit; when a unit is done its sums are spooled."""
        self.phase, self.seen = phase, []
        if not phase.endswith("done"):
            self.mask = padding_mask(self.batches[batch])
            return
        for key, value in self.sums.take().items():
            self.gather.spool.add(key, value)
        self._report(unit)

    def _report(self, unit: str) -> None:
        """A step forwards counts as one, a step backwards as three: the block is computed again and
        differentiated twice."""
        self.steps_done += 1 if self.phase == "forward done" else 3
        done = self.number + min(1.0, self.steps_done / self.steps)
        self.gather.progress("calibrate", unit, done, self.gather.rounds)

    def input_hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """Adds what a layer reads, unless another layer read the same."""

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
                self.seen.append((x, name))
                self._add_inputs(name, self._rows(x.detach(), name))

        return hook

    def _leader(self, x: Tensor, name: str) -> str:
        """The first layer of this unit and batch that read x: this one, if there is none."""
        for tensor, other in self.seen:
            if tensor is x or _same_memory(tensor, x):
                return other
        return name

    def _add_inputs(self, name: str, rows: Tensor) -> None:
        self.gather.rows[name] = self.gather.rows.get(name, 0) + rows.shape[0]
        self.sums.add(f"input.{name}", rows, whole=True)
        self.sums.add_mean(f"mean.{name}", rows)

    def output_hook(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        """Adds the gradient that arrives at a layer's output."""

        def add(gradient: Tensor) -> None:
            self.sums.add(f"output.{name}", self._rows(gradient.detach(), name))

        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if self.phase == "backward" and output.requires_grad:
                output.register_hook(add)

        return hook

    def _rows(self, values: Tensor, name: str) -> Tensor:
        """(tokens, width) in float32, without padding. Raises SvdcliError where a value is not
        finite."""
        rows = without_padding(values.float(), self.mask)
        if not bool(torch.isfinite(rows.sum())):
            raise SvdcliError(
                f"{name} meets NaN or infinity",
                "the model itself answers so on this text; check it with `svdcli eval`",
            )
        return rows


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
    )
