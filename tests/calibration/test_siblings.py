"""What experts lend each other, against the formula, and what they read against whole passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from zoo import Sums, close

import svdcli
from svdcli.calibration.loss import drawing
from svdcli.calibration.moments import Spool, open_moments
from svdcli.calibration.siblings import lend, sibling_groups
from svdcli.models.hf import separate_experts
from svdcli.text.tokens import load_tokenizer, windows_of

TEXT = svdcli.Texts("words", (" ".join(f"w{i * i % 90 + 2}" for i in range(3000)),))
EXPERTS = 5
WIDTH = 4


def named(number: int, layer: str) -> str:
    return f"model.layers.0.mlp.experts.{number}.{layer}.weight"


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    """Of experts that read 0, 1, 2, ... times ten tokens; gate and up share what they read."""
    made = Spool(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for number in range(1, EXPERTS):
        x = torch.randn(10 * number, WIDTH, generator=generator)
        made.add(f"input.{named(number, 'gate')}", x.T @ x)
        made.add(f"mean.{named(number, 'gate')}", x.sum(0))
        for layer in ("gate", "up"):
            g = torch.randn(10 * number, 3, generator=generator)
            made.add(f"output.{named(number, layer)}", g.T @ g)
    return made


def lent(spool: Spool) -> tuple[dict[str, str], dict[str, int], list[str]]:
    layers = {named(n, layer): "" for n in range(EXPERTS) for layer in ("gate", "up")}
    leaders = {
        named(n, layer): named(n, "gate") for n in range(1, EXPERTS) for layer in ("gate", "up")
    }
    rows = {named(n, "gate"): 10 * n for n in range(1, EXPERTS)}
    few = lend(layers, leaders, rows, spool)
    return leaders, rows, few


def test_inputs_are_drawn_to_the_average_by_as_many_tokens_as_there_are_inputs(
    spool: Spool,
) -> None:
    sums = {n: spool.get(f"input.{named(n, 'gate')}") for n in range(1, EXPERTS)}
    sums[0] = torch.zeros(WIDTH, WIDTH)
    average = sum(sums.values()) / sum(10 * n for n in range(EXPERTS))
    leaders, rows, few = lent(spool)
    assert leaders[named(0, "up")] == named(0, "gate")
    for number in range(EXPERTS):
        name = named(number, "gate")
        found = spool.get(f"input.{name}") / rows[name]
        expected = (sums[number] + WIDTH * average) / (10 * number + WIDTH)
        assert torch.allclose(found, expected, atol=1e-6)
        assert rows[name] == 10 * number + WIDTH
    assert few == [named(0, "gate"), named(0, "up")]


def test_gradients_count_as_often_as_the_router_sends_tokens(spool: Spool) -> None:
    sums = {n: spool.get(f"output.{named(n, 'up')}") for n in range(1, EXPERTS)}
    sums[0] = torch.zeros(3, 3)
    average = sum(sums.values()) / sum(10 * n for n in range(EXPERTS))
    lent(spool)
    for number in range(EXPERTS):
        count = 10 * number
        a_token = (sums[number] + WIDTH * average) / (count + WIDTH)
        found = spool.get(f"output.{named(number, 'up')}")
        assert torch.allclose(found, max(1, count) * a_token, atol=1e-5)
    never = spool.get(f"output.{named(0, 'up')}")
    assert torch.allclose(never, average, atol=1e-6)  # one token of the average expert


def test_what_is_alike_is_left_alike(tmp_path: Path) -> None:
    """Where all experts have the same moments, nothing changes but the counts."""
    spool, x = Spool(tmp_path), torch.randn(40, WIDTH)
    for number in range(EXPERTS):
        spool.add(f"input.{named(number, 'gate')}", x.T @ x)
        spool.add(f"mean.{named(number, 'gate')}", x.sum(0))
        spool.add(f"output.{named(number, 'gate')}", x.T @ x)
    layers = {named(n, "gate"): "" for n in range(EXPERTS)}
    rows = dict.fromkeys(layers, 40)
    assert lend(layers, dict.fromkeys(layers, "") | {n: n for n in layers}, rows, spool) == []
    for name in layers:
        assert torch.allclose(spool.get(f"input.{name}") / rows[name], x.T @ x / 40, atol=1e-5)
        assert torch.allclose(spool.get(f"output.{name}"), x.T @ x, atol=1e-4)


def test_only_numbers_of_experts_make_siblings() -> None:
    names = [named(0, "gate"), named(1, "gate"), named(0, "up"), "model.layers.0.q", "m.experts.w"]
    assert sibling_groups(names) == [names[:2]]


def test_every_expert_is_measured_on_the_tokens_sent_to_it(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 32,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    torch.manual_seed(0)
    path = tmp_path / "m"
    transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes)).save_pretrained(path)
    zoo.words_tokenizer(path)
    svdcli.calibrate(path, tmp_path / "m.safetensors", TEXT, samples=12, seq_len=16)
    moments = open_moments(tmp_path / "m.safetensors")

    # Whole passes of the same model, then what is lent
    model: Any = svdcli.load(path).float().eval()
    separate_experts(model)
    sums = Sums(model)
    ids = windows_of(load_tokenizer(path), TEXT, 16, 12).ids
    logits = model(input_ids=ids).logits.flatten(0, -2)
    labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=drawing(0, 0))[:, 0]
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    for group in sibling_groups(moments.layers):
        average = sum(sums.inputs[name] for name in group) / sum(sums.rows[name] for name in group)
        gradient = sum(sums.outputs[name] for name in group) / sum(sums.rows[n] for n in group)
        for name in group:
            found, count, n = moments.of(name), sums.rows[name], len(average)
            assert found is not None
            assert found.outputs is not None
            close(found.inputs, (sums.inputs[name] + n * average) / (count + n))
            a_token = (sums.outputs[name] + n * gradient) / (count + n)
            close(found.outputs, count * a_token / len(labels))
