"""Values to what a person or a program reads: tables, progress, JSON, CSV. The only file that imports rich."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from svdcli.errors import printable
from svdcli.progress import Progress, silent

if TYPE_CHECKING:
    from svdcli.files.report import LayerRow, Report, Total
    from svdcli.models.evaluate import Continuation, Evaluation, Mean
    from svdcli.models.speed import Bench
    from svdcli.survey import Inspection, InspectRow, Spectrum, Verification

_PIPE_WIDTH = 160
_WIDE = 120
_NARROW = 72
MANY = 64  # more lines than that, and kinds are shown in place of layers
_BARS = "▁▂▃▄▅▆▇█"
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole part of a dotted name


def console_for(stream: TextIO) -> Console:
    """A console without surprises: no markup in names, no wrapping of lines in pipes beyond a generous width."""
    width = None if stream.isatty() or "COLUMNS" in os.environ else _PIPE_WIDTH
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


# Numbers -------------------------------------------------------------------------------------------------------------


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


def _arrow(before: float, after: float, unit: str = "") -> str:
    """2.06 MB → 557 kB; a unit that both share is written once."""
    first, second = human(before, unit), human(after, unit)
    if before == after:
        return first
    same = unit and first.split(" ")[-1] == second.split(" ")[-1]
    return f"{first.split(' ')[0] if same else first} → {second}"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "0 %"


def _short(name: str) -> str:
    return printable(name.removesuffix(".weight"))


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "scalar"


# report --------------------------------------------------------------------------------------------------------------


def print_report(report: Report, stream: TextIO, *, grouped: bool) -> None:
    """The table of savings, then the totals and what was left out."""
    console = console_for(stream)
    render_report(report, console, grouped=grouped)


def render_report(report: Report, console: Console, *, grouped: bool) -> None:
    wide = console.width >= _WIDE
    groups = _grouped(report.layers) if grouped else [(_short(row.name), [row]) for row in report.layers]
    table, prefix = _layer_table([name for name, _ in groups], console)
    titles = ["Shape", "Rank", "Parameters", "Memory", "Loss" if report.predicted else "Error", "Energy", "Saved", "Solver"]
    shown = titles if wide else titles[:5] if console.width >= _NARROW else [titles[1], titles[4], titles[6]]
    for title in shown:
        table.add_column(title, justify="right", no_wrap=True)
    for name, rows in groups:
        cells = dict(zip(titles, _report_cells(rows, wide), strict=True))
        style = "dim" if rows[0].rank is None else ""
        table.add_row(_layer_name(name.removeprefix(prefix), rows), *map(cells.get, shown), style=style)
    console.print(table)
    _print_totals(report, console, grouped=any(len(rows) > 1 for _, rows in groups))


def _layer_table(names: Sequence[str], console: Console) -> tuple[Table, str]:
    """An empty table with its first column, and the prefix that all names share, told above where space is scarce."""
    prefix = "" if console.width >= _WIDE else _common_prefix(names)
    if prefix:
        console.print(f"\n{prefix}…", style="dim")
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    longest = max((len(name) - len(prefix) for name in names), default=0)
    table.add_column("Layer", overflow="fold", min_width=min(longest, max(12, console.width * 2 // 5)))
    return table, prefix


def _layer_name(name: str, rows: Sequence[object]) -> Text:
    text = Text(name)
    if len(rows) > 1:
        text.append(f" ×{len(rows)}", style="dim")
    return text


def _report_cells(rows: Sequence[LayerRow], wide: bool) -> list[str]:
    errors = [e for row in rows if (e := row.predicted_loss if row.relative_error is None else row.relative_error) is not None]
    kept = [row.energy_kept for row in rows if row.energy_kept is not None]
    return [
        _shape(rows[0].shape),
        _span([row.rank for row in rows if row.rank is not None]) or "dense",
        _arrow(sum(r.parameters_before for r in rows), sum(r.parameters_after for r in rows)),
        _arrow(sum(r.bytes_before for r in rows), sum(r.bytes_after for r in rows), "B"),
        _span_of_floats(errors) if wide else f"{sum(errors) / len(errors):.3f}" if errors else "",
        f"{100 * sum(kept) / len(kept):.1f} %" if kept else "",
        _percent(sum(r.saved_bytes for r in rows), sum(r.bytes_before for r in rows)),
        ", ".join(dict.fromkeys(row.solver + ("*" if row.fell_back else "") for row in rows)),
    ]


def _span(values: Sequence[int]) -> str:
    if not values:
        return ""
    return str(values[0]) if min(values) == max(values) else f"{min(values)}-{max(values)}"


def _span_of_floats(values: Sequence[float]) -> str:
    if not values:
        return ""
    low, high = f"{min(values):.3f}", f"{max(values):.3f}"
    return low if low == high else f"{low}-{high}"


def _grouped(rows: Sequence[LayerRow]) -> list[tuple[str, list[LayerRow]]]:
    """Layers that differ by a block's number only, on one line: model.layers.*.mlp.up_proj."""
    groups: dict[tuple[str, bool, tuple[int, ...]], list[LayerRow]] = {}
    for row in rows:
        groups.setdefault((_NUMBER.sub("*", _short(row.name)), row.rank is None, row.shape), []).append(row)
    return [(_short(rows[0].name) if len(rows) == 1 else key[0], rows) for key, rows in groups.items()]


