"""What README shows is what the commands print today. `python tests/readme/regenerate.py` brings it up to date."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "readme"))
from regenerate import BLOCK, PICTURE, README, render_picture, render_readme, workshop


@pytest.fixture(scope="module")
def made_anew() -> tuple[str, str]:
    with workshop() as folder:
        return render_readme(README.read_text()), render_picture(folder)


def test_recorded_output_is_current(made_anew: tuple[str, str]) -> None:
    assert len(BLOCK.findall(README.read_text())) >= 5
    assert made_anew[0] == README.read_text()


def test_the_picture_is_current(made_anew: tuple[str, str]) -> None:
    assert made_anew[1] == PICTURE.read_text()


def test_every_file_that_readme_links_to_is_there() -> None:
    for link in re.findall(r"\]\((?!http|#)([^)#]+)", README.read_text()):
        assert (README.parent / link).exists(), link


def test_every_python_block_runs() -> None:
    for block in re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE):
        with workshop():
            done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_install_lines_use_the_constraints() -> None:
    for line in re.findall(r"^pip install .*$", README.read_text(), re.MULTILINE):
        assert "-c tests/constraints.txt" in line, line
