"""How fast the singular values of each layer fall."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdcli.files.checkpoint import open_checkpoint
from svdcli.files.record import check_not_compressed
from svdcli.files.report import JSON_VERSION
from svdcli.plan.layers import break_even, choose_layers, nothing_selected
from svdcli.plan.tensors import TensorInfo
from svdcli.progress import Progress, silent

if TYPE_CHECKING:
    from svdcli.engine.compute import Compute


CURVE_POINTS = 24


@dataclass(frozen=True)
class SpectrumRow:
    """The singular values of one layer in a few numbers.

    effective_rank is exp of the entropy of sigma / sum(sigma) (Roy and Vetterli, 2007); stable_rank
    is ||W||_F^2 / sigma_1^2; rank_N the smallest rank that keeps N % of the energy. curve holds
    sigma / sigma_1 at evenly spaced places from the first singular value to the last.
    """

    name: str
    shape: tuple[int, ...]
    break_even: int
    sigma_max: float
    effective_rank: float
    stable_rank: float
    rank_90: int
    rank_95: int
    rank_99: int
    curve: tuple[float, ...]


@dataclass(frozen=True)
class Spectrum:
    """The singular values of every selected layer of one checkpoint."""

    path: str
    layers: tuple[SpectrumRow, ...]

    def to_json(self) -> dict[str, Any]:
        return {"svdcli_json": JSON_VERSION, "kind": "spectrum"} | asdict(self)


def spectrum(
    model: str | Path,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    layers: Sequence[str] | None = None,
    state_dict: str | None = None,
    compute: Compute | None = None,
    progress: Progress = silent,
) -> Spectrum:
    """Measure the singular values of every layer that compress would select.

    Raises SvdcliError for an output of svdcli and for NaN or infinity in a layer,
    NothingSelectedError where there is no layer, and like `compress` for bad input.
    """
    from svdcli.engine.compute import Compute
    from svdcli.engine.run import Run
    from svdcli.engine.solve import check_finite
    from svdcli.engine.spectra import measure_spectra
    from svdcli.models.kinds import take_apart_stacks

    with open_checkpoint(model, state_dict=state_dict) as checkpoint:
        check_not_compressed(checkpoint, "look at the original, or expand it first")

        # The same layers as compress
        take_apart_stacks(checkpoint)
        selected, skipped = choose_layers(
            checkpoint.infos,
            include=include,
            exclude=exclude,
            layers=layers,
            tied=checkpoint.tied,
            facts=checkpoint.facts,
        )
        if not selected:
            raise nothing_selected(checkpoint.shown, skipped)

        # Their squared singular values, all of them finite
        device = (compute or Compute()).start()
        spectra = measure_spectra(Run(checkpoint, device, progress), selected, spectra=True)
        bad = [name for name, layer in spectra.items() if not layer.finite]
        check_finite(bad, checkpoint.shown)

        rows = []
        for tensor in selected:
            layer = spectra[tensor.name]
            rows.append(_spectrum_row(tensor, layer.energies or (), layer.tails()))
        return Spectrum(checkpoint.shown, tuple(rows))


def _spectrum_row(
    tensor: TensorInfo, energies: Sequence[float], tails: Sequence[float]
) -> SpectrumRow:
    """energies are squared singular values, largest first; tails the share of energy beyond each
    rank from 0 on."""
    # A matrix of zeros is divided by 1: its numbers are 0
    sigmas = [math.sqrt(energy) for energy in energies]
    largest = sigmas[0] or 1.0
    total = math.fsum(sigmas) or 1.0

    # exp of the entropy counts the singular values as if all were equal
    shares = [sigma / total for sigma in sigmas if sigma > 0]
    effective_rank = 0.0
    if shares:
        effective_rank = math.exp(-math.fsum(share * math.log(share) for share in shares))

    points = [round(i * (len(sigmas) - 1) / (CURVE_POINTS - 1)) for i in range(CURVE_POINTS)]
    return SpectrumRow(
        name=tensor.name,
        shape=tensor.shape,
        break_even=break_even(tensor.shape),
        sigma_max=sigmas[0],
        effective_rank=effective_rank,
        stable_rank=math.fsum(energies) / largest**2,
        rank_90=_rank_within(tails, 0.1),
        rank_95=_rank_within(tails, 0.05),
        rank_99=_rank_within(tails, 0.01),
        curve=tuple(sigmas[point] / largest for point in points),
    )


def _rank_within(tails: Sequence[float], share: float) -> int:
    """The smallest rank whose tail is at most this share of the energy."""
    return next(rank for rank, tail in enumerate(tails) if tail <= share)
