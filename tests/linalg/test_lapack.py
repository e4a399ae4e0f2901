"""The leading eigenvectors by SciPy's LAPACK, against float64 and against torch; and when torch is
left to do it."""

from __future__ import annotations

import ctypes
import json
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import best_error, decaying, run, weight
from safetensors.torch import save_file
from torch import Tensor

from svdcli.linalg import lapack
from svdcli.linalg.lapack import ONE_THREAD, leading_eigh, library
from svdcli.linalg.machine import gram_eigh, keeping_temporaries, squared_norm
from svdcli.linalg.solvers import gram
from svdcli.linalg.whitening import Metric, weighted, weighted_error

cython_lapack = pytest.importorskip("scipy.linalg.cython_lapack")


@pytest.fixture(autouse=True)
def _loaded_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(ONE_THREAD, "1")
    lapack._loaded.cache_clear()
    yield
    lapack._loaded.cache_clear()


def memory(use: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


def found(matrix: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """Of the lower triangle: what lies above it is no number."""
    upper = torch.ones_like(matrix, dtype=torch.bool).triu(1)
    voided = matrix.masked_fill(upper, torch.nan)
    return leading_eigh(voided, count, lambda use, shape: memory(use, shape, matrix.dtype))


def with_spectrum(values: Tensor) -> Tensor:
    """A symmetric matrix in float64 with these eigenvalues."""
    n = len(values)
    generator = torch.Generator().manual_seed(n)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    return (basis * values) @ basis.T


SPECTRA = {
    "even": lambda k: 1.0 + 0 * k,
    "falling": lambda k: 1 / k,
    "steep": lambda k: torch.exp(-k / 20),
    "one large": lambda k: torch.where(k == 1, 1000.0, 1.0),
    "of low rank": lambda k: torch.where(k <= 50, 1 / k, 0.0),
    "in clusters": lambda k: torch.where(k <= 100, 2.0, torch.where(k <= 300, 1.0, 1e-6)),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "count"), [(512, 1), (513, 170), (600, 600)])
def test_eigenvalues_and_the_leading_vectors(
    n: int, count: int, dtype: torch.dtype, spectrum: str
) -> None:
    k = torch.arange(1, n + 1, dtype=torch.float64)
    exact = with_spectrum(SPECTRA[spectrum](k))
    answer = found(exact.to(dtype), count)
    assert answer is not None
    values, vectors = answer
    assert (values.shape, vectors.shape) == ((n,), (n, count))
    oracle = torch.linalg.eigvalsh(exact)
    eps, largest = torch.finfo(dtype).eps, float(oracle[-1])
    vectors = vectors.double()
    near = {"rtol": 0, "atol": 50 * eps}
    torch.testing.assert_close(values.double(), oracle, rtol=0, atol=50 * eps * largest)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(count, dtype=torch.float64), **near)
    torch.testing.assert_close(
        exact @ vectors, vectors * oracle[n - count :], rtol=0, atol=100 * eps * largest
    )


@pytest.mark.parametrize("shape", [(640, 700), (700, 640), (1024, 1030)])
@pytest.mark.parametrize(
    ("dtype", "power", "rank", "bound"),
    [
        (torch.float32, 0.3, 200, 1e-6),
        (torch.float32, 0.6, 60, 1e-6),
        (torch.float64, 1.5, 30, 1e-9),
    ],
)
def test_eckart_young(
    shape: tuple[int, int], dtype: torch.dtype, power: float, rank: int, bound: float
) -> None:
    """The largest is 1024, whose rows are padded."""
    w = decaying(*shape, power)
    factors = gram(w.to(dtype), rank)
    error = squared_norm(w - factors.up.double() @ factors.down.double())
    assert error == pytest.approx(best_error(w, rank), rel=bound)
    assert factors.tail == pytest.approx(best_error(w, rank), rel=100 * bound)


def test_the_best_factors_in_a_metric() -> None:
    w = decaying(520, 530, 0.6)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(900, 530, generator=generator, dtype=torch.float64)
    metric = Metric(rows.T @ rows / 900)
    factors = weighted(w, 60, metric)
    singular = torch.linalg.svdvals(w @ torch.linalg.cholesky(metric.inputs))
    best = float(singular[60:].square().sum())
    assert factors.tail == pytest.approx(best, rel=1e-9)
    assert weighted_error(w, factors.up @ factors.down, metric) == pytest.approx(best, rel=1e-9)


def test_two_threads_at_once_compute_what_one_does() -> None:
    weights = [decaying(600, 640, power).float() for power in (0.3, 0.6, 0.9, 1.2)]

    def solved(w: Tensor) -> Tensor:
        torch.set_num_threads(1)
        with keeping_temporaries():
            return gram(w, 100).up.clone()

    alone = [solved(w) for w in weights]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(solved, weights * 4))
    for one, other in zip(alone * 4, together, strict=True):
        assert torch.equal(one, other)


# When torch is left to do it ----------------------------------------------------------------------


def test_a_matrix_that_is_fit_is_decomposed() -> None:
    """Otherwise the tests below would say nothing."""
    assert found(torch.eye(512), 3) is not None


