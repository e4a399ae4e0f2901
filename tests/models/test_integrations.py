"""A compressed model in other people's tools: PEFT trains it, torchao quantises it, the evaluation
harness measures it."""

from __future__ import annotations

import math
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from torch import Tensor, nn

import svdcli
from svdcli.models.modules import LowRankLinear, PivotedLinear

Compressed = Callable[..., Path]

SAMPLE = Path(__file__).parent.parent.parent / "sample_models" / "tiny-llama"


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=zoo.IDS).logits
    return found


def factors_of(model: nn.Module) -> list[nn.Linear]:
    """Every svd_down and svd_up."""
    layers = [
        module for module in model.modules() if isinstance(module, (LowRankLinear, PivotedLinear))
    ]
    return [factor for layer in layers for factor in (layer.svd_down, layer.svd_up)]


# PEFT ---------------------------------------------------------------------------------------------


@pytest.fixture(params=["factored", "pivoted"])
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def adapted(compressed: Compressed, layout: str) -> Any:
    """The compressed llama with LoRA on both factors of every layer."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["svd_down", "svd_up"], task_type="CAUSAL_LM")
    return get_peft_model(svdcli.load(compressed("llama", layout)), config)


def train(model: Any, steps: int = 8) -> list[float]:
    """The loss before each step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model.train()(input_ids=zoo.IDS, labels=zoo.IDS).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    return losses


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_trains_on_the_factors(adapted: Any, compressed: Compressed, layout: str) -> None:
    losses = train(adapted)
    assert losses[-1] < losses[0] - 0.2, losses
    learned = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert len(learned) == 2 * len(factors_of(svdcli.load(compressed("llama", layout))))
    assert all(".svd_down.lora_" in name or ".svd_up.lora_" in name for name in learned)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_merges_into_the_factors(
    adapted: Any, compressed: Compressed, layout: str, tmp_path: Path
) -> None:
    before = logits(svdcli.load(compressed("llama", layout)))
    train(adapted, 3)
    expected = logits(adapted)
    assert not torch.allclose(expected, before, atol=1e-2)
    merged = adapted.merge_and_unload()
    assert all(type(factor) is nn.Linear for factor in factors_of(merged))
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    again = svdcli.load(tmp_path / "merged")
    assert factors_of(again)
    assert torch.equal(logits(again), logits(merged))


# torchao ------------------------------------------------------------------------------------------


def test_torchao_quantises_the_factors_to_int8(compressed: Compressed, layout: str) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = svdcli.load(compressed("llama", layout))
    expected = logits(model)
    quantize_(model, Int8WeightOnlyConfig())
    factors = factors_of(model)
    assert factors
    assert all(factor.weight.qdata.dtype == torch.int8 for factor in factors)  # type: ignore[union-attr]
    found = logits(model)
    assert not torch.equal(found, expected)
    assert (found - expected).norm() < 0.05 * expected.norm()


