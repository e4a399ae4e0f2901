"""What README and the pages of svdcli/docs show is what the commands print today. `python
tests/readme/regenerate.py` brings it up to date."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
from helpers import run_code

sys.path.insert(0, str(Path(__file__).parent / "readme"))
import zoo
from regenerate import BLOCK, PAGES, PICTURE, README, render, render_picture, workshop

from svdcli.files.checkpoint import open_checkpoint
from svdcli.plan.layers import choose_layers

TEXT = "\n".join(page.read_text() for page in PAGES)


@pytest.fixture(scope="module")
def made_anew() -> tuple[dict[Path, str], str]:
    pages, picture = {}, ""
    for page in PAGES:
        with workshop() as folder:
            pages[page] = render(page)
            if page == README:
                picture = render_picture(folder)
    return pages, picture


def test_there_is_recorded_output() -> None:
    assert len(BLOCK.findall(TEXT)) >= 5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_is_recorded_is_current(page: Path, made_anew: tuple[dict[Path, str], str]) -> None:
    assert made_anew[0][page] == page.read_text()


def test_the_picture_is_current(made_anew: tuple[dict[Path, str], str]) -> None:
    assert made_anew[1] == PICTURE.read_text()


def test_readme_stays_short() -> None:
    assert len(README.read_bytes()) <= 10_000


def test_readme_names_every_page() -> None:
    linked = set(re.findall(r"\]\(svdcli/docs/(\w+)\.md\)", README.read_text()))
    assert linked == {page.stem for page in PAGES} - {"README"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_file_that_a_page_links_to_is_there(page: Path) -> None:
    for link in re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), link


PYTHON = re.findall(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def make_smaller(model: Path) -> None:
    """Put a network of half the width and two blocks in place of a sample."""
    config = transformers.AutoConfig.from_pretrained(model)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 128, 320, 2
    config.num_attention_heads, config.num_key_value_heads = 4, 2
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(model)


@pytest.mark.parametrize("block", PYTHON, ids=range(len(PYTHON)))
def test_every_python_block_runs(block: str) -> None:
    """On a smaller network than the sample, since nothing here is about numbers."""
    with workshop() as folder:
        make_smaller(folder / "sample_models" / "tiny-llama")
        done = run_code(block, folder=folder)
    assert done.code == 0, done.err


def test_install_lines_use_the_constraints() -> None:
    for line in re.findall(r"^(?:[^`\n]*`)?(pip install .*)$", TEXT, re.MULTILINE):
        assert "-c tests/constraints.txt" in line, line


# Applications -------------------------------------------------------------------------------------

ROW = re.compile(
    r"^\| `(?P<family>[a-z0-9-]+)` \| (?P<task>[^|]+) \| `(?P<kind>\w+)`[^|]* \| (?P<run>[^|]+) "
    r"\| (?P<dense>[^|]+) \|$",
    re.MULTILINE,
)
APPLICATIONS = {row["family"]: row for row in ROW.finditer(TEXT)}


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
