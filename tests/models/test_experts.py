"""Experts that transformers stacks are layers one by one: the stock model is the oracle."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from helpers import load_all
from safetensors.torch import load_file
from torch import Tensor, nn

import svdcli
from svdcli.healing.blocks import Effort
from svdcli.models.experts import SeparateExperts, stacks_in
from svdcli.models.hf import separate_experts
from svdcli.models.load import load_stored
from svdcli.models.modules import LowRankLinear, PackedLinear

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}
DEEPSEEK = SIZES | {
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", SIZES | {"num_local_experts": 4}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", SIZES | {"num_experts": 6}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", SIZES | {"num_experts": 6, "head_dim": 16}),
    "olmoe": ("OlmoeForCausalLM", SIZES | {"num_experts": 6}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", DEEPSEEK),
    "glm4_moe": (
        "Glm4MoeForCausalLM",
        SIZES | {"n_routed_experts": 8, "first_k_dense_replace": 1, "head_dim": 16},
    ),
    "minimax_m2": ("MiniMaxM2ForCausalLM", SIZES | {"num_local_experts": 6, "head_dim": 16}),
}
Saved = Callable[[str], Path]


def build(name: str, **changed: Any) -> Any:
    torch.manual_seed(0)
    model_class = getattr(transformers, MIXTURES[name][0])
    config = model_class.config_class(**MIXTURES[name][1] | changed)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # so that routers tell experts apart
                parameter.mul_(4)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """The folder of one of them, with a tokenizer."""
    made: dict[str, Path] = {}

    def save(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "model"
            build(name).save_pretrained(made[name])
            zoo.words_tokenizer(made[name])
        return made[name]

    return save


@pytest.fixture(scope="module")
def small(saved: Saved, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The same compressed: (name, **recipe) -> folder."""
    made: dict[str, Path] = {}

    def make(name: str, **recipe: Any) -> Path:
        key = f"{name} {recipe}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp(name) / "out"
            svdcli.compress(saved(name), made[key], **({"keep": 0.5} | recipe))
        return made[key]

    return make


def answer(model: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=zoo.IDS).logits
    return found


def dense_of(folder: Path, out: Path) -> Any:
    """The stock model of what a compressed one stands for."""
    svdcli.expand(folder, out)
    model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    assert not any(isinstance(module, SeparateExperts) for module in model.modules())
    return model


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


# Dense ones ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXTURES)
def test_separate_experts_answer_as_stacks_do(name: str, saved: Saved) -> None:
    stock, separate = svdcli.load(saved(name)).eval(), load_stored(saved(name))
    found = [m for m in separate.modules() if isinstance(m, SeparateExperts)]
    assert len(found) == len(list(stacks_in(stock, zoo_conversions(stock))))
    assert found
    same(answer(separate), answer(stock))
    # Under the names of the file, and in the memory of the stacks
    names = {name for name in load_file(saved(name) / "model.safetensors") if "experts." in name}
    last = {".".join(name.split(".")[-4:]) for name in names if ".shared_" not in name}
    ours = {".".join(key.split(".")[-4:]) for key, _ in separate.named_parameters()}
    assert last - ours == set()


def zoo_conversions(model: Any) -> Any:
    from transformers.conversion_mapping import get_model_conversion_mapping

    return get_model_conversion_mapping(model)


def test_weights_are_views_of_the_stacks() -> None:
    model = build("qwen3_moe")
    stack = model.model.layers[0].mlp.experts.down_proj
    separate_experts(model)
    layer = model.get_submodule("model.layers.0.mlp.experts.3.down_proj")
    assert layer.weight.data_ptr() == stack[3].data_ptr()


def test_gradients_are_those_of_the_stacks() -> None:
    stock, separate = build("qwen3_moe"), build("qwen3_moe")
    separate_experts(separate)
    for model in (stock, separate):
        model(input_ids=zoo.IDS, labels=zoo.IDS).loss.backward()
    experts = "model.layers.1.mlp.experts"
    stacked = stock.get_submodule(experts).gate_up_proj.grad
    for number in range(6):
        gate = separate.get_submodule(f"{experts}.{number}.gate_proj").weight.grad
        up = separate.get_submodule(f"{experts}.{number}.up_proj").weight.grad
        if gate is None:
            assert not stacked[number].any()
        else:
            same(torch.cat((gate, up)), stacked[number])


def test_stacked_again_it_is_the_stock_module() -> None:
    stock, separate = build("deepseek_v3"), build("deepseek_v3")
    paths = separate_experts(separate)
    for path in paths:
        separate.set_submodule(path, separate.get_submodule(path).stacked())
    ours, theirs = separate.state_dict(), stock.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert torch.equal(answer(separate), answer(stock))


def test_stacks_that_a_class_computes_with_stay() -> None:
    config = transformers.Llama4TextConfig(**SIZES | {"num_local_experts": 4, "head_dim": 16})
    with torch.device("meta"):
        model = transformers.Llama4ForCausalLM(config)
    assert separate_experts(model) == []


@pytest.mark.parametrize("tokens", [1, 7])
def test_transposed_experts_with_biases_answer_as_stacked_ones(tokens: int) -> None:
    torch.manual_seed(0)
    sizes = SIZES | {"num_local_experts": 4, "head_dim": 16}
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("_bias"):
            torch.nn.init.normal_(parameter)
    with torch.inference_mode():
        expected = model(input_ids=zoo.IDS[:1, :tokens]).logits
        assert len(separate_experts(model)) == 2
        same(model(input_ids=zoo.IDS[:1, :tokens]).logits, expected)