# Packed models ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[8, 4])
def packed(
    request: pytest.FixtureRequest,
    written: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The llama with factors, and its table, in fewer bits."""
    out = tmp_path_factory.mktemp("packed") / "out"
    how: Any = {"rank": 32, "bits": request.param, "embedding_bits": 8}
    svdcli.compress(written("llama"), out, allow_larger=True, **how)
    return out


def config_of_lora() -> Any:
    from peft import LoraConfig

    from svdcli.models.adapters import on_packed

    names = ["svd_down", "svd_up"]
    return on_packed(LoraConfig(r=4, target_modules=names, task_type="CAUSAL_LM"))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_trains_beside_packed_factors(packed: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    from svdcli.models.adapters import on_packed

    torch.manual_seed(0)
    before = {name: t.clone() for name, t in svdcli.load(packed).state_dict().items()}
    model = get_peft_model(svdcli.load(packed), config_of_lora())
    untrained = logits(model)
    losses = train(model)
    assert losses[-1] < losses[0] - 0.2, losses
    learned = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learned
    assert all(".svd_down.lora_" in name or ".svd_up.lora_" in name for name in learned)

    # The integers are those that they were, and the adapter is beside them, also from its files
    trained = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), untrained)
    model.save_pretrained(tmp_path / "adapter")
    config = on_packed(LoraConfig.from_pretrained(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(svdcli.load(packed), tmp_path / "adapter", config=config)
    assert torch.equal(logits(again), trained)
    with pytest.raises(svdcli.SvdcliError, match="cannot be merged into packed integers"):
        model.merge_and_unload()
    base = model.unload()
    assert all(torch.equal(base.state_dict()[name], tensor) for name, tensor in before.items())


def test_adapters_that_look_at_the_weight_are_refused(packed: Path) -> None:
    from peft import get_peft_model

    config = config_of_lora()
    config.use_dora = True
    with pytest.raises(ValueError, match="unsupported variant combination"):
        get_peft_model(svdcli.load(packed), config)


def test_without_the_word_peft_names_what_it_cannot_take(packed: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["svd_down"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"Target module PackedLinear.* is not supported"):
        get_peft_model(svdcli.load(packed), config)


def test_gradients_pass_packed_layers_and_keep_no_unpacked_weight(packed: Path) -> None:
    model: Any = svdcli.load(packed)
    layer = model.model.layers[0].mlp.gate_proj.svd_down
    x = torch.randn(3, 5, layer.in_features, requires_grad=True)
    gradient = torch.randn(3, 5, layer.out_features)
    [expected] = torch.autograd.grad(x @ layer.weight.T, x, gradient)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)
    assert not any(tensor.numel() >= layer.weight.numel() for tensor in kept)
    [found] = torch.autograd.grad(y, x, gradient)
    torch.testing.assert_close(found, expected)


def test_torchao_leaves_packed_layers_alone(packed: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model: Any = svdcli.load(packed)
    before = {name: t.clone() for name, t in model.state_dict().items() if "svd_" in name}
    expected = logits(model)
    quantize_(model, Int8WeightOnlyConfig())
    assert model.lm_head.weight.qdata.dtype == torch.int8  # the one layer that is not packed
    after = model.state_dict()
    assert before
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    found = logits(model)
    assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("bits", [pytest.param(8, marks=pytest.mark.slow), 4])
def test_onnx_of_a_packed_model(bits: int, tmp_path: Path) -> None:
    """With few packed layers: tracing takes seconds for each."""
    zoo._model("LlamaForCausalLM", **zoo._decoder(num_hidden_layers=1))().save_pretrained(
        tmp_path / "m"
    )
    how: Any = {"rank": 32, "bits": bits, "embedding_bits": 8, "include": ["*.o_proj"]}
    svdcli.compress(tmp_path / "m", tmp_path / "o", allow_larger=True, **how)
    exported = svdcli.export_onnx(tmp_path / "o", tmp_path / "m.onnx")
    assert exported.checked is not None
    assert exported.checked < 1e-5


# lm-evaluation-harness ----------------------------------------------------------------------------


QUESTIONS = [
    {"text": "def area(self):\n    return", "choices": [" self", " import"], "right": 0},
    {"text": "import", "choices": [" )", " os"], "right": 1},
    {"text": "for i in", "choices": [" range", " class"], "right": 0},
    {"text": "if x is not", "choices": [" def", " None"], "right": 1},
]


def task(**more: Any) -> dict[str, Any]:
    """What a task of the harness reads from its documents, which are made here."""
    import datasets

    data = {
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(QUESTIONS)},
        "test_split": "test",
    }
    return (
        data
        | {"doc_to_text": "{{text}}", "target_delimiter": "", "metadata": {"version": 1}}
        | more
    )


def measured(model: Any, **how: Any) -> tuple[float, float]:
    """(accuracy on the questions, perplexity of the words in the texts) as the harness finds
    them."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    choose = {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{right}}",
    }
    read = {"output_type": "loglikelihood_rolling", "doc_to_target": "{{text}}"}
    tasks = [
        task(
            task="choose",
            metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            **choose,
        ),
        task(
            task="read",
            metric_list=[{"metric": "word_perplexity", "higher_is_better": False}],
            **read,
        ),
    ]
    found = lm_eval.simple_evaluate(
        HFLM(pretrained=model, device="cpu", batch_size=2, **how),
        tasks=tasks,
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )["results"]
    return found["choose"]["acc,none"], found["read"]["word_perplexity,none"]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be fetched."""

    def refuse(*_: Any) -> None:
        raise OSError("the tests reach for no network")

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.usefixtures("offline")
@pytest.mark.filterwarnings(
    "ignore:You passed `quantization_config`:UserWarning"
)  # the harness hands it over a second time
def test_the_evaluation_harness_measures_a_compressed_directory(tmp_path: Path) -> None:
    out, dense = tmp_path / "out", tmp_path / "dense"
    svdcli.compress(SAMPLE, out, svdcli.Recipe("keep", 0.8))
    svdcli.expand(out, dense)
    accuracy, perplexity = measured(str(out), dtype="float32")
    assert math.isfinite(perplexity)
    assert perplexity > 1
    assert accuracy == 1
    expected = measured(str(dense), dtype="float32")
    assert (accuracy, perplexity) == (
        expected[0],
        pytest.approx(expected[1], rel=0.02),
    )  # its weights are rounded once more
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    opened = measured(svdcli.load(out, dtype=torch.float32), tokenizer=tokenizer)
    assert opened == (accuracy, pytest.approx(perplexity, rel=1e-5))
