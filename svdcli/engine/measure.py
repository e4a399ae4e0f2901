"""The spectrum of every layer, for rank policies that look at it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from svdcli.calibration.moments import LayerMoments, metric_of
from svdcli.engine.calibrated import Calibration
from svdcli.engine.executor import spread
from svdcli.engine.job import guess_seconds
from svdcli.engine.solve import bias_of, work_dtype
from svdcli.errors import SvdcliError
from svdcli.files.checkpoint import Checkpoint
from svdcli.files.workspace import Workspace
from svdcli.linalg.solvers import squared_singular_values
from svdcli.linalg.whitening import weighted_energies
from svdcli.plan.decide import UNSOUND, Measured
from svdcli.plan.tensors import TensorInfo
from svdcli.progress import Progress

_TINY = 1e-140  # the squares of smaller numbers, or larger than one over it, leave float64


def measure_layer(
    w: Tensor,
    *,
    spectra: bool,
    device: torch.device,
    moments: LayerMoments | None = None,
    centred: bool = False,
) -> Measured:
    """Is the weight finite, its squares included, and, where asked, what are its squared singular
    values, in the metric of its moments if any.

    Weights of 16 bits are measured through a float32 Gram matrix, whose noise is below their own
    rounding; others in float64.
    """
    largest = max(abs(value) for value in map(float, w.aminmax()))
    if not math.isfinite(largest) or (
        w.dtype == torch.float64 and largest > 0 and not _TINY < largest < 1 / _TINY
    ):
        return Measured(finite=False)
    if not spectra:
        return Measured(finite=True)
    if moments is not None:
        where = torch.device("cpu") if device.type == "mps" else device
        matrix = (w.T if moments.transposed else w).to(where)
        weighed = weighted_energies(matrix, metric_of(moments, where, centred=centred))
        if not moments.inputs.any() or (moments.outputs is not None and not moments.outputs.any()):
            weighed = torch.zeros_like(
                weighed
            )  # solved as if all mattered alike, but worth nothing to the model
        return Measured(finite=True, energies=tuple(weighed.tolist()))
    work = w.to(
        device,
        work_dtype(
            device, torch.float64 if w.dtype in (torch.float32, torch.float64) else torch.float32
        ),
    )
    exponent = math.frexp(largest)[1]
    # A power of two keeps every bit, and squares of very large or small weights inside the dtype's
    # range.
    energies = squared_singular_values(torch.ldexp(work, torch.tensor(-exponent))).to(
        "cpu", torch.float64
    )
    energies = torch.ldexp(energies, torch.tensor(2 * exponent))
    return Measured(finite=True, energies=tuple(energies.tolist()))


def measure(
    checkpoint: Checkpoint,
    tensors: Sequence[TensorInfo],
    *,
    spectra: bool,
    device: torch.device,
    workspace: Workspace | None,
    progress: Progress,
    calibration: Calibration | None = None,
) -> dict[str, Measured]:
    """Measure every layer that the journal does not have yet; with a calibration, in its metric."""
    known = workspace.measured if workspace is not None else {}
    share = 0.3 if spectra else 0.0
    total, done = math.fsum(guess_seconds(tensor, share=share) for tensor in tensors), 0.0
    found = {}

    def look(tensor: TensorInfo) -> tuple[TensorInfo, dict[str, Any]]:
        line = known.get(tensor.name)
        if line is None or (spectra and line["energies"] is None and line["finite"]):
            kind = "" if calibration is None else calibration.kind(tensor.name)
            moments = (
                calibration.cut(tensor.name, kind) if calibration is not None and kind else None
            )
            bias = bias_of(checkpoint, tensor, moments)
            w = checkpoint.read_tensor(tensor.name)
            layer = measure_layer(
                w, spectra=spectra, device=device, moments=moments, centred=bias is not None
            )
            line = {
                "measured": tensor.name,
                "finite": layer.finite,
                "energies": layer.energies,
                "metric": kind,
            }
            line["refit"] = bias is not None
            line["weight"] = None if calibration is None else calibration.weight(tensor.name, kind)
            if workspace is not None:
                workspace.note(line)
        return tensor, line

    for tensor, line in spread(look, tensors, device):
        energies = None if line["energies"] is None else tuple(line["energies"])
        bias = checkpoint.tensors[f"{tensor.module}.bias"].info if line["refit"] else None
        found[tensor.name] = Measured(
            line["finite"], energies, line["metric"], bias, line["weight"]
        )
        done += guess_seconds(tensor, share=share)
        progress("measure", tensor.name, done, total)
    return {tensor.name: found[tensor.name] for tensor in tensors}


def check_finite(bad: Sequence[str]) -> None:
    """Raises SvdcliError that names the weights that no solver takes."""
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise SvdcliError(
            f"{UNSOUND} in {', '.join(bad[:3])}{more}",
            "leave such layers dense with --nonfinite skip, or --exclude them",
        )