# Compressed ones ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["factored", "pivoted"])
@pytest.mark.parametrize("name", MIXTURES)
def test_they_stay_low_rank_in_memory(
    name: str, layout: str, small: Callable[..., Path], tmp_path: Path
) -> None:
    out = small(name, layout=layout)
    model: Any = svdcli.load(out).eval()
    experts = [m for m in model.modules() if isinstance(m, SeparateExperts)]
    assert experts
    stored = sum(tensor.numel() for tensor in load_all(out).values())
    buffers = sum(m.svd_rows.numel() for m in model.modules() if hasattr(m, "svd_rows"))
    assert sum(p.numel() for p in model.parameters()) + buffers <= stored
    dense = dense_of(out, tmp_path / "dense")
    same(answer(model), answer(dense))
    ids = {"input_ids": zoo.IDS[:1], "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**ids), dense.generate(**ids))


@pytest.mark.parametrize("name", MIXTURES)
def test_saved_again_it_is_the_same(name: str, small: Callable[..., Path], tmp_path: Path) -> None:
    model: Any = svdcli.load(small(name)).eval()
    model.save_pretrained(tmp_path / "again")
    before, after = load_all(small(name)), load_all(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    same(answer(svdcli.load(tmp_path / "again").eval()), answer(model))
    same(answer(copy.deepcopy(model)), answer(model))


@pytest.mark.parametrize("pattern", ["*experts.0.*", "*layers.1.*experts*", "*experts.*.down_proj"])
def test_some_that_stayed_dense(pattern: str, saved: Saved, tmp_path: Path) -> None:
    out = tmp_path / "out"
    svdcli.compress(saved("qwen3_moe"), out, keep=0.5, exclude=[pattern])
    model = svdcli.load(out).eval()
    kinds = {type(m) for m in model.modules()}
    assert LowRankLinear in kinds
    assert nn.Linear in {
        type(m) for e in model.modules() if isinstance(e, SeparateExperts) for m in e.modules()
    }
    same(answer(model), answer(dense_of(out, tmp_path / "dense")))


def test_experts_of_few_bits_stay_packed(small: Callable[..., Path], tmp_path: Path) -> None:
    out = small("qwen3_moe", rank=16, bits=8, keep=None)
    model: Any = svdcli.load(out).eval()
    [first, *_] = [m for m in model.modules() if isinstance(m, SeparateExperts)]
    assert any(isinstance(m, PackedLinear) for m in first.modules())
    same(answer(model), answer(dense_of(out, tmp_path / "dense")))


def test_multiplied_out_for_those_who_ask(small: Callable[..., Path], tmp_path: Path) -> None:
    out = small("qwen3_moe")
    dense = dense_of(out, tmp_path / "dense")
    config = transformers.AutoConfig.from_pretrained(out)
    config.quantization_config["dequantize"] = True
    for model in (svdcli.load(out, config=config).eval(), svdcli.load(out).dequantize().eval()):
        assert model.state_dict().keys() == dense.state_dict().keys()
        same(answer(model), answer(dense))


def test_one_file_opens_it(saved: Saved, tmp_path: Path) -> None:
    svdcli.compress(saved("qwen3_moe"), tmp_path / "o", keep=0.5, self_contained=True)
    source = (tmp_path / "o" / "svdcli_model.py").read_text()
    assert "class SeparateExperts" in source
    assert "svdcli.models" not in source


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_placed_compiled_and_trained(small: Callable[..., Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model: Any = svdcli.load(small("qwen3_moe")).eval()
    expected = answer(model)
    same(answer(svdcli.load(small("qwen3_moe"), device_map="auto").eval()), expected)
    same(answer(torch.compile(model, fullgraph=True, backend="eager")), expected)
    again = copy.deepcopy(model)
    del model
    same(answer(torch.compile(again, fullgraph=True, backend="aot_eager")), expected)
    with torch.inference_mode():
        same(again(input_ids=zoo.IDS[:1, :1]).logits, answer(again)[:1, :1])

    # LoRA beside the factors of every expert that tokens were sent to
    config = peft.LoraConfig(target_modules=["svd_down", "svd_up"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(svdcli.load(small("qwen3_moe")), config)
    adapted(input_ids=zoo.IDS, labels=zoo.IDS).loss.backward()
    trained = [name for name, p in adapted.named_parameters() if p.grad is not None]
    assert any(".experts." in name for name in trained)
    adapted.merge_and_unload().save_pretrained(tmp_path / "tuned")
    same(answer(svdcli.load(tmp_path / "tuned").eval()), expected)


# Calibrated ---------------------------------------------------------------------------------------

TEXT = svdcli.Texts("words", (" ".join(f"w{i * i % 90 + 2}" for i in range(4000)),))


def test_calibration_and_healing_reach_every_expert(saved: Saved, tmp_path: Path) -> None:
    moments = tmp_path / "m.safetensors"
    done = svdcli.calibrate(saved("qwen3_moe"), moments, TEXT, samples=16, seq_len=32)
    assert done.uncalibrated == ()
    recipe = svdcli.Recipe("keep", 0.4, allocate="global", floor=0.0)
    outcome = svdcli.compress(saved("qwen3_moe"), tmp_path / "o", recipe, calibration=moments)
    ranks = {layer.rank for layer in outcome.plan.layers if "experts" in layer.tensor.name}
    assert len(ranks) > 3  # by what each of them counts
    how: dict[str, Any] = {"samples": 16, "seq_len": 32, "effort": Effort(steps=8)}
    healed = svdcli.heal(
        tmp_path / "o", tmp_path / "h", teacher=saved("qwen3_moe"), texts=TEXT, **how
    )
    blocks = healed.report.healing["blocks"]
    assert all(block["after"] < block["before"] for block in blocks.values())
    assert svdcli.verify(tmp_path / "h", saved("qwen3_moe")).ok
    stored = json.loads((tmp_path / "h" / "svdcli.json").read_text())
    assert stored["healing"]
