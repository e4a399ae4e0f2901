"""Stand-ins for low-rank layers: the same function before training, an ordinary backward pass's
moments, balanced factors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo

import svdcli
from svdcli.calibration.loss import ModelLoss
from svdcli.healing.coordinates import moments_of, whitened_layers
from svdcli.healing.standins import StandIns
from svdcli.linalg.balance import balanced
from svdcli.models.modules import LOW_RANK

IDS = [
    {"input_ids": torch.randint(2, 96, (3, 10), generator=torch.Generator().manual_seed(i))}
    for i in range(4)
]


@pytest.mark.parametrize("layout", ["factored", "pivoted"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_whitened_layer_answers_as_the_layer_it_stands_for(
    family: str, layout: str, written: Callable[[str], Path], tmp_path: Path
) -> None:
    svdcli.compress(written(family), tmp_path / "small", svdcli.Recipe("keep", 0.5, layout=layout))
    teacher, student = (
        svdcli.load(folder).requires_grad_(False)
        for folder in (written(family), tmp_path / "small")
    )
    tensors = dict(student.named_parameters()) | dict(student.named_buffers())
    layers = [name for name, module in student.named_modules() if isinstance(module, LOW_RANK)]
    with torch.no_grad():
        before = zoo.answer(family, student)
        found = whitened_layers(teacher, student, tensors, IDS)
        assert sorted(found) == sorted(layers)
        whitened = StandIns(student, found)
        with whitened.training():
            assert not any(isinstance(module, LOW_RANK) for module in student.modules())
            torch.testing.assert_close(zoo.answer(family, student), before, rtol=1e-3, atol=1e-4)
            with whitened.stored():
                torch.testing.assert_close(
                    zoo.answer(family, student), before, rtol=1e-3, atol=1e-4
                )
            next(iter(found.values())).a.data *= 1.5
            changed = zoo.answer(family, student)
            with whitened.stored():
                torch.testing.assert_close(
                    zoo.answer(family, student), changed, rtol=1e-3, atol=1e-4
                )
        assert (changed - before).abs().max() > 1e-3
        torch.testing.assert_close(zoo.answer(family, student), changed, rtol=1e-3, atol=1e-4)


def test_moments_are_those_of_an_ordinary_backward_pass(written: Callable[[str], Path]) -> None:
    model = svdcli.load(written("llama"))
    names = ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"]
    frozen = model.requires_grad_(False)
    inputs, outputs = moments_of(frozen, dict.fromkeys(names, False), IDS, seed=3)
    model.requires_grad_(True)
    sums: dict[str, Any] = {}

    def add(key: str, values: torch.Tensor) -> None:
        rows = values.detach().reshape(-1, values.shape[-1])
        sums[key] = sums.get(key, 0) + rows.T @ rows

    for name in names:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda module, args, name=name: add(f"in {name}", args[0]))
        module.register_full_backward_hook(
            lambda module, into, out, name=name: add(f"out {name}", out[0])
        )
    loss = ModelLoss(3)
    for index, batch in enumerate(IDS):
        tensor, gradient = loss.cotangent(index, batch, model(**batch))
        tensor.backward(gradient)
    for name in names:
        torch.testing.assert_close(inputs[name], sums[f"in {name}"])
        torch.testing.assert_close(outputs[name], sums[f"out {name}"], rtol=1e-4, atol=1e-6)


def test_balanced_factors_have_the_same_product_and_the_same_gram_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    up, down = (
        torch.randn(30, 7, generator=generator) * 100,
        torch.randn(7, 20, generator=generator),
    )
    a, b = balanced(up, down)
    torch.testing.assert_close(a @ b, up @ down, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(a.T @ a, b @ b.T, rtol=1e-4, atol=1e-3)
    sigma = torch.linalg.svdvals(up @ down)[:7]
    torch.testing.assert_close((a.T @ a).diagonal(), sigma, rtol=1e-4, atol=1e-3)
