"""Which layers warn loaders without the plugin, and which sub-configs ask for it."""

from __future__ import annotations

import random

import pytest

from svdcli.plan.parts import part_configs, tripwires


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (["model.layers.0.q", "model.layers.0.k", "model.layers.1.q"], {"model.layers.0.k"}),
        (["model.layers.2.q", "model.layers.10.q"], {"model.layers.2.q"}),
        (
            ["encoder.block.0.layer.0.q", "decoder.block.0.layer.0.q"],
            {"encoder.block.0.layer.0.q", "decoder.block.0.layer.0.q"},
        ),
        (["layers.0.mlp.experts.0.up", "layers.1.q"], {"layers.1.q"}),
        (["layers.3.experts.1.up", "layers.3.experts.0.up"], {"layers.3.experts.0.up"}),
        (
            ["visual.blocks.0.qkv", "model.layers.0.q", "visual.merger"],
            {"visual.blocks.0.qkv", "model.layers.0.q", "visual.merger"},
        ),
        (["pooler.dense", "lm_head", "proj"], {"pooler.dense", "lm_head", "proj"}),
        (["0", "2"], {"0"}),
        ([], set()),
    ],
    ids=[
        "first",
        "by number",
        "every stack",
        "not an expert",
        "unless only experts",
        "parts",
        "outside",
        "bare",
        "none",
    ],
)
def test_one_of_every_stack_and_all_outside(modules: list[str], expected: set[str]) -> None:
    assert set(tripwires(modules)) == expected
    shuffled = random.Random(0).sample(modules, len(modules))
    assert tripwires(shuffled) == tuple(name for name in shuffled if name in expected)


def test_parts_are_what_has_a_model_type_or_the_name_of_one() -> None:
    config = {
        "model_type": "any",
        "vision_config": {"hidden_size": 3},
        "text_config": {
            "model_type": "t",
            "rope_parameters": {"rope_type": "default"},
            "audio_config": {},
        },
        "thinker": {"model_type": "thinker", "inner": {"model_type": "inner"}},
        "quantization_config": {"quant_method": "x"},
        "id2label": {"0": "a"},
        "backbone": {"size": 1},
        "decoder": None,
    }
    found = {path for path, _ in part_configs(config)}
    assert found == {
        ("vision_config",),
        ("text_config",),
        ("text_config", "audio_config"),
        ("thinker",),
        ("thinker", "inner"),
    }
