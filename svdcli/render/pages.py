"""Pages of documentation: laid out on a terminal, as they are in a pipe."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, TextIO

from rich.markdown import CodeBlock, Heading, Markdown, TableElement
from rich.table import Table
from rich.text import Text
from rich.theme import Theme

from svdcli.render.tables import console_for

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

_WIDEST = 100  # longer lines are hard to read
_THEME = Theme(
    {
        "markdown.code": "cyan",
        "markdown.table.border": "none",
        "markdown.table.header": "bold",
    }
)


def print_topics(topics: Mapping[str, str], stream: TextIO) -> None:
    """The name and the title of every page."""
    widest = max(map(len, topics))
    stream.writelines(f"{name:{widest}}  {title}\n" for name, title in topics.items())
    stream.write("\nsvdcli help TOPIC prints a page. TOPIC may be a command, too.\n")


def print_page(text: str, stream: TextIO) -> None:
    """A page: for a person laid out, for a program the Markdown."""
    if not stream.isatty():
        stream.write(text)
        return
    # crop=False: lines of code may be longer, and are the terminal's to break
    console = console_for(stream)
    width = min(console.width, _WIDEST)
    with console.use_theme(_THEME):
        console.print(_Page(_for_reading(text), hyperlinks=False), width=width, crop=False)


def _for_reading(text: str) -> str:
    """Without pictures, and without links to other files: a terminal opens neither."""
    text = re.sub(r"^!\[.*?\]\(.*?\)\n\n?", "", text, flags=re.MULTILINE)
    return re.sub(r"\[([^\]]+)\]\((?!http)[^)]*\)", r"\1", text)


class _Heading(Heading):
    """Headings at the left."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        style = "bold underline" if self.tag == "h1" else "bold"
        yield Text(self.text.plain, style=style)


class _Code(CodeBlock):
    """Code without colours; the terminal breaks lines that are too long, so that they copy."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.text.plain.rstrip(), no_wrap=True, overflow="ignore")


class _Table(TableElement):
    """Tables that cut no word short."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for table in super().__rich_console__(console, options):
            if isinstance(table, Table):
                # rich would end what does not fit in "…"
                table.show_edge = False
                for column in table.columns:
                    column.overflow = "fold"
            yield table


class _Page(Markdown):
    elements = Markdown.elements | {
        "heading_open": _Heading,
        "fence": _Code,
        "table_open": _Table,
    }