def _common_prefix(names: Sequence[str]) -> str:
    """Leading parts that all names share, with the dot; the last part always stays."""
    split = [name.split(".")[:-1] for name in names]
    if len(split) < 2:
        return ""
    shared = itertools.takewhile(lambda same: len(set(same)) == 1, zip(*split, strict=False))
    return "".join(f"{parts[0]}." for parts in shared)


def _print_totals(report: Report, console: Console, *, grouped: bool) -> None:
    factored = sum(row.rank is not None for row in report.layers)
    lines = [("lines", "one for each kind of layer; --every-layer for each")] if grouped else []
    lines += [
        ("factored", f"{factored} of {len(report.layers)} selected layers"),
        ("selected", _total_line(report.selected)),
        ("whole output", _total_line(report.total)),
    ]
    errors = [(row.relative_error, row.name) for row in report.layers if row.relative_error is not None]
    if errors:
        mean = sum(error for error, _ in errors) / len(errors)
        worst = max(errors)
        lines.append(("relative error", f"mean {mean:.4f}, largest {worst[0]:.4f} ({_short(worst[1])})"))
    if report.calibration is not None:
        lines.append(("calibrated", _read_line(report.calibration)))
    lines += _loss_lines(report)
    lines += [("left dense", line) for line in _reasons([(r.name, r.reason) for r in report.layers if r.rank is None])]
    lines += [("fell back", f"{_short(r.name)}: {', '.join(r.fell_back)}") for r in report.layers if r.fell_back]
    lines += [("skipped", line) for line in _reasons([(item["name"], item["reason"]) for item in report.skipped])]
    lines += [("left out", line) for line in _left_out(report.left_out, report.left_out_bytes)]
    lines += [("note", note) for note in report.notes]
    _print_grid(lines, console)


def _left_out(reasons: Mapping[str, str], sizes: Mapping[str, int]) -> list[str]:
    """What does not go along: name, reason, and bytes where it is a file."""
    lines = []
    for name, reason in reasons.items():
        size = f", {human(sizes[name], 'B')}" if sizes.get(name) else ""
        lines.append(f"{name}: {reason}{size}")
    return lines


def _read_line(read: Mapping[str, Any]) -> str:
    """What a calibration has read."""
    return (
        f"on {read['tokens']:,} tokens of {printable(read['text'])}: {portions(read['samples'], read['tokens'], read['seq_len'])}"
    )


def portions(samples: int, tokens: int, seq_len: int) -> str:
    """32 windows of 2048, or, where they are not full, sentences."""
    if tokens == samples * seq_len:
        return f"{samples:,} window{'' if samples == 1 else 's'} of {seq_len}"
    return f"{samples:,} sentence{'' if samples == 1 else 's'} of at most {seq_len}"