@pytest.mark.parametrize(
    ("why", "matrix"),
    [
        ("small", torch.eye(511)),
        ("zero", torch.zeros(512, 512)),
        ("tiny numbers", torch.eye(512) * 1e-20),
        ("huge numbers", torch.eye(512) * 1e20),
        ("infinite", torch.eye(512) * torch.inf),
        ("not a number", torch.full((512, 512), torch.nan)),
        ("half precision", torch.eye(512, dtype=torch.bfloat16)),
        ("out of order", torch.eye(1024)[::2, ::2]),
    ],
)
def test_matrices_that_are_left_to_torch(why: str, matrix: Tensor) -> None:
    before = matrix.clone()
    assert leading_eigh(matrix, 3, memory) is None, why
    assert torch.equal(matrix.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("value", [None, "2", ""])
def test_a_library_with_threads_of_its_own_is_not_used(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ONE_THREAD) if value is None else monkeypatch.setenv(ONE_THREAD, value)
    assert found(torch.eye(512), 3) is None


def test_nor_where_torch_has_several_threads() -> None:
    torch.set_num_threads(2)
    assert found(torch.eye(512), 3) is None


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert found(torch.eye(512), 3) is None
    values, vectors = gram_eigh(torch.eye(600), 3)
    torch.testing.assert_close(values, torch.ones(600))
    assert vectors.shape == (600, 3)


@pytest.mark.parametrize(
    ("version", "name"),
    [("1.12.9", ""), ("1.13.0", "SciPy 1.13.0"), ("2.0.0rc1", "SciPy 2.0.0rc1"), ("dev", "")],
)
def test_the_version_decides(version: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It rounds in its own way; an old one beside NumPy 2 tells at length that it cannot."""
    monkeypatch.setattr("importlib.metadata.version", lambda package: version)
    assert library(1) == name
    assert library(2) == ""
    assert (found(torch.eye(512), 3) is None) is (name == "")


def test_nothing_is_told_of_a_scipy_that_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def warns(mode: str) -> None:
        warnings.warn("not for this NumPy", stacklevel=1)
        raise RuntimeError

    monkeypatch.setattr("scipy.show_config", warns)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert found(torch.eye(512), 3) is None
    assert told == []


def test_too_little_memory_is_no_broken_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(mode: str) -> None:
        raise MemoryError

    monkeypatch.setattr("scipy.show_config", fails)
    with pytest.raises(MemoryError):
        found(torch.eye(512), 3)


def test_scipy_with_another_library(monkeypatch: pytest.MonkeyPatch) -> None:
    built = {"Build Dependencies": {"lapack": {"name": "mkl-dynamic-ilp64-seq"}}}
    monkeypatch.setattr("scipy.show_config", lambda mode: built)
    assert found(torch.eye(512), 3) is None


def test_routines_that_take_other_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of a capsule says what it takes: here indices of 64 bits."""
    new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
        ("PyCapsule_New", ctypes.pythonapi)
    )
    named = dict(cython_lapack.__pyx_capi__)
    name = b"void (char *, long *, s *, long *, s *, s *, s *, s *, long *, long *)"
    named["ssytrd"] = new(1, name, None)
    changed = SimpleNamespace(__pyx_capi__=named)
    monkeypatch.setitem(sys.modules, "scipy.linalg.cython_lapack", changed)
    monkeypatch.setattr("scipy.linalg.cython_lapack", changed)
    assert found(torch.eye(512), 3) is None
    assert found(torch.eye(512, dtype=torch.float64), 3) is not None


def test_no_convergence_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = lapack._call

    def fails(routine: object, *arguments: object) -> int:
        return 1 if arguments[0] == b"I" else usual(routine, *arguments)

    monkeypatch.setattr(lapack, "_call", fails)
    with pytest.raises(torch.linalg.LinAlgError, match="did not converge"):
        found(torch.eye(512), 3)


def test_an_argument_that_lapack_does_not_take_is_said() -> None:
    routines = lapack._lapack(torch.float32)
    assert routines is not None
    space = torch.zeros(10)
    with pytest.raises(ValueError, match="argument 2"):
        lapack._call(routines.sytrd, b"U", -1, space, 1, space, space, space, space, 10)


# The command --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "threads", "loads"), [(512, 2, True), (448, 2, False), (512, 4, False)]
)
def test_wide_layers_by_the_command(
    folder: Path, monkeypatch: pytest.MonkeyPatch, side: int, threads: int, loads: bool
) -> None:
    """Two threads are one for each worker; what is not needed is not loaded."""
    monkeypatch.delenv(ONE_THREAD)
    save_file({"a.weight": weight(side, side + 8)}, folder / "m.safetensors")
    words = ("compress", "m.safetensors", "--rank", "40", "--solver", "gram", "--json")
    done = run(*words, "--threads", str(threads), env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert done.code == 0, done.err
    assert ("scipy.linalg.cython_lapack" in done.err) is loads
    (layer,) = json.loads(done.out)["layers"]
    assert layer["solver"] == "gram"
    w = weight(side, side + 8).double()
    best = (best_error(w, 40) / float(w.square().sum())) ** 0.5
    assert layer["relative_error"] == pytest.approx(best, rel=1e-5)
