"""Which layers are chosen: on the tensor names and shapes of real architectures, and by
patterns."""

from __future__ import annotations

import pytest

from svdcli.errors import UsageError
from svdcli.plan.layers import choose_layers
from svdcli.plan.tensors import TensorInfo

LLAMA = {
    "model.embed_tokens.weight": (32000, 2048),
    "model.layers.0.self_attn.q_proj.weight": (2048, 2048),
    "model.layers.0.self_attn.k_proj.weight": (256, 2048),
    "model.layers.0.mlp.down_proj.weight": (2048, 5632),
    "model.layers.0.input_layernorm.weight": (2048,),
    "model.norm.weight": (2048,),
    "lm_head.weight": (32000, 2048),
}
GPT2 = {
    "wte.weight": (50257, 768),
    "wpe.weight": (1024, 768),
    "h.0.attn.c_attn.weight": (768, 2304),
    "h.0.attn.c_proj.weight": (768, 768),
    "h.0.attn.bias": (1, 1, 1024, 1024),
    "h.0.mlp.c_fc.weight": (768, 3072),
    "h.0.ln_1.weight": (768,),
}
BERT = {
    "bert.embeddings.word_embeddings.weight": (30522, 768),
    "bert.embeddings.position_embeddings.weight": (512, 768),
    "bert.encoder.layer.0.attention.self.query.weight": (768, 768),
    "bert.encoder.layer.0.attention.output.dense.weight": (768, 768),
    "bert.encoder.layer.0.attention.output.LayerNorm.weight": (768,),
    "bert.pooler.dense.weight": (768, 768),
    "cls.predictions.decoder.weight": (30522, 768),
    "classifier.weight": (2, 768),
}
T5 = {
    "shared.weight": (32128, 512),
    "encoder.block.0.layer.0.SelfAttention.q.weight": (512, 512),
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 8),
    "decoder.block.0.layer.2.DenseReluDense.wi.weight": (2048, 512),
    "lm_head.weight": (32128, 512),
}
MIXTRAL = {
    "model.embed_tokens.weight": (32000, 1024),
    "model.layers.0.mlp.gate.weight": (64, 1024),
    "model.layers.0.mlp.experts.gate_up_proj": (64, 2048, 1024),
    "model.layers.0.mlp.experts.0.w1.weight": (2048, 1024),
    "model.layers.0.self_attn.q_proj.weight": (1024, 1024),
}
GATED = {
    "blocks.0.gate.weight": (512, 512),
    "blocks.0.conv.weight": (64, 64, 3, 3),
    "mixer.A_log": (512, 64),
}
CASES = {
    "llama": (
        LLAMA,
        {
            "model.layers.0.self_attn.q_proj",
            "model.layers.0.self_attn.k_proj",
            "model.layers.0.mlp.down_proj",
        },
    ),
    "gpt2": (GPT2, {"h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_fc"}),
    "bert": (
        BERT,
        {
            "bert.encoder.layer.0.attention.self.query",
            "bert.encoder.layer.0.attention.output.dense",
            "bert.pooler.dense",
        },
    ),
    "t5": (
        T5,
        {"encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.2.DenseReluDense.wi"},
    ),
    "mixture of experts": (
        MIXTRAL,
        {"model.layers.0.mlp.experts.0.w1", "model.layers.0.self_attn.q_proj"},
    ),
    "gates that are no routers": (GATED, {"blocks.0.gate"}),
}


def tensors(shapes: dict[str, tuple[int, ...]], dtype: str = "BF16") -> list[TensorInfo]:
    return [TensorInfo(name, dtype, shape) for name, shape in shapes.items()]


@pytest.mark.parametrize(("shapes", "expected"), CASES.values(), ids=CASES)
def test_architectures(shapes: dict[str, tuple[int, ...]], expected: set[str]) -> None:
    selected, skipped = choose_layers(tensors(shapes))
    assert {tensor.module for tensor in selected} == expected
    assert {item.tensor.name for item in skipped} == set(shapes) - {
        f"{module}.weight" for module in expected
    }
    assert all(item.reason for item in skipped)


def reasons(shapes: dict[str, tuple[int, ...]], **options: object) -> dict[str, str]:
    _, skipped = choose_layers(tensors(shapes), **options)  # type: ignore[arg-type]
    return {item.tensor.name: item.reason for item in skipped}


