"""The spectrum of every layer, for rank policies that go by it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from svdcli.calibration.moments import LayerMoments, metric_of
from svdcli.engine.calibrated import Calibration
from svdcli.engine.executor import solving
from svdcli.engine.footprint import bytes_to_solve
from svdcli.engine.inputs import Inputs, Opened, shared
from svdcli.engine.job import Line, guess_seconds
from svdcli.engine.packing import expected_roundings
from svdcli.engine.run import Run
from svdcli.engine.solve import bias_of, largest_of, read_weight, work_dtype
from svdcli.files.dtypes import TORCH_DTYPES
from svdcli.files.source import Source
from svdcli.linalg.damping import blocks_of
from svdcli.linalg.machine import placed_on
from svdcli.linalg.solvers import squared_singular_values
from svdcli.linalg.whitening import weighted_energies
from svdcli.memory import ROOM
from svdcli.plan.decide import LayerSpectrum
from svdcli.plan.groups import Group
from svdcli.plan.menus import Rounding, Trial, trials_of
from svdcli.plan.recipe import Recipe
from svdcli.plan.tensors import TensorInfo, module_of
from svdcli.plan.words import METRICS


def measure_spectrum(
    w: Tensor,
    *,
    spectra: bool,
    device: torch.device,
    moments: LayerMoments | None = None,
    centred: bool = False,
    trials: Sequence[Trial] = (),
    dtype: str = "",
) -> LayerSpectrum:
    """Is the weight finite, its squares included, and, where asked, what are its squared singular
    values, in the metric of its moments if any, and what rounding will cost in trials with scales
    in that dtype.

    Weights of 16 bits are measured through a float32 Gram matrix, whose noise is below their own
    rounding; others in float64.
    """
    largest = largest_of(w)
    if largest is None:
        return LayerSpectrum(finite=False)
    if not spectra:
        return LayerSpectrum(finite=True)

    # in the metric of its moments, or else plain
    if moments is None:
        return LayerSpectrum(finite=True, energies=tuple(_plain(w, device, largest).tolist()))
    measured = [moments.inputs]
    if moments.outputs is not None:
        measured += blocks_of(moments.outputs)
    if not all(moment.any() for moment in measured):
        # such a layer is solved as if all mattered alike, but is worth nothing to the model
        nothing = tuple(Rounding(trial, 0.0) for trial in trials)
        return LayerSpectrum(finite=True, energies=(0.0,) * min(w.shape), roundings=nothing)

    # mps has no float64
    capable = torch.device("cpu") if device.type == "mps" else device
    matrix = (w.T if moments.transposed else w).to(capable)
    metric = metric_of(moments, capable, centred=centred)
    roundings: list[Rounding] = []
    if trials:
        scales = TORCH_DTYPES[dtype]
        energies, roundings = expected_roundings(
            matrix, metric, trials, scales, transposed=moments.transposed
        )
    else:
        energies = weighted_energies(matrix, metric)
    values = tuple(energies.tolist())
    return LayerSpectrum(finite=True, energies=values, roundings=tuple(roundings))


def _plain(w: Tensor, device: torch.device, largest: float) -> Tensor:
    """Squared singular values, descending, in float64; largest is that of the magnitudes in w."""
    wide = w.dtype in (torch.float32, torch.float64)
    dtype = torch.float64 if wide else torch.float32
    work = w.to(device, work_dtype(device, dtype))
    # A power of two keeps every bit, and squares of very large or small weights inside the dtype's
    # range.
    exponent = math.frexp(largest)[1]
    scaled = torch.ldexp(work, torch.tensor(-exponent))
    energies = squared_singular_values(scaled).to("cpu", torch.float64)
    return torch.ldexp(energies, torch.tensor(2 * exponent))


@dataclass(frozen=True)
class SpectrumJob:
    """One layer, or group, to be measured: its weights and where they are, in values. tensor is the
    weight, or all of a group's under a name of their own."""

    tensor: TensorInfo
    inputs: Inputs
    spectra: bool
    device: str
    earlier: Line | None = None
    trials: tuple[Trial, ...] = ()
    dtype: str = ""
    members: tuple[TensorInfo, ...] = ()

    @property
    def originals(self) -> tuple[TensorInfo, ...]:
        """The weights themselves."""
        return self.members or (self.tensor,)


def run_spectrum_job(job: SpectrumJob) -> Line:
    """What the spectrum of one layer is, as a line of the journal; that of an earlier run where it
    says enough."""
    earlier = job.earlier
    if earlier is not None:
        lacks_spectrum = earlier["energies"] is None and earlier["finite"]
        lacks_roundings = bool(job.trials) and earlier["finite"] and "roundings" not in earlier
        if not (job.spectra and lacks_spectrum) and not lacks_roundings:
            return earlier

    # one after the other, where the memory holds no more
    opened = job.inputs.open()
    metric = _metric_of(opened.calibration, [tensor.name for tensor in job.originals])
    need = 0
    if job.spectra:
        shapes = [tensor.shape for tensor in job.originals]
        need = bytes_to_solve(shapes, metric, rounding=bool(job.trials))
    with ROOM.taking(need):
        return _measured(job, opened, metric)


