"""What the model's output loses when one layer alone is cut: measured with forward passes, for the
allocation to count with.

Every layer has a copy of the batches to itself, in which it is cut while all others stay whole; all
copies go through the model in one pass of `Stream`, a block at a time. The cut leaves a quarter of
min(m, n), where the loss is well above rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from svdcli.calibration.loss import answer_of
from svdcli.calibration.moments import LayerMoments, metric_of
from svdcli.calibration.stream import Stream
from svdcli.linalg.solvers import transposed
from svdcli.linalg.whitening import weighted
from svdcli.progress import Progress
from svdcli.text.tokens import Batch

CUT = 0.25  # of min(m, n)


def sensitivities(
    stream: Stream,
    batches: Sequence[Batch],
    layers: Mapping[str, str],
    moments_of: Callable[[str], LayerMoments],
    at_a_time: int,
    progress: Progress,
) -> dict[str, tuple[float, float]]:
    """For every layer (loss, share): the KL divergence from the whole model in nats a prediction,
    or, for encoders, the mean 1 - cosine of the sentence embeddings, when it alone is cut; and the
    share of its energy that the cut gives up.

    layers maps names of weights to names of modules; at_a_time bounds how many copies of the
    batches are under way together.
    """
    found: dict[str, tuple[float, float]] = {}
    names = list(layers)
    for start in range(0, len(names), at_a_time):
        group = {name: layers[name] for name in names[start : start + at_a_time]}
        cutter = _Cutter(stream.model, list(group.items()), batches, moments_of)
        copies = list(batches) * (1 + len(group))
        stream.run(copies, read=cutter.read, visit=cutter.visit)
        found |= cutter.results()
        progress(
            "sensitivity", names[min(len(names), start + at_a_time) - 1], len(found), len(names)
        )
    return found


@dataclass
class _Cutter:
    """Cuts the layer of the copy whose turn it is, and compares what each copy ends in with the
    uncut one."""

    model: nn.Module
    layers: list[tuple[str, str]]
    batches: Sequence[Batch]
    moments_of: Callable[[str], LayerMoments]
    whole: tuple[nn.Module, Tensor] | None = None
    cut: tuple[str, Tensor] | None = None
    shares: dict[str, float] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)
    answers: dict[int, Tensor] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)

    def visit(self, phase: str, unit: str, index: int, total: int) -> None:
        if self.whole is not None:
            self.whole[0].get_parameter("weight").data = self.whole[1]
            self.whole = None
        copy = index // len(self.batches) - 1
        if phase != "forward" or copy < 0:
            return
        name, target = self.layers[copy]
        if target == unit or target.startswith(f"{unit}."):
            module = self.model.get_submodule(target)
            weight = module.get_parameter("weight")
            self.whole = (module, weight.data)
            weight.data = self._cut(name, weight.data)

    def _cut(self, name: str, weight: Tensor) -> Tensor:
        """The weight at a quarter of its largest rank, best by the layer's moments; computed once
        for all batches."""
        if self.cut is None or self.cut[0] != name:
            moments = self.moments_of(name)
            w = weight.T if moments.transposed else weight
            factors = weighted(
                w, max(1, int(CUT * min(w.shape))), metric_of(moments, w.device, centred=False)
            )
            self.shares[name] = factors.tail / max(
                1e-300, factors.tail + float(factors.sigma.square().sum())
            )
            factors = transposed(factors) if moments.transposed else factors
            self.cut = name, factors.up @ factors.down
        return self.cut[1]

    def read(self, index: int, output: Any) -> None:
        copy, number = divmod(index, len(self.batches))
        answer, loss = answer_of(output, self.batches[number])
        if copy == 0:
            self.answers[number], self.counts[number] = answer, answer.shape[0]
            return
        name = self.layers[copy - 1][0]
        self.sums[name] = self.sums.get(name, 0.0) + float(loss(self.answers[number], answer))

    def results(self) -> dict[str, tuple[float, float]]:
        """Layers that no batch reached are left out."""
        count = sum(self.counts.values())
        return {
            name: (max(0.0, self.sums[name] / count), share) for name, share in self.shares.items()
        }
