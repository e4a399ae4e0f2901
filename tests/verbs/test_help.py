"""The pages of documentation, and how they are asked for."""

from __future__ import annotations

import io
import re

import pytest
from helpers import cli

from svdcli.cli.commands import command_names
from svdcli.errors import UsageError
from svdcli.render.pages import print_page
from svdcli.verbs.help import FOLDER, page, topics


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(topic: str) -> str:
    """A page as a terminal gets it."""
    terminal = Terminal()
    print_page(page(topic), terminal)
    return terminal.getvalue()


def test_every_page_is_listed_with_its_title() -> None:
    listed = cli("help").out.decode()
    for path in FOLDER.glob("*.md"):
        title = path.read_text().split("\n", 1)[0].removeprefix("# ")
        assert re.search(rf"^{path.stem} +{re.escape(title)}$", listed, re.MULTILINE)
    assert max(map(len, listed.splitlines())) <= 72


def test_a_pipe_gets_the_page_without_its_comments() -> None:
    assert cli("help", "method").out.decode() == (FOLDER / "method.md").read_text()
    guide = cli("help", "guide").out.decode()
    assert "$ svdcli inspect" in guide
    assert "<!--" not in guide


def test_a_command_is_a_topic() -> None:
    for command in command_names():
        assert f"Usage: svdcli {command}" in page(command)


def test_an_unknown_topic_names_those_that_are_near() -> None:
    done = cli("help", "gide")
    assert (done.code, done.err) == (2, "svdcli: error: there is no page 'gide'; perhaps guide\n")
    with pytest.raises(UsageError, match="`svdcli help` lists the pages"):
        page("xyzzy")
    with pytest.raises(UsageError):
        page("../docs/guide")


@pytest.mark.parametrize("topic", topics())
@pytest.mark.parametrize("width", [60, 100])
def test_prose_and_tables_fit_their_terminal(
    topic: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    # The terminal itself breaks the lines of code, so that they copy in one piece.
    code = "\n".join(re.findall(r"^```.*?^```$", page(topic), re.DOTALL | re.MULTILINE))
    text = re.sub(r"\x1b\[[0-9;]*m", "", shown(topic))
    long = [line for line in text.splitlines() if len(line) > width]
    assert not [line for line in long if line not in code]
    assert text.count("…") == page(topic).count("…")  # no cell is cut short


def test_a_terminal_gets_neither_pictures_nor_links_to_files() -> None:
    assert ".svg" not in shown("guide")
    assert ".md)" not in shown("files")
