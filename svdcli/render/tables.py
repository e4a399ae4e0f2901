"""Values to tables on a terminal or in a pipe."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from svdcli.errors import printable
from svdcli.render.words import (
    NUMBER,
    arrow,
    common_prefix,
    human,
    left_out_lines,
    percent_of,
    plus_minus,
    quantity,
    read_line,
    reasons_line,
    shape_text,
    short_name,
    span,
    span_of_floats,
    sparkline,
)

if TYPE_CHECKING:
    from svdcli.files.report import LayerRow, Report, Total
    from svdcli.verbs.bench import Bench
    from svdcli.verbs.evaluate import Continuation, Evaluation
    from svdcli.verbs.inspect import Inspection, InspectRow
    from svdcli.verbs.spectrum import Spectrum
    from svdcli.verbs.verify import Verification


_PIPE_WIDTH = 160


_WIDE = 120


_NARROW = 72


MANY = 64  # more lines than that, and kinds are shown in place of layers


def console_for(stream: TextIO) -> Console:
    """A console without surprises: no markup in names, no wrapping of lines in pipes beyond a
    generous width."""
    width = None if stream.isatty() or "COLUMNS" in os.environ else _PIPE_WIDTH
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


# report -------------------------------------------------------------------------------------------


def print_report(report: Report, stream: TextIO, *, grouped: bool) -> None:
    """The table of savings, then the totals and what was left out."""
    console = console_for(stream)
    render_report(report, console, grouped=grouped)


def render_report(report: Report, console: Console, *, grouped: bool) -> None:
    wide = console.width >= _WIDE
    groups = (
        _grouped(report.layers)
        if grouped
        else [(short_name(row.name), [row]) for row in report.layers]
    )
    table, prefix = _layer_table([name for name, _ in groups], console)
    titles = [
        "Shape",
        "Rank",
        "Parameters",
        "Memory",
        "Loss" if report.predicted else "Error",
        "Energy",
        "Saved",
        "Solver",
    ]
    shown = (
        titles
        if wide
        else titles[:5]
        if console.width >= _NARROW
        else [titles[1], titles[4], titles[6]]
    )
    for title in shown:
        table.add_column(title, justify="right", no_wrap=True)
    for name, rows in groups:
        cells = dict(zip(titles, _report_cells(rows, wide), strict=True))
        style = "dim" if rows[0].rank is None else ""
        table.add_row(
            _layer_name(name.removeprefix(prefix), rows), *map(cells.get, shown), style=style
        )
    console.print(table)
    _print_totals(report, console, grouped=any(len(rows) > 1 for _, rows in groups))


def _layer_table(names: Sequence[str], console: Console) -> tuple[Table, str]:
    """An empty table with its first column, and the prefix that all names share, told above where
    space is scarce."""
    prefix = "" if console.width >= _WIDE else common_prefix(names)
    if prefix:
        console.print(f"\n{prefix}…", style="dim")
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    longest = max((len(name) - len(prefix) for name in names), default=0)
    table.add_column(
        "Layer", overflow="fold", min_width=min(longest, max(12, console.width * 2 // 5))
    )
    return table, prefix


def _layer_name(name: str, rows: Sequence[object]) -> Text:
    text = Text(name)
    if len(rows) > 1:
        text.append(f" ×{len(rows)}", style="dim")
    return text


def _report_cells(rows: Sequence[LayerRow], wide: bool) -> list[str]:
    errors = [
        e
        for row in rows
        if (e := row.predicted_loss if row.relative_error is None else row.relative_error)
        is not None
    ]
    kept = [row.energy_kept for row in rows if row.energy_kept is not None]
    return [
        shape_text(rows[0].shape),
        span([row.rank for row in rows if row.rank is not None]) or "dense",
        arrow(sum(r.parameters_before for r in rows), sum(r.parameters_after for r in rows)),
        arrow(sum(r.bytes_before for r in rows), sum(r.bytes_after for r in rows), "B"),
        span_of_floats(errors) if wide else f"{sum(errors) / len(errors):.3f}" if errors else "",
        f"{100 * sum(kept) / len(kept):.1f} %" if kept else "",
        percent_of(sum(r.saved_bytes for r in rows), sum(r.bytes_before for r in rows)),
        ", ".join(dict.fromkeys(row.solver + ("*" if row.fell_back else "") for row in rows)),
    ]


def _grouped(rows: Sequence[LayerRow]) -> list[tuple[str, list[LayerRow]]]:
    """Layers that differ by a block's number only, on one line: model.layers.*.mlp.up_proj."""
    groups: dict[tuple[str, bool, tuple[int, ...]], list[LayerRow]] = {}
    for row in rows:
        groups.setdefault(
            (NUMBER.sub("*", short_name(row.name)), row.rank is None, row.shape), []
        ).append(row)
    return [
        (short_name(rows[0].name) if len(rows) == 1 else key[0], rows)
        for key, rows in groups.items()
    ]


