"""`svdcli export`: onnxruntime gives torch's outputs, the factors stay two products, and no half
file is ever left."""

from __future__ import annotations

import errno
import importlib.util
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
import zoo
from helpers import cli, complaint, tree
from torch import Tensor, nn

import svdcli
from svdcli.models.modules import (
    LOW_RANK,
    LowRankConv1D,
    LowRankEmbedding,
    LowRankLinear,
    PivotedConv1D,
    PivotedEmbedding,
    PivotedLinear,
    SharedLinear,
)
from svdcli.verbs import export

SAMPLE = Path(__file__).parent.parent.parent / "sample_models" / "mlp.safetensors"
Written = Callable[[str], Path]
Shallow = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Shallow:
    """A family's model with a single layer, compressed: tracing takes seconds a layer."""
    made: dict[tuple[str, str], Path] = {}

    def make(family: str, layout: str) -> Path:
        if (family, layout) not in made:
            folder = tmp_path_factory.mktemp(f"{family}-{layout}")
            model_class = type(zoo.FAMILIES[family].build())
            config = zoo.FAMILIES[family].build().config
            config.num_hidden_layers = 1
            if family != "vit":
                config.max_position_embeddings = (
                    48  # no other weight has the shape of a factored one
                )
            torch.manual_seed(0)
            model_class(config).save_pretrained(folder / "model")
            svdcli.compress(
                folder / "model", folder / "out", svdcli.Recipe("keep", 0.6, layout=layout)
            )
            made[family, layout] = folder / "out"
        return made[family, layout]

    return make


@pytest.fixture(scope="module")
def vision(shallow: Shallow) -> Path:
    """The quickest to trace."""
    return shallow("vit", "factored")


@pytest.fixture(scope="module")
def traced(vision: Path) -> Any:
    """What the exporter makes of it, once for all tests that are about what comes after."""
    with export._hushed():
        return export._traced(export._call_for(svdcli.load(vision, dtype=torch.float32).eval()))


