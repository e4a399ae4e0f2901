"""compress with a calibration, against explicit float64 SVDs of H_d^(1/2) W G^(1/2) and brute force
over all ranks."""

from __future__ import annotations

import itertools
import json
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import rebuilt, weight
from safetensors.torch import load_file, save_file
from torch import Tensor

import svdcli
from svdcli import Recipe
from svdcli.calibration.moments import Provenance, Spool, write_moments
from svdcli.errors import BadCheckpointError, NothingSelectedError, SvdcliError, UsageError
from svdcli.files.checkpoint import open_checkpoint
from svdcli.linalg.whitening import Metric

SHAPES = {
    "layers.0.tall.weight": (64, 40),
    "layers.0.wide.weight": (40, 64),
    "layers.1.square.weight": (48, 48),
}
METRICS = ["inputs", "diagonal", "full"]
Shapes = Mapping[str, tuple[int, int]]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class Known:
    """What a calibration knows of one layer: G, the mean, and H or its diagonal, in float32. x (n,
    rows) is the data."""

    inputs: Tensor
    mean: Tensor
    outputs: Tensor | None
    x: Tensor

    def metric(self, kind: str, *, centred: bool = False) -> tuple[Tensor, Tensor | None]:
        """G and H in float64, as `--metric` cuts them."""
        g = self.inputs.double()
        if centred:
            g = g - torch.outer(self.mean.double(), self.mean.double())
        if kind == "inputs" or self.outputs is None:
            return g, None
        h = self.outputs.double()
        return g, h.diagonal() if kind == "diagonal" and h.ndim == 2 else h


def known_of(shapes: Shapes, scale: Callable[[int], float] = lambda at: 1e-3) -> dict[str, Known]:
    """Moments of correlated inputs with a mean, and of correlated gradients whose size is `scale`
    of the layer's place."""
    found = {}
    for at, (name, (m, n)) in enumerate(shapes.items()):
        x = weight(n, n, 50 + at).double() @ normal(n, 300, seed=at) + normal(n, 1, seed=70 + at)
        g = scale(at) * weight(m, m, 60 + at).double() @ normal(m, 300, seed=80 + at)
        found[name] = Known((x @ x.T / 300).float(), x.mean(1).float(), (g @ g.T / 300).float(), x)
    return found


def write_source(
    path: Path,
    shapes: Shapes = SHAPES,
    *,
    bias: bool = False,
    transposed: bool = False,
    seed: int = 0,
) -> Path:
    """A file with a weight for each (out, in) of shapes; transposed stores them as (in, out)."""
    tensors = {}
    for at, (name, (m, n)) in enumerate(shapes.items()):
        w = weight(m, n, seed + at)
        tensors[name] = w.T.contiguous() if transposed else w
        if bias:
            tensors[name.replace("weight", "bias")] = normal(m, seed=seed + 30 + at).float()
    save_file(tensors | {"norm.weight": torch.ones(40)}, path)
    return path


def write_calibration(
    path: Path,
    model: Path,
    known: Mapping[str, Known],
    *,
    gradients: bool = True,
    transposed: bool = False,
    sensitivities: Mapping[str, tuple[float, float]] | None = None,
) -> Path:
    """A file of moments of this model."""
    layers = {}
    with tempfile.TemporaryDirectory() as folder:
        spool = Spool(Path(folder))
        for name, item in known.items():
            spool.add(f"input.{name}", item.inputs)
            spool.add(f"mean.{name}", item.mean)
            output = f"output.{name}" if gradients and item.outputs is not None else None
            if output is not None and item.outputs is not None:
                spool.add(output, item.outputs)
            layers[name] = {"input": name, "output": output, "transposed": transposed}
        for name, values in (sensitivities or {}).items():
            spool.add(f"sensitivity.{name}", torch.tensor(values))
        fingerprint = open_checkpoint(model).fingerprint()
        how = (
            fingerprint,
            "a text",
            "0" * 64,
            300,
            1,
            300,
            0,
            gradients,
            sensitivities is not None,
            "nats",
        )
        write_moments(path, spool, dict.fromkeys(spool.shapes, 1.0), layers, Provenance(*how))
    return path


