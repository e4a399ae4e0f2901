"""How names and columns give way where a terminal is narrow."""

from __future__ import annotations

import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from svdcli.render.layers import Line, break_at_dots, fitting, print_layers


@pytest.mark.parametrize(
    ("name", "width", "lines"),
    [
        ("layers.0.mlp.up_proj", 20, ["layers.0.mlp.up_proj"]),
        ("layers.0.mlp.up_proj", 16, ["layers.0.mlp.", "up_proj"]),
        ("layers.0.mlp.up_proj", 9, ["layers.0.", "mlp.", "up_proj"]),
        ("a.post_attention_layernorm", 9, ["a.", "post…norm"]),
        ("", 5, [""]),
        ("weight", 1, ["…t"]),
    ],
)
def test_names_break_at_their_dots(name: str, width: int, lines: list[str]) -> None:
    assert break_at_dots(name, width).split("\n") == lines


def test_letters_of_two_cells_count_twice() -> None:
    broken = break_at_dots("层的权重矩阵.层的权重矩阵", 9).split("\n")
    assert all(cell_len(line) <= 9 for line in broken)
    assert broken[0].startswith("层")
    assert broken[0].endswith("阵.")


def test_columns_go_in_the_order_that_is_given() -> None:
    widths = {"Shape": 7, "Rank": 4, "Error": 5}
    order = ("Shape", "Error")
    assert fitting(widths, 25, order) == ["Shape", "Rank", "Error"]
    assert fitting(widths, 24, order) == ["Rank", "Error"]
    assert fitting(widths, 14, order) == ["Rank"]
    assert fitting(widths, 0, order) == ["Rank"]


@pytest.mark.parametrize("width", range(60, 131, 5))
def test_no_cell_is_cut(width: int) -> None:
    """Columns go whole, and a note names them, at every width."""
    cells = {
        "Shape": "11008×4096",
        "Rank": "whole, 8 bits",
        "Parameters": "45.1M → 11.3M",
        "Memory": "90.2 MB → 45.3 MB",
        "Error": "0.123-0.456",
        "Saved": "49.8 %",
    }
    lines = [Line("model.layers.*.self_attn.down_proj", 32, cells), Line("head", 1, cells)]
    text = io.StringIO()
    console = Console(file=text, width=width, highlight=False, markup=False, emoji=False)
    print_layers(lines, list(cells), console, first_out=("Shape", "Saved", "Error", "Parameters"))
    printed = text.getvalue()
    for title, cell in cells.items():
        is_named = title in printed.partition("no room for")[2]
        assert printed.count(cell) == (0 if is_named else 2), title
    assert all(cell_len(line) <= width for line in printed.splitlines())
