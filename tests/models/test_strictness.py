"""Opening is exactly as strict as stock transformers is with the original, but for what is missing
because of factoring."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from helpers import weight
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import svdcli
from svdcli.errors import SvdcliError
from svdcli.models.hf import SvdConfig
from svdcli.models.modules import LOW_RANK

Tensors = dict[str, Tensor]
Written = Callable[[str], Path]
Compressed = Callable[..., Path]

QWEN3_NEXT = zoo._decoder(
    head_dim=16,
    moe_intermediate_size=64,
    shared_expert_intermediate_size=64,
    num_experts=4,
    num_experts_per_tok=2,
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    layer_types=["linear_attention", "full_attention"],
)


def edit(folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """Rewrite the only weight file of a folder, as a model that transformers saved."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})
    return folder


def reconfigure(folder: Path, **changes: Any) -> Path:
    """Change config.json; None removes a key."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value is not None})
    )
    return folder


def account(name: str, path: Path, **how: Any) -> dict[str, set[str]]:
    """What transformers says that it did not find or could not place, with factors under the names
    of their weights, and experts under those of their stacks."""
    _, info = getattr(transformers, name).from_pretrained(path, output_loading_info=True, **how)

    def plain(key: str) -> str:
        key = re.sub(r"svd_(up\.weight|down\.weight|rows)$", "weight", key)
        key = re.sub(r"experts\.\d+\.w[13]\.weight$", "experts.gate_up_proj", key)
        return re.sub(r"experts\.\d+\.w2\.weight$", "experts.down_proj", key)

    return {
        kind: {plain(str(key)) for key in info[kind]}
        for kind in ("missing_keys", "unexpected_keys")
    }


# What a class ignores or makes anew ---------------------------------------------------------------


@dataclass(frozen=True)
class Situation:
    """A model, what its files hold besides or lack, classes that open them, and what is to be
    factored."""

    build: Callable[[], Any]
    change: Callable[[Tensors], Tensors]
    classes: tuple[str, ...]
    include: tuple[str, ...] = ("*",)


def a_third_layer(tensors: Tensors) -> Tensors:
    return tensors | {
        name.replace("layers.1.", "layers.2."): t.clone()
        for name, t in tensors.items()
        if "layers.1." in name
    }


def old_heads(tensors: Tensors) -> Tensors:
    """As bert-base-uncased has them."""
    heads = {
        "cls.seq_relationship.weight": weight(2, 64),
        "cls.seq_relationship.bias": torch.zeros(2),
    }
    pooler = {
        "bert.pooler.dense.weight": weight(64, 64, 3),
        "bert.pooler.dense.bias": torch.zeros(64),
    }
    return tensors | heads | pooler | {"bert.embeddings.position_ids": torch.arange(64)[None]}


def with_prediction_layers(tensors: Tensors) -> Tensors:
    expert = {
        f"mtp.layers.0.mlp.experts.{i}.{name}_proj.weight": weight(64, 64, i)
        for i in range(2)
        for name in ("gate", "up")
    }
    return tensors | expert | {"mtp.fc.weight": weight(64, 128), "mtp.norm.weight": torch.ones(64)}


def without_a_norm(tensors: Tensors) -> Tensors:
    left = {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}
    return left | {"model.layers.0.extra.weight": weight(64, 64)}


SITUATIONS = {
    "heads that the class does not have": Situation(
        zoo._model("BertForMaskedLM", **zoo._BERT),
        old_heads,
        (
            "BertForMaskedLM",
            "BertForPreTraining",
            "BertModel",
            "BertForSequenceClassification",
            "AutoModelForCausalLM",
        ),
    ),
    "a pooler that the file lacks": Situation(
        zoo._model("BertModel", **zoo._BERT),
        lambda tensors: {name: tensor for name, tensor in tensors.items() if "pooler" not in name},
        ("BertModel", "BertForMaskedLM"),
    ),
    "layers that the class ignores": Situation(
        zoo._model("Qwen3NextForCausalLM", **QWEN3_NEXT),
        with_prediction_layers,
        ("Qwen3NextForCausalLM", "AutoModel"),
    ),
    "a layer beyond the last": Situation(
        zoo.FAMILIES["llama"].build, a_third_layer, ("LlamaForCausalLM", "LlamaModel")
    ),
    "experts beyond the last": Situation(
        zoo.FAMILIES["mixtral"].build, a_third_layer, ("MixtralForCausalLM",)
    ),
    "buffers of older saves": Situation(
        zoo.FAMILIES["llama"].build,
        lambda tensors: tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)},
        ("LlamaForCausalLM",),
    ),
    "a missing norm and a tensor too many": Situation(
        zoo.FAMILIES["llama"].build,
        without_a_norm,
        ("LlamaForCausalLM", "LlamaModel"),
    ),
    "another family": Situation(zoo.FAMILIES["llama"].build, dict, ("GPT2LMHeadModel",)),
    "a head factored, and a class without it": Situation(
        zoo.FAMILIES["llama"].build,
        dict,
        ("LlamaModel", "LlamaForSequenceClassification"),
        include=("lm_head", "*"),
    ),
    "the part that is an encoder": Situation(zoo.FAMILIES["t5"].build, dict, ("T5EncoderModel",)),
}


@pytest.mark.parametrize(
    ("name", "layout"),
    # Pivoted layers have the tensors of factored ones, and one more
    [("a layer beyond the last", "factored"), *((name, "pivoted") for name in SITUATIONS)],
)
def test_the_same_is_ignored_and_made_anew(name: str, layout: str, tmp_path: Path) -> None:
    situation = SITUATIONS[name]
    situation.build().save_pretrained(tmp_path / "m")
    edit(tmp_path / "m", situation.change)
    recipe = svdcli.Recipe("keep", 0.6, include=situation.include, layout=layout)
    svdcli.compress(tmp_path / "m", tmp_path / "out", recipe)
    for model_class in situation.classes:
        assert account(model_class, tmp_path / "out") == account(model_class, tmp_path / "m"), (
            model_class
        )
    assert svdcli.load(tmp_path / "m")
    assert any(isinstance(module, LOW_RANK) for module in svdcli.load(tmp_path / "out").modules())


def test_a_pattern_that_ends_in_weight_ignores_factors(
    compressed: Compressed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patterns of transformers are written for the names of weights."""
    llama = transformers.LlamaForCausalLM
    out = shutil.copytree(
        compressed("llama"), compressed("llama").parent / "fewer", dirs_exist_ok=True
    )
    reconfigure(out, num_hidden_layers=1)
    told = account("LlamaForCausalLM", out)["unexpected_keys"]
    assert "model.layers.1.mlp.up_proj.weight" in told
    monkeypatch.setattr(
        llama, "_keys_to_ignore_on_load_unexpected", [r"layers\.1\.mlp\.\w+\.weight$"]
    )
    left = account("LlamaForCausalLM", out)["unexpected_keys"]
    assert told - left == {
        f"model.layers.1.mlp.{name}_proj.weight" for name in ("up", "gate", "down")
    }


