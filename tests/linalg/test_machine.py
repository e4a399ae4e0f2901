"""Products and distances against float64, by either library, in every order of memory that the
solvers hand over."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import decaying
from torch import Tensor

from svdcli.linalg import machine
from svdcli.linalg.machine import (
    fill_gram,
    gram_eigenvalues,
    gram_eigh,
    mirror,
    moment,
    product,
    squared_distance,
    squared_norm,
)

ORDERS = {
    "rows": lambda w: w.contiguous(),
    "columns": lambda w: w.T.contiguous().T,
    "every other row": lambda w: w.repeat_interleave(2, dim=0)[::2],
    "some columns": lambda w: torch.cat([w, w], dim=1)[:, : w.shape[1]],
    "backwards": lambda w: w.flip(1).flip(1),
}


@pytest.fixture(params=[False, True], ids=["torch.mm", "oneDNN"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(machine, "_onednn_is_faster", lambda: request.param)


def random(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def off(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("left", ORDERS)
@pytest.mark.parametrize("right", ORDERS)
@pytest.mark.parametrize(
    "shape", [(100, 300, 70), (70, 64, 300), (5, 90, 80), (1, 1, 1), (0, 80, 80)]
)
def test_a_product(shape: tuple[int, int, int], left: str, right: str) -> None:
    m, k, n = shape
    a, b, c = ORDERS[left](random(m, k, 1)), ORDERS[right](random(k, n, 2)), random(m, n, 3)
    exact = a.double() @ b.double()
    assert product(a, b).shape == (m, n)
    if m == 0:
        return
    assert off(product(a, b), exact) < 1e-6
    distance = float((c.double() - exact).square().sum())
    assert squared_distance(c, a, b) == pytest.approx(distance, rel=1e-6)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("rows", [10, 128, 255, 256, 511, 512, 701])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_lower_triangle_of_a_gram_matrix(rows: int, order: str, dtype: torch.dtype) -> None:
    w = ORDERS[order](random(rows, rows + 3).to(dtype))
    bound = 1e-6 if dtype == torch.float32 else 1e-14
    exact = w.double() @ w.double().T
    out = torch.full((rows, rows), torch.nan, dtype=dtype)
    fill_gram(w, out)
    assert off(out.tril(), exact.tril()) < bound
    fill_gram(w, out, add=True)
    assert off(out.tril(), 2 * exact.tril()) < bound
    out[torch.ones_like(out, dtype=torch.bool).triu(1)] = torch.nan
    symmetric = mirror(out)
    assert symmetric is out
    assert torch.equal(out, out.T)
    assert off(out, 2 * exact) < bound


@pytest.mark.usefixtures("library")
def test_second_moments() -> None:
    rows = random(500, 300)
    exact = rows.double().T @ rows.double()
    assert off(moment(rows), exact) < 1e-6


@pytest.fixture
def chosen_anew() -> Iterator[None]:
    machine._onednn_is_faster.cache_clear()
    yield
    machine._onednn_is_faster.cache_clear()


@pytest.mark.usefixtures("chosen_anew")
@pytest.mark.parametrize(
    ("capability", "maker", "family", "chosen"),
    [
        ("AVX512", "AuthenticAMD", 26, True),
        ("AVX512", "AuthenticAMD", 25, False),
        ("AVX512", "Other", 25, True),
        ("AVX512", "GenuineIntel", 6, False),
        ("AVX2", "AuthenticAMD", 26, False),
        ("AVX512", "", 0, False),
    ],
)
def test_onednn_is_for_whole_avx512_of_other_makers(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capability: str,
    maker: str,
    family: int,
    chosen: bool,
) -> None:
    if maker:
        one = f"vendor_id\t: {maker}\ncpu family\t: {family}\nmodel\t\t: 17\n"
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{one}\nprocessor\t: 1\n{one}")
    monkeypatch.setattr(machine, "_PROCESSORS", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert machine._onednn_is_faster() is chosen


@pytest.mark.parametrize(
    ("rows", "dtype", "scale"),
    [
        (100, torch.float32, 1.0),
        (100, torch.float32, 1e-12),
        (1024, torch.float32, 1e-12),
        (512, torch.float64, 1.0),
        (513, torch.float64, 1e-12),
    ],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_eigenvalues_and_vectors_of_a_gram_matrix(
    rows: int, dtype: torch.dtype, scale: float, weighted: bool
) -> None:
    """Rows of 4096 bytes are padded inside; nothing of that is seen."""
    w = decaying(rows, rows + 40, 0.3).to(dtype) * scale
    inner = None
    if weighted:
        root = random(rows + 40, 30, 2).to(dtype) / 20
        inner = torch.eye(rows + 40, dtype=dtype) + root @ root.T
    values, vectors = gram_eigh(w, rows, inner)
    exact = w.double() @ (w.double().T if inner is None else inner.double() @ w.double().T)
    oracle = torch.linalg.eigvalsh(exact)
    eps = torch.finfo(dtype).eps
    largest = float(oracle[-1])
    torch.testing.assert_close(values.double(), oracle, rtol=0, atol=30 * eps * largest)
    torch.testing.assert_close(
        gram_eigenvalues(w, inner).double(),
        oracle,
        rtol=0,
        atol=30 * eps * largest,
    )
    identity = torch.eye(rows, dtype=torch.float64)
    torch.testing.assert_close(
        vectors.double().T @ vectors.double(), identity, rtol=0, atol=50 * eps
    )
    torch.testing.assert_close(
        exact @ vectors.double(), vectors.double() * oracle, rtol=0, atol=100 * eps * largest
    )


def test_eigenvalues_of_zero() -> None:
    values, _ = gram_eigh(torch.zeros(1024, 5), 5)
    assert values.shape == (1024,)
    assert not values.any()


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_squared_norm(scale: float) -> None:
    """Also where the squares do not fit into float32."""
    w = torch.randn(300, 1000, generator=torch.Generator().manual_seed(0)) * scale
    assert squared_norm(w) == pytest.approx(float(w.double().square().sum()), rel=1e-8)
    assert squared_norm(w.T) == squared_norm(w)
    assert squared_norm(w.double()) == pytest.approx(float(w.double().square().sum()), rel=1e-12)


def test_squared_norm_where_every_row_rounds_alike() -> None:
    w = torch.full((3000, 1000), 0.1)
    assert squared_norm(w) == pytest.approx(3e6 * float(torch.tensor(0.1)) ** 2, rel=1e-7)


def test_squared_norm_of_zero() -> None:
    assert squared_norm(torch.zeros(3, 4)) == 0
