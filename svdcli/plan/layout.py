"""How the factors of one layer are stored: names, shapes, parameters and bytes of each layout.

For a stored weight `P.weight` of shape (m, n) at rank r:

    factored   P.svd_up.weight (m, r), P.svd_down.weight (r, n)
               W ~ up @ down
    pivoted    P.svd_down.weight (r, n), P.svd_up.weight (m - r, r), P.svd_rows (m,)
               W ~ cat(down, up @ down)[rows]
    dense      P.weight (m, n), of rank r
               W ~ the low-rank matrix itself
"""

from __future__ import annotations

from svdcli.plan.tensors import TensorInfo, module_of

UP, DOWN, ROWS, WEIGHT = "svd_up.weight", "svd_down.weight", "svd_rows", "weight"


def stored_name(name: str, part: str) -> str:
    """The name under which one part of the layer `name` is stored."""
    module = module_of(name)
    return part if module == name else f"{module}.{part}"


def stored_tensors(layer: TensorInfo, rank: int, layout: str, dtype: str) -> tuple[TensorInfo, ...]:
    """The tensors that stand for `layer` at `rank`, in the order in which they are written."""
    m, n = layer.shape
    shapes: dict[str, tuple[str, tuple[int, ...]]]
    if layout == "factored":
        shapes = {UP: (dtype, (m, rank)), DOWN: (dtype, (rank, n))}
    elif layout == "pivoted":
        shapes = {DOWN: (dtype, (rank, n)), UP: (dtype, (m - rank, rank)), ROWS: ("I32", (m,))}
    else:
        shapes = {WEIGHT: (dtype, (m, n))}
    return tuple(TensorInfo(stored_name(layer.name, part), *spec) for part, spec in shapes.items())


def stored_parameters(shape: tuple[int, ...], rank: int, layout: str) -> int:
    """Parameters at `rank`; row numbers of the pivoted layout are counted in bytes, not as
    parameters.

    A low-rank matrix in the dense layout is counted as its factors would be: ranks are chosen by
    what they could save.
    """
    m, n = shape
    return rank * (m + n - rank) if layout == "pivoted" else rank * (m + n)


def stored_bytes(layer: TensorInfo, rank: int, layout: str, dtype: str) -> int:
    """Bytes of the stored tensors at `rank`. The dense layout is weighed as the factored one (see
    above)."""
    weighed = "factored" if layout == "dense" else layout
    return sum(tensor.nbytes for tensor in stored_tensors(layer, rank, weighed, dtype))


def largest_saving_rank(layer: TensorInfo, layout: str, dtype: str) -> int:
    """The largest rank whose stored bytes and parameters are both below the dense weight's; 0 if
    there is none."""
    low, high = 0, min(layer.shape) - (1 if layout == "pivoted" else 0)
    while low < high:
        rank = (low + high + 1) // 2
        saves = stored_bytes(layer, rank, layout, dtype) < layer.nbytes
        if saves and stored_parameters(layer.shape, rank, layout) < layer.parameters:
            low = rank
        else:
            high = rank - 1
    return low
