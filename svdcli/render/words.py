"""Numbers, names and shapes as short text."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from svdcli.errors import printable

if TYPE_CHECKING:
    from svdcli.verbs.evaluate import Mean


_BARS = "▁▂▃▄▅▆▇█"


NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole part of a dotted name


# Numbers ------------------------------------------------------------------------------------------


def human(value: float, unit: str = "") -> str:
    """1234567 -> 1.23M; with the unit B, 1.23 MB. Powers of 1000."""
    sign, value = ("-", -value) if value < 0 else ("", value)
    for scale, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale * 0.9995:
            return f"{sign}{value / scale:.3g}{' ' if unit else ''}{letter}{unit}"
    return f"{sign}{value:.0f}{' ' if unit else ''}{unit}"


def duration(seconds: float) -> str:
    """42 s, 7 min, 3.4 h."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def arrow(before: float, after: float, unit: str = "") -> str:
    """2.06 MB → 557 kB; a unit that both share is written once."""
    first, second = human(before, unit), human(after, unit)
    if before == after:
        return first
    same = unit and first.split(" ")[-1] == second.split(" ")[-1]
    return f"{first.split(' ')[0] if same else first} → {second}"


def percent_of(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "0 %"


def short_name(name: str) -> str:
    return printable(name.removesuffix(".weight"))


def shape_text(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def span(values: Sequence[int]) -> str:
    if not values:
        return ""
    return str(values[0]) if min(values) == max(values) else f"{min(values)}-{max(values)}"


def span_of_floats(values: Sequence[float]) -> str:
    if not values:
        return ""
    low, high = f"{min(values):.3f}", f"{max(values):.3f}"
    return low if low == high else f"{low}-{high}"


def common_prefix(names: Sequence[str]) -> str:
    """Leading parts that all names share, with the dot; the last part always stays."""
    split = [name.split(".")[:-1] for name in names]
    if len(split) < 2:
        return ""
    shared = itertools.takewhile(lambda same: len(set(same)) == 1, zip(*split, strict=False))
    return "".join(f"{parts[0]}." for parts in shared)


def left_out_lines(reasons: Mapping[str, str], sizes: Mapping[str, int]) -> list[str]:
    """What does not go along: name, reason, and bytes where it is a file."""
    lines = []
    for name, reason in reasons.items():
        size = f", {human(sizes[name], 'B')}" if sizes.get(name) else ""
        lines.append(f"{name}: {reason}{size}")
    return lines


def read_line(read: Mapping[str, Any]) -> str:
    """What a calibration has read."""
    return (
        f"on {read['tokens']:,} tokens of {printable(read['text'])}: "
        f"{portions(read['samples'], read['tokens'], read['seq_len'])}"
    )


def portions(samples: int, tokens: int, seq_len: int) -> str:
    """32 windows of 2048, or, where they are not full, sentences."""
    if tokens == samples * seq_len:
        return f"{samples:,} window{'' if samples == 1 else 's'} of {seq_len}"
    return f"{samples:,} sentence{'' if samples == 1 else 's'} of at most {seq_len}"


def reasons_line(items: Sequence[tuple[str, str]]) -> list[str]:
    """One line a reason: how many tensors it holds for, and their names where they are few."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in items:
        by_reason.setdefault(reason, []).append(short_name(name))
    lines = []
    for reason, names in by_reason.items():
        patterns = list(dict.fromkeys(NUMBER.sub("*", name) for name in names))
        shown = ", ".join(patterns[:3]) + (
            f" and {len(patterns) - 3} more" if len(patterns) > 3 else ""
        )
        lines.append(f"{len(names)}: {reason} ({shown})")
    return lines


def sparkline(curve: Sequence[float], width: int) -> str:
    """The decay of the singular values from 1 (full block) down."""
    points = [curve[round(i * (len(curve) - 1) / (width - 1))] for i in range(width)]
    return "".join(
        _BARS[min(len(_BARS) - 1, max(0, round(point * (len(_BARS) - 1))))] for point in points
    )


def plus_minus(mean: Mean) -> str:
    digits = 2 if mean.value >= 100 else 4 if mean.value < 10 else 3
    return f"{mean.value:.{digits}f}" + (
        "" if mean.error is None else f" ± {mean.error:.{digits}f}"
    )


def quantity(value: float, unit: str) -> str:
    return human(value, "B") if unit == "B" else f"{value:.2f} s" if unit == "s" else f"{value:.4g}"
