"""Layers that share a basis: what is in the file, what is in memory, and what answers."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from helpers import cli, complaint, load_all, run_code
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import svdcli
from svdcli.calibration.moments import open_moments
from svdcli.files.checkpoint import open_checkpoint
from svdcli.files.report import read_report
from svdcli.models.modules import LOW_RANK, SharedLinear
from svdcli.models.self_contained import standalone_source
from svdcli.plan.plan import Plan
from svdcli.verbs.export import export_onnx

TEXT = svdcli.Texts("words", (" ".join(f"w{i * i % 90 + 2}" for i in range(3000)),))
HOW: dict[str, Any] = {"samples": 12, "seq_len": 32}
# What to ask for, and how much of the parameters may be in memory.
FORMS: dict[str, dict[str, Any]] = {
    "pivoted": {"keep": 0.5},
    "factored": {"keep": 0.5, "layout": "factored"},
    "bits": {"keep_bytes": 0.3},
}
# Every form of one family, and those of the others that differ from it.
CASES = [("llama", form) for form in FORMS]
CASES += [("biased", "pivoted"), ("biased", "bits"), ("mixtral", "factored"), ("mixtral", "bits")]
OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "biased": ("LlamaForCausalLM", {"attention_bias": True}),
    "narrow": ("LlamaForCausalLM", {"hidden_size": 32, "intermediate_size": 80}),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "intermediate_size": 64}),
}
QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
Shared = Callable[..., Path]


@pytest.fixture(scope="module")
def source(
    readable: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The original of a family, with a tokenizer: `biased` is a llama with biases in attention,
    `narrow` one of half the width."""
    made: dict[str, Path] = {}

    def original(family: str) -> Path:
        if family not in OWN:
            return readable(family)
        if family not in made:
            name, config = OWN[family]
            model = zoo._model(name, **zoo._decoder(**config))()
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith(".bias"):
                    nn.init.normal_(parameter, std=0.1)
            made[family] = tmp_path_factory.mktemp(family) / "m"
            model.save_pretrained(made[family])
            zoo.words_tokenizer(made[family])
        return made[family]

    return original