def damped(h: Tensor | None, m: int) -> Tensor:
    """H_d as a full matrix."""
    eye = torch.eye(m, dtype=torch.float64)
    if h is None:
        return eye
    full = h.diag() if h.ndim == 1 else h
    return full + Metric(eye).damping * full.trace() / m * eye


def root(s: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(s)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def best_energies(w: Tensor, g: Tensor, h: Tensor | None) -> Tensor:
    return torch.linalg.svdvals(root(damped(h, w.shape[0])) @ w.double() @ root(g)).square()


def trace_error(d: Tensor, g: Tensor, h: Tensor | None) -> float:
    return float(torch.trace(damped(h, d.shape[0]) @ d @ g @ d.T))


# Ranks and factors --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("layout", ["factored", "pivoted", "dense"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_what_is_stored_reaches_the_optimum(
    tmp_path: Path, kind: str, layout: str, transposed: bool, bias: bool, dtype: str
) -> None:
    model, known = (
        write_source(tmp_path / "m.safetensors", bias=bias, transposed=transposed),
        known_of(SHAPES),
    )
    calibration = write_calibration(tmp_path / "c.safetensors", model, known, transposed=transposed)
    recipe = Recipe("rank", 8, layout=layout, dtype=dtype, metric=kind)
    outcome = svdcli.compress(model, tmp_path / "o.safetensors", recipe, calibration=calibration)
    before, after = load_file(model), load_file(tmp_path / "o.safetensors")
    assert {row.solver for row in outcome.report.layers} == {"weighted"}
    assert not any(row.fell_back for row in outcome.report.layers)
    for row in outcome.report.layers:
        w, stored = before[row.name].double(), rebuilt(after, row.name, layout)
        relative = float((w - stored).norm() / w.norm())
        assert row.relative_error == pytest.approx(relative, rel=1e-5)
        w, stored = (w.T, stored.T) if transposed else (w, stored)
        g, h = known[row.name].metric(kind, centred=bias)
        best = best_energies(w, g, h)
        assert trace_error(w - stored, g, h) == pytest.approx(float(best[8:].sum()), rel=1e-6)
        scale = 0.5 if kind != "inputs" else 1 / float(best.sum())
        assert row.predicted_loss == pytest.approx(scale * float(best[8:].sum()), rel=1e-5)
    assert svdcli.verify(tmp_path / "o.safetensors", model).ok


