"""What the model's output loses when one layer alone is cut: measured with forward passes, for the
allocation to count with.

Every layer has a copy of the batches to itself, in which it is cut while all others stay whole; all
copies go through the model in one pass of `Stream`, a block at a time. The cut leaves a quarter of
min(m, n), where the loss is well above rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from svdcli.calibration.loss import answer_of
from svdcli.calibration.memory import state_bytes
from svdcli.calibration.moments import LayerMoments, metric_of
from svdcli.calibration.stream import Stream
from svdcli.calibration.sums import Sums
from svdcli.linalg.solvers import transposed
from svdcli.linalg.whitening import weighted
from svdcli.progress import Progress
from svdcli.text.tokens import Batch

CUT = 0.25  # of min(m, n)

# Sensitivities compare whole distributions, which says much with little text.
SENSITIVITY_BATCHES = 4


def add_sensitivities(
    sums: Sums,
    stream: Stream,
    layers: Mapping[str, str],
    width: int,
    batches: Sequence[Batch],
    memory: int,
    progress: Progress,
) -> None:
    """Measure the sensitivities on batches spread over the text, and put them beside the moments.

    layers maps names of weights to names of modules; width is that of the hidden states, and memory
    what these may take, in bytes.
    """
    count = min(SENSITIVITY_BATCHES, len(batches))
    sample = [batches[len(batches) * i // SENSITIVITY_BATCHES] for i in range(count)]

    # As many copies of them at a time as their hidden states fit into the memory
    copy_bytes = 0
    for batch in sample:
        copy_bytes += state_bytes(stream.model, width, [batch], gradients=False)
    at_a_time = max(1, memory // copy_bytes)
    reached = {name: target for name, target in layers.items() if name in sums.leaders}
    results = sensitivities(stream, sample, reached, sums.moments_of, at_a_time, progress)
    for name, values in results.items():
        sums.spool.put(f"sensitivity.{name}", torch.tensor(values))


def sensitivities(
    stream: Stream,
    batches: Sequence[Batch],
    layers: Mapping[str, str],
    moments_of: Callable[[str], LayerMoments],
    at_a_time: int,
    progress: Progress,
) -> dict[str, tuple[float, float]]:
    """Return (loss, share) for every layer: the KL divergence from the whole model in nats a
    prediction, or, for encoders, the mean 1 - cosine of the sentence embeddings, when it alone is
    cut; and the share of its energy that the cut gives up.

    layers maps names of weights to names of modules; at_a_time bounds how many copies of the
    batches are under way together.
    """
    results: dict[str, tuple[float, float]] = {}
    names = list(layers)
    for start in range(0, len(names), at_a_time):
        group = names[start : start + at_a_time]

        # The uncut copy comes first, so that its answers are there when the others come
        targets = [(name, layers[name]) for name in group]
        copies = _CutCopies(stream.model, targets, batches, moments_of)
        stream.run(list(batches) * (1 + len(group)), read=copies.read, visit=copies.visit)
        results |= copies.results()
        progress("sensitivity", group[-1], len(results), len(names))
    return results


class _CutCopies:
    """Copies of the batches: one in which no layer is cut, then one for each of `layers` (name of
    the weight, name of the module), in which that layer is.

    As the visit of a stream it cuts the layer of the copy whose turn it is; what each copy ends in
    is compared with the uncut one.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[tuple[str, str]],
        batches: Sequence[Batch],
        moments_of: Callable[[str], LayerMoments],
    ) -> None:
        self.model = model
        self.layers = layers
        self.batches = batches
        self.moments_of = moments_of
        # The weight that is cut at present, and what it was
        self._uncut: tuple[nn.Parameter, Tensor] | None = None
        # The cut of the last layer, computed once for all batches of its copy
        self._last_cut: tuple[str, Tensor] | None = None
        self._shares: dict[str, float] = {}
        # By batch, what the uncut copy ends in; by layer, the summed distance from it
        self._answers: dict[int, Tensor] = {}
        self._losses: dict[str, float] = {}

    def visit(self, phase: str, unit: str, index: int, total: int) -> None:
        """Restore the layer that was cut, and cut the next one: called before every unit of every
        batch."""
        if self._uncut is not None:
            parameter, weight = self._uncut
            parameter.data = weight
            self._uncut = None

        copy = index // len(self.batches)
        if phase != "forward" or copy == 0:
            return
        name, target = self.layers[copy - 1]
        if target == unit or target.startswith(f"{unit}."):
            parameter = self.model.get_submodule(target).get_parameter("weight")
            self._uncut = (parameter, parameter.data)
            parameter.data = self._cut(name, parameter.data)

    def _cut(self, name: str, weight: Tensor) -> Tensor:
        """Return the weight at a quarter of its largest rank, best by the layer's moments."""
        if self._last_cut is not None and self._last_cut[0] == name:
            return self._last_cut[1]
        moments = self.moments_of(name)
        w = weight.T if moments.transposed else weight
        rank = max(1, int(CUT * min(w.shape)))
        factors = weighted(w, rank, metric_of(moments, w.device, centred=False))

        # The share of the energy that is given up; nothing of nothing where there is none
        energy = factors.tail + float(factors.sigma.square().sum())
        self._shares[name] = factors.tail / max(1e-300, energy)
        if moments.transposed:
            factors = transposed(factors)
        cut = factors.up @ factors.down
        self._last_cut = (name, cut)
        return cut

    def read(self, index: int, output: Any) -> None:
        """Compare what one batch of one copy ends in with the uncut one."""
        copy, number = divmod(index, len(self.batches))
        answer, distance = answer_of(output, self.batches[number])
        if copy == 0:
            self._answers[number] = answer
            return
        name = self.layers[copy - 1][0]
        loss = float(distance(self._answers[number], answer))
        self._losses[name] = self._losses.get(name, 0.0) + loss

    def results(self) -> dict[str, tuple[float, float]]:
        """Return (loss a prediction, share) by name; layers that no batch reached are left out."""
        predictions = sum(answer.shape[0] for answer in self._answers.values())
        # Below 0 by rounding alone
        return {
            name: (max(0.0, self._losses[name] / predictions), share)
            for name, share in self._shares.items()
        }
