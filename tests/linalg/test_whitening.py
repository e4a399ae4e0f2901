"""The weighted truncation against Eckart and Young in its metric, by an explicit float64 SVD of
H_d^(1/2) W G^(1/2)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from svdcli.linalg.whitening import Metric, refit_bias, weighted, weighted_energies, weighted_error

SHAPES = [(40, 24), (24, 40), (32, 32), (64, 9), (9, 64), (7, 1), (1, 7)]
ROWS = ["none", "diagonal", "full"]
# A tail below this part of the whole energy is lost in the rounding of products with G.
FLOOR = 1e-9


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(n: int, condition: float = 100.0, seed: int = 1) -> Tensor:
    """A full symmetric (n, n) matrix with eigenvalues from 1 down to 1 / condition."""
    q = torch.linalg.qr(normal(n, n, seed=seed)).Q
    g = (q * condition ** -torch.linspace(0, 1, n, dtype=torch.float64)) @ q.T
    return (g + g.T) / 2


def singular(n: int, rank: int) -> Tensor:
    x = normal(n, rank, seed=5)
    return x @ x.T


def metric(m: int, n: int, rows: str, condition: float = 100.0) -> Metric:
    h = moment(m, 1e4, seed=2) * 3e-7
    return Metric(
        moment(n, condition), {"none": None, "diagonal": h.diagonal().clone(), "full": h}[rows]
    )


def damped(on: Metric, m: int) -> Tensor:
    """H_d as a full matrix."""
    eye = torch.eye(m, dtype=torch.float64)
    if on.outputs is None:
        return eye
    h = on.outputs.diag() if on.outputs.ndim == 1 else on.outputs
    return h + on.damping * h.trace() / m * eye


def power(s: Tensor, exponent: float) -> Tensor:
    """The symmetric power of a symmetric positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(s)
    return (vectors * values.clamp(min=0) ** exponent) @ vectors.T


def best_energies(w: Tensor, on: Metric) -> Tensor:
    return torch.linalg.svdvals(
        power(damped(on, w.shape[0]), 0.5) @ w @ power(on.inputs, 0.5)
    ).square()


def trace_error(w: Tensor, approx: Tensor, on: Metric) -> float:
    d = w - approx
    return float(torch.trace(damped(on, w.shape[0]) @ d @ on.inputs @ d.T))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("condition", [100.0, 1e12])
def test_every_rank_has_the_error_of_the_explicit_svd(
    shape: tuple[int, int], rows: str, condition: float
) -> None:
    w, on = normal(*shape), metric(*shape, rows, condition)
    best = best_energies(w, on)
    floor = FLOOR * float(best.sum())
    checked = 0
    for rank in range(1, min(shape) + 1):
        factors = weighted(w, rank, on)
        assert factors.up.shape == (shape[0], rank)
        assert factors.down.shape == (rank, shape[1])
        error = trace_error(w, factors.up @ factors.down, on)
        expected = float(best[rank:].sum())
        assert error == pytest.approx(expected, rel=1e-6, abs=1e-6 * floor)
        assert factors.tail == pytest.approx(expected, rel=1e-6, abs=1e-6 * floor)
        torch.testing.assert_close(
            factors.sigma.square(), best[:rank], rtol=1e-6, atol=1e-6 * floor
        )
        checked += expected > floor
    assert checked >= min(shape) // 2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", ROWS)
def test_the_energies_are_the_errors_of_every_rank(shape: tuple[int, int], rows: str) -> None:
    w, on = normal(*shape), metric(*shape, rows)
    energies = weighted_energies(w, on)
    assert energies.dtype == torch.float64
    assert bool((energies.diff() <= 0).all())
    torch.testing.assert_close(energies, best_energies(w, on), rtol=1e-9, atol=0)
    assert weighted_error(w, torch.zeros_like(w), on) == pytest.approx(
        float(energies.sum()), rel=1e-12
    )
    for rank in range(1, min(shape) + 1):
        factors = weighted(w, rank, on)
        error = weighted_error(w, factors.up @ factors.down, on)
        assert error == pytest.approx(
            float(energies[rank:].sum()), rel=1e-9, abs=1e-15 * float(energies.sum())
        )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", ROWS)
