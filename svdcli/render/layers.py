"""Tables with a line for each layer, as many columns as their terminal has room for."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from svdcli.render.words import NUMBER, common_prefix, joint_name, short_name

WIDE = 120  # from here on whole names, and every column
NARROW = 80  # below, a table drops columns that do not fit
_GAP = 3  # what rich puts between two columns
_LEAST_OF_A_NAME = 12  # a folded name gets as much
_NAME_WIDTH = 20  # columns go before names get less than this


class Named(Protocol):
    """What has the name of a tensor."""

    @property
    def name(self) -> str: ...


Row = TypeVar("Row", bound=Named)


@dataclass(frozen=True)
class Line:
    """A line of a table: the name of a layer or what several share, how many it stands for, and a
    cell for every title."""

    name: str
    count: int
    cells: Mapping[str, str]
    style: str = ""


@dataclass(frozen=True)
class LastColumn:
    """The column at the right end, which is always shown; with a width it breaks between words."""

    title: str
    width: int | None = None
    no_wrap: bool = False


def label_of(row: Named) -> str:
    """What a row is called: by its name, or by those of all layers that it stands for."""
    members: Sequence[str] = getattr(row, "members", ())
    return joint_name(members) if members else short_name(row.name)


def grouped_rows(
    rows: Sequence[Row], key: Callable[[Row], Hashable]
) -> list[tuple[str, list[Row]]]:
    """Rows that agree in `key` and differ by a block's number only, under one name:
    model.layers.*.mlp.up_proj. A row alone keeps its own."""
    groups: dict[tuple[str, Hashable], list[Row]] = {}
    for row in rows:
        pattern = NUMBER.sub("*", label_of(row))
        groups.setdefault((pattern, key(row)), []).append(row)
    named = []
    for (pattern, _), members in groups.items():
        name = pattern if len(members) > 1 else label_of(members[0])
        named.append((name, members))
    return named


def new_table() -> Table:
    """An empty table without a frame: only the titles are underlined."""
    return Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)


def print_layers(
    lines: Sequence[Line],
    titles: Sequence[str],
    console: Console,
    *,
    last: LastColumn | None = None,
    first_out: Sequence[str] = (),
) -> None:
    """The table of these columns. Below 80 characters those of `first_out` go, in that order, until
    the others fit, and a note names them."""
    # What all names share is told once, above, where space is scarce
    prefix = ""
    if console.width < WIDE:
        prefix = common_prefix([line.name for line in lines])
    if prefix:
        console.print(f"\n{prefix}…", style="dim")
    names = [line.name.removeprefix(prefix) for line in lines]

    # From 80 on long names are folded, and columns go that leave them no room at all; below, names
    # are measured
    table = new_table()
    name_width = None
    room = console.width - _last_width(lines, last)
    widths = {title: _width_of(title, lines) for title in titles}
    if console.width >= NARROW:
        longest = max(map(len, names), default=0)
        shown = fitting(widths, room - min(longest, _LEAST_OF_A_NAME), first_out)
        wanted = max(_LEAST_OF_A_NAME, console.width * 2 // 5)
        least = min(longest, wanted, max(_LEAST_OF_A_NAME, room - _all_of(widths, shown)))
        table.add_column("Layer", overflow="fold", min_width=least)
    else:
        longest = max(map(_name_width, lines, names), default=0)
        shown = fitting(widths, room - min(longest, _NAME_WIDTH), first_out)
        name_width = max(1, min(longest, room - _all_of(widths, shown)))
        table.add_column("Layer", no_wrap=True, width=max(name_width, len("Layer")))

    # The other columns, and the lines
    for title in shown:
        table.add_column(title, justify="right", no_wrap=True)
    if last is not None:
        table.add_column(last.title, overflow="fold", no_wrap=last.no_wrap, max_width=last.width)
    for line, name in zip(lines, names, strict=True):
        cells = [line.cells[title] for title in shown]
        if last is not None:
            cells.append(line.cells[last.title])
        table.add_row(_name_cell(name, line.count, name_width), *map(Text, cells), style=line.style)
    console.print(table)
    print_left_out([title for title in titles if title not in shown], console)


def fitting(widths: Mapping[str, int], room: int, first_out: Sequence[str]) -> list[str]:
    """The titles whose columns fit into `room`, each with the gap before it; those of `first_out`
    go first, in that order, and what it does not name always stays."""
    shown = list(widths)
    for title in first_out:
        if _all_of(widths, shown) <= room:
            break
        shown.remove(title)
    return shown


def _all_of(widths: Mapping[str, int], shown: Sequence[str]) -> int:
    """What these columns take together, each with the gap before it."""
    return sum(widths[title] + _GAP for title in shown)


def print_left_out(titles: Sequence[str], console: Console) -> None:
    """Tell which columns found no room, and where they are."""
    if titles:
        console.print(f"\nno room for {', '.join(titles)}: see --csv or --json", style="dim")


def _last_width(lines: Sequence[Line], last: LastColumn | None) -> int:
    """What the last column takes with the gap before it."""
    if last is None:
        return 0
    width = _width_of(last.title, lines)
    if last.width is not None:
        width = min(width, last.width)
    return width + _GAP


def _width_of(title: str, lines: Sequence[Line]) -> int:
    return max(map(cell_len, (title, *(line.cells[title] for line in lines))))


def _count_of(count: int) -> str:
    """How many layers a line stands for, behind its name."""
    return f" ×{count}" if count > 1 else ""


def _name_width(line: Line, name: str) -> int:
    return cell_len(name + _count_of(line.count))


def _name_cell(name: str, count: int, width: int | None) -> Text:
    """The name with the count; in so many characters, where a width is given."""
    suffix = _count_of(count)
    if width is not None:
        name = break_at_dots(name, max(1, width - len(suffix)))
    text = Text(name)
    if suffix:
        text.append(suffix, style="dim")
    return text


def break_at_dots(name: str, width: int) -> str:
    """Lines of whole parts of a dotted name; a part that alone is too long loses its middle."""
    # The dots stay at the ends of lines
    *parts, end = name.split(".")
    lines = [""]
    for part in (*(f"{part}." for part in parts), end):
        if lines[-1] and cell_len(lines[-1] + part) > width:
            lines.append("")
        lines[-1] += _without_middle(part, width)
    return "\n".join(lines)


def _without_middle(text: str, width: int) -> str:
    """`text` in at most so many cells, with … for what is missing."""
    if cell_len(text) <= width:
        return text
    # From both halves alike, cell by cell: a letter may take two cells
    head, tail = text[: len(text) // 2], text[len(text) // 2 :]
    while head and cell_len(head) + 1 + cell_len(tail) > width:
        if len(head) >= len(tail):
            head = head[:-1]
        else:
            tail = tail[1:]
    return f"{head}…{tail}"
