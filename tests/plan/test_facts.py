"""What config.json says: numbers under all their spellings, in the configs inside it too."""

from __future__ import annotations

from typing import Any

import pytest

from svdcli.plan.facts import ModelFacts

LABELS = {"id2label": {str(number): f"LABEL_{number}" for number in range(7)}}


@pytest.mark.parametrize(
    "spelling",
    ["vocab_size", "n_vocab", "tgt_vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input"],
)
def test_vocabularies(spelling: str) -> None:
    assert ModelFacts.of({spelling: 900, "type_vocab_size": 2}).vocabularies == {900}


@pytest.mark.parametrize(
    "spelling",
    [
        "num_experts",
        "num_local_experts",
        "n_routed_experts",
        "moe_num_experts",
        "num_moe_experts",
        "n_experts",
    ],
)
def test_experts(spelling: str) -> None:
    others = {
        "num_experts_per_tok": 2,
        "n_shared_experts": 3,
        "num_shared_experts": 4,
        "expert_capacity": 64,
    }
    assert ModelFacts.of({spelling: 16} | others).experts == {16}
    assert ModelFacts.of({"ffn_config": {spelling: 16}}).experts == {16}
    assert ModelFacts.of({spelling: [16, 32]}).experts == {16, 32}
    assert not ModelFacts.of({spelling: 1}).experts, "one expert needs no router"


def test_labels() -> None:
    assert ModelFacts.of(LABELS).labels == {7}
    assert (
        ModelFacts.of({"num_labels": 7}).labels == ModelFacts.of({"num_classes": 7}).labels == {7}
    )
    assert not ModelFacts.of({"num_labels": 2}).labels, "two rows are too few to say anything"


@pytest.mark.parametrize(
    ("config", "depth"),
    [
        ({"num_hidden_layers": 5}, 5),
        ({"n_layer": 5}, 5),
        ({"num_layers": 5}, 5),
        ({"num_hidden_layers": 9, "text_config": {"num_hidden_layers": 5}}, 5),
        ({"thinker_config": {"text_config": {"num_hidden_layers": 5}, "num_hidden_layers": 9}}, 5),
        ({"num_hidden_layers": 9, "text_config": {}}, None),
        ({"vision_config": {"num_hidden_layers": 5}}, None),
        ({"num_hidden_layers": [5]}, None),
    ],
)
def test_the_depth_is_that_of_the_text_stack(config: dict[str, Any], depth: int | None) -> None:
    assert ModelFacts.of(config).depth == depth


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({}, None),
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, False),
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"vision_config": {"tie_word_embeddings": True}}, None),
        ({"tie_word_embeddings": "yes"}, None),
    ],
)
def test_tied_as_transformers_reads_it(config: dict[str, Any], tied: bool | None) -> None:
    assert ModelFacts.of(config).tied is tied


def test_a_class_reads_it_where_it_names_one() -> None:
    assert ModelFacts.of({"model_type": "llama"}).by_class
    assert ModelFacts.of({"architectures": ["Mine"]}).by_class
    assert not ModelFacts.of({"num_classes": 1000}).by_class


@pytest.mark.parametrize("value", [None, "16", 2.5, True, -1, 0, {"a": None}, [], [[3]], ["x"]])
def test_odd_values_say_nothing(value: Any) -> None:
    odd = {
        "num_experts": value,
        "vocab_size": value,
        "num_labels": value,
        "id2label": value,
        "num_hidden_layers": value,
    }
    facts = ModelFacts.of(odd | {"text_config": value})
    assert (facts.experts, facts.vocabularies, facts.depth) == (frozenset(), frozenset(), None)
