"""Adapters are refused in a line: their matrices are factors already."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import weight
from safetensors.torch import save_file

from svdcli.errors import SvdcliError
from svdcli.plan.adapters import adapter_kind
from svdcli.plan.layers import choose_layers
from svdcli.plan.recipe import Recipe
from svdcli.plan.tensors import TensorInfo
from svdcli.verbs.compress import compress

RANK = Recipe("rank", 8)
PEFT = "base_model.model.model.layers.0.self_attn.q_proj"
ADAPTERS = {
    "PEFT": (f"{PEFT}.lora_A.weight", f"{PEFT}.lora_B.weight"),
    "kohya": ("lora_unet_a.lora_down.weight", "lora_unet_a.lora_up.weight"),
    "diffusers": ("unet.up.attn.to_q.lora.down.weight", "unet.up.attn.to_q_lora.up.weight"),
    "older diffusers": ("unet.down.0.to_q.lora.down.weight", "unet.down.0.to_q.lora.up.weight"),
    "XLabs": (
        "double_blocks.0.processor.qkv_lora1.down.weight",
        "double_blocks.0.processor.qkv_lora1.up.weight",
    ),
    "MLX": ("layers.0.q_proj.lora_a", "layers.0.q_proj.lora_b"),
    "DoRA": ("a.lora_A.weight", "a.lora_B.weight"),
    "LoHa": ("lora_te.hada_w1_a", "lora_te.hada_w1_b"),
    "LoKr": ("lycoris_a.lokr_w1", "lycoris_a.lokr_w2"),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_are_refused(tmp_path: Path, kind: str) -> None:
    first, second = ADAPTERS[kind]
    save_file(
        {first: weight(64, 256), second: weight(256, 64), "x.alpha": torch.tensor(8.0)},
        tmp_path / "a.safetensors",
    )
    with pytest.raises(SvdcliError, match=r"adapter.*merge it into its base model"):
        compress(tmp_path / "a.safetensors", recipe=RANK)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_an_adapter_in_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(
        {"base_model.prompt_encoder.embedding.weight": weight(64, 256)},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "PROMPT_TUNING"}))
    with pytest.raises(SvdcliError, match="is an adapter"):
        compress(folder, recipe=RANK)


def test_a_model_with_an_adapter_in_it_is_a_model() -> None:
    whole = TensorInfo("layers.0.q_proj.base_layer.weight", "F32", (512, 512))
    factors = [
        TensorInfo(f"layers.0.q_proj.lora_{part}.default.weight", "F32", shape)
        for part, shape in (("A", (8, 512)), ("B", (512, 8)))
    ]
    assert adapter_kind([whole, *factors]) == ""
    assert adapter_kind(factors) == "a LoRA adapter"


def test_factors_of_an_adapter_in_a_model_stay_dense() -> None:
    shapes = {
        "q_proj.base_layer": (512, 512),
        "q_proj.lora_A.default": (64, 512),
        "q_proj.lora_B.default": (512, 64),
    }
    selected, skipped = choose_layers(
        [TensorInfo(f"layers.0.{name}.weight", "F32", shape) for name, shape in shapes.items()]
    )
    assert [tensor.module for tensor in selected] == ["layers.0.q_proj.base_layer"]
    assert {item.reason for item in skipped} == {"a factor of an adapter that is not merged"}


@pytest.mark.parametrize(
    "name",
    [
        "model.explorer_A.weight",
        "flora_up.weight",
        "layers.0.up.weight",
        "catalora.weight",
        "oft.weight",
    ],
)
def test_names_that_only_look_like_it(name: str) -> None:
    assert adapter_kind([TensorInfo(name, "F32", (64, 64))]) == ""
