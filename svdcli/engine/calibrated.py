"""A calibration as solvers take it: the metric of every layer, read from the moments of `svdcli
calibrate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from svdcli.calibration.moments import LayerMoments, Moments
from svdcli.errors import SvdcliError, UsageError
from svdcli.plan.plan import LayerPlan
from svdcli.plan.recipe import Recipe


@dataclass(frozen=True)
class Calibration:
    """The moments that a recipe counts with, and how much of them."""

    moments: Moments
    metric: str

    @property
    def unit(self) -> str:
        """Of the predicted losses: that of the model's own loss where gradients or sensitivities
        count, else none."""
        measured = self.moments.provenance
        if self.metric == "inputs":
            # moments of gradients do not count then, nor sensitivities that were measured by them
            counts = measured.sensitivity and not measured.gradients
        else:
            counts = measured.gradients or measured.sensitivity
        return measured.unit if counts else ""

    def metric_name(self, name: str) -> str:
        """The metric of one layer: "" where the moments say nothing of it."""
        measured = self.moments.metric_name(name)
        provenance = self.moments.provenance
        if provenance.gradients and measured == "inputs" and self.metric != "inputs":
            return ""  # no gradient reached it, so nothing compares it with the others
        if provenance.sensitivity and self.moments.loss_scale(name) is None:
            return ""
        if self.metric == "inputs" and measured:
            return "inputs"
        if self.metric == "diagonal" and measured == "full":
            return "diagonal"
        return measured

    def inputs(self) -> dict[str, str]:
        """What each layer reads, by the name of the first layer that reads it; only of weights that
        are stored as (out, in), and that gradients reached."""
        return {
            name: str(keys["input"])
            for name, keys in self.moments.layers.items()
            if not keys["transposed"] and self.metric_name(name) in ("diagonal", "full")
        }

    def loss_scale(self, name: str, metric: str) -> float | None:
        """The measured sensitivity of one layer, where it was measured in the metric that counts
        here."""
        if not metric or metric != self.moments.metric_name(name):
            return None
        return self.moments.loss_scale(name)

    def of(self, layer: LayerPlan) -> LayerMoments | None:
        """The moments of one planned layer, cut to its metric."""
        if not layer.metric:
            return None
        return self.of_stack([tensor.name for tensor in layer.originals], layer.metric)

    def of_stack(self, names: Sequence[str], metric: str) -> LayerMoments:
        """The moments of layers that read the same input, one below the other; those of a single
        one are its own. Raises as `cut`."""
        first = self.cut(names[0], metric)
        if len(names) == 1:
            return first
        outputs = [self.cut(name, metric).outputs for name in names]
        blocks = tuple(block for block in outputs if isinstance(block, Tensor))
        return replace(first, outputs=blocks)

    def cut(self, name: str, metric: str) -> LayerMoments:
        """The moments of one layer as far as a metric counts them. Raises SvdcliError where the
        file has none of it."""
        whole = self.moments.of(name)
        if whole is None:
            raise SvdcliError(
                f"the calibration lacks {name}, which the plan needs",
                "give the calibration it was made with",
            )
        outputs = None if metric == "inputs" else whole.outputs
        if metric == "diagonal" and isinstance(outputs, Tensor) and outputs.ndim == 2:
            outputs = outputs.diagonal().contiguous()
        return LayerMoments(whole.inputs, whole.mean, outputs, whole.transposed)


def check_metric(recipe: Recipe, moments: Moments) -> None:
    """Raises UsageError where the recipe asks for gradients that the calibration did not
    measure."""
    if recipe.metric in ("diagonal", "full") and not moments.provenance.gradients:
        raise UsageError(
            f"--metric {recipe.metric} needs gradients, which the calibration left out",
            "calibrate with --gradients",
        )
    if recipe.share == "always" and not moments.provenance.gradients:
        raise UsageError(
            "--share always needs gradients, which the calibration left out",
            "calibrate with --gradients",
        )
