"""Run the commands whose output README and the pages of svdcli/docs show, and put the output back:
`python tests/readme/regenerate.py`.

A block is the fenced text behind `<!-- output: COMMAND -->`: the command and its output. The
commands of a page run in a copy of sample_models of its own, 80 columns wide; what they write stays
there. The picture is the table of README's first command. The page of commands is their `--help`.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "svdcli" / "docs"
COMMANDS = DOCS / "commands.md"
PAGES = (README, *sorted(DOCS.glob("*.md")))
PICTURE = HERE / "compress.svg"
BLOCK = re.compile(
    r"(<!-- output: (?P<command>.+?) -->\n```[a-z]*\n)(?P<text>.*?)(?=^```$)",
    re.DOTALL | re.MULTILINE,
)
BENCHMARKS = ROOT / "tests" / "benchmarks"
QUALITY = re.compile(r"(?<=<!-- quality -->\n).*?(?=<!-- /quality -->)", re.DOTALL)
BITS = re.compile(r"(?<=<!-- bits -->\n).*?(?=<!-- /bits -->)", re.DOTALL)
PACKED = re.compile(r"(?<=<!-- packed -->\n).*?(?=<!-- /packed -->)", re.DOTALL)
SHARING = re.compile(r"(?<=<!-- sharing -->\n).*?(?=<!-- /sharing -->)", re.DOTALL)
MIXTURE = re.compile(r"(?<=<!-- mixture -->\n).*?(?=<!-- /mixture -->)", re.DOTALL)
COMMUNICATION = re.compile(
    r"(?<=<!-- communication -->\n).*?(?=<!-- /communication -->)", re.DOTALL
)
COUNTED = re.compile(r"(?<=<!-- counted -->\n).*?(?=<!-- /counted -->)", re.DOTALL)
BIG = re.compile(r"(?<=<!-- big -->\n).*?(?=<!-- /big -->)", re.DOTALL)
SHORT = re.compile(r"(?<=<!-- quality in short -->\n).*?(?=<!-- /quality in short -->)", re.DOTALL)
SHORT_ROWS = {
    "plain": "plain SVD",
    "svd-llm": "SVD-LLM(W)",
    "shared": "svdcli compress --text",
    "heal": "the same with --share never, heal",
}
ABOUT_COMMANDS = """# Commands: every option of each

What `svdcli COMMAND --help` prints. `svdcli help COMMAND` shows one of these sections.
"""


@contextmanager
def workshop() -> Iterator[Path]:
    """A temporary folder with the sample models, as current folder."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        # README's own first command leaves an output beside the model, which is no part of the
        # repository.
        outputs = shutil.ignore_patterns("*-svd*", "*.partial", "*.svd.safetensors")
        shutil.copytree(ROOT / "sample_models", Path(folder) / "sample_models", ignore=outputs)
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


def output_of(command: str) -> str:
    """What `svdcli ...` prints on both streams, 80 columns wide, without trailing blanks."""
    from svdcli.cli.commands import main

    text = io.StringIO()
    with (
        mock.patch.dict(os.environ, {"COLUMNS": "80"}),
        mock.patch.object(sys, "argv", shlex.split(command)),
        redirect_stdout(text),
        redirect_stderr(text),
        suppress(SystemExit),
    ):
        main()
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    return "\n".join(lines).strip("\n") + "\n"


def render(page: Path) -> str:
    """A page with everything recorded made anew. Run inside a workshop."""
    if page == COMMANDS:
        return render_commands()
    text = QUALITY.sub(lambda _: quality_tables(), page.read_text())
    text = SHORT.sub(lambda _: quality_in_short(), text)
    text = BITS.sub(lambda _: bits_table(), text)
    text = PACKED.sub(lambda _: packed_table(), text)
    text = MIXTURE.sub(lambda _: mixture_table(), text)
    text = BIG.sub(lambda _: big_tables(), text)
    text = SHARING.sub(lambda _: sharing_table(), text)
    text = COMMUNICATION.sub(lambda _: communication_table(), text)
    text = COUNTED.sub(lambda _: benchmark("communication").counted() + "\n\n", text)
    return BLOCK.sub(lambda block: block[1] + session(block["command"]), text)


def session(command: str) -> str:
    """A command as it is typed, and what it prints."""
    return f"$ {command}\n{output_of(command)}"


def render_commands() -> str:
    """The help of every command."""
    from svdcli.cli.commands import command_names

    sections = [
        f"## {name}\n\n```\n{output_of(f'svdcli {name} --help')}```\n" for name in command_names()
    ]
    return "\n".join([ABOUT_COMMANDS, f"```\n{output_of('svdcli --help')}```\n", *sections])


def quality_tables() -> str:
    """The recorded comparison of methods, as quality.py renders it."""
    return benchmark("quality").markdown(quality_results()) + "\n\n"


def bits_table() -> str:
    """The recorded comparisons of bits and ranks and with other packages, as bits.py renders it."""
    names = ("bits.json", "peers.json")
    results = {
        row: found
        for name in names
        for row, found in json.loads((BENCHMARKS / name).read_text()).items()
    }
    return benchmark("bits").markdown(results) + "\n\n"


def packed_table() -> str:
    """The recorded speed and memory of packed layers, as packed.py renders it."""
    results = json.loads((BENCHMARKS / "packed.json").read_text())
    return benchmark("packed").markdown(results) + "\n\n"


def mixture_table() -> str:
    """The recorded losses of a mixture of experts, as mixture.py renders them."""
    results = json.loads((BENCHMARKS / "mixture.json").read_text())
    return benchmark("mixture").markdown(results) + "\n\n"


def sharing_table() -> str:
    """The recorded losses with shared bases, as sharing.py renders them."""
    results = json.loads((BENCHMARKS / "sharing.json").read_text())
    return benchmark("sharing").markdown(results) + "\n\n"


def communication_table() -> str:
    """The recorded bytes and losses of healing on ranks, as communication.py renders them."""
    results = json.loads((BENCHMARKS / "communication.json").read_text())
    return benchmark("communication").markdown(results) + "\n\n"


def big_tables() -> str:
    """The recorded run and plans of large models, as big.py renders them."""
    results = json.loads((BENCHMARKS / "big.json").read_text())
    return benchmark("big").markdown(results) + "\n\n"


def quality_in_short() -> str:
    """Perplexities of the sample model, for four of the methods."""
    return (
        benchmark("quality").in_short(quality_results()["models"]["tiny-llama"], SHORT_ROWS)
        + "\n\n"
    )


def benchmark(name: str) -> ModuleType:
    """A file of tests/benchmarks."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS))
    return importlib.import_module(name)


def quality_results() -> dict[str, Any]:
    """What it measured."""
    results: dict[str, Any] = json.loads((BENCHMARKS / "quality.json").read_text())
    return results


def render_picture(folder: Path) -> str:
    """The table of the sample model as SVG."""
    from rich.console import Console

    from svdcli import report
    from svdcli.render.tables import render_report

    console = Console(
        record=True, width=96, file=io.StringIO(), highlight=False, force_terminal=True
    )
    render_report(report(folder / "sample_models" / "tiny-llama-svd"), console, grouped=True)
    return console.export_svg(
        title="svdcli compress sample_models/tiny-llama --rank 100", unique_id="svdcli"
    )


def main() -> None:
    for page in PAGES:
        with workshop() as folder:
            page.write_text(render(page))
            if page == README:
                PICTURE.write_text(render_picture(folder))


if __name__ == "__main__":
    main()
