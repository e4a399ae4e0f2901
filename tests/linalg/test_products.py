"""Products against float64, by either library, in every order of memory that the solvers hand
over."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from svdcli.linalg import products
from svdcli.linalg.products import fill_gram, minus_product, mirror, moment, product

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
    monkeypatch.setattr(products, "_onednn_is_quicker", lambda: request.param)


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
    out = torch.full((m + 1, n + 2), torch.nan)[1:, :n]
    assert product(a, b).shape == (m, n)
    if m == 0:
        return
    assert off(product(a, b), exact) < 1e-6
    assert minus_product(c, a, b, out) is out
    assert off(out, c.double() - exact) < 1e-6


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
@pytest.mark.parametrize("full", [300, 299])
def test_second_moments(full: int) -> None:
    rows = random(500, 300)
    exact = rows.double().T @ rows.double()
    assert off(moment(rows, full), exact if full == 300 else exact.diagonal()) < 1e-6


@pytest.fixture
def chosen_anew() -> Iterator[None]:
    products._onednn_is_quicker.cache_clear()
    yield
    products._onednn_is_quicker.cache_clear()


@pytest.mark.usefixtures("chosen_anew")
@pytest.mark.parametrize(
    ("capability", "maker", "chosen"),
    [
        ("AVX512", "AuthenticAMD", True),
        ("AVX512", "GenuineIntel", False),
        ("AVX2", "AuthenticAMD", False),
        ("AVX512", None, False),
    ],
)
def test_onednn_is_for_avx512_of_other_makers(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capability: str,
    maker: str | None,
    chosen: bool,
) -> None:
    if maker:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {maker}\n")
    monkeypatch.setattr(products, "_PROCESSORS", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert products._onednn_is_quicker() is chosen