def test_auto_counts_with_all_that_was_measured(tmp_path: Path) -> None:
    model, known = write_source(tmp_path / "m.safetensors"), known_of(SHAPES)
    name = "layers.0.tall.weight"
    diagonal = known | {
        name: replace(known[name], outputs=known[name].outputs.diagonal().contiguous())
    }
    for gradients, kinds in ((True, ("diagonal", "full", "full")), (False, ("inputs",) * 3)):
        calibration = write_calibration(
            tmp_path / "c.safetensors", model, diagonal, gradients=gradients
        )
        out = tmp_path / f"{gradients}.safetensors"
        plan = svdcli.compress(model, out, Recipe("rank", 8), calibration=calibration).plan
        found = {layer.tensor.name: layer.metric for layer in plan.layers}
        assert found == dict(zip(SHAPES, kinds, strict=True))
        for layer, kind in found.items():
            w = load_file(model)[layer].double()
            g, h = diagonal[layer].metric(kind)
            error = trace_error(w - rebuilt(load_file(out), layer, "factored"), g, h)
            assert error == pytest.approx(float(best_energies(w, g, h)[8:].sum()), rel=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("layout", ["factored", "pivoted"])
def test_a_refitted_bias_takes_the_mean_error_away(
    tmp_path: Path, transposed: bool, layout: str
) -> None:
    model, known = (
        write_source(tmp_path / "m.safetensors", bias=True, transposed=transposed),
        known_of(SHAPES),
    )
    calibration = write_calibration(tmp_path / "c.safetensors", model, known, transposed=transposed)
    recipe = Recipe("rank", 6, metric="inputs", layout=layout)
    svdcli.compress(model, tmp_path / "o.safetensors", recipe, calibration=calibration)
    before, after = load_file(model), load_file(tmp_path / "o.safetensors")
    for name, item in known.items():
        w, stored = before[name].double(), rebuilt(after, name, layout)
        w, stored = (w.T, stored.T) if transposed else (w, stored)
        bias, refitted = (
            tensors[name.replace("weight", "bias")].double()[:, None] for tensors in (before, after)
        )
        error = (w - stored) @ item.x + bias - refitted
        moved = float(((w - stored) @ item.x).mean(1).norm())
        assert moved > 0.05
        assert float(error.mean(1).norm()) < 1e-5 * moved
        tail = float(best_energies(w, *item.metric("inputs", centred=True))[6:].sum())
        assert float(error.square().sum()) / item.x.shape[1] == pytest.approx(tail, rel=1e-3)


def test_a_bias_that_is_nobody_s_mean_stays(tmp_path: Path) -> None:
    """Left dense, or of another width: as it was, to the byte."""
    model, known = write_source(tmp_path / "m.safetensors", bias=True), known_of(SHAPES)
    tensors = load_file(model) | {"layers.0.tall.bias": torch.ones(7)}
    save_file(tensors, model)
    dense = "layers.1.square.weight"
    calibration = write_calibration(
        tmp_path / "c.safetensors", model, {n: k for n, k in known.items() if n != dense}
    )
    svdcli.compress(
        model, tmp_path / "o.safetensors", Recipe("rank", 8, metric="full"), calibration=calibration
    )
    after = load_file(tmp_path / "o.safetensors")
    for name in ("layers.0.tall.bias", "layers.1.square.bias", dense):
        assert torch.equal(after[name], tensors[name])
    assert not torch.equal(after["layers.0.wide.bias"], tensors["layers.0.wide.bias"])
    w = tensors["layers.0.tall.weight"].double()
    g, h = known["layers.0.tall.weight"].metric("full")
    error = trace_error(w - rebuilt(after, "layers.0.tall.weight", "factored"), g, h)
    assert error == pytest.approx(float(best_energies(w, g, h)[8:].sum()), rel=1e-6)
    assert svdcli.verify(tmp_path / "o.safetensors", model).ok


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_costs_its_rounding_alone(tmp_path: Path, dtype: torch.dtype) -> None:
    model, known = tmp_path / "m.safetensors", known_of(SHAPES)
    save_file(
        {
            name: weight(*shape, seed=at, dtype=dtype)
            for at, (name, shape) in enumerate(SHAPES.items())
        },
        model,
    )
    calibration = write_calibration(tmp_path / "c.safetensors", model, known)
    outcome = svdcli.compress(
        model, tmp_path / "o.safetensors", Recipe("rank", 8), calibration=calibration
    )
    assert not any(row.fell_back for row in outcome.report.layers)
    for name, item in known.items():
        w, (g, h) = load_file(model)[name].double(), item.metric("full")
        best = best_energies(w, g, h)
        error = trace_error(
            w - rebuilt(load_file(tmp_path / "o.safetensors"), name, "factored"), g, h
        )
        roundoff = torch.finfo(dtype).eps / 2
        assert (
            float(best[8:].sum()) * (1 - 1e-9)
            <= error
            <= float(best[8:].sum()) + 4 * roundoff**2 * float(best.sum())
        )


@pytest.mark.parametrize("kind", METRICS)
def test_energy_is_counted_in_the_metric(tmp_path: Path, kind: str) -> None:
    model, known = write_source(tmp_path / "m.safetensors"), known_of(SHAPES)
    calibration = write_calibration(tmp_path / "c.safetensors", model, known)
    recipe = Recipe("energy", 0.8, metric=kind)
    for row in svdcli.compress(
        model, None, recipe, calibration=calibration, dry_run=True
    ).report.layers:
        best = best_energies(load_file(model)[row.name], *known[row.name].metric(kind))
        needed = int((best.cumsum(0) / best.sum() < 0.8).sum()) + 1
        assert row.rank == needed or (row.rank is None and "would not save" in row.reason)


def test_a_measured_sensitivity_is_the_loss_that_a_whole_energy_stands_for(tmp_path: Path) -> None:
    model, known = write_source(tmp_path / "m.safetensors"), known_of(SHAPES)
    measured = {"layers.0.tall.weight": (0.3, 0.5), "layers.0.wide.weight": (0.02, 0.25)}
    calibration = write_calibration(
        tmp_path / "c.safetensors", model, known, sensitivities=measured
    )
    rows = svdcli.compress(
        model, None, Recipe("rank", 8), calibration=calibration, dry_run=True
    ).report.layers
    for row in rows:
        if row.name not in measured:
            assert row.rank is None
            continue
        best = best_energies(load_file(model)[row.name], *known[row.name].metric("full"))
        loss, share = measured[row.name]
        assert row.predicted_loss == pytest.approx(
            loss / share * float(best[8:].sum() / best.sum()), rel=1e-5
        )


# What is left dense, and what is refused ----------------------------------------------------------


@pytest.mark.parametrize("allocate", ["uniform", "global"])
def test_an_uncalibrated_layer_stays_dense_and_says_so(tmp_path: Path, allocate: str) -> None:
    model, known = write_source(tmp_path / "m.safetensors", bias=True), known_of(SHAPES)
    left = "layers.0.wide.weight"
    calibration = write_calibration(
        tmp_path / "c.safetensors", model, {n: k for n, k in known.items() if n != left}
    )
    recipe = Recipe("keep", 0.6, allocate=allocate)
    outcome = svdcli.compress(model, tmp_path / "o.safetensors", recipe, calibration=calibration)
    rows = {row.name: row for row in outcome.report.layers}
    assert [name for name, row in rows.items() if row.rank is None] == [left]
    assert "not calibrated" in rows[left].reason
    assert 0.57 < outcome.report.selected.keep <= 0.6
    before, after = load_file(model), load_file(tmp_path / "o.safetensors")
    for name in (left, left.replace("weight", "bias")):
        assert torch.equal(after[name], before[name])


def test_where_nothing_is_calibrated_nothing_is_written(tmp_path: Path) -> None:
    model = write_source(tmp_path / "m.safetensors")
    calibration = write_calibration(tmp_path / "c.safetensors", model, {})
    with pytest.raises(NothingSelectedError, match="not calibrated"):
        svdcli.compress(
            model, tmp_path / "o.safetensors", Recipe("rank", 8), calibration=calibration
        )
    assert {path.name for path in tmp_path.iterdir()} == {"m.safetensors", "c.safetensors"}


def test_a_layer_without_gradients_is_not_compared_with_others(tmp_path: Path) -> None:
    model, known = write_source(tmp_path / "m.safetensors"), known_of(SHAPES)
    name = "layers.0.wide.weight"
    calibration = write_calibration(
        tmp_path / "c.safetensors", model, known | {name: replace(known[name], outputs=None)}
    )
    for kind in ("auto", "diagonal", "full", "inputs"):
        rows = svdcli.compress(
            model, None, Recipe("rank", 8, metric=kind), calibration=calibration, dry_run=True
        ).report.layers
        assert {row.name: row.rank for row in rows} == dict.fromkeys(SHAPES, 8) | {
            name: 8 if kind == "inputs" else None
        }


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_a_metric_of_gradients_needs_gradients(tmp_path: Path, kind: str) -> None:
    model = write_source(tmp_path / "m.safetensors")
    calibration = write_calibration(
        tmp_path / "c.safetensors", model, known_of(SHAPES), gradients=False
    )
    for options in ({}, {"dry_run": True}):
        with pytest.raises(UsageError, match=f"--metric {kind} needs gradients"):
            svdcli.compress(
                model,
                tmp_path / "o.safetensors",
                Recipe("rank", 8, metric=kind),
                calibration=calibration,
                **options,
            )
    assert {path.name for path in tmp_path.iterdir() if ".partial" not in path.name} == {
        "m.safetensors",
        "c.safetensors",
    }


@pytest.mark.parametrize("kind", METRICS)
def test_a_metric_needs_a_calibration(tmp_path: Path, kind: str) -> None:
    model = write_source(tmp_path / "m.safetensors")
    with pytest.raises(UsageError, match="give --calibration"):
        svdcli.compress(model, tmp_path / "o.safetensors", Recipe("rank", 8, metric=kind))


def test_another_model_s_calibration_is_refused(tmp_path: Path) -> None:
    model, other = (
        write_source(tmp_path / "m.safetensors"),
        write_source(tmp_path / "n.safetensors", seed=5),
    )
    calibration = write_calibration(tmp_path / "c.safetensors", other, known_of(SHAPES))
    with pytest.raises(SvdcliError, match="another model than"):
        svdcli.compress(
            model, tmp_path / "o.safetensors", Recipe("rank", 8), calibration=calibration
        )
    with pytest.raises(BadCheckpointError, match="not written by svdcli calibrate"):
        svdcli.compress(model, tmp_path / "o.safetensors", Recipe("rank", 8), calibration=other)
    assert not (tmp_path / "o.safetensors").exists()


# The same again -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("allocate", ["uniform", "global"])
def test_a_plan_runs_again_to_the_same_bytes_with_its_calibration_alone(
    tmp_path: Path, kind: str, allocate: str
) -> None:
    model, known = write_source(tmp_path / "m.safetensors", bias=True), known_of(SHAPES)
    calibration = write_calibration(tmp_path / "c.safetensors", model, known)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    recipe = Recipe("keep", 0.5, metric=kind, allocate=allocate)
    first = svdcli.compress(
        model, tmp_path / "a" / "o.safetensors", recipe, calibration=calibration
    )
    plan = svdcli.Plan.from_json(json.loads(json.dumps(first.plan.to_json())))
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(calibration.read_bytes())
    svdcli.compress(model, tmp_path / "b" / "o.safetensors", plan=plan, calibration=copy)
    assert (tmp_path / "a" / "o.safetensors").read_bytes() == (
        tmp_path / "b" / "o.safetensors"
    ).read_bytes()
    with pytest.raises(UsageError, match="made with a calibration"):
        svdcli.compress(model, tmp_path / "e.safetensors", plan=plan)
    other = write_calibration(tmp_path / "d.safetensors", model, known_of(SHAPES, lambda at: 1e-2))
    with pytest.raises(UsageError, match="not the calibration"):
        svdcli.compress(model, tmp_path / "e.safetensors", plan=plan, calibration=other)
    assert not (tmp_path / "e.safetensors").exists()


def stopping(at: int) -> Callable[..., None]:
    """Progress that interrupts the run when it is told of something for the at-th time."""
    calls = itertools.count()

    def progress(*_: Any) -> None:
        if next(calls) == at:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("layout", ["factored", "pivoted"])
def test_an_interrupted_run_continues_to_the_same_bytes(tmp_path: Path, layout: str) -> None:
    model, known = write_source(tmp_path / "m.safetensors", bias=True), known_of(SHAPES)
    calibration = write_calibration(tmp_path / "c.safetensors", model, known)
    recipe, out = Recipe("keep", 0.5, allocate="global", layout=layout), tmp_path / "o.safetensors"
    told: list[str] = []
    svdcli.compress(
        model, out, recipe, calibration=calibration, progress=lambda stage, *_: told.append(stage)
    )
    expected = out.read_bytes()
    assert {"measure", "write"} <= set(told)
    for at in range(len(told)):
        out.unlink()
        with pytest.raises(KeyboardInterrupt):
            svdcli.compress(model, out, recipe, calibration=calibration, progress=stopping(at))
        assert not out.exists()
        assert not svdcli.compress(model, out, recipe, calibration=calibration).started_over
        assert out.read_bytes() == expected
        assert {path.name for path in tmp_path.iterdir()} == {
            "m.safetensors",
            "c.safetensors",
            "o.safetensors",
        }


def test_a_continued_run_never_mixes_two_calibrations(tmp_path: Path) -> None:
    model, out, recipe = (
        write_source(tmp_path / "m.safetensors"),
        tmp_path / "o.safetensors",
        Recipe("keep", 0.5),
    )
    one = write_calibration(tmp_path / "c.safetensors", model, known_of(SHAPES))
    other = write_calibration(
        tmp_path / "d.safetensors", model, known_of({n: SHAPES[n] for n in reversed(SHAPES)})
    )
    svdcli.compress(model, out, recipe, calibration=other)
    expected = out.read_bytes()
    out.unlink()
    with pytest.raises(KeyboardInterrupt):
        svdcli.compress(model, out, recipe, calibration=one, progress=stopping(4))
    assert svdcli.compress(model, out, recipe, calibration=other).started_over
    assert out.read_bytes() == expected


# Global allocation --------------------------------------------------------------------------------

SMALL = [
    {"l.0.a.weight": (18, 18), "l.1.a.weight": (20, 17), "l.2.a.weight": (16, 24)},
    {"l.0.a.weight": (30, 18), "l.1.a.weight": (17, 40)},
]
SCALES = {
    "alike": lambda at: 1e-3,
    "one counts": lambda at: (1e-3, 3e-2, 1e-3)[at],
    "one hardly": lambda at: (1e-2, 1e-3, 1e-5)[at],
}


def cost_of(shape: tuple[int, int], rank: int | None, layout: str, unit: str) -> int:
    m, n = shape
    size = 1 if unit == "parameters" else 4
    if rank is None:
        return size * m * n
    if layout == "factored":
        return size * rank * (m + n)
    return size * rank * (m + n - rank) + (0 if unit == "parameters" else 4 * m)


def losses_of(model: Path, known: Mapping[str, Known], kind: str) -> dict[str, list[float]]:
    """The predicted loss of every rank 0 .. min(m, n) of each layer."""
    found = {}
    for name, item in known.items():
        best = best_energies(load_file(model)[name], *item.metric(kind))
        scale = 0.5 if kind != "inputs" else 1 / float(best.sum())
        found[name] = [scale * float(best[rank:].sum()) for rank in range(len(best) + 1)]
    return found


def menus_of(
    shapes: Shapes, losses: Mapping[str, list[float]], layout: str, unit: str
) -> list[list[tuple[int, float]]]:
    """(cost, loss) of every rank that saves, and of staying dense."""
    menus = []
    for name, (m, n) in shapes.items():
        ranks = [
            rank
            for rank in range(1, min(m, n) + (layout == "factored"))
            if all(
                cost_of((m, n), rank, layout, u) < cost_of((m, n), None, layout, u)
                for u in ("parameters", "bytes")
            )
        ]
        ranked = [(cost_of((m, n), rank, layout, unit), losses[name][rank]) for rank in ranks]
        menus.append([*ranked, (cost_of((m, n), None, layout, unit), 0.0)])
    return menus


def brute_force(menus: list[list[tuple[int, float]]], budget: int) -> float:
    """The least summed loss of all combinations within the budget."""
    costs, losses = torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.float64)
    for menu in menus:
        costs = (costs[:, None] + torch.tensor([cost for cost, _ in menu])).flatten()
        losses = (
            losses[:, None] + torch.tensor([loss for _, loss in menu], dtype=torch.float64)
        ).flatten()
    return min(losses[costs <= budget].tolist(), default=math.inf)


