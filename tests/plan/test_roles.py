"""Heads, routers and embeddings are known by what they do; what the model's class leaves out stays
dense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import write_model

import svdcli
from svdcli.errors import NothingSelectedError, UsageError
from svdcli.plan.facts import ModelFacts
from svdcli.plan.layers import choose_layers
from svdcli.plan.tensors import TensorInfo

Shapes = dict[str, tuple[int, ...]]
BLOCK = "model.layers.1"
ATTENTION: Shapes = {
    f"{BLOCK}.self_attn.k_proj.weight": (64, 512),
    f"{BLOCK}.self_attn.o_proj.weight": (512, 512),
}


def tensors(shapes: Shapes) -> list[TensorInfo]:
    return [TensorInfo(name, "BF16", shape) for name, shape in shapes.items()]


def reasons(shapes: Shapes, config: dict[str, Any] | None = None, **options: Any) -> dict[str, str]:
    """{name: why it stays dense} of those that do."""
    facts = None if config is None else ModelFacts.of(config)
    _, skipped = choose_layers(tensors(shapes), facts=facts, **options)
    return {item.tensor.name: item.reason for item in skipped}


# Routers ------------------------------------------------------------------------------------------

EXPERTS: dict[str, Shapes] = {
    "one by one": {f"{BLOCK}.mlp.experts.0.w1.weight": (1024, 512)},
    "in stacks": {f"{BLOCK}.mlp.experts.gate_up_proj": (64, 1024, 512)},
    "in stacks of their own names": {f"{BLOCK}.mlp.input_linear.weight": (64, 1024, 512)},
}


@pytest.mark.parametrize("experts", EXPERTS.values(), ids=EXPERTS)
@pytest.mark.parametrize(
    "router",
    [
        "gate",
        "router",
        "router.layer",
        "gate.wg",
        "gate.router_mlp.fc1",
        "gating.0",
        "shared_router_proj",
        "scorer",
    ],
)
def test_a_router_is_known_whatever_it_is_called(router: str, experts: Shapes) -> None:
    shapes = (
        ATTENTION
        | experts
        | {f"{BLOCK}.mlp.{router}.weight": (64, 512), f"{BLOCK}.mlp.shared.up.weight": (1024, 512)}
    )
    found = reasons(shapes, {"num_local_experts": 64})
    assert found.pop(f"{BLOCK}.mlp.{router}.weight").startswith("expert router")
    assert not found.keys() & {*ATTENTION, f"{BLOCK}.mlp.shared.up.weight"}, (
        "as many outputs as experts are not enough"
    )


@pytest.mark.parametrize("router", ["gate", "router", "gate.wg"])
def test_without_a_config_a_router_is_known_by_its_name_beside_the_experts(router: str) -> None:
    shapes = ATTENTION | EXPERTS["one by one"] | {f"{BLOCK}.mlp.{router}.weight": (64, 512)}
    assert reasons(shapes) == {f"{BLOCK}.mlp.{router}.weight": "expert router"}


@pytest.mark.parametrize(
    "gate", ["self_attn.gate", "mlp.gate_proj", "shared.gate", "gateway.gate", "temporal.switch"]
)
def test_other_gates_of_a_mixture_of_experts_are_no_routers(gate: str) -> None:
    shapes = EXPERTS["one by one"] | {f"{BLOCK}.{gate}.weight": (512, 512)}
    assert not reasons(shapes, {"num_experts": 64})


def test_gates_of_a_model_without_experts_are_no_routers() -> None:
    assert not reasons(
        {f"{BLOCK}.mlp.gate.weight": (512, 512), f"{BLOCK}.moe_like.w.weight": (64, 512)},
        {"vocab_size": 9},
    )


@pytest.mark.parametrize(
    "chooser", ["self_attn.indexer.wq_b", "self_attn.index_q_proj", "attn.indexer.compressor.wkv"]
)
def test_what_picks_tokens_for_attention_is_not_selected(chooser: str) -> None:
    found = reasons(ATTENTION | {f"{BLOCK}.{chooser}.weight": (512, 512)})
    assert list(found) == [f"{BLOCK}.{chooser}.weight"]
    assert found[f"{BLOCK}.{chooser}.weight"].startswith("feeds a choice")


# Heads and embeddings -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head",
    [
        f"{BLOCK}.shared_head.head",
        "lm_heads.0",
        "talker.codec_head",
        "medusa_head.3",
        "decoder.heads.1",
    ],
)
def test_a_head_is_known_within_numbered_blocks_by_its_name_and_shape(head: str) -> None:
    shapes = ATTENTION | {f"{head}.weight": (900, 512)}
    assert set(reasons(shapes, {"audio_config": {"vocab_size": 900}})) == {f"{head}.weight"}
    assert set(reasons(shapes | {"embed.weight": (900, 512)})) == {f"{head}.weight", "embed.weight"}
    assert not reasons(shapes, {"vocab_size": 901}), "a head of attention, or of anything else"


@pytest.mark.parametrize("name", ["w", "model.readout", "out.proj"])
def test_outside_of_blocks_a_vocabulary_is_known_by_its_rows(name: str) -> None:
    shapes = ATTENTION | {f"{name}.weight": (5000, 512)}
    assert set(reasons(shapes, {"vocab_size": 5000})) == {f"{name}.weight"}
    assert not reasons(shapes)


def test_a_small_vocabulary_is_no_sign_of_a_head() -> None:
    assert not reasons(
        {"encoder.subsampling.weight": (512, 128), "pooler.dense.weight": (512, 512)},
        {"vocab_size": 512},
    )


@pytest.mark.parametrize("shape", [(37, 512), (512, 37)])
def test_a_head_of_as_many_rows_as_labels(shape: tuple[int, int]) -> None:
    config = {"id2label": {str(number): "x" for number in range(37)}}
    assert set(reasons(ATTENTION | {"fc.weight": shape}, config)) == {"fc.weight"}
    assert not reasons({f"{BLOCK}.fc.weight": shape}, config), (
        "within blocks the name must say so too"
    )
    assert set(
        reasons({"class_predictor.weight": (38, 512), "proj.weight": (38, 512)}, config)
    ) == {"class_predictor.weight"}


DETECTION = ["class_embed.0", "model.decoder.bbox_embed.3.layers.0", "model.enc_out_class_embed.2"]


@pytest.mark.parametrize("head", [*DETECTION, "model.vision_tower.head_linear"])
def test_heads_of_detectors_and_of_visual_tokenizers_are_no_embeddings(head: str) -> None:
    assert reasons(ATTENTION | {f"{head}.weight": (256, 256)}) == {f"{head}.weight": "output head"}


@pytest.mark.parametrize(
    "table", ["query", "model.queries", "model.query_feat", "decoder.queries_features"]
)
def test_tables_of_learned_queries_are_embeddings(table: str) -> None:
    assert reasons(ATTENTION | {f"{table}.weight": (200, 1024)}) == {f"{table}.weight": "embedding"}
    assert not reasons(
        {f"{BLOCK}.attention.self.query.weight": (256, 1024), "pooling.query.weight": (512, 512)}
    )


def test_layers_of_a_network_within_a_head_are_layers() -> None:
    shapes = {
        "head.blocks.0.mlp.fc1.weight": (512, 512),
        "head.2.weight": (512, 512),
        "head.fc.weight": (512, 512),
    }
    assert set(reasons(shapes)) == {"head.2.weight", "head.fc.weight"}


def test_layers_of_a_tower_below_something_that_embeds_are_layers() -> None:
    tower = "model.embed_tokens_extend.image_embed"
    shapes = {
        f"{tower}.layers.0.attn.q_proj.weight": (512, 512),
        f"{tower}.proj.weight": (512, 512),
        "embeds.3.weight": (90, 512),
    }
    assert set(reasons(shapes)) == {f"{tower}.proj.weight", "embeds.3.weight"}


# What the class leaves out ------------------------------------------------------------------------

CONFIG = {"model_type": "some", "num_hidden_layers": 2, "vision_config": {"num_hidden_layers": 9}}
LEFT_OUT = [
    "mtp.fc",
    "model.mtp.layers.0.mlp.up_proj",
    "model.mtp_block.0.self_attn.q_proj",
    "model.layers.2.eh_proj",
]
LEFT_OUT += [
    "language_model.model.layers.61.mlp.up_proj",
    "model.language_model.layers.2.up_proj",
    "transformer.h.2.attn.c_attn",
]


@pytest.mark.parametrize("layer", LEFT_OUT)
def test_layers_that_no_class_has_are_left_dense_unless_named(layer: str) -> None:
    shapes = {f"{layer}.weight": (512, 512)} | ATTENTION
    assert list(reasons(shapes, CONFIG)) == [f"{layer}.weight"]
    assert f"{layer}.weight" not in reasons(shapes, CONFIG, include=[layer])
    assert f"{layer}.weight" in reasons(shapes, CONFIG, include=["*"]), "a glob does not name it"
    assert not reasons(shapes), "without a config.json there is no class"


@pytest.mark.parametrize(
    "tower",
    [
        "visual.blocks",
        "vision_tower.encoder.layers",
        "audio.layers",
        "model.encoder.layers",
        "mlp.h",
    ],
)
def test_towers_beside_the_main_stack_have_depths_of_their_own(tower: str) -> None:
    assert not reasons({f"{tower}.8.fc1.weight": (512, 512)}, CONFIG)


# Tied weights -------------------------------------------------------------------------------------

TABLE: Shapes = {"model.embed_tokens.weight": (900, 64), "model.embed_positions.weight": (512, 64)}


@pytest.mark.parametrize("how", ["include", "exclude", "layers"])
@pytest.mark.parametrize(
    "head", ["lm_head", "lm_head.weight", "cls.predictions.decoder", "proj_out"]
)
def test_a_head_that_is_tied_leads_to_its_embedding(head: str, how: str) -> None:
    with pytest.raises(
        UsageError,
        match=r"tied weights are in the file once, here as model\.embed_tokens; name model",
    ):
        reasons(TABLE, {"tie_word_embeddings": True, "vocab_size": 900}, **{how: [head]})
    with pytest.raises(UsageError, match=r"near names: model\.embed"):
        reasons(TABLE, {"tie_word_embeddings": False, "vocab_size": 900}, **{how: [head]})


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_the_tables_of_an_encoder_and_a_decoder_lead_to_the_shared_one(side: str) -> None:
    with pytest.raises(
        UsageError, match="tied weights are in the file once, here as shared; name shared"
    ):
        reasons({"shared.weight": (900, 64)}, {"vocab_size": 900}, include=[f"{side}.embed_tokens"])


def test_a_pattern_that_only_finds_what_stays_dense_says_why(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    with pytest.raises(
        NothingSelectedError,
        match=r"embed_tokens stays dense: embedding\); its full name as --include",
    ):
        svdcli.compress(model, tmp_path / "o", svdcli.Recipe("rank", 8, include=("*embed*",)))


def test_an_embedding_that_is_tied_leads_to_its_head() -> None:
    with pytest.raises(UsageError, match="here as lm_head"):
        reasons({"lm_head.weight": (900, 64)}, {"vocab_size": 900}, include=["model.embed_tokens"])


@pytest.mark.parametrize("wrong", ["lm_haed", "model.embed_token"])
def test_where_both_are_there_a_name_is_only_mistyped(wrong: str) -> None:
    with pytest.raises(UsageError, match="near names"):
        reasons(TABLE | {"lm_head.weight": (900, 64)}, {"vocab_size": 900}, include=[wrong])