def test_reasons_say_what_a_tensor_is() -> None:
    found = reasons(LLAMA | MIXTRAL | {"fc.weight": (12, 12)})
    assert found["model.embed_tokens.weight"] == "embedding"
    assert found["lm_head.weight"] == "output head"
    assert found["model.norm.weight"].startswith("1-D")
    assert found["model.layers.0.mlp.experts.gate_up_proj"].startswith("3-D expert stack")
    assert found["model.layers.0.mlp.gate.weight"] == "expert router"
    assert found["fc.weight"].startswith("too small to gain")


@pytest.mark.parametrize(
    ("dtype", "chosen"),
    [
        ("F32", True),
        ("F64", True),
        ("F16", True),
        ("F8_E4M3", False),
        ("I8", False),
        ("C64", False),
    ],
)
def test_only_real_floating_dtypes_are_factored(dtype: str, chosen: bool) -> None:
    selected, skipped = choose_layers([TensorInfo("fc.weight", dtype, (64, 64))])
    assert bool(selected) == chosen
    assert chosen or skipped[0].reason.startswith(dtype)


THREE = {"a.weight": (64, 64), "b.weight": (64, 64), "c.weight": (64, 64), "d.weight": (64, 64)}
TIED = {"b.weight": "a.weight", "a.weight": "c.weight", "c.weight": "a.weight"}


def test_tied_weights_are_left_dense() -> None:
    found = reasons(THREE, tied=TIED)
    assert found == {
        one: f"tied: shares its storage with {TIED[one]}"
        for one in ("a.weight", "b.weight", "c.weight")
    }


@pytest.mark.parametrize("how", ["include", "layers"])
def test_tied_weights_are_factored_when_all_their_names_are_given(how: str) -> None:
    selected, _ = choose_layers(tensors(THREE), tied=TIED, **{how: ["c", "a", "b.weight"]})
    assert [tensor.module for tensor in selected] == ["a", "b", "c"]
    with pytest.raises(
        UsageError, match=r"b is tied: it shares its storage with a, c; name all of them"
    ):
        choose_layers(tensors(THREE), tied=TIED, **{how: ["b", "c"]})


def test_a_head_that_is_called_something_else_is_known_by_its_shape() -> None:
    assert (
        "shaped like the embedding"
        in reasons({"tok_emb.weight": (900, 64), "readout.weight": (900, 64)})["readout.weight"]
    )


@pytest.mark.parametrize(
    "table", ["embeddings.position_embeddings", "wpe", "embeddings.token_type_embeddings"]
)
def test_a_square_layer_is_no_head_because_a_table_of_positions_has_its_shape(table: str) -> None:
    pooled = {
        "embeddings.word_embeddings.weight": (900, 64),
        f"{table}.weight": (64, 64),
        "pooler.dense.weight": (64, 64),
    }
    assert "pooler.dense.weight" not in reasons(pooled)


@pytest.mark.parametrize(
    "pattern", ["*q_proj*", "model.layers.0.self_attn.q_proj", "re:q_proj", r"re:layers\.0\..*q"]
)
def test_patterns(pattern: str) -> None:
    selected, _ = choose_layers(tensors(LLAMA), include=[pattern])
    assert {tensor.module for tensor in selected} == {"model.layers.0.self_attn.q_proj"}
    left, _ = choose_layers(tensors(LLAMA), exclude=[pattern])
    assert "model.layers.0.self_attn.q_proj" not in {tensor.module for tensor in left}
    assert len(left) == 2


def test_patterns_that_match_nothing_show_near_names() -> None:
    with pytest.raises(UsageError, match=r"matches no tensor.*near names: .*q_proj"):
        choose_layers(tensors(LLAMA), include=["model.layers.0.self_attn.qproj"])
    with pytest.raises(UsageError, match="not a regular expression"):
        choose_layers(tensors(LLAMA), exclude=["re:("])
    with pytest.raises(UsageError, match="no tensor 'q_projj'"):
        choose_layers(tensors(LLAMA), layers=["q_projj"])


def test_only_an_exact_name_overrides_a_rule_that_goes_by_name() -> None:
    wide, _ = choose_layers(tensors(LLAMA), include=["*"])
    assert "lm_head" not in {tensor.module for tensor in wide}
    exact, _ = choose_layers(tensors(LLAMA), layers=["lm_head"])
    assert [tensor.module for tensor in exact] == ["lm_head"]
    assert reasons(LLAMA, include=["model.norm"])["model.norm.weight"].startswith("1-D"), (
        "shape rules stay"
    )