def lost(report: Any, losses: Mapping[str, list[float]]) -> float:
    """The summed loss of a plan by the oracle; checks that the report predicts the same."""
    each = {
        row.name: 0.0 if row.rank is None else losses[row.name][row.rank] for row in report.layers
    }
    for row in report.layers:
        assert row.predicted_loss == (
            None if row.rank is None else pytest.approx(each[row.name], rel=1e-5)
        )
    return math.fsum(each.values())


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("layout", ["factored", "pivoted"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shapes", SMALL, ids=["three", "two"])
def test_parameters_are_spent_as_brute_force_would(
    tmp_path: Path, kind: str, layout: str, scale: str, shapes: Shapes
) -> None:
    model, known = write_source(tmp_path / "m.safetensors", shapes), known_of(shapes, SCALES[scale])
    calibration = write_calibration(tmp_path / "c.safetensors", model, known)
    losses = losses_of(model, known, kind)
    menus = menus_of(shapes, losses, layout, "parameters")
    dense = sum(m * n for m, n in shapes.values())
    for keep in (0.3, 0.5, 0.8):
        recipe = Recipe("keep", keep, layout=layout, metric=kind)
        found = {}
        for allocate, floor in (("uniform", 0.6), ("global", 0.6), ("global", 0.0)):
            asked = replace(recipe, allocate=allocate, floor=floor)
            report = svdcli.compress(
                model, None, asked, calibration=calibration, dry_run=True
            ).report
            assert report.selected.parameters_after <= keep * dense
            found[allocate, floor] = lost(report, losses)
        assert found["global", 0.6] <= found["uniform", 0.6] * (1 + 1e-6)
        assert found["global", 0.0] <= found["global", 0.6] * (1 + 1e-6)
        assert (
            found["global", 0.0]
            <= 1.001 * brute_force(menus, math.floor(keep * dense + 1e-9)) + 1e-12
        )


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("layout", ["factored", "pivoted"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shapes", SMALL, ids=["three", "two"])
def test_bytes_are_spent_as_brute_force_would(
    tmp_path: Path, kind: str, layout: str, scale: str, shapes: Shapes
) -> None:
    model, known = write_source(tmp_path / "m.safetensors", shapes), known_of(shapes, SCALES[scale])
    calibration = write_calibration(tmp_path / "c.safetensors", model, known)
    losses = losses_of(model, known, kind)
    menus = menus_of(shapes, losses, layout, "bytes")
    dense = sum(4 * m * n for m, n in shapes.values())
    around = Recipe("keep", 0.5, layout=layout, metric=kind)
    told = svdcli.compress(model, None, around, calibration=calibration, dry_run=True).report
    beside = told.total.bytes_after - told.selected.bytes_after
    for share in (0.4, 0.6, 0.8):
        size = beside + int(share * dense)
        found = {}
        for allocate, floor in (("uniform", 0.6), ("global", 0.6), ("global", 0.0)):
            recipe = Recipe(
                "size", size, layout=layout, metric=kind, allocate=allocate, floor=floor
            )
            report = svdcli.compress(
                model, None, recipe, calibration=calibration, dry_run=True
            ).report
            assert report.total.bytes_after <= size
            found[allocate, floor] = lost(report, losses)
        assert found["global", 0.6] <= found["uniform", 0.6] * (1 + 1e-6)
        # A plan's own text is in the header: what is within this of the size may not fit.
        room = size - (report.total.bytes_after - report.selected.bytes_after) - 48
        assert found["global", 0.0] <= 1.001 * brute_force(menus, room) + 1e-12


@pytest.mark.parametrize("target", ["keep", "size"])
def test_a_layer_that_counts_stays_whole_where_the_others_pay_for_it(
    tmp_path: Path, target: str
) -> None:
    model, known = (
        write_source(tmp_path / "m.safetensors"),
        known_of(SHAPES, lambda at: (1e-3, 1.0, 1e-3)[at]),
    )
    calibration = write_calibration(tmp_path / "c.safetensors", model, known)
    even = svdcli.compress(
        model, tmp_path / "e.safetensors", Recipe("keep", 0.8), calibration=calibration
    ).report
    value = 0.8 if target == "keep" else even.total.bytes_after
    recipe = Recipe(target, value, allocate="global")
    report = svdcli.compress(
        model, tmp_path / "o.safetensors", recipe, calibration=calibration
    ).report
    rows = {row.name: row for row in report.layers}
    assert rows["layers.0.wide.weight"].rank is None
    assert "worth more whole" in rows["layers.0.wide.weight"].reason
    assert rows["layers.0.tall.weight"].rank is not None
    if target == "size":
        assert (tmp_path / "o.safetensors").stat().st_size <= value
    else:
        assert report.selected.keep <= 0.8


def test_the_loss_is_comparable_between_layers_with_gradients_alone(tmp_path: Path) -> None:
    """Gradients ten times as large count a hundred times as much; inputs alone know shares of a
    layer's own energy."""
    model = write_source(tmp_path / "m.safetensors")
    small, large = (
        known_of(SHAPES, lambda at, size=size: size if at == 0 else 1e-3) for size in (1e-3, 1e-2)
    )
    losses = []
    for name, known in (("a", small), ("b", large)):
        calibration = write_calibration(tmp_path / f"{name}.safetensors", model, known)
        losses.append(
            {
                kind: [
                    row.predicted_loss
                    for row in svdcli.compress(
                        model,
                        None,
                        Recipe("rank", 8, metric=kind),
                        calibration=calibration,
                        dry_run=True,
                    ).report.layers
                ]
                for kind in METRICS
            }
        )
    for kind in METRICS:
        one, other = losses[0][kind], losses[1][kind]
        assert other[0] == pytest.approx(one[0] * (1 if kind == "inputs" else 100), rel=1e-4)
        assert other[1:] == one[1:]