def test_the_factors_are_those_of_the_whitened_svd(shape: tuple[int, int], rows: str) -> None:
    w, on, rank = normal(*shape), metric(*shape, rows), (min(shape) + 1) // 2
    root = power(damped(on, shape[0]), 0.5)
    u = torch.linalg.svd(root @ w @ power(on.inputs, 0.5)).U[:, :rank]
    factors = weighted(w, rank, on)
    expected = power(damped(on, shape[0]), -0.5) @ u @ u.T @ root @ w
    torch.testing.assert_close(factors.up @ factors.down, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", ROWS)
def test_nothing_near_is_better(shape: tuple[int, int], rows: str) -> None:
    w, on, rank = normal(*shape), metric(*shape, rows), (min(shape) + 1) // 2
    factors = weighted(w, rank, on)
    best = trace_error(w, factors.up @ factors.down, on)
    slack = 1e-12 * trace_error(w, torch.zeros_like(w), on)
    for seed in range(4):
        for size in (1e-5, 1e-3, 1e-1, 1.0):
            up = factors.up + size * normal(*factors.up.shape, seed=seed)
            down = factors.down + size * normal(*factors.down.shape, seed=seed + 100)
            for product in (
                up @ down,
                up @ factors.down,
                factors.up @ down,
                (1 + size) * factors.up @ factors.down,
            ):
                assert trace_error(w, product, on) >= best - slack


@pytest.mark.parametrize("shape", SHAPES)
def test_the_output_error_on_data_is_the_least_there_is(shape: tuple[int, int]) -> None:
    w, x = (
        normal(*shape),
        normal(shape[1], 200, seed=3)
        * torch.linspace(0.1, 3, shape[1], dtype=torch.float64)[:, None],
    )
    best = torch.linalg.svdvals(w @ x).square() / 200
    for rank in range(1, min(shape) + 1):
        factors = weighted(w, rank, Metric(x @ x.T / 200))
        error = float((w @ x - factors.up @ (factors.down @ x)).square().sum()) / 200
        assert error == pytest.approx(
            float(best[rank:].sum()), rel=1e-9, abs=1e-13 * float(best.sum())
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_without_a_metric_it_is_eckart_young(shape: tuple[int, int]) -> None:
    w, rank = normal(*shape), (min(shape) + 1) // 2
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    factors = weighted(w, rank, Metric(torch.eye(shape[1])))
    torch.testing.assert_close(
        factors.up @ factors.down, (u[:, :rank] * s[:rank]) @ vh[:rank], rtol=0, atol=1e-10
    )
    torch.testing.assert_close(factors.sigma, s[:rank])


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)])
@pytest.mark.parametrize("rows", ROWS)
def test_a_singular_g_of_rank_3_needs_rank_3(shape: tuple[int, int], rows: str) -> None:
    w, on = normal(*shape), replace(metric(*shape, rows), inputs=singular(shape[1], 3))
    best, whole = best_energies(w, on), trace_error(w, torch.zeros_like(w), on)
    for rank in range(1, min(shape) + 1):
        factors = weighted(w, rank, on)
        error = trace_error(w, factors.up @ factors.down, on)
        assert error == pytest.approx(
            float(best[rank:].sum()) if rank < 3 else 0.0, rel=1e-9, abs=1e-14 * whole
        )
    torch.testing.assert_close(weighted_energies(w, on), best, rtol=1e-9, atol=1e-14 * whole)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