def _loss_lines(report: Report) -> list[tuple[str, str]]:
    """What the layers' losses make of the model's, and what healing did to its blocks."""
    lines = []
    if report.predicted_loss is not None:
        unit = "nats a token" if report.loss_unit == "nats" else report.loss_unit
        text = f"{report.predicted_loss:.4g} {unit}, summed over the layers"
        if report.expected_loss is not None:
            summed = f"{report.predicted_loss:.2g} summed over the layers"
            text = f"{report.expected_loss:.2g} {unit} of divergence from the original ({summed})"
        lines.append(("expected loss", text))
    if report.healing is not None:
        blocks, hard = report.healing["blocks"], report.healing["hard_labels"]
        whole = f"{1 - hard:g} × divergence + {hard:g} × excess loss" if hard else "divergence"
        text = f"relative error of each block, and {whole} of the whole model, on text that was not trained on"
        lines.append(("healed", f"on {printable(report.healing['text'])}; {text}"))
        for name, item in blocks.items():
            change = f"{item['before']:.3e} → {item['after']:.3e}" if item["after"] < item["before"] else "nothing better found"
            lines.append(("", f"{printable(name)}: {change}, {item['steps']} steps"))
    return lines


def _print_grid(lines: Sequence[tuple[str, str]], console: Console) -> None:
    """Titles and what belongs to them; a title that repeats is printed once."""
    if not lines:
        return
    console.print()
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    last = ""
    for title, text in lines:
        grid.add_row(title if title != last else "", Text(text))
        last = title
    console.print(grid)


def _total_line(total: Total) -> str:
    percent = _percent(total.saved_bytes, total.bytes_before)
    return (
        f"{_arrow(total.parameters_before, total.parameters_after)} parameters, "
        f"{_arrow(total.bytes_before, total.bytes_after, 'B')}, saved {human(total.saved_bytes, 'B')} ({percent})"
    )


