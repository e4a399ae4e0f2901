"""Values to tables on a terminal or in a pipe."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from svdcli.errors import printable
from svdcli.plan.layouts import DENSE, WHOLE
from svdcli.render.layers import (
    NARROW,
    WIDE,
    LastColumn,
    Line,
    fitting,
    grouped_rows,
    label_of,
    new_table,
    print_layers,
    print_left_out,
)
from svdcli.render.words import (
    arrow,
    duration,
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
    from svdcli.engine.costs import Estimate
    from svdcli.files.report import LayerRow, Report, Total
    from svdcli.verbs.bench import Bench, Comparison
    from svdcli.verbs.evaluate import Continuation, Evaluation
    from svdcli.verbs.inspect import Inspection, InspectRow
    from svdcli.verbs.spectrum import Spectrum
    from svdcli.verbs.verify import Check, Verification


_PIPE_WIDTH = 160
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
    """The same on a console that is there already."""
    # Layers that became the same, on one line
    if grouped:
        groups = grouped_rows(report.layers, lambda row: (row.rank is None, row.shape))
    else:
        groups = [(label_of(row), [row]) for row in report.layers]

    # As many columns as there is room for; a dry run has predicted losses in place of errors
    error = "Loss" if report.predicted else "Error"
    if console.width >= WIDE:
        titles = ["Shape", "Rank", "Parameters", "Memory", error, "Energy", "Saved", "Solver"]
    elif console.width >= NARROW:
        titles = ["Shape", "Rank", "Parameters", "Memory", error]
    else:
        titles = ["Shape", "Rank", error, "Saved"]

    lines = []
    for name, rows in groups:
        cells = _report_cells(rows, error, spans=console.width >= WIDE)
        style = "dim" if rows[0].rank is None else ""
        lines.append(Line(name, len(rows), cells, style))
    print_layers(lines, titles, console, first_out=("Shape", "Saved", error))
    has_groups = any(line.count > 1 for line in lines)
    _print_grid(_total_lines(report, has_groups=has_groups), console)


def _report_cells(rows: Sequence[LayerRow], error: str, *, spans: bool) -> dict[str, str]:
    """{title: cell} of rows that share a line; errors as their mean, or as lowest to highest."""
    errors, energies, solvers = [], [], []
    for row in rows:
        # Before a run there is no error, and at most a loss that is predicted
        value = row.relative_error
        if value is None:
            value = row.predicted_loss
        if value is not None:
            errors.append(value)
        if row.energy_kept is not None:
            energies.append(row.energy_kept)
        # A star for a solver that others gave way to
        fallen = "*" if row.fell_back else ""
        solvers.append(f"{row.solver}{fallen}")
    shown_errors = ""
    if errors and spans:
        shown_errors = span_of_floats(errors)
    elif errors:
        shown_errors = f"{sum(errors) / len(errors):.3f}"
    energy = f"{100 * sum(energies) / len(energies):.1f} %" if energies else ""

    parameters_before = sum(row.parameters_before for row in rows)
    parameters_after = sum(row.parameters_after for row in rows)
    bytes_before = sum(row.bytes_before for row in rows)
    bytes_after = sum(row.bytes_after for row in rows)
    return {
        "Shape": shape_text(rows[0].shape),
        "Rank": _ranks(rows),
        "Parameters": arrow(parameters_before, parameters_after),
        "Memory": arrow(bytes_before, bytes_after, "B"),
        error: shown_errors,
        "Energy": energy,
        "Saved": percent_of(sum(row.saved_bytes for row in rows), bytes_before),
        "Solver": ", ".join(dict.fromkeys(solvers)),
    }


def _ranks(rows: Sequence[LayerRow]) -> str:
    """The ranks of the factored rows and the bits of the packed ones; `whole` for a matrix that is
    packed as it is."""
    whole = [row.layout == WHOLE or (row.layout == DENSE and row.bits < 16) for row in rows]
    factored = [row for row, is_whole in zip(rows, whole, strict=True) if not is_whole]
    ranks = span([row.rank for row in factored if row.rank is not None])
    shown = [ranks] if ranks else []
    if any(whole):
        shown.append(WHOLE)
    packed = sorted({row.bits for row in rows if row.bits < 16}, reverse=True)
    if packed:
        shown.append(f"{'/'.join(map(str, packed))} bits")
    return ", ".join(shown) or "dense"


def _total_lines(report: Report, *, has_groups: bool) -> list[tuple[str, str]]:
    """Totals, then what the layers lost, then what was left out or needs a word."""
    # What was saved
    lines = []
    if has_groups:
        lines.append(("lines", "one for each kind of layer; --every-layer for each"))
    selected = [row for row in report.layers if not row.role]
    factored = sum(row.layers for row in selected if row.rank is not None)
    lines.append(
        ("factored", f"{factored} of {sum(row.layers for row in selected)} selected layers")
    )
    sharing = [row.layers for row in selected if row.members]
    if sharing:
        groups = "1 group" if len(sharing) == 1 else f"{len(sharing)} groups"
        lines.append(("shared", f"{sum(sharing)} of these have a basis with others, in {groups}"))
    lines.append(("selected", _total_line(report.selected)))
    if report.embeddings is not None:
        lines.append(("embeddings", _total_line(report.embeddings)))
    lines += [
        ("whole output", _total_line(report.total)),
    ]

    # What it cost
    lines += _error_lines(report)
    if report.calibration is not None:
        lines.append(("calibrated", read_line(report.calibration)))
    lines += _loss_lines(report)
    if report.healing is not None:
        lines += _healing_lines(report.healing)

    # What is not as one may expect
    dense = [(row.name, row.reason) for row in report.layers if row.rank is None]
    skipped = [(skip["name"], skip["reason"]) for skip in report.skipped]
    lines += [("left dense", line) for line in reasons_line(dense)]
    for row in report.layers:
        if row.fell_back:
            lines.append(("fell back", f"{label_of(row)}: {', '.join(row.fell_back)}"))
    lines += [("skipped", line) for line in reasons_line(skipped)]
    lines += [("left out", line) for line in left_out_lines(report.left_out, report.left_out_bytes)]
    lines += [("note", note) for note in report.notes]
    return lines


def _error_lines(report: Report) -> list[tuple[str, str]]:
    """Mean and largest of the layers' errors, where there are any, and the part of rounding."""
    errors = {}
    for row in report.layers:
        if row.relative_error is not None:
            errors[label_of(row)] = row.relative_error
    if not errors:
        return []
    mean = sum(errors.values()) / len(errors)
    largest, name = max((error, name) for name, error in errors.items())
    text = f"mean {mean:.4f}, largest {largest:.4f} ({name})"
    lines = [("relative error", text)]
    shares = [row.rounding_share for row in report.layers if row.rounding_share is not None]
    if shares:
        share = f"{100 * sum(shares) / len(shares):.0f} % of the error that counts"
        lines.append(("rounding", f"{share}, in the mean of {len(shares)} packed layers"))
    return lines