@pytest.mark.parametrize("rows", ["diagonal", "full"])
def test_without_damping_a_singular_h_leaves_its_null_space_zero(
    shape: tuple[int, int], rows: str
) -> None:
    m, n = shape
    w, h = normal(m, n), singular(m, 5)
    if rows == "diagonal":
        h = (torch.arange(m) < 5).double()
    on = Metric(moment(n), h, damping=0.0)
    best, whole = best_energies(w, on), trace_error(w, torch.zeros_like(w), on)
    for rank in (1, 4, 5, 9):
        factors = weighted(w, rank, on)
        product = factors.up @ factors.down
        assert trace_error(w, product, on) == pytest.approx(
            float(best[rank:].sum()), rel=1e-9, abs=1e-13 * whole
        )
        null = torch.linalg.eigh(damped(on, m)).eigenvectors[:, : m - 5]
        assert float((null.T @ product).norm()) <= 1e-6 * float(product.norm())
    torch.testing.assert_close(weighted_energies(w, on), best, rtol=1e-9, atol=1e-13 * whole)


@pytest.mark.parametrize("damping", [0.0, 1e-9, 1e-3, 10.0])
def test_damping_moves_every_row_towards_the_same_weight(damping: float) -> None:
    w, on = normal(30, 20), replace(metric(30, 20, "full"), damping=damping)
    factors = weighted(w, 8, on)
    error, expected = (
        trace_error(w, factors.up @ factors.down, on),
        float(best_energies(w, on)[8:].sum()),
    )
    assert error == pytest.approx(expected, rel=1e-9)
    assert weighted_error(w, factors.up @ factors.down, on) == pytest.approx(expected, rel=1e-9)
    plain = weighted_error(w, factors.up @ factors.down, replace(on, damping=0.0))
    assert plain == pytest.approx(
        trace_error(w, factors.up @ factors.down, replace(on, damping=0.0)), rel=1e-9
    )


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
@pytest.mark.parametrize("rows", ROWS)
def test_the_scale_of_a_moment_scales_the_error_and_nothing_else(
    shape: tuple[int, int], rows: str
) -> None:
    w, on = normal(*shape), metric(*shape, rows)
    scaled = Metric(on.inputs * 1e-20, None if on.outputs is None else on.outputs * 1e30)
    scale = 1e-20 if on.outputs is None else 1e10
    one, other = weighted(w, 10, on), weighted(w, 10, scaled)
    torch.testing.assert_close(one.up @ one.down, other.up @ other.down, rtol=0, atol=1e-10)
    assert other.tail == pytest.approx(scale * one.tail, rel=1e-9)
    torch.testing.assert_close(
        weighted_energies(w, scaled), scale * weighted_energies(w, on), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
@pytest.mark.parametrize("rows", ROWS)
def test_the_units_of_the_input_channels_do_not_matter(shape: tuple[int, int], rows: str) -> None:
    """x -> S x, W -> W S^-1 is the same layer, also where one channel outweighs another by 2^60."""
    w, on = normal(*shape), metric(*shape, rows)
    units = 2.0 ** torch.linspace(-30, 30, shape[1], dtype=torch.float64).round()
    one, other = (
        weighted(w, 10, on),
        weighted(w / units, 10, replace(on, inputs=units[:, None] * on.inputs * units)),
    )
    torch.testing.assert_close(one.up @ one.down, other.up @ other.down * units, rtol=0, atol=1e-9)
    assert other.tail == pytest.approx(one.tail, rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", ROWS)
def test_the_norms_of_a_factor_pair_are_equal(shape: tuple[int, int], rows: str) -> None:
    factors = weighted(normal(*shape), min(shape), metric(*shape, rows))
    torch.testing.assert_close(factors.up.norm(dim=0), factors.down.norm(dim=1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
@pytest.mark.parametrize("rows", ROWS)
def test_the_first_columns_of_the_factors_are_the_factors_of_a_lower_rank(
    shape: tuple[int, int], rows: str
) -> None:
    w, on = normal(*shape), metric(*shape, rows)
    high, low = weighted(w, 12, on), weighted(w, 5, on)
    torch.testing.assert_close(
        high.up[:, :5] @ high.down[:5], low.up @ low.down, rtol=0, atol=1e-12
    )


def test_rounding_never_makes_an_error_negative() -> None:
    on = Metric(singular(24, 3))
    null = torch.linalg.eigh(on.inputs).eigenvectors[:, :21]
    for seed in range(16):
        w = normal(2, 21, seed=seed) @ null.T
        assert 0 <= weighted_error(w, torch.zeros_like(w), on) <= 1e-12
        assert bool((weighted_energies(normal(40, 24, seed=seed), on) >= 0).all())
        factors = weighted(normal(40, 24, seed=seed), 12, on)
        assert bool((factors.sigma >= 0).all())
        assert factors.tail >= 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", ROWS)
def test_a_full_rank_is_the_weight_itself(shape: tuple[int, int], rows: str) -> None:
    w = normal(*shape)
    factors = weighted(w, min(shape), metric(*shape, rows))
    torch.testing.assert_close(factors.up @ factors.down, w, rtol=0, atol=1e-10)
    assert factors.tail == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_any_dtype_comes_in_and_its_factors_go_out(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    w, on = normal(*shape).to(dtype), metric(*shape, "full")
    factors, exact = weighted(w, 10, on), weighted(w.double(), 10, on)
    assert factors.up.dtype == factors.down.dtype == dtype
    assert torch.equal(factors.up, exact.up.to(dtype))
    assert torch.equal(factors.down, exact.down.to(dtype))
    assert torch.equal(factors.sigma, exact.sigma)
    assert factors.tail == exact.tail
    assert torch.equal(weighted_energies(w, on), weighted_energies(w.double(), on))
    product = factors.up.double() @ factors.down.double()
    assert weighted_error(w, product.to(dtype), on) == weighted_error(
        w.double(), product.to(dtype).double(), on
    )


def test_a_moment_in_single_precision_is_taken_as_it_is() -> None:
    w, on = normal(20, 30), metric(20, 30, "diagonal")
    assert on.outputs is not None
    single = Metric(on.inputs.float(), on.outputs.float())
    double = Metric(single.inputs.double(), on.outputs.float().double())
    assert torch.equal(weighted(w, 5, single).up, weighted(w, 5, double).up)
    assert torch.equal(weighted_energies(w, single), weighted_energies(w, double))


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_a_zero_moment_counts_as_the_identity(shape: tuple[int, int]) -> None:
    m, n = shape
    w, g, h = normal(m, n), moment(n), moment(m)
    no_rows = [Metric(g, torch.zeros(m)), Metric(g, torch.zeros(m, m))]
    no_inputs = [Metric(torch.zeros(n, n), h)]
    for got, expected in [(on, Metric(g)) for on in no_rows] + [
        (on, Metric(torch.eye(n), h)) for on in no_inputs
    ]:
        one, other = weighted(w, 6, got), weighted(w, 6, expected)
        torch.testing.assert_close(one.up @ one.down, other.up @ other.down, rtol=0, atol=1e-10)
        torch.testing.assert_close(weighted_energies(w, got), weighted_energies(w, expected))
        assert weighted_error(w, 0 * w, got) == pytest.approx(weighted_error(w, 0 * w, expected))
        assert one.tail == pytest.approx(other.tail)


@pytest.mark.parametrize("rows", ROWS)
def test_a_zero_weight_has_zero_factors(rows: str) -> None:
    w, on = torch.zeros(12, 8), metric(12, 8, rows)
    factors = weighted(w, 3, on)
    assert torch.equal(factors.up, torch.zeros(12, 3))
    assert torch.equal(factors.down, torch.zeros(3, 8))
    assert factors.tail == 0
    assert weighted_error(w, w, on) == 0


def test_nothing_given_is_changed() -> None:
    w, on = normal(20, 30), metric(20, 30, "full")
    assert on.outputs is not None
    before = w.clone(), on.inputs.clone(), on.outputs.clone()
    factors = weighted(w, 4, on)
    weighted_energies(w, on)
    weighted_error(w, factors.up @ factors.down, on)
    for one, other in zip(before, (w, on.inputs, on.outputs), strict=True):
        assert torch.equal(one, other)


def test_the_refitted_bias_takes_the_mean_error_away_and_leaves_that_of_the_covariance() -> None:
    w, bias, x = normal(12, 20), normal(12, seed=4), normal(20, 300, seed=3) + normal(20, 1, seed=6)
    mean = x.mean(dim=1)
    centred = Metric((x @ x.T) / 300 - torch.outer(mean, mean))
    factors = weighted(w, 5, centred)
    approx = factors.up @ factors.down
    refitted = refit_bias(w, approx, mean, bias)
    error = (w @ x + bias[:, None]) - (approx @ x + refitted[:, None])
    torch.testing.assert_close(
        error.mean(dim=1), torch.zeros(12, dtype=torch.float64), rtol=0, atol=1e-12
    )
    assert float(error.square().sum()) / 300 == pytest.approx(factors.tail, rel=1e-9)
    torch.testing.assert_close(refit_bias(w, approx, mean, None), refitted - bias)
    assert refit_bias(w, approx, mean, bias.bfloat16()).dtype == torch.bfloat16
    assert refit_bias(w.half(), approx, mean, None).dtype == torch.float16


def test_what_does_not_fit_is_refused() -> None:
    w, g = normal(6, 4), moment(4)
    for rank in (0, 5):
        with pytest.raises(ValueError, match="rank"):
            weighted(w, rank, Metric(g))
    for on in (
        Metric(moment(6)),
        Metric(g, torch.ones(4)),
        Metric(g, moment(4)),
        Metric(g, torch.ones(6, 1)),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            weighted(w, 2, on)
        with pytest.raises(ValueError, match="do not fit"):
            weighted_energies(w, on)
        with pytest.raises(ValueError, match="do not fit"):
            weighted_error(w, w, on)
    for damping in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="damping"):
            weighted(w, 2, Metric(g, damping=damping))
    with pytest.raises(ValueError, match="shape"):
        weighted_error(w, w[:1], Metric(g))
    for h in (-torch.ones(6), -torch.eye(6)):
        with pytest.raises(torch.linalg.LinAlgError):
            weighted(w, 2, Metric(g, h))


# A group of layers: H in blocks -------------------------------------------------------------------

BLOCKS = [(12, "full"), (20, "diagonal"), (8, "full")]


def in_blocks() -> tuple[Metric, Metric]:
    """The metric of three layers that read one input, and the same with H as one matrix."""
    blocks, damped_blocks = [], []
    for at, (m, kind) in enumerate(BLOCKS):
        h = moment(m, 1e3, seed=20 + at) * 10.0 ** (-3 * at)
        if kind == "diagonal":
            h = h.diagonal().clone()
        blocks.append(h)
        whole = h.diag() if h.ndim == 1 else h
        damped_blocks.append(whole + 0.1 * whole.trace() / m * torch.eye(m, dtype=torch.float64))
    g = moment(24, 50)
    return Metric(g, tuple(blocks)), Metric(g, torch.block_diag(*damped_blocks), damping=0.0)


@pytest.mark.parametrize("rank", [1, 7, 20])
def test_layers_one_below_the_other_are_one_in_the_metric_of_all(rank: int) -> None:
    blocks, whole = in_blocks()
    w = normal(sum(m for m, _ in BLOCKS), 24)
    factors = weighted(w, rank, blocks)
    expected = weighted(w, rank, whole)
    torch.testing.assert_close(factors.up @ factors.down, expected.up @ expected.down)
    assert factors.tail == pytest.approx(expected.tail)
    torch.testing.assert_close(weighted_energies(w, blocks), weighted_energies(w, whole))
    approx = factors.up @ factors.down
    assert weighted_error(w, approx, blocks) == pytest.approx(weighted_error(w, approx, whole))


def test_a_group_of_one_is_its_layer() -> None:
    on = metric(40, 24, "full")
    assert isinstance(on.outputs, Tensor)
    w = normal(40, 24)
    alone, group = weighted(w, 5, on), weighted(w, 5, replace(on, outputs=(on.outputs,)))
    torch.testing.assert_close(group.up @ group.down, alone.up @ alone.down)


def test_blocks_that_do_not_fit_are_refused() -> None:
    blocks, _ = in_blocks()
    with pytest.raises(ValueError, match="do not fit"):
        weighted(normal(41, 24), 3, blocks)
