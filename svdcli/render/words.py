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
    sign = "-" if value < 0 else ""
    blank = " " if unit else ""
    size = abs(value)
    for scale, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        # What three digits would round up to 1000 goes to the next letter
        if size >= scale * 0.9995:
            return f"{sign}{size / scale:.3g}{blank}{letter}{unit}"
    return f"{sign}{size:.0f}{blank}{unit}"


def duration(seconds: float) -> str:
    """42 s, 7 min, 3.4 h."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def arrow(before: float, after: float, unit: str = "") -> str:
    """2.06 MB → 557 kB; a unit that both share is written once."""
    first, second = human(before, unit), human(after, unit)
    if before == after:
        return first
    if unit and first.split(" ")[-1] == second.split(" ")[-1]:
        first = first.split(" ")[0]
    return f"{first} → {second}"


def percent_of(part: float, total: float) -> str:
    return f"{100 * part / total:.1f} %" if total else "0 %"


def short_name(name: str) -> str:
    """A tensor's name without what nearly all end in, and safe on a terminal."""
    return printable(name.removesuffix(".weight"))


def joint_name(names: Sequence[str]) -> str:
    """Names of several tensors as a shell would write them: self_attn.{q,k,v}_proj."""
    short = [short_name(name) for name in names]
    start = _beginning(short)
    start = start[: start.rfind(".") + 1]  # whole words
    rests = [name.removeprefix(start) for name in short]
    end = _beginning([rest[::-1] for rest in rests])[::-1]
    _, underscore, last = end.partition("_")
    end = underscore + last
    differing = ",".join(rest.removesuffix(end) for rest in rests)
    return f"{start}{{{differing}}}{end}"


def _beginning(texts: Sequence[str]) -> str:
    """The letters with which all of them begin."""
    same = itertools.takewhile(lambda letters: len({*letters}) == 1, zip(*texts, strict=False))
    return "".join(letters[0] for letters in same)


def shape_text(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def span(values: Sequence[int]) -> str:
    """37-106, or one number where all are equal."""
    if not values:
        return ""
    return str(values[0]) if min(values) == max(values) else f"{min(values)}-{max(values)}"


def span_of_floats(values: Sequence[float]) -> str:
    """The same, with three digits each."""
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
        # Names that differ by a block's number only count as one
        patterns = list(dict.fromkeys(NUMBER.sub("*", name) for name in names))
        shown = ", ".join(patterns[:3])
        if len(patterns) > 3:
            shown += f" and {len(patterns) - 3} more"
        lines.append(f"{len(names)}: {reason} ({shown})")
    return lines


def sparkline(curve: Sequence[float], width: int) -> str:
    """The decay of the singular values from 1 (full block) down."""
    highest = len(_BARS) - 1
    bars = []
    for i in range(width):
        value = curve[round(i * (len(curve) - 1) / (width - 1))]
        height = round(value * highest)
        bars.append(_BARS[min(highest, max(0, height))])
    return "".join(bars)


def plus_minus(mean: Mean) -> str:
    """A mean with its standard error, both with about five digits of the mean."""
    digits = 3
    if mean.value >= 100:
        digits = 2
    elif mean.value < 10:
        digits = 4
    text = f"{mean.value:.{digits}f}"
    if mean.error is not None:
        text += f" ± {mean.error:.{digits}f}"
    return text


def quantity(value: float, unit: str) -> str:
    """Bytes as 1.23 MB, seconds as 0.42 s, anything else as a number of four digits."""
    if unit == "B":
        return human(value, "B")
    if unit == "s":
        return f"{value:.2f} s"
    return f"{value:.4g}"