def _loss_lines(report: Report) -> list[tuple[str, str]]:
    """What the layers' predicted losses make of the model's."""
    if report.predicted_loss is None:
        return []
    unit = "nats a token" if report.loss_unit == "nats" else report.loss_unit
    if report.expected_loss is None:
        text = f"{report.predicted_loss:.4g} {unit}, summed over the layers"
    else:
        summed = f"{report.predicted_loss:.2g} summed over the layers"
        text = f"{report.expected_loss:.2g} {unit} of divergence from the original ({summed})"
    return [("expected loss", text)]


def _healing_lines(healing: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What healing did to each block, and what its numbers are."""
    hard = healing["hard_labels"]
    whole = "divergence"
    if hard:
        whole = f"{1 - hard:g} × divergence + {hard:g} × excess loss"
    text = (
        f"relative error of each block, and {whole} of the whole model, on text that was not "
        f"trained on"
    )
    lines = [("healed", f"on {printable(healing['text'])}; {text}")]
    for name, block in healing["blocks"].items():
        change = "nothing better found" if block["steps"] else "there was no time for a step"
        if block["after"] < block["before"]:
            change = f"{block['before']:.3e} → {block['after']:.3e}"
        lines.append(("", f"{printable(name)}: {change}, {block['steps']} steps"))
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
        shown = "" if title == last else title
        grid.add_row(shown, Text(text))
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
    """Every tensor, or every kind where they are many, then what compress would select."""
    console = console_for(stream)
    groups = [(short_name(row.name), [row]) for row in inspection.tensors]
    if len(inspection.tensors) > MANY:
        groups = grouped_rows(inspection.tensors, lambda row: (row.shape, row.dtype, row.reason))

    # Wide terminals have room for the other layout's rank, and for whole reasons
    wide = console.width >= WIDE
    even = "Break-even rank" if wide else "Even"
    titles = ["Shape", even, "Dtype", "Memory"] if wide else ["Shape", even, "Dtype"]
    reason_width = None if wide else 18
    last = LastColumn("Selected", reason_width)

    lines = []
    for name, rows in groups:
        style = "" if rows[0].selected else "dim"
        lines.append(Line(name, len(rows), _inspection_cells(rows, even, wide=wide), style))
    print_layers(lines, titles, console, last=last, first_out=("Dtype", even, "Shape"))

    share = percent_of(inspection.selected_parameters, inspection.parameters)
    console.print(
        f"\n{human(inspection.parameters)} parameters, {human(inspection.bytes, 'B')}; "
        f"{len(inspection.selected)} of {len(inspection.tensors)} tensors selected, {share} of the "
        f"parameters"
    )
    if len(groups) < len(inspection.tensors):
        console.print("one line for each kind of tensor; --csv and --json list each")
    if inspection.written_by_svdcli:
        console.print("written by svdcli: see `svdcli report`")
    for line in left_out_lines(inspection.left_out, inspection.left_out_bytes):
        console.print(f"left out: {line}")
    for note in inspection.notes:
        console.print(f"note: {note}")


def _inspection_cells(rows: Sequence[InspectRow], even: str, *, wide: bool) -> dict[str, str]:
    """{title: cell} of tensors that share a line."""
    first = rows[0]
    break_even = "" if first.break_even is None else str(first.break_even)
    if break_even and wide:
        break_even += f"  ({first.pivoted_break_even} pivoted)"
    return {
        "Shape": shape_text(first.shape),
        even: break_even,
        "Dtype": first.dtype,
        "Memory": human(sum(row.bytes for row in rows), "B"),
        "Selected": first.reason or "yes",
    }


def print_spectrum(spectrum: Spectrum, stream: TextIO) -> None:
    """How fast the singular values of every layer fall, in numbers and as a small picture."""
    console = console_for(stream)
    wide = console.width >= WIDE
    titles = ["Eff. rank", "90 %", "95 %", "99 %", "Even", "Shape"]
    if wide:
        titles += ["Stable rank", "Largest"]
    curve_width = 24 if wide else 8

    # All cells of a layer; a table takes those that it has titles for
    lines = []
    for row in spectrum.layers:
        cells = {
            "Eff. rank": f"{row.effective_rank:.1f}",
            "90 %": str(row.rank_90),
            "95 %": str(row.rank_95),
            "99 %": str(row.rank_99),
            "Even": str(row.break_even),
            "Shape": shape_text(row.shape),
            "Stable rank": f"{row.stable_rank:.1f}",
            "Largest": f"{row.sigma_max:.3g}",
            "Decay": sparkline(row.curve, curve_width),
        }
        lines.append(Line(short_name(row.name), 1, cells))
    print_layers(
        lines,
        titles,
        console,
        last=LastColumn("Decay", no_wrap=True),
        first_out=("Shape", "95 %", "Even", "99 %", "90 %"),
    )
    console.print(
        "\nEven: largest rank that saves parameters when factored. 90 %: rank that keeps 90 % of "
        "the energy."
    )


def print_verification(verification: Verification, stream: TextIO) -> None:
    """A line for each kind of check, with what failed; then what is not as it was beside the
    weights."""
    from svdcli.verbs.verify import BESIDE

    console = console_for(stream)
    by_name: dict[str, list[Check]] = {}
    for check in verification.checks:
        by_name.setdefault(check.check, []).append(check)
    notes = by_name.pop(BESIDE, [])

    for name, checks in by_name.items():
        failures = [check for check in checks if not check.ok]
        result, style = ("FAILED", "red") if failures else ("ok", "")
        passed = len(checks) - len(failures)
        console.print(f"{result:<6}  {name}: {passed} of {len(checks)}", style=style)
        for check in failures:
            console.print(f"        {printable(check.subject)}: {printable(check.detail)}")
    for check in notes:
        console.print(f"note    {printable(check.subject)}: {check.detail}")


# eval ---------------------------------------------------------------------------------------------


def print_measured(evaluation: Evaluation, stream: TextIO) -> None:
    """What the compressed model that compress has just written is worth, in a few lines."""
    console = console_for(stream)
    lines = []
    if evaluation.original is not None and evaluation.compressed is not None:
        before = plus_minus(evaluation.original.perplexity)
        after = plus_minus(evaluation.compressed.perplexity)
        tokens = f"{evaluation.tokens:,} tokens that calibration did not read"
        lines.append(("perplexity", f"{before} → {after}, {tokens}"))
    lines += _drift_lines(evaluation)
    _print_grid(lines, console)


def print_estimate(estimate: Estimate, unchecked: str, stream: TextIO) -> None:
    """What a run would take, after a dry run, and what only the run would see."""
    workers = "1 worker" if estimate.workers == 1 else f"{estimate.workers} workers"
    read, written = human(estimate.bytes_read, "B"), human(estimate.bytes_written, "B")
    text = f"about {duration(estimate.seconds)} on {workers}, {read} read, {written} written"
    lines = [("a run", text)]
    if unchecked:
        lines.append(("not checked", unchecked))
    _print_grid(lines, console_for(stream))


def print_evaluation(evaluation: Evaluation, stream: TextIO) -> None:
    """Scores of both models, how far one is from the other, and what they make of the prompts."""
    # How much text was read
    console = console_for(stream)
    if evaluation.text:
        console.print(
            f"{evaluation.text}: {evaluation.tokens} of {evaluation.text_tokens} tokens, computed "
            f"in {evaluation.computed_in}\n"
        )

    # Scores, which encoders have none of
    if evaluation.compressed is not None:
        table = new_table()
        table.add_column("Model", overflow="fold")
        for title in ("Perplexity", "Loss, nats a token", "Bits a byte"):
            table.add_column(title, justify="right", no_wrap=True)
        for scores in filter(None, (evaluation.original, evaluation.compressed)):
            table.add_row(
                Text(printable(scores.path)),
                plus_minus(scores.perplexity),
                plus_minus(scores.loss),
                f"{scores.bits_per_byte:.4f}",
            )
        console.print(table)
    _print_grid(_drift_lines(evaluation), console)
    for continuation in evaluation.continuations:
        _print_continuation(continuation, console)


def _drift_lines(evaluation: Evaluation) -> list[tuple[str, str]]:
    """How far the compressed model is from its original."""
    lines = []
    drift = evaluation.drift
    if drift is not None:
        error = "" if drift.top1.error is None else f" ± {100 * drift.top1.error:.1f}"
        lines += [
            ("excess loss", f"{plus_minus(drift.excess_loss)} nats a token"),
            ("KL divergence", f"{plus_minus(drift.kl)} nats a token, from the original"),
            ("same next token", f"{100 * drift.top1.value:.1f}{error} %"),
        ]
    similarity = evaluation.similarity
    if similarity is not None:
        mean = f"mean {similarity.mean:.4f}, 5th percentile {similarity.percentile_5:.4f}"
        lines += [
            ("cosine similarity", mean),
            ("", f"minimum {similarity.minimum:.4f}, over {similarity.sentences} sentences"),
        ]
    return lines


def _print_continuation(continuation: Continuation, console: Console) -> None:
    """The prompt, and what each model makes of it side by side."""
    console.print(f"\n{printable(continuation.prompt)}", style="bold")
    table = new_table()
    table.expand = True
    cells = []
    sides = {"Original": continuation.original, "Compressed": continuation.compressed}
    for title, text in sides.items():
        if text is not None:
            table.add_column(title, ratio=1, overflow="fold")
            cells.append(Text("\n".join(map(printable, text.split("\n")))))
    table.add_row(*cells)
    console.print(table)


# bench --------------------------------------------------------------------------------------------

_MEASURES = {"load": "time to load", "memory": "memory at rest", "files": "weights on disk"}
_SPAN = "Lowest to highest"


def print_bench(bench: Bench, stream: TextIO) -> None:
    """Both models measure by measure, then what was measured and how."""
    console = console_for(stream)
    rows = [_bench_cells(comparison) for comparison in bench.comparisons]
    _print_comparison(rows, console)

    # What was asked of both
    plural = "" if bench.threads == 1 else "s"
    batch = f"{bench.batch} × " if bench.batch > 1 else ""
    new = "" if bench.original.decode is None else f", {bench.new_tokens} new ones"
    lines = [
        ("original", printable(bench.against)),
        ("compressed", printable(bench.path)),
        ("dtype", " and ".join(dict.fromkeys((bench.original.dtype, bench.compressed.dtype)))),
        ("device", f"{bench.device}, {bench.threads} thread{plural}"),
        ("work", f"prompts of {batch}{bench.prompt_tokens} tokens{new}"),
        ("rounds", f"{bench.rounds}, by turns, each model in a process of its own"),
    ]
    _print_grid(lines, console)


def _bench_cells(comparison: Comparison) -> dict[str, str]:
    """{title: cell} of one measure, whose own name has no title."""
    name = _MEASURES.get(comparison.measure, comparison.measure)
    if comparison.unit == "tokens/s":
        name += f", {comparison.unit}"
    ratio = "" if comparison.ratio is None else f"{comparison.ratio:.2f}"
    extent = ""
    if comparison.lowest is not None and comparison.highest is not None:
        extent = f"{comparison.lowest:.2f} to {comparison.highest:.2f}"
    return {
        "": name,
        "Original": quantity(comparison.original, comparison.unit),
        "Compressed": quantity(comparison.compressed, comparison.unit),
        "Ratio": ratio,
        _SPAN: extent,
    }


def _print_comparison(rows: Sequence[Mapping[str, str]], console: Console) -> None:
    """The table of measures; on narrow terminals without the columns that find no room."""
    name, *titles = rows[0]
    shown = titles
    if console.width < NARROW:
        widths = {}
        for title in (name, *titles):
            widths[title] = max(map(cell_len, (title, *(row[title] for row in rows))))
        room = console.width - widths.pop(name)
        shown = fitting(widths, room, (_SPAN, "Original", "Compressed"))
    table = new_table()
    table.add_column(name, no_wrap=True)
    for title in shown:
        if title == _SPAN:
            table.add_column(title, overflow="fold")
        else:
            table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row[name], *(row[title] for title in shown))
    console.print(table)
    print_left_out([title for title in titles if title not in shown], console)
