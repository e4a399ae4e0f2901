"""Progress with the time that is left, on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from svdcli.progress import Progress, silent
from svdcli.render.tables import console_for
from svdcli.render.words import short_name

# What percent, times and their blanks take, with a bar of 24 characters before them.
_TAKEN = 64
_LONGEST_NAME = 40
_SHORTEST_NAME = 8


@contextmanager
def progress_on(stream: TextIO, *, quiet: bool) -> Iterator[Progress]:
    """Bars with the time left on a terminal; nothing anywhere else."""
    if quiet or not stream.isatty():
        yield silent
        return
    from rich.progress import (
        BarColumn,
        ProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars

    # Where the line does not fit, the name goes first, then the bar
    console = console_for(stream)
    room = console.width - _TAKEN
    columns: list[ProgressColumn] = [TextColumn("{task.description:<8}", markup=False)]
    if room >= 0:
        columns.append(BarColumn(bar_width=24))
    columns += [
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    ]
    if room >= _SHORTEST_NAME:
        columns.append(TextColumn("{task.fields[name]}", markup=False))

    with Bars(*columns, console=console, transient=True) as bars:
        # A bar for each phase, when it begins; of a long name its end tells most
        length = min(_LONGEST_NAME, max(1, room))
        tasks: dict[str, Any] = {}

        def step(phase: str, name: str, done: float, total: float) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total, name="")
            shown = short_name(name)[-length:]
            bars.update(tasks[phase], completed=done, total=total, name=shown)

        yield step