def _print_totals(report: Report, console: Console, *, grouped: bool) -> None:
    factored = sum(row.rank is not None for row in report.layers)
    lines = [("lines", "one for each kind of layer; --every-layer for each")] if grouped else []
    lines += [
        ("factored", f"{factored} of {len(report.layers)} selected layers"),
        ("selected", _total_line(report.selected)),
        ("whole output", _total_line(report.total)),
    ]
    errors = [
        (row.relative_error, row.name) for row in report.layers if row.relative_error is not None
    ]
    if errors:
        mean = sum(error for error, _ in errors) / len(errors)
        worst = max(errors)
        lines.append(
            ("relative error", f"mean {mean:.4f}, largest {worst[0]:.4f} ({short_name(worst[1])})")
        )
    if report.calibration is not None:
        lines.append(("calibrated", read_line(report.calibration)))
    lines += _loss_lines(report)
    lines += [
        ("left dense", line)
        for line in reasons_line([(r.name, r.reason) for r in report.layers if r.rank is None])
    ]
    lines += [
        ("fell back", f"{short_name(r.name)}: {', '.join(r.fell_back)}")
        for r in report.layers
        if r.fell_back
    ]
    lines += [
        ("skipped", line)
        for line in reasons_line([(item["name"], item["reason"]) for item in report.skipped])
    ]
    lines += [("left out", line) for line in left_out_lines(report.left_out, report.left_out_bytes)]
    lines += [("note", note) for note in report.notes]
    _print_grid(lines, console)


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
        text = (
            f"relative error of each block, and {whole} of the whole model, on text that "
            f"was not trained on"
        )
        lines.append(("healed", f"on {printable(report.healing['text'])}; {text}"))
        for name, item in blocks.items():
            change = (
                f"{item['before']:.3e} → {item['after']:.3e}"
                if item["after"] < item["before"]
                else "nothing better found"
            )
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
    percent = percent_of(total.saved_bytes, total.bytes_before)
    return (
        f"{arrow(total.parameters_before, total.parameters_after)} parameters, "
        f"{arrow(total.bytes_before, total.bytes_after, 'B')}, saved "
        f"{human(total.saved_bytes, 'B')} ({percent})"
    )


# inspect, spectrum, verify ------------------------------------------------------------------------


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
        cells = [shape_text(row.shape), even, row.dtype, human(sum(r.bytes for r in rows), "B")]
        style = "" if row.selected else "dim"
        table.add_row(
            _layer_name(name.removeprefix(prefix), rows),
            *cells[:shown],
            Text(row.reason or "yes"),
            style=style,
        )
    console.print(table)
    chosen = len(inspection.selected)
    share = percent_of(inspection.selected_parameters, inspection.parameters)
    console.print(
        f"\n{human(inspection.parameters)} parameters, {human(inspection.bytes, 'B')}; {chosen} "
        f"of {len(inspection.tensors)} "
        f"tensors selected, {share} of the parameters"
    )
    if len(groups) < len(inspection.tensors):
        console.print("one line for each kind of tensor; --csv and --json list each")
    if inspection.written_by_svdcli:
        console.print("written by svdcli: see `svdcli report`")
    for line in left_out_lines(inspection.left_out, inspection.left_out_bytes):
        console.print(f"left out: {line}")
    for note in inspection.notes:
        console.print(f"note: {note}")


def _alike(tensors: Sequence[InspectRow]) -> list[tuple[str, list[InspectRow]]]:
    """One group a tensor; where tensors are many, one a kind."""
    if len(tensors) <= MANY:
        return [(short_name(row.name), [row]) for row in tensors]
    groups: dict[tuple[object, ...], list[InspectRow]] = {}
    for row in tensors:
        groups.setdefault(
            (NUMBER.sub("*", short_name(row.name)), row.shape, row.dtype, row.reason), []
        ).append(row)
    return [
        (str(key[0]) if len(rows) > 1 else short_name(rows[0].name), rows)
        for key, rows in groups.items()
    ]


