"""Eigenvectors that are wanted alone, by the LAPACK that SciPy brings along, where it is installed.

`torch.linalg.eigh` computes every eigenvector: LAPACK's syevd brings the matrix to a tridiagonal
one (sytrd), solves that by divide and conquer (stedc), and turns all the vectors back (ormtr). Here
are the same three steps, the last for the leading vectors alone, in SciPy's OpenBLAS. SciPy's own
functions compute one matrix at a time, whatever the number of threads; its `cython_lapack` names
the routines themselves.
"""

from __future__ import annotations

import ctypes
import math
import os
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

# A smaller matrix takes torch a few hundredths of a second, and loading SciPy 0.2.
_SMALLEST = 512

# OpenBLAS reads it when it is loaded; what calls it are threads already.
ONE_THREAD = "OPENBLAS_NUM_THREADS"

# The first SciPy that is built for NumPy 2: an older one beside that tells so at length.
_OLDEST = (1, 13)

# Sizes of memory are 32-bit numbers.
_MOST_NUMBERS = 2**31 - 1

_LETTERS = {torch.float32: "s", torch.float64: "d"}

_loading = threading.Lock()

_Routine = Callable[..., None]
NoConvergence: type[Exception] = torch.linalg.LinAlgError  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Lapack:
    """Routines for one dtype; every argument is a pointer."""

    sytrd: _Routine
    stedc: _Routine
    ormtr: _Routine


def leading_eigh(
    matrix: Tensor, count: int, memory: Callable[[str, tuple[int, ...]], Tensor]
) -> tuple[Tensor, Tensor] | None:
    """All eigenvalues (n,), ascending, and the last `count` eigenvectors (n, count) of a positive
    semidefinite matrix (n, n), of which the lower triangle counts and which is void afterwards.

    None, and nothing is changed, where torch is to do it: SciPy is not installed or was built with
    another library, this thread computes with others, the matrix is small, or would have to be
    scaled first. memory makes an uninitialised tensor for a use; the vectors lie in one. Raises
    torch.linalg.LinAlgError where LAPACK does not converge.
    """
    lapack = _lapack(matrix.dtype) if _is_usable(matrix) else None
    if lapack is None:
        return None

    # rows of the lower triangle are columns of the upper one, in LAPACK's order
    n = matrix.shape[0]
    diagonal, beside, scales = matrix.new_empty((3, n))
    work = memory("LAPACK", (_numbers_in_work(n),))
    rest = (work, work.numel())
    _call(lapack.sytrd, b"U", n, matrix, n, diagonal, beside, scales, *rest)

    # eigenvectors of the tridiagonal matrix, one a row
    vectors = memory("eigenvectors", (n, n))
    places = torch.empty(3 + 5 * n, dtype=torch.int32)
    tridiagonal = (diagonal, beside, vectors, n)
    if _call(lapack.stedc, b"I", n, *tridiagonal, *rest, places, places.numel()) > 0:
        raise NoConvergence("the divide and conquer of LAPACK did not converge")

    # those of the matrix
    leading = vectors[n - count :]
    _call(lapack.ormtr, b"L", b"U", b"N", n, count, matrix, n, scales, leading, n, *rest)
    return diagonal, leading.mT


def _numbers_in_work(n: int) -> int:
    """What stedc needs, which is the most (dstedc.f)."""
    return 1 + 4 * n + n * n


def _is_usable(matrix: Tensor) -> bool:
    """Is it large, a CPU's, in order, and in the range that LAPACK does not scale (dsyevd.f), and
    has this thread no others?"""
    n = matrix.shape[0]
    if n < _SMALLEST or _numbers_in_work(n) > _MOST_NUMBERS or torch.get_num_threads() != 1:
        return False
    if matrix.device.type != "cpu" or matrix.dtype not in _LETTERS or not matrix.is_contiguous():
        return False
    limits = torch.finfo(matrix.dtype)
    smallest = math.sqrt(limits.tiny / limits.eps)
    # no number of such a matrix is larger than one on its diagonal
    return smallest < float(matrix.diagonal().amax()) < 1 / smallest


def _call(routine: _Routine, *arguments: bytes | int | Tensor) -> int:
    """What a routine says at last: 0 where all is well. Raises ValueError for an argument that it
    does not take."""
    pointers: list[Any] = []
    for argument in arguments:
        if isinstance(argument, bytes):
            pointers.append(ctypes.c_char_p(argument))
        elif isinstance(argument, int):
            pointers.append(ctypes.byref(ctypes.c_int(argument)))
        else:
            pointers.append(argument.data_ptr())
    info = ctypes.c_int()
    routine(*pointers, ctypes.byref(info))
    if info.value < 0:
        raise ValueError(f"LAPACK does not take its argument {-info.value}")
    return info.value


# Loading ------------------------------------------------------------------------------------------


def library(threads: int) -> str:
    """What the leading eigenvectors come from where workers have so many threads, which decides
    how they are rounded: SciPy and its version, "" for torch."""
    if threads != 1 or os.environ.get(ONE_THREAD) != "1":
        return ""
    try:
        version = metadata.version("scipy")
        is_old = tuple(map(int, version.split(".")[:2])) < _OLDEST
    except (metadata.PackageNotFoundError, ValueError):
        return ""
    return "" if is_old else f"SciPy {version}"


def _lapack(dtype: torch.dtype) -> _Lapack | None:
    """The routines of SciPy's OpenBLAS, where that was held to one thread; loaded once, whoever
    asks."""
    with _loading:
        return _loaded(dtype)


@cache
def _loaded(dtype: torch.dtype) -> _Lapack | None:
    if not library(1):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import scipy
            from scipy.linalg import cython_lapack

            libraries = scipy.show_config(mode="dicts")["Build Dependencies"]
        if "openblas" not in libraries["lapack"]["name"]:
            return None
        # how many arguments, and how many of them are numbers of 32 bits
        shapes = {"sytrd": (10, 4), "stedc": (11, 6), "ormtr": (13, 6)}
        letter, named = _LETTERS[dtype], cython_lapack.__pyx_capi__
        capsules = {name: named[letter + name] for name in shapes}
        return _Lapack(**{name: _routine(capsules[name], *shapes[name]) for name in shapes})
    except MemoryError:
        raise
    except Exception:  # broken, or of another NumPy
        return None


def _routine(capsule: object, arguments: int, integers: int) -> _Routine:
    """A function of C from a capsule, named after what it takes. Raises ValueError where that is
    something else."""
    name_of = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(
        ("PyCapsule_GetName", ctypes.pythonapi)
    )
    pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
        ("PyCapsule_GetPointer", ctypes.pythonapi)
    )
    name = name_of(capsule)
    if (name.count(b"*"), name.count(b"int *")) != (arguments, integers):
        raise ValueError(f"{name!r} is not what is needed")
    # other threads go on while such a function computes
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * arguments)(pointer_of(capsule, name))
