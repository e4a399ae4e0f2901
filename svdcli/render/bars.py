"""Progress with the time that is left, on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from svdcli.progress import Progress, silent
from svdcli.render.tables import console_for
from svdcli.render.words import short_name

if TYPE_CHECKING:
    pass


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
            bars.update(
                tasks[phase],
                completed=done,
                total=total,
                name=short_name(name)[-min(40, max(1, room)) :],
            )

        yield step
