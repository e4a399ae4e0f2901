"""Layers of few-bit integers, opened: their answers are those of a stock model that has the numbers
that they stand for, and in memory they stay packed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from accelerate import cpu_offload
from accelerate.utils import set_module_tensor_to_device
from helpers import contents, load_all, run_code, weight
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

import svdcli
from svdcli.calibration.stream import units_of
from svdcli.linalg.codes import pack_int4, stored_codes, stored_values
from svdcli.linalg.packed import packed_factors, packed_matrix
from svdcli.linalg.rounding import Grid
from svdcli.linalg.solvers import svd
from svdcli.linalg.whitening import Metric, weighted
from svdcli.models import modules
from svdcli.models.kernels import few_rows
from svdcli.models.modules import (
    LazyWeight,
    LowRankLinear,
    PackedLinear,
    PackedMatrix,
    low_rank_like,
    unpacked,
    weight_of,
)
from svdcli.models.self_contained import standalone_source
from svdcli.plan.packing import Packing
from svdcli.plan.parts import tripwires

Written = Callable[[str], Path]

GROUP = 24  # which divides no size of these models


@dataclass(frozen=True)
class Form:
    """How one layer is stored: rank None for whole."""

    bits: int
    rank: int | None = None

    @property
    def grid(self) -> Grid:
        return Grid(self.bits, GROUP if self.bits == 4 else None)


LLAMA = {
    "model.layers.0.self_attn.q_proj": Form(4, 13),
    "model.layers.0.self_attn.k_proj": Form(4),
    "model.layers.0.mlp.gate_proj": Form(8, 20),
    "model.layers.0.mlp.down_proj": Form(8),
    "model.layers.1.mlp.up_proj": Form(16, 20),
    "model.layers.1.mlp.down_proj": Form(4, 21),
    "lm_head": Form(8),
}


# Packed checkpoints -------------------------------------------------------------------------------


def pack(w: Tensor, name: str, form: Form) -> tuple[dict[str, Tensor], Tensor]:
    """(the tensors that are stored for a layer, the weight that they stand for in float32)."""
    metric = Metric(torch.eye(w.shape[1], dtype=torch.float64))
    if form.rank is None:
        whole = packed_matrix(w, form.grid, metric, w.dtype)
        stored = stored_codes(whole)
        return named(f"{name}.weight", stored, form), values(stored)
    if form.bits == 16:
        factors = svd(w.double(), form.rank)
        up, down = (tensor.to(w.dtype) for tensor in (factors.up, factors.down))
        tensors = {f"{name}.svd_up.weight": up, f"{name}.svd_down.weight": down}
        return tensors, up.float() @ down.float()
    grid = form.grid
    factors = weighted(w.to(torch.float64), form.rank, metric)
    up, down = map(stored_codes, packed_factors(w, factors, grid, metric, w.dtype))
    tensors = named(f"{name}.svd_up.weight", up, form)
    tensors |= named(f"{name}.svd_down.weight", down, form)
    return tensors, values(up) @ values(down)


def values(stored: tuple[Tensor, ...]) -> Tensor:
    return stored_values(stored, GROUP, torch.float32)


def named(name: str, stored: tuple[Tensor, ...], form: Form) -> dict[str, Tensor]:
    infos = Packing(form.bits, GROUP).tensors(name, (1, 1), "F32")
    return {info.name: tensor for info, tensor in zip(infos, stored, strict=True)}


def record_of(forms: Mapping[str, Form], dense: Mapping[str, Tensor]) -> str:
    """The part of a record about its layers, as a weight file's metadata has it."""
    layers = {}
    for name, form in forms.items():
        w = dense[f"{name}.weight"]
        dtype = {torch.float32: "F32", torch.bfloat16: "BF16"}[w.dtype]
        layers[f"{name}.weight"] = {
            "shape": list(w.shape),
            "dtype": dtype,
            "rank": form.rank or min(w.shape),
            "layout": "factored" if form.rank else "whole",
            "stored_dtype": dtype,
            "solver": "svd",
            "relative_error": 0.1,
        }
        if form.bits != 16:
            layers[f"{name}.weight"] |= {"bits": form.bits, "group": GROUP}
    record = {"svdcli": "0", "format": 1, "fingerprint": "0", "layers": layers}
    return json.dumps(record)


