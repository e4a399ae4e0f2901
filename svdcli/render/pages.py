"""Pages of documentation: laid out on a terminal, as they are in a pipe."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, TextIO

from rich.markdown import CodeBlock, Heading, Markdown
from rich.table import Table
from rich.text import Text

from svdcli.render.tables import console_for

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

_WIDEST = 100  # longer lines are hard to read


def print_topics(topics: Mapping[str, str], stream: TextIO) -> None:
    """The name and the title of every page."""
    table = Table.grid(padding=(0, 2))
    for name, title in topics.items():
        table.add_row(Text(name, style="bold"), Text(title))
    console = console_for(stream)
    console.print(table)
    console.print("\nsvdcli help TOPIC prints a page; TOPIC may be a command, too.")


def print_page(text: str, stream: TextIO) -> None:
    """A page: for a person laid out, for a program the Markdown."""
    if not stream.isatty():
        stream.write(text)
        return
    console = console_for(stream)
    width = min(console.width, _WIDEST)
    console.print(_Page(_for_reading(text), hyperlinks=False), width=width, crop=False)


def _for_reading(text: str) -> str:
    """Without pictures, and without links to other files: a terminal opens neither."""
    text = re.sub(r"^!\[.*?\]\(.*?\)\n\n?", "", text, flags=re.MULTILINE)
    return re.sub(r"\[([^\]]+)\]\((?!http)[^)]*\)", r"\1", text)


class _Heading(Heading):
    """Headings at the left, without a frame."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.tag != "h1":
            yield Text()
        style = "bold underline" if self.tag == "h1" else "bold"
        yield Text(self.text.plain, style=style)


class _Code(CodeBlock):
    """Code without colours; the terminal breaks lines that are too long, so that they copy."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.text.plain.rstrip(), no_wrap=True, overflow="ignore")


class _Page(Markdown):
    elements = Markdown.elements | {"heading_open": _Heading, "fence": _Code, "code_block": _Code}
