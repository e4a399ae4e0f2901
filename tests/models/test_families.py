"""Every application of svdcli/docs/families.md: full rank equals the original; compressed, it
loads, runs, saves, loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import zoo
from torch import nn

import svdcli
from svdcli.models.modules import LOW_RANK

Written = Callable[[str], Path]
Compressed = Callable[..., Path]


def low_rank_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, LOW_RANK)]


@pytest.mark.parametrize("layout", ["factored", "pivoted"])
@pytest.mark.parametrize("family", zoo.FAMILIES)
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_at_full_rank_the_answers_are_the_original_s(
    family: str, layout: str, written: Written, tmp_path: Path
) -> None:
    expected = zoo.answer(family, svdcli.load(written(family)))
    model = svdcli.load(zoo.write_full_rank(written(family), tmp_path / "full", layout))
    assert low_rank_modules(model)
    found = zoo.answer(family, model)
    assert torch.allclose(found, expected, atol=2e-5, rtol=2e-5), (found - expected).abs().max()


@pytest.mark.parametrize("layout", ["factored", "pivoted"])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_compressed_it_loads_runs_saves_and_loads(
    family: str, layout: str, compressed: Compressed, tmp_path: Path
) -> None:
    out = compressed(family, layout)
    model = svdcli.load(out)
    assert low_rank_modules(model)
    assert not any(parameter.is_meta for parameter in model.parameters())
    answer = zoo.answer(family, model)
    dense = svdcli.load(svdcli.expand(out, tmp_path / "dense"))
    assert not low_rank_modules(dense)
    assert torch.allclose(answer, zoo.answer(family, dense), atol=2e-5, rtol=2e-5)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(answer, zoo.answer(family, svdcli.load(tmp_path / "again")))


@pytest.mark.parametrize("layout", ["factored", "pivoted"])
@pytest.mark.parametrize(
    "family", [name for name, family in zoo.FAMILIES.items() if family.generates]
)
def test_generates_as_the_dense_model_of_the_same_weights_does(
    family: str, layout: str, compressed: Compressed, tmp_path: Path
) -> None:
    out = compressed(family, layout)
    inputs = {k: v for k, v in zoo.FAMILIES[family].inputs.items() if not k.startswith("decoder_")}
    one, other = svdcli.load(out), svdcli.load(svdcli.expand(out, tmp_path / "dense"))
    how = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(one.generate(**inputs, **how), other.generate(**inputs, **how))