@dataclass(frozen=True)
class Packed:
    """A directory with packed layers, and the weights of the stock model that answers alike."""

    path: Path
    tensors: dict[str, Tensor]
    dense: dict[str, Tensor]


def write(
    source: Path,
    out: Path,
    forms: Mapping[str, Form],
    *,
    with_record: bool = True,
    change: Callable[[dict[str, Tensor]], Any] = lambda _: None,
) -> Packed:
    """Pack layers of a model; `change` gets the tensors before they are written."""
    original = load_all(source)
    tensors = dict(original)
    dense = dict(original)
    for name, form in forms.items():
        parts, dense_weight = pack(tensors.pop(f"{name}.weight"), name, form)
        tensors |= parts
        dense[f"{name}.weight"] = dense_weight.to(original[f"{name}.weight"].dtype)
    for name in tripwires(name for name, form in forms.items() if form.rank):
        tensors[f"{name}.weight"] = torch.empty(0)
    change(tensors)

    out.mkdir()
    metadata = {"format": "pt"}
    if with_record:
        metadata["svdcli"] = record_of(forms, original)
    save_file({name: t.contiguous() for name, t in tensors.items()}, out / FILE, metadata)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "svdcli",
        "format": 1,
        "layout": "factored",
        "group": GROUP,
    }
    (out / "config.json").write_text(json.dumps(config))
    return Packed(out, tensors, dense)


FILE = "model.safetensors"


def stock(source: Path, packed: Packed, folder: Path) -> Any:
    """The stock model of the weights that packed layers stand for."""
    folder.mkdir()
    save_file(packed.dense, folder / FILE, {"format": "pt"})
    (folder / "config.json").write_text((source / "config.json").read_text())
    return svdcli.load(folder).eval()


