"""The pages of documentation that come with the installed version."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from svdcli.errors import UsageError

FOLDER = Path(__file__).parent.parent / "docs"
COMMANDS = "commands"


def topics() -> dict[str, str]:
    """The title of every page, by the name to ask for it."""
    titles = {}
    for file in sorted(FOLDER.glob("*.md")):
        first_line = _text(file.stem).split("\n", 1)[0]
        titles[file.stem] = first_line.lstrip("# ")
    return titles


def page(topic: str) -> str:
    """The Markdown of a page; for the name of a command, its part of the page of commands."""
    name = topic.lower().removesuffix(".md")
    if name in topics():
        return _text(name)
    sections = _sections()
    if name in sections:
        return sections[name]

    # No such page: what is spelt nearly so may be meant
    close = difflib.get_close_matches(name, [*topics(), *sections], n=3, cutoff=0.5)
    hint = "`svdcli help` lists the pages"
    if close:
        hint = f"perhaps {', '.join(close)}"
    raise UsageError(f"there is no page {topic!r}", hint)


def _text(name: str) -> str:
    """A page without the comments that say where its recorded output comes from."""
    text = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
    return re.sub(r"^<!-- .*? -->\n", "", text, flags=re.MULTILINE)


def _sections() -> dict[str, str]:
    """The help of every command, by its name."""
    _, *parts = re.split(r"^(?=## )", _text(COMMANDS), flags=re.MULTILINE)
    return {part.split("\n", 1)[0].removeprefix("## "): part for part in parts}
