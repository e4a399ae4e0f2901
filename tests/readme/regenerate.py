"""Run the commands whose output README shows, and put the output back: `python
tests/readme/regenerate.py`.

A block is the fenced text behind `<!-- output: COMMAND -->`. Commands run in a copy of
sample_models, 80 columns wide; what they write stays there. The picture is the table of the first
command.
"""

from __future__ import annotations

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
from typing import TYPE_CHECKING
from unittest import mock

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
README = ROOT / "README.md"
PICTURE = HERE / "compress.svg"
BLOCK = re.compile(
    r"(<!-- output: (?P<command>.+?) -->\n```[a-z]*\n)(?P<text>.*?)(?=^```$)",
    re.DOTALL | re.MULTILINE,
)


BENCHMARKS = ROOT / "tests" / "benchmarks"
QUALITY = re.compile(r"(?<=<!-- quality -->\n).*?(?=<!-- /quality -->)", re.DOTALL)


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


def render_readme(readme: str) -> str:
    """README with every recorded output made anew. Run inside a workshop."""
    readme = QUALITY.sub(lambda _: quality_tables(), readme)
    return BLOCK.sub(lambda block: block[1] + output_of(block["command"]), readme)


def quality_tables() -> str:
    """The recorded comparison of methods, as quality.py renders it."""
    sys.path.insert(0, str(BENCHMARKS))
    from quality import markdown

    return markdown(json.loads((BENCHMARKS / "quality.json").read_text())) + "\n\n"


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
    with workshop() as folder:
        README.write_text(render_readme(README.read_text()))
        PICTURE.write_text(render_picture(folder))


if __name__ == "__main__":
    main()
