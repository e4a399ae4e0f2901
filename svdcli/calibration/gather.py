"""Second moments of what layers read, gathered by hooks while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from svdcli.calibration.loss import ModelLoss
from svdcli.calibration.memory import state_bytes
from svdcli.calibration.moments import LayerMoments, Spool
from svdcli.calibration.sensitivity import sensitivities
from svdcli.calibration.stream import Stream
from svdcli.errors import SvdcliError
from svdcli.linalg.products import fill_gram, mirror
from svdcli.progress import Progress
from svdcli.text.tokens import Batch

# Outputs wider than this get the diagonal of H only: m * m numbers, and a factorisation of them,
# would dwarf the rest.
FULL_OUTPUTS = 4096


# Sensitivities compare whole distributions, which says much with little text.
SENSITIVITY_BATCHES = 4


@dataclass
class Gather:
    """Hooks on the selected layers, and the sums of the unit whose turn it is."""

    model: Any
    width: int
    layers: dict[str, str]
    spool: Spool
    progress: Progress
    rounds: int
    phase: str = ""
    mask: Tensor | None = None
    loss: ModelLoss = field(default_factory=ModelLoss)
    sums: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    leaders: dict[str, str] = field(default_factory=dict)
    seen: list[tuple[Tensor, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, target in self.layers.items():
            module = self.model.get_submodule(target)
            module.register_forward_pre_hook(self._input_hook(name))
            module.register_forward_hook(self._output_hook(name))

    def begin(self, number: int, batches: Sequence[Batch], *, backwards: bool, units: int) -> None:
        self.number, self.batches, self.backwards, self.units, self.steps = (
            number,
            batches,
            backwards,
            units,
            0,
        )

    def visit(self, phase: str, unit: str, batch: int, total: int) -> None:
        self.phase, self.seen = phase, []
        if phase.endswith("done"):
            for key, value in self.sums.items():
                self.spool.add(key, mirror(value) if value.ndim == 2 else value)
            self.sums = {}
            self._tell(unit)
        else:
            mask = self.batches[batch].get("attention_mask")
            self.mask = None if mask is None or bool(mask.all()) else mask.bool()

    def _tell(self, unit: str) -> None:
        """A step forwards counts as one, a step backwards as three: the block is computed again and
        differentiated twice."""
        self.steps += 1 if self.phase == "forward done" else 3
        whole = self.units * (4 if self.backwards else 1)
        done = self.number + min(1.0, self.steps / whole)
        self.progress("calibrate", unit, done, self.rounds)

    def _input_hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if self.phase == "forward":
                x = inputs[0]
                leader = next(
                    (n for tensor, n in self.seen if tensor is x or _same_memory(tensor, x)), name
                )
                if self.leaders.setdefault(name, leader) != leader:
                    raise SvdcliError(
                        f"{name} shares its input only sometimes",
                        "calibrate it alone with --include",
                    )
                if leader == name:
                    self.seen.append((x, name))
                    self._add_inputs(name, self._rows(x, name))

        return hook

    def _add_inputs(self, name: str, rows: Tensor) -> None:
        self.rows[name] = self.rows.get(name, 0) + rows.shape[0]
        width = rows.shape[1]
        for key, shape in ((f"input.{name}", (width, width)), (f"mean.{name}", (width,))):
            if key not in self.sums:
                self.sums[key] = torch.zeros(shape, dtype=torch.float32, device=rows.device)
        fill_gram(rows.T, self.sums[f"input.{name}"], add=True)
        self.sums[f"mean.{name}"] += rows.sum(0)

    def _output_hook(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if self.phase == "backward" and output.requires_grad:
                output.register_hook(
                    lambda gradient: self._add_outputs(name, self._rows(gradient.detach(), name))
                )

        return hook

    def _add_outputs(self, name: str, rows: Tensor) -> None:
        key, width = f"output.{name}", rows.shape[1]
        full = width <= FULL_OUTPUTS
        if key not in self.sums:
            self.sums[key] = torch.zeros(
                (width, width) if full else (width,), dtype=torch.float32, device=rows.device
            )
        if full:
            fill_gram(rows.T, self.sums[key], add=True)
        else:
            self.sums[key] += rows.square().sum(0)

    def _rows(self, values: Tensor, name: str) -> Tensor:
        """(tokens, width) in float32, without padding. Raises SvdcliError where a value is not
        finite."""
        values = values.float()
        if self.mask is not None and values.shape[:-1] == self.mask.shape:
            values = values[self.mask.to(values.device)]
        values = values.reshape(-1, values.shape[-1])
        if not bool(torch.isfinite(values.sum())):
            raise SvdcliError(
                f"{name} meets NaN or infinity",
                "the model itself answers so on this text; check it with `svdcli eval`",
            )
        return values

    # What is written

    def add_sensitivities(self, stream: Stream, batches: Sequence[Batch], room: int) -> None:
        """Measure them on batches spread over the text, and put them beside the moments."""
        self.phase = ""
        few = [
            batches[len(batches) * i // SENSITIVITY_BATCHES]
            for i in range(min(SENSITIVITY_BATCHES, len(batches)))
        ]
        each = sum(state_bytes(self.model, self.width, [batch], gradients=False) for batch in few)
        known = {name: self.layers[name] for name in self.leaders}
        found = sensitivities(
            stream, few, known, self._moments_of, max(1, room // each), self.progress
        )
        for name, values in found.items():
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
        outputs = self.spool.shapes
        return {
            name: {
                "input": leader,
                "output": f"output.{name}" if f"output.{name}" in outputs else None,
                "transposed": not isinstance(
                    self.model.get_submodule(self.layers[name]), nn.Linear
                ),
            }
            for name, leader in self.leaders.items()
        }

    def scales(self) -> dict[str, float]:
        """Inputs are averaged over rows, gradients summed over the losses: an error counts for
        every row that a loss reads."""

        def scale(kind: str, name: str) -> float:
            return 1 / max(
                1, {"output": self.loss.events, "sensitivity": 1}.get(kind) or self.rows[name]
            )

        return {key: scale(*key.split(".", 1)) for key in self.spool.shapes}


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
    )
