"""What calibration adds up over a text, or over a part of it, and how the file of moments comes of
it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from svdcli.calibration.moments import LayerMoments, Provenance, Spool, write_moments
from svdcli.calibration.siblings import lend
from svdcli.errors import SvdcliError


@dataclass
class Sums:
    """Sums over what the selected layers read, in the spool, and how much that was.

    layers maps the name of every selected weight to whether it is stored as (in, out). rows counts
    what each layer read. leaders names, for each layer that was reached, the first layer that reads
    the same input: the moments of a shared input are summed once. events counts predictions or
    embeddings that gradients began from; nats says that it was predictions.
    """

    spool: Spool
    layers: dict[str, bool]
    leaders: dict[str, str] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    events: int = 0
    nats: bool = True

    def lead(self, name: str, leader: str) -> None:
        """Note which layer's input a layer shares. Raises SvdcliError where it was another one
        before."""
        if self.leaders.setdefault(name, leader) != leader:
            raise SvdcliError(
                f"{name} shares its input only sometimes", "calibrate it alone with --include"
            )

    def count(self, name: str, rows: int) -> None:
        """Note that a layer read so many rows more."""
        self.rows[name] = self.rows.get(name, 0) + rows

    def share_among_experts(self) -> list[str]:
        """Have the experts of each layer lend each other what they saw; return the names of weights
        that read fewer tokens than they have inputs."""
        return lend(self.layers, self.leaders, self.rows, self.spool)

    def keys(self) -> dict[str, dict[str, Any]]:
        """Return the keys of the moments of every layer that was reached, as they are in the
        file."""
        keys = {}
        for name, is_transposed in self.layers.items():
            if name not in self.leaders:
                continue
            output = f"output.{name}"
            keys[name] = {
                "input": self.leaders[name],
                "output": output if output in self.spool.shapes else None,
                "transposed": is_transposed,
            }
        return keys

    def scales(self) -> dict[str, float]:
        """Return the factor of every sum: inputs are averaged over rows, gradients summed over the
        losses, so that an error counts for every row that a loss reads."""
        scales = {}
        for key in self.spool.shapes:
            quantity, name = key.split(".", 1)
            if quantity == "output":
                count = self.events or self.rows[name]
            elif quantity == "sensitivity":
                count = 1
            else:
                count = self.rows[name]
            scales[key] = 1 / max(1, count)
        return scales

    def moments_of(self, name: str) -> LayerMoments:
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

    def write(
        self,
        out: Path,
        provenance: Provenance,
        measure: Callable[[Sums], None] | None = None,
    ) -> list[str]:
        """Write the file of moments, once the whole text is in the sums; return the names of
        weights of experts that read fewer tokens than they have inputs.

        measure is called with the sums when they are final, and may put more beside them into the
        spool.
        """
        few = self.share_among_experts()
        if measure is not None:
            measure(self)
        write_moments(out, self.spool, self.scales(), self.keys(), provenance)
        return few