@pytest.fixture
def quick(traced: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_traced", lambda _: traced)


# The whole way ------------------------------------------------------------------------------------


def other_inputs(family: str) -> dict[str, Tensor]:
    """Another batch and another length than anything was traced or checked with; the second row is
    padded."""
    if family == "vit":
        return {"pixel_values": torch.linspace(-2, 2, 5 * 3 * 16 * 16).reshape(5, 3, 16, 16)}
    ids = (torch.arange(5 * 17).reshape(5, 17) * 11 + 1) % 96
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def answers(file: Path, family: str) -> dict[str, Tensor]:
    """What onnxruntime makes of them."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found = session.run(
        names, {name: value.numpy() for name, value in other_inputs(family).items()}
    )
    return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}


@dataclass(frozen=True)
class Products:
    """The matrix products of a graph with a stored matrix: {matrix: shape}, {matrix: (input,
    output)}."""

    shapes: dict[str, tuple[int, ...]]
    flow: dict[str, tuple[str, str]]


def products_of(file: Path) -> Products:
    graph = onnx.load(file).graph
    shapes = {item.name: tuple(item.dims) for item in graph.initializer}
    products = [
        node
        for node in graph.node
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in shapes
    ]
    return Products(shapes, {node.input[1]: (node.input[0], node.output[0]) for node in products})


def assert_two_products_a_layer(file: Path, model: nn.Module) -> None:
    """Each factor is multiplied with once, as it is or transposed; nothing else has the shape of
    what they stand for."""
    found = products_of(file)
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, LOW_RANK)
    }
    others = {shape for name, shape in found.shapes.items() if ".svd_" not in name}
    assert layers
    for name, layer in layers.items():
        flow = {}
        for part in ("svd_up", "svd_down"):
            stored, shape = f"{name}.{part}.weight", tuple(layer.get_submodule(part).weight.shape)
            assert (stored in found.flow) != (f"{stored}.T" in found.flow), stored
            if stored not in found.flow:
                stored, shape = f"{stored}.T", shape[::-1]
            assert found.shapes[stored] == shape
            flow[part] = found.flow[stored]
        assert not {tuple(layer.weight.shape), tuple(layer.weight.shape[::-1])} & others, name
        if "Pivoted" not in type(layer).__name__:  # the output of one is the input of the other
            assert (
                flow["svd_down"][1] == flow["svd_up"][0] or flow["svd_up"][1] == flow["svd_down"][0]
            )


def check_answers(file: Path, out: Path, family: str) -> None:
    inputs = other_inputs(family)
    model: Any = svdcli.load(out, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(**inputs)
    mask = inputs.get("attention_mask")
    for name, found in answers(file, family).items():
        here = mask.bool() if mask is not None and found.shape[:2] == mask.shape else slice(None)
        torch.testing.assert_close(found[here], expected[name][here], atol=2e-5, rtol=2e-5)
    assert_two_products_a_layer(file, model)


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("bert", "factored"),
        # The command exports a decoder, and a module of every kind has its factors the other way
        pytest.param("gpt2", "pivoted", marks=pytest.mark.slow),
    ],
)
def test_onnxruntime_answers_as_torch_does(
    family: str, layout: str, shallow: Shallow, tmp_path: Path
) -> None:
    out, file = shallow(family, layout), tmp_path / "model.onnx"
    exported = svdcli.export_onnx(out, file)
    assert exported.checked is not None
    assert exported.checked < 1e-5
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert file.stat().st_size == exported.bytes
    check_answers(file, out, family)


def test_the_command_exports_a_decoder(shallow: Shallow, tmp_path: Path) -> None:
    out, file = shallow("llama", "factored"), tmp_path / "model.onnx"
    done = cli("export", out, "--onnx", file, "--json")
    assert done.code == 0, done
    found = json.loads(done.out)
    assert {
        key: found[key] for key in ("svdcli_json", "kind", "path", "bytes", "inputs", "outputs")
    } == {
        "svdcli_json": 1,
        "kind": "export",
        "path": str(file),
        "bytes": file.stat().st_size,
        "inputs": ["input_ids", "attention_mask"],
        "outputs": ["logits"],
    }
    assert found["checked"] < 1e-5
    lines = done.err.splitlines()
    assert lines[0] == f"svdcli: wrote {file}"
    assert len(lines) == 2, "the exporter's own messages stay away"
    check_answers(file, out, "llama")
    graph = onnx.load(file).graph
    assert [
        [axis.dim_param for axis in value.type.tensor_type.shape.dim] for value in graph.input
    ] == [["batch", "sequence"]] * 2
    assert not any(node.metadata_props for node in graph.node), "paths of this machine"
    assert "exists; use --force" in complaint(cli("export", out, "--onnx", file))


@pytest.mark.usefixtures("quick")
def test_a_vision_model(vision: Path, tmp_path: Path) -> None:
    exported = svdcli.export_onnx(vision, tmp_path / "model.onnx")
    assert exported.inputs == ("pixel_values",)
    check_answers(exported.path, vision, "vit")


class EveryKind(nn.Module):
    """One low-rank module of each kind, one after the other, and two layers that share one: ids
    (batch, sequence) -> hidden (batch, sequence, 40)."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(
            [kind(90, 40, 7) for kind in (LowRankEmbedding, PivotedEmbedding)]
        )
        linears = [kind(40, 40, 9, bias=True) for kind in (LowRankLinear, PivotedLinear)]
        self.layers = nn.ModuleList(
            [*linears, *(kind(40, 40, 11) for kind in (LowRankConv1D, PivotedConv1D))]
        )
        spans = ((0, 0, 24), (0, 24, 40))
        self.pair = nn.ModuleList([SharedLinear(40, span, bias=True) for span in spans])
        SharedLinear.join(list(self.pair), PivotedLinear(40, 40, 9, bias=False))
        random = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=random)
        for name, rows in self.named_buffers():
            if name.endswith("svd_rows"):
                rows.copy_(torch.randperm(len(rows), generator=random))

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        hidden: Tensor = sum(embed(ids) for embed in self.embeddings)
        for layer in self.layers:
            hidden = nn.functional.normalize(layer(hidden), dim=-1)
        return {"hidden": torch.cat([layer(hidden) for layer in self.pair], -1)}