@pytest.fixture(scope="module")
def moments(
    source: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def calibrated(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("moments") / f"{family}.safetensors"
            svdcli.calibrate(source(family), made[family], TEXT, gradients=True, **HOW)
        return made[family]

    return calibrated


@pytest.fixture(scope="module")
def shared(
    source: Callable[[str], Path],
    moments: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Shared:
    """(family, form) -> the output in which every group shares its basis."""
    made: dict[tuple[str, str], Path] = {}

    def compressed(family: str, form: str = "pivoted") -> Path:
        if (family, form) not in made:
            out = tmp_path_factory.mktemp(f"{family}-{form}") / "out"
            svdcli.compress(
                source(family), out, calibration=moments(family), share="always", **FORMS[form]
            )
            made[family, form] = out
        return made[family, form]

    return compressed


def plan_of(out: Path) -> Plan:
    return Plan.from_json(json.loads((out / "svdcli.json").read_text()))


def groups_of(out: Path) -> list[tuple[str, ...]]:
    return [
        tuple(m.module for m in layer.members) for layer in plan_of(out).layers if layer.members
    ]


def answer(model: Any) -> Tensor:
    model.eval()
    with torch.inference_mode():
        found: Tensor = model(input_ids=zoo.IDS)[0]
    return found


# In files -----------------------------------------------------------------------------------------


def test_groups_are_those_that_read_the_same_input(shared: Shared) -> None:
    expected = set()
    for block in range(2):
        attention, mlp = f"model.layers.{block}.self_attn", f"model.layers.{block}.mlp"
        expected.add(frozenset(f"{attention}.{name}" for name in QKV))
        expected.add(frozenset(f"{mlp}.{name}" for name in GATE_UP))
    assert set(map(frozenset, groups_of(shared("llama")))) == expected
    # Every expert's first layers, which the router sends the same tokens to
    experts = [group for group in groups_of(shared("mixtral")) if ".experts." in group[0]]
    assert len(experts) == 8
    assert all({name.rpartition(".")[2] for name in group} == {"w1", "w3"} for group in experts)


# bert has biases everywhere
@pytest.mark.parametrize(
    ("family", "form"),
    [*(case for case in CASES if "biased" not in case), ("bert", "pivoted"), ("bert", "bits")],
)
def test_from_end_to_end(
    family: str,
    form: str,
    shared: Shared,
    source: Callable[[str], Path],
    moments: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    out = shared(family, form)
    assert len(groups_of(out)) >= 2
    checked = svdcli.verify(out, source(family))
    assert checked.ok, [check for check in checked.checks if not check.ok]
    how: dict[str, Any] = {"calibration": moments(family), "share": "always"} | FORMS[form]
    predicted = svdcli.compress(source(family), tmp_path / "p", dry_run=True, **how).report
    assert predicted.files == read_report(out).files

    # The budget is kept, and the same plan gives the same bytes
    plan = plan_of(out)
    before = sum(tensor.nbytes for tensor in plan.originals)
    after = 0
    for layer in plan.layers:
        after += sum(tensor.nbytes for tensor in (*layer.stored(), *layer.spans()))
    if form == "bits":
        assert after <= 0.3 * before
    svdcli.compress(source(family), tmp_path / "again", plan=plan, calibration=moments(family))
    again = load_all(tmp_path / "again")
    assert all(torch.equal(again[name], tensor) for name, tensor in load_all(out).items())

    # Expanded, it is the stock model of what it stands for
    svdcli.expand(out, tmp_path / "dense")
    original = load_all(source(family))
    dense = load_all(tmp_path / "dense")
    assert {name: t.shape for name, t in dense.items()} == {
        name: t.shape for name, t in original.items()
    }
    model: Any = svdcli.load(out)
    assert any(isinstance(module, SharedLinear) for module in model.modules())
    stock = svdcli.load(tmp_path / "dense")
    torch.testing.assert_close(answer(model), answer(stock), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", ["llama", "biased"])
def test_no_matrix_of_that_rank_is_nearer_in_the_metric(
    family: str,
    shared: Shared,
    source: Callable[[str], Path],
    moments: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """Eckart and Young for [K_1 W_1; K_2 W_2; ...] G^(1/2), by an explicit SVD in float64."""
    svdcli.expand(shared(family, "factored"), tmp_path / "dense")
    before, after = load_all(source(family)), load_all(tmp_path / "dense")
    measured = open_moments(moments(family))
    for layer in plan_of(shared(family, "factored")).layers:
        if not layer.members:
            continue
        weighed, lost = [], []
        for member in layer.members:
            known = measured.of(member.name)
            assert known is not None
            assert isinstance(known.outputs, Tensor)
            g = known.inputs.double()
            if layer.biases:
                g = g - torch.outer(known.mean.double(), known.mean.double())
            values, vectors = torch.linalg.eigh(g)
            root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
            h = known.outputs.double()
            h = h + 0.1 * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
            k = torch.linalg.cholesky(h, upper=True)
            weighed.append(k @ before[member.name].double() @ root)
            lost.append(k @ (before[member.name] - after[member.name]).double() @ root)
        energies = torch.linalg.svdvals(torch.cat(weighed)).square()
        best, digits = float(energies[layer.rank :].sum()), 1e-7 * float(energies.sum())
        found = float(torch.cat(lost).square().sum())
        assert found == pytest.approx(best, rel=1e-4, abs=digits)
        assert layer.loss == pytest.approx(best / 2, rel=1e-3, abs=digits)


def test_never_shares_nothing_and_alone_nothing_changes(
    source: Callable[[str], Path], moments: Callable[[str], Path], tmp_path: Path
) -> None:
    how: dict[str, Any] = {"keep": 0.5, "calibration": moments("narrow")}
    losses = {}
    for share in ("never", "auto", "always"):
        svdcli.compress(source("narrow"), tmp_path / share, share=share, **how)
        plan = plan_of(tmp_path / share)
        losses[share] = sum(layer.loss or 0.0 for layer in plan.layers)
    assert groups_of(tmp_path / "never") == []
    assert len(groups_of(tmp_path / "always")) == 4
    assert losses["auto"] <= min(losses["never"], losses["always"]) * (1 + 1e-9)

    # Without a calibration, or with ranks that are all alike, there is nothing to choose by
    for other in ({"keep": 0.5}, how | {"allocate": "uniform"}, how | {"metric": "inputs"}):
        svdcli.compress(source("narrow"), tmp_path / "o", share="auto", force=True, **other)
        assert groups_of(tmp_path / "o") == []


def test_what_cannot_share_is_refused(source: Callable[[str], Path], tmp_path: Path) -> None:
    done = cli(
        "compress", source("llama"), "-o", tmp_path / "o", "--keep", "0.5", "--share", "always"
    )
    assert "--share always" in complaint(done, 2)


# In memory ----------------------------------------------------------------------------------------


def test_the_basis_is_one_tensor_and_is_multiplied_once(shared: Shared) -> None:
    model: Any = svdcli.load(shared("llama"))
    attention = model.model.layers[0].self_attn
    layers = [getattr(attention, name) for name in QKV]
    [holder] = {id(layer.first): layer.first for layer in layers}.values()
    calls: list[int] = []
    holder.svd_shared.svd_down.register_forward_hook(lambda *_: calls.append(1))
    with torch.inference_mode():
        model(input_ids=zoo.IDS)
    assert len(calls) == 1
    model(input_ids=zoo.IDS)
    assert len(calls) == 2
    names = {name for name, _ in model.named_parameters() if "layers.0.self_attn" in name}
    assert sum(".svd_down." in name for name in names) == 2  # with o_proj's

    # Nothing is held afterwards
    assert all(layer.__dict__["_last"] is None for layer in layers)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    stored = load_all(shared("llama"))
    assert numbers == sum(
        t.numel() for n, t in stored.items() if "svd_rows" not in n and "span" not in n
    )


def joined(bias: bool = False) -> tuple[list[SharedLinear], nn.Module]:
    from svdcli.models.modules import LowRankLinear

    torch.manual_seed(0)
    layers = [SharedLinear(8, (5, 0, 4), bias=bias), SharedLinear(8, (5, 4, 10), bias=bias)]
    shared = LowRankLinear(8, 10, 3, bias=False)
    SharedLinear.join(layers, shared)
    for layer in layers:
        if layer.bias is not None:
            nn.init.normal_(layer.bias)
    return layers, shared


def test_what_is_kept_of_a_product_is_never_stale() -> None:
    (first, second), shared = joined(bias=True)
    weight = (shared.svd_up.weight @ shared.svd_down.weight).detach()  # type: ignore[union-attr,operator]

    def right(x: Tensor) -> None:
        y = x @ weight.T
        assert first.bias is not None
        assert second.bias is not None
        torch.testing.assert_close(first(x), y[:, :4] + first.bias)
        torch.testing.assert_close(second(x), y[:, 4:] + second.bias)

    x = torch.randn(3, 8)
    right(x)
    first(x)
    x.mul_(2)  # between the calls of both
    torch.testing.assert_close(second(x), x @ weight[4:].T + second.bias)
    first(x)
    right(x)  # asked again, it is computed again
    with torch.no_grad():
        first(x)
    assert second(x).requires_grad
    with torch.inference_mode():
        right(torch.randn(3, 8))
    with torch.autocast("cpu", torch.bfloat16):
        first(x)
    assert second(x).dtype == torch.float32


def test_copies_and_pickles_share_among_themselves() -> None:
    layers, shared = joined()
    model = nn.ModuleList(layers)
    x = torch.randn(3, 8)
    expected = torch.cat([layer(x) for layer in layers], -1)
    layers[0](x)  # something is kept
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other[1].first is other[0]
        assert other[0].svd_shared is not shared
        assert torch.equal(torch.cat([layer(x) for layer in other], -1), expected)
    alone = copy.deepcopy(layers[1])
    assert torch.equal(alone(x), expected[:, 4:])


def test_gradients_are_those_of_the_dense_layers() -> None:
    layers, shared = joined()
    up, down = shared.svd_up.weight, shared.svd_down.weight  # type: ignore[union-attr]
    x = torch.randn(3, 8, requires_grad=True)
    torch.cat([layers[1](x), layers[0](x) * 2], -1).square().sum().backward()
    got = [x.grad, up.grad, down.grad]  # type: ignore[union-attr]
    leaves = [t.detach().clone().requires_grad_() for t in (x, up, down)]  # type: ignore[arg-type,union-attr]
    y = leaves[0] @ (leaves[1] @ leaves[2]).T
    torch.cat([y[:, 4:], y[:, :4] * 2], -1).square().sum().backward()
    for mine, leaf in zip(got, leaves, strict=True):
        torch.testing.assert_close(mine, leaf.grad)


def test_its_weight_is_that_of_the_layer(shared: Shared, tmp_path: Path) -> None:
    svdcli.expand(shared("biased"), tmp_path / "dense")
    dense = load_all(tmp_path / "dense")
    model: Any = svdcli.load(shared("biased"))
    for name in QKV:
        layer = model.get_submodule(f"model.layers.1.self_attn.{name}")
        expected = dense[f"model.layers.1.self_attn.{name}.weight"]
        assert layer.weight.shape == expected.shape
        assert layer.weight.dtype == expected.dtype
        torch.testing.assert_close(layer.weight + 0, expected, rtol=1e-4, atol=1e-6)


# With other tools ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize(("family", "form"), CASES)
def test_saved_again_and_dequantised(
    family: str, form: str, shared: Shared, tmp_path: Path
) -> None:
    out = shared(family, form)
    model: Any = svdcli.load(out)
    expected = answer(model)
    model.save_pretrained(tmp_path / "again")
    assert load_all(tmp_path / "again").keys() == load_all(out).keys()
    assert torch.equal(answer(svdcli.load(tmp_path / "again")), expected)

    # Multiplied out while loading, and afterwards
    from svdcli.models.hf import SvdConfig

    auto = transformers.AutoModelForCausalLM
    for dense in (
        auto.from_pretrained(out, quantization_config=SvdConfig(dequantize=True)),
        svdcli.load(out).dequantize(),
    ):
        assert not any(isinstance(m, (SharedLinear, *LOW_RANK)) for m in dense.modules())
        torch.testing.assert_close(answer(dense), expected, rtol=1e-4, atol=2e-5)
        dense.save_pretrained(tmp_path / "dense")
        stock = load_all(tmp_path / "dense")
        assert not any("svd_" in name for name in stock)


@pytest.mark.parametrize(
    "form", ["pivoted", pytest.param("factored", marks=pytest.mark.slow), "bits"]
)
def test_a_compiler_multiplies_once_too(form: str, shared: Shared) -> None:
    model: Any = svdcli.load(shared("llama", form))
    expected = answer(model)
    products: list[int] = []

    def count(graph: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.common import aot_autograd

        def inner(lowered: Any, inputs: Any) -> Any:
            names = [str(node.target) for node in lowered.graph.nodes if node.op == "call_function"]
            products.append(sum("aten.mm" in name or "product" in name for name in names))
            return lowered.forward

        return aot_autograd(fw_compiler=inner)(graph, inputs)

    compiled = torch.compile(model, fullgraph=True, backend=count)
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=zoo.IDS)[0], expected, rtol=1e-4, atol=2e-5)
    # Two products a layer or group, at most, and those of the head and of positions
    layers = [layer for layer in plan_of(shared("llama", form)).layers if layer.rank is not None]
    assert products[0] <= 2 * len(layers) + 3
    assert 2 * len(layers) + 3 < 2 * 14


@pytest.mark.slow  # tests/verbs/test_export.py has such layers among those of every kind
def test_onnx(shared: Shared, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    out = shared("llama")
    export_onnx(out, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    names = [entry.name for entry in session.get_inputs()]
    feeds = {"input_ids": zoo.IDS.numpy(), "attention_mask": torch.ones_like(zoo.IDS).numpy()}
    [found, *_] = session.run(None, {name: feeds[name] for name in names})
    expected = answer(svdcli.load(out))
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_trains_on_the_shared_factors(shared: Shared, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["svd_down", "svd_up"], task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(svdcli.load(shared("llama")), config)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = adapted.train()(input_ids=zoo.IDS, labels=zoo.IDS).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert losses[-1] < losses[0] - 0.1
    expected = answer(adapted)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(answer(merged), expected, atol=1e-5, rtol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(answer(svdcli.load(tmp_path / "merged")), answer(merged))


def test_a_model_on_disk_answers_the_same(shared: Shared, tmp_path: Path) -> None:
    expected = answer(svdcli.load(shared("llama")))
    places = {"model.layers": "disk", "lm_head": "disk"}
    places |= dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb"], "cpu")
    aside = str(tmp_path / "aside")
    model = svdcli.load(shared("llama"), device_map=places, offload_folder=aside)
    assert torch.equal(answer(model), expected)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_one_file_opens_it_without_svdcli(family: str, shared: Shared, tmp_path: Path) -> None:
    (tmp_path / "plugin.py").write_bytes(standalone_source())
    code = (
        "import sys, runpy, torch, transformers\n"
        "runpy.run_path('plugin.py')\n"
        "assert not any(name.startswith('svdcli') for name in sys.modules)\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "torch.save(model(torch.arange(12)[None]).logits, 'logits.pt')\n"
    )
    done = run_code(code, shared(family), folder=tmp_path)
    assert done.code == 0, done.err
    expected = svdcli.load(shared(family))(torch.arange(12)[None]).logits
    assert torch.allclose(torch.load(tmp_path / "logits.pt"), expected, atol=1e-5)


def test_tensors_that_warn_other_loaders_have_the_old_names(shared: Shared, tmp_path: Path) -> None:
    tripwires = [name for name, t in load_all(shared("llama")).items() if t.numel() == 0]
    assert tripwires
    assert all(name.endswith(".weight") and "svd_" not in name for name in tripwires)


@pytest.mark.parametrize("form", FORMS)
def test_into_a_module_of_ones_own(
    form: str, shared: Shared, source: Callable[[str], Path]
) -> None:
    out = shared("llama", form)
    expected = answer(svdcli.load(out))
    model = transformers.LlamaForCausalLM.from_pretrained(source("llama"))
    svdcli.load(out, into=model)
    torch.testing.assert_close(answer(model), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "form"), [("llama", "pivoted"), ("llama", "bits"), ("biased", "factored")]
)
def test_heal(
    family: str, form: str, shared: Shared, source: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "healed"
    outcome = svdcli.heal(
        shared(family, form),
        out,
        teacher=source(family),
        texts=TEXT,
        effort=svdcli.Effort(steps=12),
        **HOW,
    )
    assert outcome.report.healing is not None
    blocks = outcome.report.healing["blocks"]
    assert all(block["after"] <= block["before"] for block in blocks.values())
    assert blocks["model.layers.0"]["after"] < blocks["model.layers.0"]["before"]
    checked = svdcli.verify(out, source(family))
    assert checked.ok, [check for check in checked.checks if not check.ok]
    before, after = load_all(shared(family, form)), load_all(out)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(".svd_shared.svd_down." in name for name in changed)


# Damage -------------------------------------------------------------------------------------------


def without_a_span(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.0.self_attn.k_proj.svd_span"]


def without_any_span(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.endswith(".svd_span")]:
        del tensors[name]


def other_span(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.self_attn.k_proj.svd_span"][1] += 1


def without_a_factor(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.0.mlp.gate_proj.svd_shared.svd_up.weight"]


@pytest.mark.parametrize("change", [without_a_span, without_any_span, other_span, without_a_factor])
def test_damage_is_told(
    change: Callable[[dict[str, Tensor]], None], shared: Shared, tmp_path: Path
) -> None:
    out = tmp_path / "o"
    out.mkdir()
    for file in shared("llama").iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    with safe_open(out / "model.safetensors", "pt") as opened:
        metadata = opened.metadata()
    save_file(tensors, out / "model.safetensors", metadata)
    with pytest.raises((ValueError, svdcli.SvdcliError)):
        transformers.LlamaForCausalLM.from_pretrained(out)
    with pytest.raises(svdcli.SvdcliError):
        svdcli.load(out)
    done = cli("verify", out)
    assert done.code == 1
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    "members",
    [
        {"x.weight": 3},
        {"model.layers.0.self_attn.q_proj.weight": -1, "b.weight": 129},
        {"model.layers.0.self_attn.q_proj.weight": 1, "b.weight": "x"},
        7,
    ],
)
def test_a_record_of_no_group_is_told(members: Any, shared: Shared, tmp_path: Path) -> None:
    out = tmp_path / "o"
    out.mkdir()
    for file in shared("llama").iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    record = json.loads((out / "svdcli.json").read_text())
    for layer in record["layers"].values():
        if "members" in layer:
            layer["members"] = members
    (out / "svdcli.json").write_text(json.dumps(record))
    for command in ("report", "verify", "expand"):
        assert "damaged" in complaint(cli(command, out)) or "not a plan" in complaint(
            cli(command, out)
        )


def test_every_layer_of_a_group_has_a_span(shared: Shared) -> None:
    with open_checkpoint(shared("llama")) as checkpoint:
        spans = [name for name in checkpoint.tensors if name.endswith(".svd_span")]
    assert len(spans) == 10
