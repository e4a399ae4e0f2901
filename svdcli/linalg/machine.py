"""What linear algebra has to know of the machine: the faster library for a product, memory that is
used again, padding against cache conflicts, the allocator.

The rest of `linalg` reads like mathematics because this file does not.
"""

from __future__ import annotations

import ctypes
import math
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from svdcli.linalg.lapack import leading_eigh

# Below this size oneDNN's change of layout costs what its product gains.
_SMALL = 64

# Rows of a symmetric matrix that are worked on at a time.
_STRIP = 256

# Numbers of a large matrix that are worked on at a time.
_NUMBERS_AT_ONCE = 2**22

_PROCESSORS = Path("/proc/cpuinfo")
# The family of Zen 3, which has no AVX-512, and of Zen 4.
_ZEN_4 = re.compile(r"AuthenticAMD\s+cpu family\s*: 25$", re.MULTILINE)


# Products -----------------------------------------------------------------------------------------


def product(a: Tensor, b: Tensor, use: str = "") -> Tensor:
    """a @ b (m, n) for a (m, k) and b (k, n), by the faster of torch's two libraries. With a use,
    it may be a `temporary` for that.

    `torch.mm` calls MKL on x86, which on an AMD processor with AVX-512 (Zen 5) was no faster than
    oneDNN held to AVX2. oneDNN, which torch calls for linear layers in its own layout, uses AVX-512
    wherever there is one: it was 1.7 to 2.2 times as fast there. Zen 4 does AVX-512 in halves: both
    multiply as fast there, and with the change of layout oneDNN took 1.1 to 1.4 times as long.
    """
    if _suits_onednn(a, b):
        return _by_onednn(a, b)
    if use:
        return torch.mm(a, b, out=temporary(use, (a.shape[0], b.shape[1]), a))
    return torch.mm(a, b)


def squared_distance(w: Tensor, up: Tensor, down: Tensor) -> float:
    """||W - up @ down||_F^2 for w (m, n), up (m, r) and down (r, n).

    The product is computed in w's dtype, a block of rows at a time; sums are those of
    `squared_norm`.
    """
    if w.T.is_contiguous():
        w, up, down = w.T, down.T, up.T
    # oneDNN is faster where the second factor has its columns in memory order
    columns = temporary("down", tuple(down.T.shape), w).T.copy_(down)

    blocks = row_blocks(w)
    buffer = temporary("block", tuple(w[blocks[0]].shape), w)
    distances = []
    for rows in blocks:
        left = up[rows].to(w.dtype)
        difference = buffer[: w[rows].shape[0]]
        if _suits_onednn(left, columns):
            torch.sub(w[rows], _by_onednn(left, columns), out=difference)
        else:
            torch.addmm(w[rows], left, columns, alpha=-1, out=difference)
        distances.append(squared_norm(difference))
    return math.fsum(distances)