@pytest.fixture(scope="module")
def llama(written: Written, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return write(written("llama"), tmp_path_factory.mktemp("packed") / "out", LLAMA)


@pytest.fixture(scope="module")
def dense_llama(llama: Packed, written: Written, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return stock(written("llama"), llama, tmp_path_factory.mktemp("stock") / "dense")


def dequantizing(path: Path) -> Any:
    """The config of a packed directory that asks for dense layers."""
    config = transformers.AutoConfig.from_pretrained(path)
    config.quantization_config["dequantize"] = True
    return config


def same(family: str, model: Any, dense: Any) -> None:
    """Fails where two models answer differently beyond rounding."""
    expected = zoo.answer(family, dense)
    scale = float(expected.abs().max())
    torch.testing.assert_close(zoo.answer(family, model), expected, rtol=1e-4, atol=1e-5 * scale)


# A directory --------------------------------------------------------------------------------------


def test_it_answers_as_the_stock_model_of_its_numbers(llama: Packed, dense_llama: Any) -> None:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        llama.path, output_loading_info=True
    )
    assert not any(info.values())
    same("llama", model, dense_llama)
    ids = {"input_ids": zoo.IDS[:1], "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(**ids), dense_llama.generate(**ids))


def test_its_layers_stay_packed_in_memory(llama: Packed) -> None:
    model = svdcli.load(llama.path)
    state = model.state_dict()
    stored = {name: t for name, t in llama.tensors.items() if t.numel()}
    assert state.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(state[name], tensor)
        assert state[name].dtype == tensor.dtype
    for name, form in LLAMA.items():
        module = model.get_submodule(name)
        assert isinstance(module, PackedLinear if form.rank is None else LowRankLinear)
        if form.rank is not None and form.bits != 16:
            assert isinstance(module.svd_up, PackedLinear)
            assert isinstance(module.svd_down, PackedLinear)
        assert sum(p.numel() for p in module.parameters()) == 0 or form.bits == 16


@pytest.mark.parametrize("way", ["while loading", "afterwards", "half"])
def test_casts_leave_integers_alone(way: str, llama: Packed) -> None:
    if way == "while loading":
        model = transformers.AutoModelForCausalLM.from_pretrained(llama.path, dtype=torch.float64)
    elif way == "afterwards":
        model = svdcli.load(llama.path).to(torch.float64)
    else:
        model = svdcli.load(llama.path).half()
    for name, tensor in model.state_dict().items():
        if llama.tensors[name].is_floating_point():
            assert tensor.dtype == (torch.float16 if way == "half" else torch.float64)
        else:
            assert torch.equal(tensor, llama.tensors[name])
    assert model.model.layers[0].mlp.down_proj.weight.dtype == model.dtype
    assert zoo.answer("llama", model).isfinite().all()


@pytest.mark.parametrize("with_record", [True, False])
def test_saved_again_it_is_the_same_bytes(
    with_record: bool, written: Written, tmp_path: Path
) -> None:
    write(written("llama"), tmp_path / "out", LLAMA, with_record=with_record)
    model = svdcli.load(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again" / FILE) == contents(tmp_path / "out" / FILE)
    quantised = [
        json.loads((tmp_path / folder / "config.json").read_text())["quantization_config"]
        for folder in ("out", "again")
    ]
    assert quantised[0] == quantised[1]
    again = svdcli.load(tmp_path / "again")
    assert torch.equal(zoo.answer("llama", again), zoo.answer("llama", model))


def test_it_unpacks_for_those_who_ask(llama: Packed, dense_llama: Any, tmp_path: Path) -> None:
    dense = svdcli.load(llama.path, config=dequantizing(llama.path))
    later = svdcli.load(llama.path).dequantize()
    for model in (dense, later):
        assert model.state_dict().keys() == dense_llama.state_dict().keys()
        assert not any(isinstance(m, (PackedLinear, LowRankLinear)) for m in model.modules())
        same("llama", model, dense_llama)
        assert all(parameter.requires_grad for parameter in model.parameters())
    for model in (dense, later):
        model.save_pretrained(tmp_path / "again")
        assert "quantization_config" not in json.loads(
            (tmp_path / "again" / "config.json").read_text()
        )
        same("llama", svdcli.load(tmp_path / "again"), dense_llama)


def test_bfloat16_answers_as_the_stock_model(tmp_path: Path) -> None:
    source = zoo.save("llama", tmp_path / "model", torch.bfloat16)
    packed = write(source, tmp_path / "out", LLAMA)
    model = svdcli.load(tmp_path / "out").eval()
    dense = stock(source, packed, tmp_path / "dense")
    assert model.lm_head.scales.dtype == torch.bfloat16
    expected = zoo.answer("llama", dense).float()
    error = zoo.answer("llama", model).float() - expected
    assert error.norm() < 0.02 * expected.norm()
    ids = zoo.IDS[:1, :6]  # so few rows that torch multiplies the integers themselves
    expected = dense(ids).logits.float()
    assert (model(ids).logits.float() - expected).norm() < 0.02 * expected.norm()


def test_tensors_may_be_moved_one_by_one(llama: Packed, tmp_path: Path) -> None:
    """As accelerate does where a model is spread over devices: by the names of buffers."""
    model = svdcli.load(llama.path)
    expected = zoo.answer("llama", model)
    for name, _ in list(model.named_buffers()):
        set_module_tensor_to_device(model, name, "cpu")
    assert torch.equal(zoo.answer("llama", model), expected)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, llama.tensors[name])
        assert type(tensor) is Tensor
    head = svdcli.load(llama.path).lm_head
    moved = head.weight.to("meta")
    assert isinstance(moved, LazyWeight)
    assert (moved.device.type, moved.shape) == ("meta", (96, 64))
    set_module_tensor_to_device(head, "weight", "meta")
    assert head.state_dict()["weight"].dtype == torch.int8
    assert head.state_dict()["weight"].is_meta


def test_a_model_on_disk_answers_the_same(llama: Packed, tmp_path: Path) -> None:
    expected = zoo.answer("llama", svdcli.load(llama.path))
    places = {"model.layers": "disk", "lm_head": "disk"}
    places |= dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb"], "cpu")
    model = svdcli.load(llama.path, device_map=places, offload_folder=str(tmp_path / "aside"))
    assert torch.equal(zoo.answer("llama", model), expected)


@pytest.mark.parametrize("name", [name for name, form in LLAMA.items() if form.bits != 16])
def test_integers_may_wait_elsewhere(name: str, llama: Packed) -> None:
    """As accelerate has them do between calls; it gives them back in the dtype of `weight`."""
    layer = svdcli.load(llama.path).get_submodule(name)
    x = torch.randn(3, layer.in_features)
    expected = layer(x)
    cpu_offload(layer, torch.device("cpu"), offload_buffers=True)
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    assert torch.allclose(layer(x), expected, atol=1e-6)


def test_compiles_as_one_graph(llama: Packed) -> None:
    model = svdcli.load(llama.path)
    expected = zoo.answer("llama", model)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    assert torch.allclose(zoo.answer("llama", model), expected, atol=1e-5)


def test_the_class_is_found_where_the_config_names_none(
    llama: Packed, dense_llama: Any, written: Written, tmp_path: Path
) -> None:
    write(written("llama"), tmp_path / "out", LLAMA)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    model = svdcli.load(tmp_path / "out")
    assert type(model) is type(dense_llama)
    same("llama", model, dense_llama)


def test_one_file_opens_it_without_svdcli(llama: Packed, tmp_path: Path) -> None:
    (tmp_path / "plugin.py").write_bytes(standalone_source())
    code = (
        "import sys, runpy, torch, transformers\n"
        "runpy.run_path('plugin.py')\n"
        "assert not any(name.startswith('svdcli') for name in sys.modules)\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "torch.save(model(torch.arange(12)[None]).logits, 'logits.pt')\n"
    )
    done = run_code(code, llama.path, folder=tmp_path)
    assert done.code == 0, done.err
    expected = svdcli.load(llama.path)(torch.arange(12)[None]).logits
    assert torch.allclose(torch.load(tmp_path / "logits.pt"), expected, atol=1e-5)


# What other modules stand for ---------------------------------------------------------------------


EXPERTS = "model.layers.{}.block_sparse_moe.experts.{}.{}"
MIXTRAL = {
    EXPERTS.format(0, 0, "w1"): Form(4),
    EXPERTS.format(0, 1, "w1"): Form(8),
    EXPERTS.format(0, 2, "w1"): Form(16, 12),
    EXPERTS.format(0, 3, "w3"): Form(8, 12),
    EXPERTS.format(0, 0, "w3"): Form(4, 12),
    EXPERTS.format(0, 1, "w2"): Form(8),
    EXPERTS.format(1, 2, "w2"): Form(4),
    "model.layers.1.self_attn.q_proj": Form(8),
}
GPT2 = {
    "transformer.h.0.mlp.c_fc": Form(8),
    "transformer.h.0.attn.c_attn": Form(4),
    "transformer.h.1.mlp.c_proj": Form(4, 12),
    "transformer.h.1.mlp.c_fc": Form(8, 12),
}
MARIAN = {"model.shared": Form(4), "model.encoder.layers.0.fc1": Form(8)}


@pytest.mark.parametrize(
    ("family", "forms", "asked"),
    [
        ("mixtral", MIXTRAL, True),
        ("gpt2", GPT2, True),
        ("marian", MARIAN, False),
        ("marian", MARIAN, True),
    ],
)
def test_what_no_module_can_hold_is_unpacked_and_it_says_so(
    family: str,
    forms: dict[str, Form],
    asked: bool,
    written: Written,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    packed = write(written(family), tmp_path / "out", forms)
    options = {"config": dequantizing(tmp_path / "out")} if asked else {}
    transformers.utils.logging.enable_propagation()
    try:
        model = svdcli.load(tmp_path / "out", **options).eval()
    finally:
        transformers.utils.logging.disable_propagation()
    assert ("multiplied out" in caplog.text) is not asked
    dense = stock(written(family), packed, tmp_path / "dense")
    same(family, model, dense)
    model.save_pretrained(tmp_path / "again")
    same(family, svdcli.load(tmp_path / "again").eval(), dense)


def test_weights_stored_the_other_way_round_stay_packed(written: Written, tmp_path: Path) -> None:
    packed = write(written("gpt2"), tmp_path / "out", GPT2)
    model: Any = svdcli.load(tmp_path / "out").eval()
    assert isinstance(model.transformer.h[0].mlp.c_fc, PackedMatrix)
    assert isinstance(model.transformer.h[1].mlp.c_proj.svd_up, PackedMatrix)
    dense = stock(written("gpt2"), packed, tmp_path / "dense")
    same("gpt2", model, dense)
    compiled = torch.compile(model, backend="eager")
    same("gpt2", compiled, dense)
    model.save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again" / FILE) == contents(tmp_path / "out" / FILE)
    same("gpt2", model.dequantize(), dense)


def test_a_packed_head_beside_a_table_is_a_weight_of_its_own(
    written: Written, tmp_path: Path
) -> None:
    source = zoo.save("llama-tied", tmp_path / "model")
    head = torch.randn(96, 64)
    tensors = load_file(source / FILE) | {"lm_head.weight": head}
    save_file(tensors, source / FILE, {"format": "pt"})
    forms = {"lm_head": Form(8), "model.layers.0.self_attn.q_proj": Form(4)}
    packed = write(source, tmp_path / "out", forms)
    model = svdcli.load(tmp_path / "out").eval()
    same("llama-tied", model, stock(source, packed, tmp_path / "dense"))


@pytest.mark.parametrize("form", [Form(8), Form(4), Form(4, 10)])
def test_names_that_are_others_in_the_model(form: Form, tmp_path: Path) -> None:
    source = tmp_path / "model"
    zoo._model("DeepseekV4ForCausalLM", **zoo.GROUPED)().save_pretrained(source)
    packed = write(source, tmp_path / "out", {"head": form})
    model = svdcli.load(tmp_path / "out").eval()
    assert isinstance(model.lm_head, PackedLinear if form.rank is None else LowRankLinear)
    expected = stock(source, packed, tmp_path / "dense")(zoo.IDS).logits
    assert torch.allclose(model(zoo.IDS).logits, expected, atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again" / FILE) == contents(tmp_path / "out" / FILE)


# What is refused ----------------------------------------------------------------------------------


SIX = {name: form for name, form in LLAMA.items() if form.bits != 16}
PARTS = [
    info.name
    for name, form in SIX.items()
    for matrix in (["weight"] if form.rank is None else ["svd_up.weight", "svd_down.weight"])
    for info in Packing(form.bits, GROUP).tensors(f"{name}.{matrix}", (1, 1), "F32")
]


@pytest.mark.parametrize("with_record", [True, False])
@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_is_told(
    part: str, with_record: bool, written: Written, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    write(
        written("llama"),
        out,
        SIX,
        with_record=with_record,
        change=lambda tensors: tensors.pop(part),
    )
    with pytest.raises(ValueError, match="missing from the weight files"):
        transformers.AutoModelForCausalLM.from_pretrained(out)
    with pytest.raises(svdcli.SvdcliError):
        svdcli.load(out)


def wider(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = functional.pad(tensors[name], (0, 1))

    return change


def other_shape(tensors: dict[str, Tensor]) -> None:
    name = "model.layers.0.self_attn.k_proj.weight_shape"
    tensors[name] = torch.tensor([32, 63])


def no_integers(tensors: dict[str, Tensor]) -> None:
    name = "model.layers.0.mlp.gate_proj.svd_up.weight"
    tensors[name] = tensors[name].float()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (wider("lm_head.weight_scale"), "lm_head.weight disagree"),
        (wider("model.layers.0.self_attn.k_proj.weight_packed"), "k_proj.weight disagree"),
        (wider("model.layers.0.self_attn.q_proj.svd_up.weight_scale"), "svd_up.weight disagree"),
        (wider("model.layers.0.self_attn.q_proj.svd_up.weight_shape"), "svd_up.weight disagree"),
        (other_shape, "k_proj are not those that svdcli recorded"),
        (no_integers, "gate_proj.svd_up.weight disagree"),
    ],
)
def test_parts_that_disagree_are_told(
    change: Callable[[dict[str, Tensor]], None], says: str, written: Written, tmp_path: Path
) -> None:
    write(written("llama"), tmp_path / "out", LLAMA, change=change)
    with pytest.raises(ValueError, match=says):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("with_record", [True, False])
@pytest.mark.parametrize(
    "forms",
    [
        {"lm_head": Form(8)},
        {"lm_head": Form(4)},
        {"lm_head": Form(4, 7)},
        {"model.layers.0.mlp.up_proj": Form(8, 7)},
    ],
)
def test_a_lost_group_is_told(
    forms: dict[str, Form], with_record: bool, written: Written, tmp_path: Path
) -> None:
    write(written("llama"), tmp_path / "out", forms, with_record=with_record)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["quantization_config"]["group"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has no group"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_another_group_than_the_recorded_one_is_told(written: Written, tmp_path: Path) -> None:
    write(written("llama"), tmp_path / "out", {"lm_head": Form(4)})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["group"] = 23  # which needs as many scales
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has groups of 24 columns"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


# Into a module of one's own -----------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_file_loads_into_a_module(device: str, tmp_path: Path) -> None:
    forms = {"0": Form(8), "2": Form(4, 9), "3": Form(4), "4": Form(8, 9), "5": Form(16, 9)}
    dense = nn.Sequential(
        nn.Linear(40, 48), nn.ReLU(), *(nn.Linear(48, 48, bias=i == 2) for i in range(4))
    )
    original = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    tensors = dict(original)
    expected = dict(original)
    for name, form in forms.items():
        parts, expected[f"{name}.weight"] = pack(tensors.pop(f"{name}.weight"), name, form)
        tensors |= parts
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    file = tmp_path / "m.safetensors"
    save_file(tensors, file, {"svdcli": record_of(forms, original)})
    dense.load_state_dict(expected)

    with torch.device(device):
        module = nn.Sequential(
            nn.Linear(40, 48), nn.ReLU(), *(nn.Linear(48, 48, bias=i == 2) for i in range(4))
        )
    model = svdcli.load(file, into=module)
    assert model.state_dict().keys() == tensors.keys()
    assert all(torch.equal(model.state_dict()[name], t) for name, t in tensors.items())
    x = weight(5, 40, 7)
    assert torch.allclose(model(x), dense(x), atol=1e-5)


# Modules ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 24, 47, 48, 49, 130])
def test_unpacking_is_that_of_the_writer(columns: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(columns)
    eight = torch.randint(-128, 128, (5, columns), generator=generator, dtype=torch.int8)
    scales = torch.rand(5, 1, generator=generator).to(dtype)
    expected = stored_values((eight, scales), 0, dtype)
    assert torch.equal(unpacked(eight, scales, columns, None, dtype), expected)

    four = torch.randint(-8, 8, (5, columns), generator=generator, dtype=torch.int8)
    for group in (8, 24, 64, 200):
        scales = torch.rand(5, -(-columns // group), generator=generator).to(dtype)
        stored = (pack_int4(four), scales, torch.tensor(four.shape))
        expected = stored_values(stored, group, dtype)
        assert torch.equal(unpacked(stored[0], scales, columns, group, dtype), expected)


def packed_linear(
    form: Form, n: int, m: int, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, nn.Linear]:
    """(a packed layer, the dense one of the same numbers)."""
    torch.manual_seed(0)
    old = nn.Linear(n, m, dtype=dtype)
    layout = "whole" if form.rank is None else "factored"
    rank = form.rank or min(m, n)
    new = low_rank_like(old, rank, layout=layout, bits=form.bits, group=GROUP)
    assert new is not None
    parts, dense = pack(old.weight.detach(), "x", form)
    state = {name.removeprefix("x."): tensor for name, tensor in parts.items()}
    new.load_state_dict(state | {"bias": old.bias.detach()}, assign=True)
    old.weight.data = dense.to(dtype)
    return new, old


FORMS = [Form(8), Form(4), Form(8, 11), Form(4, 11)]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_forward_is_that_of_the_dense_layer(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    new, old = packed_linear(form, 50, 30)
    x = torch.randn(3, 7, 50, requires_grad=True)
    assert torch.allclose(new(x), old(x), atol=1e-5)
    new(x).sum().backward()
    assert torch.allclose(x.grad, old.weight.sum(0).expand(3, 7, 50), atol=1e-4)
    for numbers in (1, 50 * 7):
        monkeypatch.setattr(modules, "NUMBERS_AT_ONCE", numbers)
        assert torch.allclose(new(x), old(x), atol=1e-5)
    assert new(torch.randn(0, 50)).shape == (0, 30)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_its_weight_is_unpacked_only_where_it_is_used(
    form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, old = packed_linear(form, 50, 30)
    with monkeypatch.context() as patch:
        patch.setattr(modules, "unpacked", lambda *_: pytest.fail("unpacked"))
        w = new.weight
        assert isinstance(w, LazyWeight)
        assert (w.shape, w.dtype, w.device) == ((30, 50), torch.float32, torch.device("cpu"))
    assert torch.allclose(w + 0, old.weight, atol=1e-6)
    assert torch.allclose(weight_of(new), old.weight, atol=1e-6)


@pytest.mark.parametrize("inputs", ["few", "one", "many", "unaligned", "strided"])
@pytest.mark.parametrize("n", [64, 40])
def test_integers_are_multiplied_where_that_is_safe(
    n: int, inputs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, old = packed_linear(Form(8), n, 30, torch.bfloat16)
    x = {
        "few": torch.randn(2, 3, n).bfloat16(),
        "one": torch.randn(n).bfloat16(),
        "many": torch.randn(few_rows() + 1, n).bfloat16(),
        "unaligned": torch.randn(n * 3 + 1).bfloat16()[1:].view(3, n),
        "strided": torch.randn(n, 3).bfloat16().T,
    }[inputs]
    expected = old(x)
    with torch.no_grad():
        assert torch.allclose(new(x), expected, atol=0.02)
        monkeypatch.setattr(modules, "unpacked", lambda *_: pytest.fail("unpacked"))
        if n == 64 and inputs != "many":
            new(x)
        else:
            with pytest.raises(pytest.fail.Exception, match="unpacked"):
                new(x)


def test_only_linear_layers_and_tables_of_eight_bits_are_packed() -> None:
    for layout, bits in (("whole", 4), ("factored", 8)):
        assert low_rank_like(nn.Embedding(9, 8), 2, layout=layout, bits=bits, group=8) is None
        assert low_rank_like(nn.Conv2d(3, 4, 1), 2, layout=layout, bits=4, group=8) is None


def test_packed_numbers_count_and_take_turns(llama: Packed, dense_llama: Any) -> None:
    model = svdcli.load(llama.path)
    ranks = {name: form.rank for name, form in LLAMA.items() if form.rank is not None}
    expected = modules.numbers_of(dense_llama)
    for name, rank in ranks.items():
        m, n = dense_llama.get_submodule(name).weight.shape
        expected += rank * (m + n) - m * n
    assert modules.numbers_of(model) == expected
    assert units_of(model).keys() == units_of(dense_llama).keys()