def _metric_of(calibration: Calibration | None, names: Sequence[str]) -> str:
    """The metric of a layer or group, as far as the calibration has one for all of it."""
    if calibration is None:
        return ""
    metrics = {calibration.metric_name(name) for name in names}
    return max(metrics, key=METRICS.index) if "" not in metrics else ""


def _measured(job: SpectrumJob, opened: Opened, metric: str) -> Line:
    """The weights of a job, measured in this metric."""
    # what the calibration has of them
    names = [tensor.name for tensor in job.originals]
    moments, loss = None, None
    if opened.calibration is not None and metric:
        moments = opened.calibration.of_stack(names, metric)
        loss = opened.calibration.loss_scale(names[0], metric) if len(names) == 1 else None
    biases = [bias_of(opened.source, tensor, moments) for tensor in job.originals]
    refits = None not in biases
    weight = placed_on(read_weight(opened.source, job.originals), torch.device(job.device))

    with solving(job.device):
        spectrum = measure_spectrum(
            weight,
            spectra=job.spectra,
            device=torch.device(job.device),
            moments=moments,
            centred=refits,
            trials=job.trials,
            dtype=job.dtype,
        )
    line: Line = {
        "measured": job.tensor.name,
        "finite": spectrum.finite,
        "energies": spectrum.energies,
        "metric": metric,
        "refit": refits,
        "weight": loss,
    }
    if job.trials and spectrum.finite:
        line["roundings"] = [rounding.share for rounding in spectrum.roundings]
    return line


def measure_spectra(
    run: Run,
    tensors: Sequence[TensorInfo],
    *,
    spectra: bool,
    recipe: Recipe | None = None,
    groups: Sequence[Group] = (),
) -> dict[str, LayerSpectrum]:
    """Measure every layer, and group, that the journal does not have yet; with a calibration, in
    its metric. A group is under the name of its stack.

    recipe is one that chooses packings: what rounding will cost is found for it, too.
    """
    members = {group.stack.name: group.members for group in groups}
    tensors = [*tensors, *(group.stack for group in groups)]
    workspace = run.workspace
    earlier = workspace.measured if workspace is not None else {}
    share = 0.3 if spectra else 0.0
    costs = {tensor.name: guess_seconds(tensor, share=share) for tensor in tensors}
    total, done = math.fsum(costs.values()), 0.0
    spectrum_of: dict[str, LayerSpectrum] = {}

    # what is new goes to the journal as soon as it is known, so that the next run has it
    def note(line: Line) -> None:
        if workspace is not None and line != earlier.get(line["measured"]):
            workspace.note(line)

    with shared(Opened(run.source, run.calibration)) as inputs:
        jobs = []
        for tensor in tensors:
            of_group = members.get(tensor.name, ())
            jobs.append(_job(run, tensor, inputs, spectra, recipe, of_group))
        trials = {job.tensor.name: job.trials for job in jobs}
        for line in run.crew.map_unordered(run_spectrum_job, jobs, note):
            name = line["measured"]
            parts = [tensor.name for tensor in members.get(name, ())] or [name]
            spectrum_of[name] = _spectrum_of(run.source, line, trials[name], parts)
            done += costs[name]
            run.progress("measure", name, done, total)
    return {tensor.name: spectrum_of[tensor.name] for tensor in tensors}


def _job(
    run: Run,
    tensor: TensorInfo,
    inputs: Inputs,
    spectra: bool,
    recipe: Recipe | None,
    members: tuple[TensorInfo, ...],
) -> SpectrumJob:
    earlier = run.workspace.measured if run.workspace is not None else {}
    job = SpectrumJob(tensor, inputs, spectra, str(run.device), earlier.get(tensor.name))
    job = replace(job, members=members)
    if recipe is None:
        return job
    trials = tuple(trials_of(tensor, recipe, shared=bool(members)))
    return replace(job, trials=trials, dtype=recipe.dtype or tensor.dtype)


def _spectrum_of(
    source: Source, line: Line, trials: Sequence[Trial], names: Sequence[str]
) -> LayerSpectrum:
    """A line of the journal as a value; names are of the weights that it is about."""
    energies = line["energies"]
    if energies is not None:
        energies = tuple(energies)
    biases: tuple[TensorInfo, ...] = ()
    if line["refit"]:
        biases = tuple(source.tensors[f"{module_of(name)}.bias"].info for name in names)
    return LayerSpectrum(
        finite=line["finite"],
        energies=energies,
        metric=line["metric"],
        biases=biases,
        loss_scale=line["weight"],
        roundings=tuple(
            Rounding(trial, share)
            for trial, share in zip(trials, line.get("roundings", ()), strict=False)
        ),
    )