def test_every_kind_of_low_rank_module(tmp_path: Path) -> None:
    model, file = EveryKind(), tmp_path / "model.onnx"
    assert {type(module) for module in model.modules()} >= set(LOW_RANK)
    call = export._Call(model, ("ids",), {}, {"vocabulary": 90}).eval()
    call.outputs = ("hidden",)
    with export._hushed():
        program = export._traced(call)
        export._name_like_model(program.model.graph)
        program.optimize()
        program.save(file)
    difference = export._difference(file, call)
    assert difference is not None
    assert difference < 1e-5
    products = {name.removesuffix(".T") for name in products_of(file).flow}
    ups = {f"layers.{i}.svd_up.weight" for i in range(4)} | {"pair.0.svd_shared.svd_up.weight"}
    assert products == ups | {
        name for name, _ in model.named_parameters() if name.endswith("svd_down.weight")
    }


@pytest.mark.usefixtures("quick")
def test_with_q_nothing_is_said(vision: Path, tmp_path: Path) -> None:
    done = cli("export", vision, "--onnx", tmp_path / "model.onnx", "-q")
    assert (done.code, done.out, done.err) == (0, b"", "")


def test_half_precision(shallow: Shallow, tmp_path: Path) -> None:
    out = shallow("vit", "pivoted")
    exported = svdcli.export_onnx(out, tmp_path / "model.onnx", dtype="F16")
    assert exported.checked is not None
    assert exported.checked < 1e-2
    stored = onnx.load(exported.path).graph.initializer
    assert all(
        item.data_type == onnx.TensorProto.FLOAT16 for item in stored if ".svd_" in item.name
    )
    assert_two_products_a_layer(exported.path, svdcli.load(out))


# Where it goes ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_large_models_have_their_weights_beside_the_graph(
    vision: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.onnx"
    monkeypatch.setattr(export, "_IN_ONE_FILE", 0)
    exported = svdcli.export_onnx(vision, file)
    assert sorted(tree(tmp_path)) == ["model.onnx", "model.onnx.data"]
    assert exported.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert file.stat().st_size < exported.bytes / 2
    check_answers(file, vision, "vit")
    monkeypatch.undo()
    file.unlink()
    with pytest.raises(svdcli.SvdcliError, match=r"model\.onnx\.data exists; use --force"):
        svdcli.export_onnx(vision, file)


