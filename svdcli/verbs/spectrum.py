"""How fast the singular values of each layer fall."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdcli.errors import SvdcliError
from svdcli.files.checkpoint import (
    open_checkpoint,
)
from svdcli.files.record import record_of
from svdcli.files.report import JSON_VERSION
from svdcli.plan.layers import break_even, choose_layers, nothing_selected
from svdcli.plan.tensors import TensorInfo
from svdcli.progress import Progress, silent

if TYPE_CHECKING:
    from svdcli.engine.compute import Compute


CURVE_POINTS = 24


# spectrum -----------------------------------------------------------------------------------------


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
    """Measure the singular values of every layer that compress would select."""
    from svdcli.engine.compute import Compute
    from svdcli.engine.spectra import check_finite, measure_spectra

    with open_checkpoint(model, state_dict=state_dict) as checkpoint:
        if record_of(checkpoint) is not None:
            raise SvdcliError(
                f"{checkpoint.shown} is compressed already",
                "look at the original, or expand it first",
            )
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
        device = (compute or Compute()).start()
        found = measure_spectra(
            checkpoint, selected, spectra=True, device=device, workspace=None, progress=progress
        )
        check_finite([name for name, layer in found.items() if not layer.finite])
        rows = [
            _spectrum_row(tensor, found[tensor.name].energies or (), found[tensor.name].tails())
            for tensor in selected
        ]
        return Spectrum(checkpoint.shown, tuple(rows))


def _spectrum_row(
    tensor: TensorInfo, energies: Sequence[float], tails: Sequence[float]
) -> SpectrumRow:
    sigmas = [math.sqrt(energy) for energy in energies]
    top, mass = (sigmas[0] or 1.0), (math.fsum(sigmas) or 1.0)
    shares = [sigma / mass for sigma in sigmas if sigma > 0]
    entropy = -math.fsum(share * math.log(share) for share in shares)
    places = [round(i * (len(sigmas) - 1) / (CURVE_POINTS - 1)) for i in range(CURVE_POINTS)]
    rank_90, rank_95, rank_99 = (
        next(r for r, tail in enumerate(tails) if tail <= cut) for cut in (0.1, 0.05, 0.01)
    )
    return SpectrumRow(
        name=tensor.name,
        shape=tensor.shape,
        break_even=break_even(tensor.shape),
        sigma_max=sigmas[0],
        effective_rank=math.exp(entropy) if shares else 0.0,
        stable_rank=math.fsum(energies) / top**2,
        rank_90=rank_90,
        rank_95=rank_95,
        rank_99=rank_99,
        curve=tuple(sigmas[place] / top for place in places),
    )