def _reasons(items: Sequence[tuple[str, str]]) -> list[str]:
    """One line a reason: how many tensors it holds for, and their names where they are few."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in items:
        by_reason.setdefault(reason, []).append(_short(name))
    lines = []
    for reason, names in by_reason.items():
        patterns = list(dict.fromkeys(_NUMBER.sub("*", name) for name in names))
        shown = ", ".join(patterns[:3]) + (f" and {len(patterns) - 3} more" if len(patterns) > 3 else "")
        lines.append(f"{len(names)}: {reason} ({shown})")
    return lines


# inspect, spectrum, verify --------------------------------------------------------------------------------------------


def print_inspection(inspection: Inspection, stream: TextIO) -> None:
    console = console_for(stream)
    groups = _alike(inspection.tensors)
    table, prefix = _layer_table([name for name, _ in groups], console)
    titles = ["Shape", "Break-even rank" if console.width >= _WIDE else "Even", "Dtype", "Memory"]
    shown = len(titles) if console.width >= _WIDE else 3 if console.width >= _NARROW else 1
    for title in titles[:shown]:
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("Selected", overflow="fold", max_width=None if console.width >= _WIDE else 18)
    for name, rows in groups:
        row = rows[0]
        even = "" if row.break_even is None else str(row.break_even)
        if even and console.width >= _WIDE:
            even += f"  ({row.pivoted_break_even} pivoted)"
        cells = [_shape(row.shape), even, row.dtype, human(sum(r.bytes for r in rows), "B")]
        style = "" if row.selected else "dim"
        table.add_row(_layer_name(name.removeprefix(prefix), rows), *cells[:shown], Text(row.reason or "yes"), style=style)
    console.print(table)
    chosen = len(inspection.selected)
    share = _percent(inspection.selected_parameters, inspection.parameters)
    console.print(
        f"\n{human(inspection.parameters)} parameters, {human(inspection.bytes, 'B')}; {chosen} of {len(inspection.tensors)} "
        f"tensors selected, {share} of the parameters"
    )
    if len(groups) < len(inspection.tensors):
        console.print("one line for each kind of tensor; --csv and --json list each")
    if inspection.written_by_svdcli:
        console.print("written by svdcli: see `svdcli report`")
    for line in _left_out(inspection.left_out, inspection.left_out_bytes):
        console.print(f"left out: {line}")
    for note in inspection.notes:
        console.print(f"note: {note}")


def _alike(tensors: Sequence[InspectRow]) -> list[tuple[str, list[InspectRow]]]:
    """One group a tensor; where tensors are many, one a kind."""
    if len(tensors) <= MANY:
        return [(_short(row.name), [row]) for row in tensors]
    groups: dict[tuple[object, ...], list[InspectRow]] = {}
    for row in tensors:
        groups.setdefault((_NUMBER.sub("*", _short(row.name)), row.shape, row.dtype, row.reason), []).append(row)
    return [(str(key[0]) if len(rows) > 1 else _short(rows[0].name), rows) for key, rows in groups.items()]


def sparkline(curve: Sequence[float], width: int) -> str:
    """The decay of the singular values from 1 (full block) down."""
    points = [curve[round(i * (len(curve) - 1) / (width - 1))] for i in range(width)]
    return "".join(_BARS[min(len(_BARS) - 1, max(0, round(point * (len(_BARS) - 1))))] for point in points)


def print_spectrum(spectrum: Spectrum, stream: TextIO) -> None:
    console = console_for(stream)
    wide = console.width >= _WIDE
    table, prefix = _layer_table([_short(row.name) for row in spectrum.layers], console)
    titles = ["Eff. rank", "90 %", "95 %", "99 %", "Even", "Shape", "Stable rank", "Largest"]
    shown = titles if wide else titles[:6] if console.width >= _NARROW else titles[:1]
    for title in shown:
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("Decay", no_wrap=True)
    for row in spectrum.layers:
        cells = [f"{row.effective_rank:.1f}", str(row.rank_90), str(row.rank_95), str(row.rank_99)]
        cells += [str(row.break_even), _shape(row.shape), f"{row.stable_rank:.1f}", f"{row.sigma_max:.3g}"]
        decay = sparkline(row.curve, 24 if wide else 8)
        table.add_row(Text(_short(row.name).removeprefix(prefix)), *cells[: len(shown)], decay)
    console.print(table)
    console.print("\nEven: largest rank that saves parameters when factored. 90 %: rank that keeps 90 % of the energy.")


def print_verification(verification: Verification, stream: TextIO) -> None:
    """A line for each kind of check, with what failed; then what is not as it was beside the weights."""
    from svdcli.survey import BESIDE

    console = console_for(stream)
    kinds = list(dict.fromkeys(check.check for check in verification.checks if check.check != BESIDE))
    for kind in kinds:
        mine = [check for check in verification.checks if check.check == kind]
        bad = [check for check in mine if not check.ok]
        console.print(
            f"{'FAILED' if bad else 'ok':<6}  {kind}: {len(mine) - len(bad)} of {len(mine)}", style="red" if bad else ""
        )
        for check in bad:
            console.print(f"        {printable(check.subject)}: {printable(check.detail)}")
    for check in verification.checks:
        if check.check == BESIDE:
            console.print(f"note    {printable(check.subject)}: {check.detail}")


# eval ----------------------------------------------------------------------------------------------------------------


def print_measured(found: Evaluation, stream: TextIO) -> None:
    """What compress bought, in three lines."""
    console = console_for(stream)
    lines = _drift_lines(found)
    if found.original is not None and found.compressed is not None:
        both = f"{_plus_minus(found.original.perplexity)} → {_plus_minus(found.compressed.perplexity)}"
        lines.insert(0, ("perplexity", f"{both}, {found.tokens:,} tokens that calibration did not read"))
    _print_grid(lines, console)


def print_evaluation(found: Evaluation, stream: TextIO) -> None:
    console = console_for(stream)
    if found.text:
        console.print(f"{found.text}: {found.tokens} of {found.text_tokens} tokens, computed in {found.computed_in}\n")
    if found.compressed is not None:
        table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
        table.add_column("Model", overflow="fold")
        for title in ("Perplexity", "Loss, nats a token", "Bits a byte"):
            table.add_column(title, justify="right", no_wrap=True)
        for scores in filter(None, (found.original, found.compressed)):
            cells = (_plus_minus(scores.perplexity), _plus_minus(scores.loss), f"{scores.bits_per_byte:.4f}")
            table.add_row(Text(printable(scores.path)), *cells)
        console.print(table)
    lines = _drift_lines(found)
    _print_grid(lines, console)
    for spoken in found.continuations:
        _print_continuation(spoken, console)


def _drift_lines(found: Evaluation) -> list[tuple[str, str]]:
    lines = []
    if found.drift is not None:
        drift = found.drift
        lines += [("excess loss", f"{_plus_minus(drift.excess_loss)} nats a token")]
        lines += [("KL divergence", f"{_plus_minus(drift.kl)} nats a token, from the original")]
        spread = "" if drift.top1.error is None else f" ± {100 * drift.top1.error:.1f}"
        lines += [("same next token", f"{100 * drift.top1.value:.1f}{spread} %")]
    if found.similarity is not None:
        similarity = found.similarity
        lines += [("cosine similarity", f"mean {similarity.mean:.4f}, 5th percentile {similarity.percentile_5:.4f}")]
        lines += [("", f"minimum {similarity.minimum:.4f}, over {similarity.sentences} sentences")]
    return lines


def _plus_minus(mean: Mean) -> str:
    digits = 2 if mean.value >= 100 else 4 if mean.value < 10 else 3
    return f"{mean.value:.{digits}f}" + ("" if mean.error is None else f" ± {mean.error:.{digits}f}")


def _print_continuation(spoken: Continuation, console: Console) -> None:
    console.print(f"\n{printable(spoken.prompt)}", style="bold")
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False, expand=True)
    sides = [("Original", spoken.original), ("Compressed", spoken.compressed)]
    texts = [(title, text) for title, text in sides if text is not None]
    for title, _ in texts:
        table.add_column(title, ratio=1, overflow="fold")
    table.add_row(*(Text("\n".join(map(printable, text.split("\n")))) for _, text in texts))
    console.print(table)


# bench ---------------------------------------------------------------------------------------------------------------


def print_bench(found: Bench, stream: TextIO) -> None:
    console = console_for(stream)
    names = {"load": "time to load", "memory": "memory at rest", "files": "weights on disk"}
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    table.add_column("", no_wrap=True)
    for title in ("Original", "Compressed", "Ratio"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("Lowest to highest", overflow="fold")
    for row in found.measures:
        name = names.get(row.measure, row.measure) + (f", {row.unit}" if row.unit == "tokens/s" else "")
        values = [_measured(value, row.unit) for value in (row.original, row.compressed)]
        spread = "" if row.lowest is None or row.highest is None else f"{row.lowest:.2f} to {row.highest:.2f}"
        table.add_row(name, *values, "" if row.ratio is None else f"{row.ratio:.2f}", spread)
    console.print(table)
    plural = "" if found.threads == 1 else "s"
    size = f"{found.batch} × " if found.batch > 1 else ""
    new = "" if found.original.decode is None else f", {found.new_tokens} new ones"
    lines = [
        ("original", printable(found.against)),
        ("compressed", printable(found.path)),
        ("dtype", " and ".join(dict.fromkeys((found.original.dtype, found.compressed.dtype)))),
        ("device", f"{found.device}, {found.threads} thread{plural}"),
        ("work", f"prompts of {size}{found.prompt_tokens} tokens{new}"),
        ("rounds", f"{found.rounds}, by turns, each model in a process of its own"),
    ]
    _print_grid(lines, console)


def _measured(value: float, unit: str) -> str:
    return human(value, "B") if unit == "B" else f"{value:.2f} s" if unit == "s" else f"{value:.4g}"


# Machines ------------------------------------------------------------------------------------------------------------


def print_json(data: Mapping[str, Any], stream: TextIO) -> None:
    stream.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def print_csv(rows: Sequence[Mapping[str, Any]], stream: TextIO) -> None:
    """One line a row; lists are joined by spaces, shapes by x."""
    text = io.StringIO()
    if rows:
        import csv

        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: _flat(key, value) for key, value in row.items()})
    stream.write(text.getvalue())


def _flat(key: str, value: object) -> object:
    if isinstance(value, (tuple, list)):
        return ("x" if key == "shape" else " ").join(map(str, value))
    return "" if value is None else value


@contextmanager
def progress_on(stream: TextIO, *, quiet: bool) -> Iterator[Progress]:
    """Bars with the time left on a terminal; nothing anywhere else."""
    if quiet or not stream.isatty():
        yield silent
        return
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    console = console_for(stream)
    room = console.width - 64  # what the bar and the times leave for a name
    columns = (
        TextColumn("{task.description:<8}", markup=False),
        *([BarColumn(bar_width=24)] if room >= 0 else []),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        *([TextColumn("{task.fields[name]}", markup=False)] if room >= 8 else []),
    )
    with Bars(*columns, console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def step(phase: str, name: str, done: float, total: float) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total, name="")
            bars.update(tasks[phase], completed=done, total=total, name=_short(name)[-min(40, max(1, room)) :])

        yield step


def print_lines(lines: Sequence[str], stream: TextIO) -> None:
    shown = map(printable, lines) if stream.isatty() else lines
    stream.writelines(line + "\n" for line in shown)
