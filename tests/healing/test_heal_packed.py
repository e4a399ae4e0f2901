"""Packed layers that are trained: the same function until an integer moves to a neighbour, bytes
that stay, and no output that is worse than it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from helpers import contents
from zoo import words_tokenizer

import svdcli
from svdcli.healing import blocks
from svdcli.healing.blocks import WHOLE, Effort
from svdcli.healing.learned import LearnedRounding, grid_of, put_rounded
from svdcli.healing.standins import StandIns
from svdcli.linalg.rounding import rounded
from svdcli.models.modules import LowRankLinear, PackedLinear

TEXT = svdcli.Texts("words", (" ".join(f"w{(i * i + 3 * i) % 94 + 2}" for i in range(3000)),))
HOW: dict[str, Any] = {"effort": Effort(steps=4), "samples": 16, "seq_len": 32}


def packed(m: int, n: int, bits: int, *, bias: bool = False) -> PackedLinear:
    """A packed layer of random numbers."""
    generator = torch.Generator().manual_seed(m)
    module = PackedLinear(n, m, bits, 32 if bits == 4 else None, bias=bias, dtype=torch.float32)
    w = torch.randn(m, n, generator=generator)
    put_rounded(module, rounded(w, grid_of(module), torch.bfloat16))
    if module.bias is not None:
        module.bias.data = torch.randn(m, generator=generator)
    return module


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("n", [64, 72])
def test_a_stand_in_answers_as_the_layer_until_an_integer_moves(bits: int, n: int) -> None:
    module = packed(16, n, bits, bias=True)
    codes, scales = module.codes.clone(), module.scales.clone()
    learned = LearnedRounding(module, torch.bfloat16)
    x = torch.randn(5, n)
    torch.testing.assert_close(learned(x), module(x))

    # less than half a step is nothing, more is one
    learned.numbers.data += 0.4
    learned.store(module)
    assert torch.equal(module.codes, codes)
    assert torch.equal(module.scales, scales)
    learned.numbers.data += 0.2
    learned.store(module)
    torch.testing.assert_close(learned(x), module(x))
    assert not torch.equal(module.codes, codes)
    assert torch.equal(module.weight, learned.weight)


@pytest.mark.parametrize("bits", [8, 4])
def test_gradients_pass_through_rounding_and_end_at_the_edge_of_the_grid(bits: int) -> None:
    """They are those of an ordinary matrix product of codes and scales."""
    module = packed(8, 64, bits)
    learned = LearnedRounding(module, torch.bfloat16)
    learned.numbers.data[0, 0] = grid_of(module).highest + 0.6
    learned.requires_grad_()
    x, weights = torch.randn(5, 64), torch.randn(5, 8)
    (learned(x) * weights).sum().backward()

    grid = learned.grid
    codes = learned.numbers.detach().round().clamp(grid.lowest, grid.highest).requires_grad_()
    scales = learned.scales.detach().to(torch.bfloat16).float().requires_grad_()
    groups = scales.repeat_interleave(32, 1) if bits == 4 else scales
    ((x @ (codes * groups).T) * weights).sum().backward()
    assert codes.grad is not None
    expected = codes.grad.clone()
    assert expected[0, 0] != 0
    expected[0, 0] = 0
    torch.testing.assert_close(learned.numbers.grad, expected)
    torch.testing.assert_close(learned.scales.grad, scales.grad)


def test_stand_ins_give_the_layers_back() -> None:
    model = LowRankLinear(32, 16, 32, bias=False)
    model.svd_down, model.svd_up = packed(32, 32, 8), packed(16, 32, 4)
    learned = {
        name: LearnedRounding(model.get_submodule(name), torch.bfloat16)  # type: ignore[arg-type]
        for name in ("svd_down", "svd_up")
    }
    originals = {name: model.get_submodule(name) for name in learned}
    layers = StandIns(model, learned)
    x = torch.randn(3, 32)
    with layers.training():
        assert model.svd_up is learned["svd_up"]
        learned["svd_up"].numbers.data += 1
        changed = model(x)
        with layers.stored():
            torch.testing.assert_close(model(x), changed)
    assert all(model.get_submodule(name) is module for name, module in originals.items())
    torch.testing.assert_close(model(x), changed)


@pytest.fixture(scope="module", params=["factors at 4 bits", "whole and factors"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """(a tiny Llama, the same in fewer bits), both with a tokenizer."""
    folder = tmp_path_factory.mktemp("heal")
    teacher = zoo.save("llama", folder / "model")
    words_tokenizer(teacher)
    if request.param == "factors at 4 bits":
        recipe = svdcli.Recipe("keep", 0.9, bits="4", group_size=32)
        svdcli.compress(teacher, folder / "small", recipe)
    else:
        reading = svdcli.Reading(TEXT, samples=16, seq_len=32)
        recipe = svdcli.Recipe("keep_bytes", 0.25, bits="auto", allocate="global", group_size=32)
        svdcli.compress(teacher, folder / "small", recipe, reading=reading)
    return teacher, folder / "small"


@pytest.fixture(autouse=True)
def _small_batches_and_large_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """With steps as large as these a few are enough for an integer to move."""
    monkeypatch.setattr("svdcli.text.tokens.TOKENS_IN_A_BATCH", 128)
    monkeypatch.setattr(blocks, "BLOCK_STEP", 0.2)
    monkeypatch.setattr(blocks, "WHOLE_STEP", 0.2)


def test_packed_layers_heal_and_nothing_else_changes(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    teacher, small = pair
    found = svdcli.heal(small, tmp_path / "healed", teacher=teacher, texts=TEXT, **HOW)
    healed = found.report.healing["blocks"]
    assert list(healed) == ["model.layers.0", "model.layers.1", WHOLE]
    assert all(block["after"] < block["before"] for block in healed.values())
    assert svdcli.verify(tmp_path / "healed", teacher).ok

    # integers and scales alone, in as many bytes
    old, new = (contents(folder / "model.safetensors") for folder in (small, tmp_path / "healed"))
    assert old.keys() == new.keys()
    changed = {name for name in old if old[name] != new[name]}
    packed: set[str] = set()
    for layer in found.plan.factored:
        packed |= {tensor.name for tensor in layer.stored() if not tensor.name.endswith("_shape")}
    assert changed
    assert changed <= packed
    assert all(old[name][:2] == new[name][:2] for name in old)


def test_the_reported_error_is_that_of_what_is_stored(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """What a second healing starts from, on the same held-out text, is what the first one ended
    with."""
    teacher, small = pair
    how = HOW | {"memory": 0}
    found = svdcli.heal(small, tmp_path / "healed", teacher=teacher, texts=TEXT, **how)
    again = svdcli.heal(tmp_path / "healed", tmp_path / "twice", teacher=teacher, texts=TEXT, **how)
    first = found.report.healing["blocks"]["model.layers.0"]
    second = again.report.healing["blocks"]["model.layers.0"]
    assert second["before"] == pytest.approx(first["after"], rel=1e-4)
    assert second["after"] <= second["before"]


def test_steps_that_are_far_too_large_leave_nothing_worse(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_STEP", 3.0)
    monkeypatch.setattr(blocks, "WHOLE_STEP", 3.0)
    teacher, small = pair
    how = HOW | {"hard_labels": 0.0}
    found = svdcli.heal(small, tmp_path / "healed", teacher=teacher, texts=TEXT, **how)
    healed = found.report.healing["blocks"]
    assert all(block["after"] <= block["before"] for block in healed.values())


def test_a_block_is_rounded_for_what_the_packed_blocks_before_it_send(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """Without a single step of training, in closed form alone."""
    teacher, small = pair
    how = HOW | {"effort": Effort(steps=1), "memory": 0}
    found = svdcli.heal(small, tmp_path / "healed", teacher=teacher, texts=TEXT, **how)
    second = found.report.healing["blocks"]["model.layers.1"]
    assert second["after"] < 0.9 * second["before"]


def test_a_table_in_fewer_bits_stays_as_it_is(tmp_path: Path) -> None:
    """In a model of bfloat16, whose table and tied head lie outside every block."""
    teacher = zoo.save("llama-tied", tmp_path / "model")
    model = svdcli.load(teacher).to(torch.bfloat16)
    model.save_pretrained(teacher)
    words_tokenizer(teacher)
    recipe = svdcli.Recipe("keep", 0.9, bits="4", group_size=32, embedding_bits="8")
    svdcli.compress(teacher, tmp_path / "small", recipe)
    found = svdcli.heal(tmp_path / "small", tmp_path / "healed", teacher=teacher, texts=TEXT, **HOW)
    assert WHOLE in found.report.healing["blocks"]
    assert svdcli.verify(tmp_path / "healed", teacher).ok
    folders = (tmp_path / "small", tmp_path / "healed")
    old, new = (contents(folder / "model.safetensors") for folder in folders)
    table = [name for name in old if "embed_tokens" in name]
    assert len(table) == 2
    assert all(old[name] == new[name] for name in table)