@pytest.mark.usefixtures("quick")
def test_force_replaces_the_graph_and_the_weights(vision: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_text("old")
    (tmp_path / "model.onnx.data").write_text("old")
    svdcli.export_onnx(vision, file, force=True)
    assert list(tree(tmp_path)) == ["model.onnx"]
    check_answers(file, vision, "vit")


@pytest.mark.usefixtures("quick")
def test_what_a_killed_run_left_is_swept_away(vision: Path, tmp_path: Path) -> None:
    left = tmp_path / "model.onnx.partial" / "data"
    left.mkdir(parents=True)
    (left / "model.onnx.data").write_text("half")
    svdcli.export_onnx(vision, tmp_path / "model.onnx")
    assert list(tree(tmp_path)) == ["model.onnx"]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("failure", "shown"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), svdcli.SvdcliError),
        (OSError(errno.EACCES, "Permission denied"), PermissionError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=["disk full", "no permission", "interrupted"],
)
def test_a_failed_write_leaves_everything_as_it_was(
    failure: BaseException,
    shown: type[BaseException],
    traced: Any,
    vision: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise failure

    monkeypatch.setattr(traced, "save", fail)
    (tmp_path / "model.onnx").write_text("older")
    before = tree(tmp_path)
    with pytest.raises(shown):
        svdcli.export_onnx(vision, tmp_path / "model.onnx", force=True)
    assert tree(tmp_path) == before


# Checks -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_other_outputs_than_torch_s_are_an_error(
    traced: Any, vision: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale = next(
        value
        for name, value in traced.model.graph.initializers.items()
        if "layernorm" in name and "weight" in name
    )
    monkeypatch.setattr(
        scale, "const_value", onnx_ir.tensor(np.full(64, 1.1, np.float32), name=scale.name)
    )
    with pytest.raises(svdcli.SvdcliError, match="outputs differ from torch's by"):
        svdcli.export_onnx(vision, tmp_path / "model.onnx")
    assert not tree(tmp_path)


@pytest.mark.usefixtures("quick")
def test_a_graph_that_onnxruntime_refuses_is_an_error(
    traced: Any, vision: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traced, "save", lambda path, **_: path.write_bytes(b"no graph"))
    with pytest.raises(svdcli.SvdcliError, match="onnxruntime does not run what"):
        svdcli.export_onnx(vision, tmp_path / "model.onnx")
    assert not tree(tmp_path)


def lacking(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if that library was not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda other, *rest: None if other == name else find(other, *rest),
    )


@pytest.mark.usefixtures("quick")
def test_without_onnxruntime_the_file_is_written_and_that_is_said(
    vision: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking("onnxruntime", monkeypatch)
    done = cli("export", vision, "--onnx", tmp_path / "model.onnx", "--json")
    assert done.code == 0, done
    assert json.loads(done.out)["checked"] is None
    assert "onnxruntime is not installed, so this was not checked" in done.err
    check_answers(tmp_path / "model.onnx", vision, "vit")


def test_shapes_count_as_a_difference_and_padding_does_not() -> None:
    wanted, mask = torch.ones(2, 3, 4), torch.tensor([[True, True, False], [True, True, True]])
    found = wanted.clone()
    found[0, 2] = float("nan")
    assert export._distance(found, wanted, mask) == 0
    assert np.isnan(export._distance(found, wanted, None))
    assert export._distance(found[:1], wanted, mask) == float("inf")


# Refusals -----------------------------------------------------------------------------------------


def test_refusals(vision: Path, written: Written, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "empty").mkdir()
    for code, arguments, reason in (
        (2, (vision, tmp_path / "model.safetensors"), "does not end in .onnx"),
        (1, (vision, tmp_path / "no" / "model.onnx"), "does not exist"),
        (1, (vision, tmp_path / "folder.onnx"), "is a directory"),
        (
            1,
            (vision, vision / "model.onnx"),
            "is the source, or inside or around it; choose another --onnx",
        ),
        (1, (tmp_path / "nowhere", file), "does not exist"),
        (2, (vision / "model.safetensors", file), "takes a model directory"),
        (2, (vision, file, "--dtype", "bfloat16"), "is not one of 'float32', 'float16'"),
        (
            1,
            (written("t5"), file),
            "T5ForConditionalGeneration is neither a text encoder, a decoder nor a vision model",
        ),
        (1, (written("whisper"), file), "is neither a text encoder"),
    ):
        model, goal, *rest = arguments
        assert reason in complaint(cli("export", model, "--onnx", goal, *rest), code)
    assert "--onnx" in complaint(cli("export", vision), 2)
    assert not file.exists()


def test_experts_one_by_one_are_refused_before_they_are_traced(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    svdcli.compress(written("mixtral"), tmp_path / "o", rank=8)
    monkeypatch.setattr(torch.onnx, "export", None)
    told = complaint(cli("export", tmp_path / "o", "--onnx", tmp_path / "model.onnx"))
    assert "MixtralForCausalLM has experts one by one" in told
    assert not (tmp_path / "model.onnx").exists()


def test_a_model_that_needs_more_than_it_is_given(
    vision: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*_: Any, **__: Any) -> None:
        raise ValueError("bool_masked_pos is needed\nand more")

    monkeypatch.setattr(export._Call, "forward", forward)
    with pytest.raises(
        svdcli.SvdcliError,
        match=r"does not run on pixel_values: ValueError: bool_masked_pos is needed$",
    ):
        svdcli.export_onnx(vision, tmp_path / "model.onnx")


def test_a_model_that_cannot_be_traced(
    vision: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise torch.onnx.OnnxExporterError("long story") from ValueError(
            "data-dependent branch\nand a page more"
        )

    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(
        svdcli.SvdcliError,
        match=r"cannot export ViTForImageClassification: ValueError: data-dependent branch$",
    ):
        svdcli.export_onnx(vision, tmp_path / "model.onnx")
    assert not tree(tmp_path)


@pytest.mark.parametrize("name", ["onnx", "onnxscript"])
def test_a_missing_library_is_named(
    name: str, vision: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking(name, monkeypatch)
    told = complaint(cli("export", vision, "--onnx", tmp_path / "model.onnx"))
    assert told == f"svdcli: error: exporting to ONNX needs {name}; pip install 'svdcli[onnx]'\n"


def test_a_directory_that_no_library_opens(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(SAMPLE, folder / "model.safetensors")
    assert "has no config.json that names a model" in complaint(
        cli("export", folder, "--onnx", tmp_path / "model.onnx")
    )
