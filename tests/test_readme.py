"""What README shows is what the commands print today. `python tests/readme/regenerate.py` brings it
up to date."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from helpers import run_code

sys.path.insert(0, str(Path(__file__).parent / "readme"))
import zoo
from regenerate import BLOCK, PICTURE, README, render_picture, render_readme, workshop

from svdcli.files.checkpoint import open_checkpoint
from svdcli.plan.layers import choose_layers


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
    for block in re.findall(
        r"^```python\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE
    ):
        with workshop() as folder:
            done = run_code(block, folder=folder)
        assert done.code == 0, done.err


def test_install_lines_use_the_constraints() -> None:
    for line in re.findall(r"^pip install .*$", README.read_text(), re.MULTILINE):
        assert "-c tests/constraints.txt" in line, line


# Applications -------------------------------------------------------------------------------------

ROW = re.compile(
    r"^\| `(?P<family>[a-z0-9-]+)` \| (?P<task>[^|]+) \| `(?P<kind>\w+)`[^|]* \| (?P<run>[^|]+) "
    r"\| (?P<dense>[^|]+) \|$",
    re.MULTILINE,
)
APPLICATIONS = {row["family"]: row for row in ROW.finditer(README.read_text())}


def test_every_family_has_its_row() -> None:
    assert list(APPLICATIONS) == list(zoo.FAMILIES)


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_a_row_tells_what_the_tests_run(name: str, tmp_path: Path) -> None:
    row, family = APPLICATIONS[name], zoo.FAMILIES[name]
    assert (row["task"], row["kind"]) == (family.task, type(family.build()).__name__)
    assert row["run"] == "full rank, round trip" + (", generate" if family.generates else "")
    checkpoint = open_checkpoint(zoo.save(name, tmp_path / "model"))
    _, skipped = choose_layers(checkpoint.infos, facts=checkpoint.facts)
    dense = {item.tensor.module for item in skipped if len(item.tensor.shape) > 1}
    told = set(re.findall(r"`([a-z0-9_.]+)`", row["dense"])) - {"save_pretrained"}
    assert {
        weight for weight in dense if any(f".{weight}".endswith(f".{word}") for word in told)
    } == dense
    assert {
        word for word in told if any(f".{weight}".endswith(f".{word}") for weight in dense)
    } == told
