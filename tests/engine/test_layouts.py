"""A layout is a value: one more is a class that plans, one that computes, a module, a line each."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from helpers import weight
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import svdcli
from svdcli.linalg.layouts import CODECS, Codec
from svdcli.linalg.solvers import Factors
from svdcli.models.modules import HOLDERS, Holders
from svdcli.plan import words
from svdcli.plan.layouts import LAYOUTS, Layout


class Turned(Layout):
    """W ~ (right @ left)^T, both factors lying on their other side."""

    name = "turned"
    usual_rounding = 2.0
    most_rounding = 8.0

    def parts(self, m: int, n: int, rank: int) -> dict[str, tuple[int, ...]]:
        return {"right.weight": (n, rank), "left.weight": (rank, m)}

    def parameters(self, shape: tuple[int, ...], rank: int) -> int:
        return rank * sum(shape)


class TurnedCodec(Codec):
    def encode(self, factors: Factors, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return factors.down.T.to(dtype).contiguous(), factors.up.T.to(dtype).contiguous()

    def rows(self, stored: tuple[Tensor, ...], compute: torch.dtype, at: slice) -> Tensor:
        right, left = stored
        return left[:, at].T.to(compute) @ right.T.to(compute)


class TurnedLinear(nn.Module):
    def __init__(self, inputs: int, outputs: int, rank: int, *, bias: bool, **how: Any) -> None:
        super().__init__()
        self.right = nn.Linear(rank, inputs, bias=False, **how)
        self.left = nn.Linear(outputs, rank, bias=False, **how)
        self.bias = nn.Parameter(torch.empty(outputs, **how)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.right.weight @ self.left.weight
        return y if self.bias is None else y + self.bias


@pytest.fixture
def turned(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(LAYOUTS, "turned", Turned())
    monkeypatch.setitem(CODECS, "turned", TurnedCodec())
    monkeypatch.setitem(HOLDERS, "turned", Holders(TurnedLinear, nn.Identity, nn.Identity))
    return "turned"


def test_every_layout_is_listed_everywhere() -> None:
    assert tuple(LAYOUTS) == tuple(CODECS)
    asked_for = [name for name, layout in LAYOUTS.items() if layout.is_asked_for]
    assert tuple(asked_for) == get_args(words.Layout)
    assert set(HOLDERS) == {name for name in asked_for if LAYOUTS[name].keeps_factors}
    assert all(layout.name == name for name, layout in LAYOUTS.items())


def test_a_layout_of_ones_own_goes_all_the_way(turned: str, tmp_path: Path) -> None:
    model, out, usual = (tmp_path / f"{name}.safetensors" for name in ("m", "turned", "factored"))
    save_file(
        {"0.weight": weight(96, 64), "0.bias": torch.ones(96), "1.weight": weight(64, 96)}, model
    )
    for path, layout in ((out, turned), (usual, "factored")):
        recipe = svdcli.Recipe("keep", 0.6, layout=layout)  # type: ignore[arg-type]
        svdcli.compress(model, path, recipe)

    # planned, stored, reported and checked as any other
    ours, theirs = svdcli.report(out).layers, svdcli.report(usual).layers
    assert [row.rank for row in ours] == [row.rank for row in theirs]
    for row, other in zip(ours, theirs, strict=True):
        assert row.relative_error == pytest.approx(other.relative_error, rel=1e-4)
    assert {name for name in load_file(out) if name.startswith("1")} == {
        "1.right.weight",
        "1.left.weight",
    }
    assert svdcli.verify(out, model).ok

    # and back, dense or in a module
    dense = load_file(svdcli.expand(out, tmp_path / "dense.safetensors"))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    expected = (x @ dense["0.weight"].T + dense["0.bias"]) @ dense["1.weight"].T
    module = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64, bias=False))
    assert torch.allclose(svdcli.load(out, into=module)(x), expected, atol=1e-5)
    assert isinstance(module[0], TurnedLinear)