def print_spectrum(spectrum: Spectrum, stream: TextIO) -> None:
    console = console_for(stream)
    wide = console.width >= _WIDE
    table, prefix = _layer_table([short_name(row.name) for row in spectrum.layers], console)
    titles = ["Eff. rank", "90 %", "95 %", "99 %", "Even", "Shape", "Stable rank", "Largest"]
    shown = titles if wide else titles[:6] if console.width >= _NARROW else titles[:1]
    for title in shown:
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("Decay", no_wrap=True)
    for row in spectrum.layers:
        cells = [f"{row.effective_rank:.1f}", str(row.rank_90), str(row.rank_95), str(row.rank_99)]
        cells += [
            str(row.break_even),
            shape_text(row.shape),
            f"{row.stable_rank:.1f}",
            f"{row.sigma_max:.3g}",
        ]
        decay = sparkline(row.curve, 24 if wide else 8)
        table.add_row(Text(short_name(row.name).removeprefix(prefix)), *cells[: len(shown)], decay)
    console.print(table)
    console.print(
        "\nEven: largest rank that saves parameters when factored. 90 %: rank that keeps 90 % of "
        "the energy."
    )


def print_verification(verification: Verification, stream: TextIO) -> None:
    """A line for each kind of check, with what failed; then what is not as it was beside the
    weights."""
    from svdcli.verbs.verify import BESIDE

    console = console_for(stream)
    kinds = list(
        dict.fromkeys(check.check for check in verification.checks if check.check != BESIDE)
    )
    for kind in kinds:
        mine = [check for check in verification.checks if check.check == kind]
        bad = [check for check in mine if not check.ok]
        console.print(
            f"{'FAILED' if bad else 'ok':<6}  {kind}: {len(mine) - len(bad)} of {len(mine)}",
            style="red" if bad else "",
        )
        for check in bad:
            console.print(f"        {printable(check.subject)}: {printable(check.detail)}")
    for check in verification.checks:
        if check.check == BESIDE:
            console.print(f"note    {printable(check.subject)}: {check.detail}")


# eval ---------------------------------------------------------------------------------------------


def print_measured(found: Evaluation, stream: TextIO) -> None:
    """What compress bought, in three lines."""
    console = console_for(stream)
    lines = _drift_lines(found)
    if found.original is not None and found.compressed is not None:
        both = (
            f"{plus_minus(found.original.perplexity)} → {plus_minus(found.compressed.perplexity)}"
        )
        lines.insert(
            0, ("perplexity", f"{both}, {found.tokens:,} tokens that calibration did not read")
        )
    _print_grid(lines, console)


def print_evaluation(found: Evaluation, stream: TextIO) -> None:
    console = console_for(stream)
    if found.text:
        console.print(
            f"{found.text}: {found.tokens} of {found.text_tokens} tokens, computed in "
            f"{found.computed_in}\n"
        )
    if found.compressed is not None:
        table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
        table.add_column("Model", overflow="fold")
        for title in ("Perplexity", "Loss, nats a token", "Bits a byte"):
            table.add_column(title, justify="right", no_wrap=True)
        for scores in filter(None, (found.original, found.compressed)):
            cells = (
                plus_minus(scores.perplexity),
                plus_minus(scores.loss),
                f"{scores.bits_per_byte:.4f}",
            )
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
        lines += [("excess loss", f"{plus_minus(drift.excess_loss)} nats a token")]
        lines += [("KL divergence", f"{plus_minus(drift.kl)} nats a token, from the original")]
        spread = "" if drift.top1.error is None else f" ± {100 * drift.top1.error:.1f}"
        lines += [("same next token", f"{100 * drift.top1.value:.1f}{spread} %")]
    if found.similarity is not None:
        similarity = found.similarity
        lines += [
            (
                "cosine similarity",
                f"mean {similarity.mean:.4f}, 5th percentile {similarity.percentile_5:.4f}",
            )
        ]
        lines += [("", f"minimum {similarity.minimum:.4f}, over {similarity.sentences} sentences")]
    return lines


def _print_continuation(spoken: Continuation, console: Console) -> None:
    console.print(f"\n{printable(spoken.prompt)}", style="bold")
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False, expand=True)
    sides = [("Original", spoken.original), ("Compressed", spoken.compressed)]
    texts = [(title, text) for title, text in sides if text is not None]
    for title, _ in texts:
        table.add_column(title, ratio=1, overflow="fold")
    table.add_row(*(Text("\n".join(map(printable, text.split("\n")))) for _, text in texts))
    console.print(table)


# bench --------------------------------------------------------------------------------------------


def print_bench(found: Bench, stream: TextIO) -> None:
    console = console_for(stream)
    names = {"load": "time to load", "memory": "memory at rest", "files": "weights on disk"}
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    table.add_column("", no_wrap=True)
    for title in ("Original", "Compressed", "Ratio"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("Lowest to highest", overflow="fold")
    for row in found.comparisons:
        name = names.get(row.measure, row.measure) + (
            f", {row.unit}" if row.unit == "tokens/s" else ""
        )
        values = [quantity(value, row.unit) for value in (row.original, row.compressed)]
        spread = (
            ""
            if row.lowest is None or row.highest is None
            else f"{row.lowest:.2f} to {row.highest:.2f}"
        )
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