def row_blocks(w: Tensor) -> list[slice]:
    """The rows of w in blocks of at most a few million numbers."""
    step = max(1, _NUMBERS_AT_ONCE // w.shape[1])
    return [slice(start, start + step) for start in range(0, w.shape[0], step)]


def _suits_onednn(a: Tensor, b: Tensor) -> bool:
    fits = a.dtype == torch.float32 and a.device.type == "cpu" and min(*a.shape, *b.shape) >= _SMALL
    return fits and _onednn_is_faster()


def _by_onednn(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.linear(a.to_mkldnn(), b.T).to_dense()


@cache
def _onednn_is_faster() -> bool:
    """Has the processor AVX-512, and is it neither one of Intel's nor a Zen 4?"""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        processors = _PROCESSORS.read_text()
    except OSError:  # not Linux
        return False
    return "GenuineIntel" not in processors and not _ZEN_4.search(processors)


# Sums of squares ----------------------------------------------------------------------------------


def squared_norm(w: Tensor) -> float:
    """||w||_F^2, each row summed in w's dtype and the rows in float64: in float32 to about 1e-8 of
    itself."""
    w = w if w.is_contiguous() else w.T
    step = max(1, 2**20 // w.shape[1])
    return math.fsum(_rows_squared(w[start : start + step]) for start in range(0, w.shape[0], step))


def exact_squared_norm(values: Tensor) -> float:
    """The sum of squares, all of it in float64."""
    return float(values.to(torch.float64).square().sum())


def _rows_squared(w: Tensor) -> float:
    rows = torch.mul(w, w, out=temporary("squares", tuple(w.shape), w)).sum(1)
    if 1e-20 < float(rows.max()) < 1e30:
        return float(rows.sum(dtype=torch.float64))
    return exact_squared_norm(w)  # squares outside the range of float32


# Second moments -----------------------------------------------------------------------------------


def moment(rows: Tensor) -> Tensor:
    """rows^T rows (n, n) for rows (k, n)."""
    out = rows.new_empty((rows.shape[1], rows.shape[1]))
    fill_gram(rows.T, out)
    return mirror(out)


def fill_gram(w: Tensor, out: Tensor, *, add: bool = False) -> None:
    """Write the lower triangle of W W^T (m, m) for w (m, n) to `out`, or add it; what lies above it
    is void."""
    if _suits_onednn(w, w):
        _gram_by_strips(w, out, add)
        return
    whole = 2048
    if w.device.type == "cpu":
        whole = 128 * torch.get_num_threads()
    _gram_by_halves(w, out, int(add), whole)


def mirror(lower: Tensor) -> Tensor:
    """The symmetric matrix (m, m) whose lower triangle this is, in the same memory."""
    for start in range(0, lower.shape[0], _STRIP):
        stop = start + _STRIP
        lower[start:stop, stop:] = lower[stop:, start:stop].T
        corner = lower[start:stop, start:stop]
        corner.copy_(corner.tril() + corner.tril(-1).T)
    return lower


def _gram_by_halves(w: Tensor, out: Tensor, beta: int, whole: int) -> None:
    """Both diagonal blocks by themselves, down to `whole` rows, and the one below: the upper one is
    never computed."""
    half = w.shape[0] // 2
    if w.shape[0] <= whole:
        out.addmm_(w, w.T, beta=beta)
        return
    out[half:, :half].addmm_(w[half:], w[:half].T, beta=beta)
    _gram_by_halves(w[:half], out[:half, :half], beta, whole)
    _gram_by_halves(w[half:], out[half:, half:], beta, whole)


def _gram_by_strips(w: Tensor, out: Tensor, add: bool) -> None:
    """Each strip of rows up to the diagonal, by oneDNN."""
    if not w.is_contiguous():
        # slices of columns take oneDNN longer than the product
        w = temporary("block", tuple(w.shape), w).copy_(w)
    for start in range(0, w.shape[0], _STRIP):
        strip = slice(start, start + _STRIP)
        values = product(w[strip], w[: strip.stop].T)
        place = out[strip, : strip.stop]
        if add:
            place.add_(values)
        else:
            place.copy_(values)


# Eigenvalues --------------------------------------------------------------------------------------


def gram_eigh(w: Tensor, count: int, inner: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """All eigenvalues (m,), ascending, and the last `count` eigenvectors (m, count) of W W^T, or
    W G W^T, for w (m, n) and a positive semidefinite `inner` G (n, n), in w's dtype.

    The eigenvectors are a `temporary`: void after the next call in this thread. Raises
    torch.linalg.LinAlgError where LAPACK does not converge.
    """
    matrix = _padded_gram(w, inner)
    size, extra = matrix.shape[0], matrix.shape[0] - w.shape[0]
    found = leading_eigh(matrix, count, lambda use, shape: temporary(use, shape, w))
    if found is not None:
        return found[0][extra:], found[1][: w.shape[0]]

    # The upper triangle of the transpose is in LAPACK's order of columns already, and reduced
    # faster.
    place = w.new_empty(size), temporary("eigenvectors", (size, size), w).mT
    values, vectors = torch.linalg.eigh(matrix.mT, UPLO="U", out=place)
    return values[extra:], vectors[: w.shape[0], size - count :]


def gram_eigenvalues(w: Tensor, inner: Tensor | None = None) -> Tensor:
    """The eigenvalues (m,) alone of `gram_eigh`."""
    matrix = _padded_gram(w, inner)
    values: Tensor = torch.linalg.eigvalsh(matrix.mT, UPLO="U")
    return values[matrix.shape[0] - w.shape[0] :]


# Rows and columns that are added to a matrix whose rows would lie a multiple of 4096 bytes apart.
_PADDING = 8


def _padded_gram(w: Tensor, inner: Tensor | None) -> Tensor:
    """The lower triangle of W G W^T, in rows whose length in bytes is no multiple of 4096: a few
    rows and columns are added where it would be.

    Neighbours at such a distance displace each other in a cache: LAPACK took 5 to 8 % longer for
    2048, and 13 % for 1024, than with 8 rows more. What is added is an eigenspace of its own, below
    every eigenvalue of the matrix.
    """
    m, padding = w.shape[0], 0
    if w.device.type == "cpu" and m and m * w.element_size() % 4096 == 0:
        padding = _PADDING
    matrix = temporary("symmetric", (m + padding, m + padding), w)

    if inner is None:
        fill_gram(w, matrix[:m, :m])
    else:
        torch.mm(w @ inner, w.T, out=matrix[:m, :m])

    if padding:
        matrix[m:] = 0
        matrix.diagonal()[m:] = -matrix.diagonal()[:m].amax()
    return matrix


# Memory -------------------------------------------------------------------------------------------


class _Kept(threading.local):
    """One buffer for each use, in threads that keep them."""

    buffers: dict[str, Tensor] | None = None


_kept = _Kept()


def temporary(use: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialised tensor of that shape, in the dtype and on the device of `like`.

    In a thread that keeps its temporaries it is the memory of the last one for the same use, which
    is then void: fresh pages are cleared by the kernel first, which took a twentieth of the time of
    `compress`.
    """
    if _kept.buffers is None or like.device.type != "cpu":
        return like.new_empty(shape)
    count = math.prod(shape) * like.element_size()
    buffer = _kept.buffers.get(use)
    if buffer is None or buffer.numel() < count:
        # the old one is freed before the new one is there
        del buffer
        _kept.buffers.pop(use, None)
        buffer = _kept.buffers[use] = torch.empty(count, dtype=torch.uint8)
    return buffer[:count].view(like.dtype).view(shape)


def keep_temporaries() -> None:
    """From now on, and for as long as it lives, this thread keeps its temporaries."""
    _kept.buffers = {}


@contextmanager
def keeping_temporaries() -> Iterator[None]:
    """`keep_temporaries` for a while."""
    keep_temporaries()
    try:
        yield
    finally:
        _kept.buffers = None


@contextmanager
def with_threads(count: int) -> Iterator[None]:
    """Have torch use so many threads meanwhile; 0 leaves it as it is."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def placed_on(w: Tensor, device: torch.device) -> Tensor:
    """w on a CUDA device, from pinned memory and in a stream of its own, so that the device goes on
    meanwhile with what other threads compute there. For any other device w as it is, which
    `converted` brings there."""
    if device.type != "cuda":
        return w
    copying = torch.cuda.Stream(device)
    with torch.cuda.stream(copying):
        placed = w.pin_memory().to(device, non_blocking=True)
    copying.synchronize()
    # its memory is not used again before what the computing stream does with it is done
    placed.record_stream(torch.cuda.default_stream(device))
    return placed


def converted(w: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """w on that device and in that dtype: itself where nothing changes, a `temporary` with its long
    side in rows where the CPU converts it."""
    if device.type != "cpu" or w.dtype == dtype:
        return w.to(device, dtype)
    # transposed before it is converted: both at once takes eight times as long
    tall = w.shape[0] > w.shape[1]
    wide = w.T.contiguous() if tall else w
    work = temporary("weight", tuple(wide.shape), w.new_empty(0, dtype=dtype)).copy_(wide)
    return work.T if tall else work


# mallopt's name for the size above which a buffer is mapped by itself, in glibc's malloc.h.
_MMAP_THRESHOLD = -3


def return_free_memory() -> None:
    """Have glibc return what is free now, of buffers that lay among others in its heaps."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def return_freed_memory() -> None:
    """Let glibc return every buffer of a megabyte or more when it is freed.

    Its threshold grows with what it sees, up to 32 MB: freed matrices then stay in the heaps of the
    two workers, in pieces. Reading and training, which need the same small buffers again and again,
    do better without.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**20)