def test_the_remark_is_transformers_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    zoo.save("llama", tmp_path / "m")
    edit(tmp_path / "m", a_third_layer)
    recipe = svdcli.Recipe("keep", 0.6, include=("*", "model.layers.2.mlp.up_proj"))
    svdcli.compress(tmp_path / "m", tmp_path / "out", recipe)
    transformers.utils.logging.enable_propagation()
    try:
        svdcli.load(tmp_path / "out")
    finally:
        transformers.utils.logging.disable_propagation()
    assert "LOAD REPORT" in caplog.text
    assert "model.layers.2.mlp.up_proj.svd_up.weight" in caplog.text


def test_other_sizes_are_refused_unless_asked_for(compressed: Compressed, tmp_path: Path) -> None:
    """As transformers does it; the head of another number of labels is the usual case."""
    out = reconfigure(
        shutil.copytree(compressed("bert-classifier"), tmp_path / "out"),
        num_labels=None,
        id2label={0: "a", 1: "b"},
    )
    with pytest.raises(SvdcliError, match="ignore_mismatched_sizes"):
        svdcli.load(out)
    model = svdcli.load(out, ignore_mismatched_sizes=True)
    assert model.classifier.weight.shape == (2, 64)


def test_other_sizes_of_factors_are_always_refused(compressed: Compressed, tmp_path: Path) -> None:
    out = reconfigure(shutil.copytree(compressed("llama"), tmp_path / "out"), intermediate_size=168)
    with pytest.raises(
        SvdcliError, match=r"stand for a weight \[64, 160\], the model has \[64, 168\]"
    ):
        svdcli.load(out, ignore_mismatched_sizes=True)


# Nothing is made up where factors should be -------------------------------------------------------


def without_factors(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if ".svd_" not in name}


def test_a_state_dict_without_its_files_is_refused(compressed: Compressed) -> None:
    config = transformers.AutoConfig.from_pretrained(compressed("llama"))
    tensors = load_file(compressed("llama") / "model.safetensors")
    for state in (tensors, without_factors(tensors)):
        with pytest.raises(ValueError, match="is factored, and was not filled"):
            transformers.LlamaForCausalLM.from_pretrained(
                None, config=config, state_dict=state, ignore_mismatched_sizes=True
            )


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_files_that_lost_all_factors_are_refused(
    family: str, compressed: Compressed, tmp_path: Path
) -> None:
    """What is left in place of a layer is a zero-size tensor, whose size transformers can be told
    not to mind."""
    out = edit(shutil.copytree(compressed(family), tmp_path / "out"), without_factors)
    (out / "svdcli.json").unlink()
    with pytest.raises(SvdcliError, match="is factored, and was not filled"):
        svdcli.load(out, ignore_mismatched_sizes=True)


