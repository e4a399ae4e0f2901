"""What a run will take, before it begins: the operations and bytes of every job, at speeds that
are measured in a blink on this machine.

A guess, meant to hold within a factor of 1.5 for layers of 1024 to 4096 by the solver `gram`, on a
CPU with nothing else to do; coarser for others. The order of jobs is no business of it
(`job.guess_seconds`): that must not change with the speed of a moment.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from svdcli.plan.packing import PLAIN
from svdcli.plan.queueing import estimate
from svdcli.plan.words import WEIGHTED

if TYPE_CHECKING:
    import torch

    from svdcli.engine.executor import Workers
    from svdcli.files.blueprint import CompressDesign
    from svdcli.files.writer import Unit
    from svdcli.plan.plan import LayerPlan
    from svdcli.plan.tensors import TensorInfo

# How much longer a job takes than its operations at the speed of small ones: large matrices leave
# the caches.
_IN_PRACTICE = 1.2

# Bytes a second that one worker reads, checks, converts, sums up and writes.
_BYTES = 1e9

# How much longer than an eigenproblem an SVD of the same side takes, and mathematics in float64
# than in float32.
_SVD_TO_EIGEN = 5.0
_EIGEN_IN_DOUBLE, _PRODUCT_IN_DOUBLE = 2.0, 4.0

# Operations of the randomised solver for every number of the weight and every direction: products
# and, as long again and more, orthonormal bases.
_RANDOMIZED = 48.0

# Rounding in the metric of a calibration, for every number of the weight and its columns.
_ROUNDING = 2.0

# Sides of the small problems whose time is measured: the smallest at which speed has settled.
_EIGEN_SIDE, _PRODUCT_SIDE, _DIGESTED, _TIMES = 768, 512, 2**20, 4


@dataclass(frozen=True)
class Speeds:
    """Of one worker, while the others work: operations a second in products, and cubes of the side
    a second in eigenproblems, with the vectors of a quarter of them or the values alone, all in
    float32; bytes a second of a digest."""

    workers: int
    product: float
    eigen: float
    values: float
    digest: float


@dataclass(frozen=True)
class Estimate:
    """What a run takes on so many workers. jobs are those that write; bytes are all that the
    process reads, what it reads twice counted twice, and all that it writes."""

    seconds: float
    workers: int
    jobs: int
    longest_job_seconds: float
    bytes_read: int
    bytes_written: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Costs:
    """The seconds of every job of a run, phase by phase, each of which begins when the one before
    has ended; workers are those at hand."""

    phases: Mapping[str, Sequence[float]]
    workers: int
    bytes_read: int
    bytes_written: int

    def estimate(self, workers: int | None = None) -> Estimate:
        """What they take on so many workers, each as fast as one here; on those at hand where that
        is None."""
        workers = workers or self.workers
        jobs = self.phases["write"]
        return Estimate(
            seconds=sum(estimate(costs, workers) for costs in self.phases.values()),
            workers=workers,
            jobs=len(jobs),
            longest_job_seconds=max(jobs, default=0.0),
            bytes_read=self.bytes_read,
            bytes_written=self.bytes_written,
        )


def costs_of(
    design: CompressDesign,
    layers: Sequence[TensorInfo],
    speeds: Speeds,
    *,
    spectra: bool,
    calibrated: bool,
) -> Costs:
    """Of a run that measures these layers first, in the metric of a calibration where there is one,
    writes this design and sums its files up."""
    # each of them is read once more, to see whether it is finite, or what its spectrum is
    measure = []
    for tensor in layers:
        operations = _Operations()
        if spectra:
            operations.add_spectrum(*tensor.shape, weighted=calibrated)
        measure.append(tensor.nbytes / _BYTES + operations.seconds(speeds))

    # every unit reads its tensors and writes others
    planned = {layer.tensor.name: layer for layer in design.plan.factored}
    sizes = {info.name: info.nbytes for info in design.checkpoint.infos}
    write, bytes_read = [], sum(tensor.nbytes for tensor in layers)
    for unit in design.units:
        read = sum(sizes.get(name, unit.nbytes) for name in unit.reads)
        bytes_read += read
        write.append(_unit_seconds(unit, planned.get(unit.name), read, speeds))

    # every file is read back for its digest
    blueprint = design.blueprint()
    files = list(blueprint.sizes().values()) if blueprint.record_bytes else []
    digests = [size / speeds.digest for size in files]
    phases = {"measure": measure, "write": write, "check": digests}
    return Costs(phases, speeds.workers, bytes_read + sum(files), blueprint.total)


def _unit_seconds(unit: Unit, layer: LayerPlan | None, read: int, speeds: Speeds) -> float:
    seconds = 1e-4 + (read + unit.nbytes) / _BYTES
    if unit.kind == "factor" and layer is not None and not layer.role:
        operations = _Operations()
        operations.add_layer(layer)
        seconds += operations.seconds(speeds)
    return seconds


@dataclass
class _Operations:
    """What the mathematics of a job comes to: operations of products, and cubes of eigenproblems'
    sides, of which the vectors are wanted or the values alone."""

    products: float = 0.0
    cubes: float = 0.0
    cubes_of_values: float = 0.0

    def seconds(self, speeds: Speeds) -> float:
        """On one worker."""
        eigen = self.cubes / speeds.eigen + self.cubes_of_values / speeds.values
        return _IN_PRACTICE * (self.products / speeds.product + eigen)

    def add_eigenproblem(self, m: int, n: int) -> None:
        """Of the Gram matrix on the short side, of which half is computed."""
        small, large = sorted((m, n))
        self.products += small * small * large
        self.cubes += small**3

    def add_spectrum(self, m: int, n: int, *, weighted: bool) -> None:
        """Eigenvalues without their vectors."""
        if weighted:
            self._add_weighted(m, n, 0, packed=False)
        else:
            self.add_eigenproblem(m, n)
        self.cubes, self.cubes_of_values = 0.0, self.cubes

    def add_layer(self, layer: LayerPlan) -> None:
        """From the weight to what is stored, and the error of that."""
        m, n = layer.tensor.shape
        small, large = sorted((m, n))
        rank = int(layer.rank or 0)
        if layer.solver == WEIGHTED:
            self._add_weighted(m, n, rank, packed=layer.packing != PLAIN)
        elif layer.solver == "svd":
            self.products += 4 * small * small * large
            self.cubes += _SVD_TO_EIGEN * small**3
        elif layer.solver == "randomized":
            self.products += _RANDOMIZED * m * n * (rank + 16)
        else:
            self.add_eigenproblem(m, n)
            self.products += 2 * rank * m * n

        # the layout, and the product that is compared with the weight
        if layer.layout == "pivoted":
            self.products += 6 * m * rank * rank + 2 * rank * rank * n
        self.products += 2 * rank * m * n

    def _add_weighted(self, m: int, n: int, rank: int, *, packed: bool) -> None:
        """In the metric of a calibration, all in float64: a root of the outputs' moment, a QR, the
        eigenproblem, the factors, their error."""
        small, large = sorted((m, n))
        products = m * m * n + m**3 / 3 + 4 * small * small * large
        products += 4 * small * n * n + 2 * rank * m * n + 2 * m * n * n
        if packed:
            products += _ROUNDING * rank * (m * m + n * n)
        self.products += _PRODUCT_IN_DOUBLE * products
        self.cubes += _EIGEN_IN_DOUBLE * small**3


# Measuring ----------------------------------------------------------------------------------------


def speeds_here(crew: Workers) -> Speeds:
    """Of the workers that a run would have now, those of other processes taken to be as fast;
    measured once in a process."""
    import torch

    # torch solves the eigenproblems of mps on the CPU
    capable = torch.device("cpu") if crew.device.type == "mps" else crew.device
    speeds = _measured(capable, torch.get_num_threads())
    return replace(speeds, workers=crew.ranks * speeds.workers)


@cache
def _measured(device: torch.device, threads: int) -> Speeds:
    """All workers at once, as in a run; on a CPU in seconds of its time, which other processes
    hardly change, and the best of a few times."""
    from svdcli.engine.executor import Local

    executor, workers = Local(device).executor()
    if device.type != "cpu":
        workers = 1  # of its threads one at a time computes
    with executor:
        found = list(executor.map(_measure, [device] * workers))
    return Speeds(workers, *(sum(kind) / workers for kind in zip(*found, strict=True)))


def _measure(device: torch.device) -> tuple[float, float, float, float]:
    """The speeds of `Speeds`, in that order."""
    import torch

    from svdcli.linalg.machine import gram_eigenvalues, gram_eigh, product

    square = torch.randn(_EIGEN_SIDE, _EIGEN_SIDE).to(device)
    part = square[:_PRODUCT_SIDE, :_PRODUCT_SIDE].contiguous()
    data = bytes(_DIGESTED)

    # an accelerator has done it when a number is here
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    of_product = _fastest(lambda: float(product(part, part)[0, 0]), clock)
    of_eigen = _fastest(lambda: float(gram_eigh(square, _EIGEN_SIDE // 4)[0][0]), clock)
    of_values = _fastest(lambda: float(gram_eigenvalues(square)[0]), clock)
    of_digest = _fastest(lambda: hashlib.sha256(data).digest(), time.thread_time)

    operations = 2 * _PRODUCT_SIDE**3 / of_product

    def cubes(seconds: float) -> float:
        """Without the Gram matrix."""
        alone = seconds - _EIGEN_SIDE**3 / operations
        return float(_EIGEN_SIDE**3 / max(alone, seconds / 2))

    return operations, cubes(of_eigen), cubes(of_values), _DIGESTED / of_digest


def _fastest(work: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds of the best of a few times, of which the first warms up."""
    seconds = []
    for _ in range(_TIMES):
        begin = clock()
        work()
        seconds.append(clock() - begin)
    return max(min(seconds), 1e-6)  # clocks have ticks
