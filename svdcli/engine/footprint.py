"""How much memory the mathematics of one layer takes: about, and rather more."""

from __future__ import annotations

from collections.abc import Sequence

# Copies of a weight that are there at once, besides the stored one: in float32 of a plain layer, in
# float64 in the metric of a calibration.
_PLAIN_COPIES, _WEIGHTED_COPIES = 4, 3

# Matrices on the short side of a layer: one to decompose, its eigenvectors, what LAPACK works in.
_SHORT = 3


def bytes_to_solve(shapes: Sequence[tuple[int, ...]], metric: str, *, rounding: bool) -> int:
    """Return the bytes that a layer takes at its most, or a group of them one below the other, each
    of which is (out, in). metric is what its calibration measured, "" without one; rounding says
    that its numbers are rounded, or looked at for that."""
    heights = [shape[0] for shape in shapes]
    m, n = sum(heights), shapes[0][1]
    numbers, short = m * n, min(m, n) ** 2
    if not metric:
        return 4 * (_PLAIN_COPIES * numbers + _SHORT * short)

    # G as stored and in float64; its root, and once more on the way there
    inputs = (4 + 8 + 16 * rounding) * n * n
    # every H as stored, and all roots or one that is being rounded with
    outputs = 0
    if metric == "full":
        squares = [height**2 for height in heights]
        outputs = 4 * sum(squares) + max(8 * sum(squares), 16 * max(squares))
    return 8 * (_WEIGHTED_COPIES * numbers + _SHORT * short) + inputs + outputs