# Modules that cannot hold factors -----------------------------------------------------------------


@pytest.mark.parametrize("layout", ["factored", "pivoted"])
@pytest.mark.parametrize("pattern", ["*experts.0.*", "*experts.2.w1", "*layers.1.*experts*"])
def test_experts_of_which_some_stayed_dense(
    pattern: str, layout: str, written: Written, tmp_path: Path
) -> None:
    svdcli.compress(
        written("mixtral"),
        tmp_path / "out",
        svdcli.Recipe("keep", 0.6, exclude=(pattern,), layout=layout),
    )
    svdcli.expand(tmp_path / "out", tmp_path / "dense")
    answers = [zoo.answer("mixtral", svdcli.load(tmp_path / name)) for name in ("out", "dense")]
    assert torch.allclose(*answers, atol=2e-5, rtol=2e-5)


def gemma3() -> Any:
    torch.manual_seed(0)
    return transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**zoo._decoder(head_dim=16))
    ).eval()


def scaled_bart() -> Any:
    torch.manual_seed(0)
    config = transformers.BartConfig(**{**zoo._MARIAN, "scale_embedding": True})
    return transformers.BartForConditionalGeneration(config).eval()


DINO = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)}
IDS = {"input_ids": zoo.IDS}


@pytest.mark.parametrize("layout", ["factored", "pivoted"])
@pytest.mark.parametrize(
    ("build", "name", "inputs"),
    [
        (gemma3, "model.embed_tokens", IDS),
        (scaled_bart, "model.shared", IDS | {"decoder_input_ids": zoo.IDS}),
        (zoo._model("NomicBertModel", **zoo._BERT), "encoder.layers.0.attn.Wqkv", IDS),
        (
            zoo._model("Dinov2Model", use_swiglu_ffn=True, **DINO),
            "encoder.layer.0.mlp.weights_in",
            PIXELS,
        ),
    ],
    ids=["scaled embedding", "scaled and shared", "one matrix for three layers", "one for two"],
)
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
def test_layers_whose_modules_cannot_hold_factors_are_multiplied_out(
    build: Callable[[], Any],
    name: str,
    inputs: Tensors,
    layout: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    build().save_pretrained(tmp_path / "m")
    include = (name, "*") if "embed" in name or "shared" in name else ()
    svdcli.compress(
        tmp_path / "m", tmp_path / "out", svdcli.Recipe("keep", 0.6, include=include, layout=layout)
    )
    transformers.utils.logging.enable_propagation()
    try:
        model = svdcli.load(tmp_path / "out")
    finally:
        transformers.utils.logging.disable_propagation()
    place = model.get_submodule(name) if name in dict(model.named_modules()) else None
    assert (
        isinstance(place, LOW_RANK) or f"such as {name}) are multiplied out" in caplog.text
    )  # versions split differently
    with torch.inference_mode():
        expected = svdcli.load(svdcli.expand(tmp_path / "out", tmp_path / "dense"))(**inputs)[0]
        assert torch.allclose(model(**inputs)[0], expected, atol=2e-5, rtol=2e-5)
        dense = type(model).from_pretrained(
            tmp_path / "out", quantization_config=SvdConfig(dequantize=True)
        )
        assert torch.allclose(dense(**inputs)[0], expected, atol=2e-5, rtol=2e-5)
        for opened, folder in ((model, "again"), (dense, "as it was")):
            opened.save_pretrained(tmp_path / folder)
            assert torch.equal(svdcli.load(tmp_path / folder)(**inputs)[0], opened(**inputs)[0])
    assert (
        load_file(tmp_path / "as it was" / "model.safetensors").keys()
        == load_file(tmp_path / "m" / "model.safetensors").keys()
    )


# Without architectures ----------------------------------------------------------------------------

UNNAMED = {name: family.build for name, family in zoo.FAMILIES.items()} | {
    "masked": zoo._model("BertForMaskedLM", **zoo._BERT),
    "pre-training": zoo._model("BertForPreTraining", **zoo._BERT),
    "tokens": zoo._model("BertForTokenClassification", num_labels=3, **zoo._BERT),
    "encoder": lambda: transformers.T5EncoderModel(transformers.T5Config(**zoo._T5)).eval(),
    "bare": zoo._model("GPT2Model", **zoo._GPT2),
    "decoder": zoo._model("LlamaModel", **zoo._decoder()),
}
# A decoder without its head is opened with one where the config ties it to the embedding, since it
# is there.
SAME_AS = {"bare": "GPT2LMHeadModel"}


@pytest.mark.parametrize("name", UNNAMED)
def test_without_architectures_the_class_that_fits_is_found(name: str, tmp_path: Path) -> None:
    model = UNNAMED[name]()
    model.save_pretrained(tmp_path / "m")
    reconfigure(tmp_path / "m", architectures=None)
    svdcli.compress(tmp_path / "m", tmp_path / "out", svdcli.Recipe("keep", 0.6))
    for path in (tmp_path / "m", tmp_path / "out"):
        assert type(svdcli.load(path)).__name__ == SAME_AS.get(name, type(model).__name__)


def test_a_model_type_that_nobody_knows_is_one_line(compressed: Compressed, tmp_path: Path) -> None:
    out = shutil.copytree(compressed("llama"), tmp_path / "out")
    reconfigure(out, architectures=None, model_type="nobody")
    with pytest.raises(SvdcliError, match="nobody") as error:
        svdcli.load(out)
    assert "\n" not in str(error.value)


# In another dtype ---------------------------------------------------------------------------------

CASTS: dict[str, tuple[Callable[[Any], Any], torch.dtype]] = {
    "half": (lambda model: model.half(), torch.float16),
    "bfloat16": (lambda model: model.bfloat16(), torch.bfloat16),
    "double": (lambda model: model.double(), torch.float64),
    "half, then float": (lambda model: model.half().float(), torch.float32),
    "to": (lambda model: model.to(torch.bfloat16), torch.bfloat16),
    "to cpu": (lambda model: model.to("cpu", torch.float64), torch.float64),
}


@pytest.mark.parametrize("layout", ["factored", "pivoted"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("cast", CASTS)
def test_an_opened_model_can_be_cast(
    cast: str, family: str, layout: str, compressed: Compressed, tmp_path: Path
) -> None:
    change, dtype = CASTS[cast]
    before = svdcli.load(compressed(family, layout))
    expected = zoo.answer(family, before)
    model = change(before)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.allclose(zoo.answer(family, model).float(), expected, atol=2e-2)
    model.save_pretrained(tmp_path / "cast")
    again = svdcli.load(tmp_path / "cast")
    assert {parameter.dtype for parameter in again.parameters()} == {dtype}
    cast_state, found = model.state_dict(), again.state_dict()
    assert cast_state.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in cast_state.items())
    assert {parameter.dtype for parameter in model.dequantize().parameters()} == {dtype}


@pytest.mark.parametrize("layout", ["factored", "pivoted"])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype", None])
def test_the_factors_open_in_the_dtype_that_was_asked_for(
    key: str | None, layout: str, tmp_path: Path
) -> None:
    zoo.save("llama", tmp_path / "m", torch.bfloat16)
    reconfigure(tmp_path / "m", **{"dtype": None} | ({} if key is None else {key: "bfloat16"}))
    svdcli.compress(
        tmp_path / "m",
        tmp_path / "out",
        svdcli.Recipe("keep", 0.5, dtype="F32", layout=layout),
        allow_larger=True,
    )
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for model in (
        svdcli.load(tmp_path / "out"),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto"),
    ):
        for name, parameter in model.named_parameters():
            if ".svd_" in name:
                assert torch.equal(parameter, stored[name])
                assert parameter.dtype == torch.float32


# Dequantized in memory ----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["factored", "pivoted"])
@pytest.mark.parametrize(
    ("family", "name"),
    [("llama-tied", "model.embed_tokens"), ("gpt2", "transformer.wte"), ("t5", "shared")],
)
def test_embeddings_and_ties_dequantize_too(
    family: str, name: str, layout: str, written: Written, tmp_path: Path
) -> None:
    svdcli.compress(
        written(family),
        tmp_path / "out",
        svdcli.Recipe("rank", 12, layout=layout, include=(name, "*")),
    )
    model = svdcli.load(tmp_path / "out")
    expected = zoo.answer(family, model)
    dense = model.dequantize()
    assert not any(isinstance(module, LOW_RANK) for module in dense.modules())
    assert isinstance(dense.get_input_embeddings(), nn.Embedding)
    assert dense.get_output_embeddings().weight is dense.get_input_embeddings().weight
    assert torch.allclose(zoo.answer(family, dense), expected, atol=2e-5, rtol=2e-5)
    dense.save_pretrained(tmp_path / "dense")
    names = [
        load_file(folder / "model.safetensors").keys()
        for folder in (tmp_path / "dense", written(family))
    ]
    assert names[0] == names[1]
    assert torch.equal(
        zoo.answer(family, svdcli.load(tmp_path / "dense")), zoo.answer(family, dense)
    )
