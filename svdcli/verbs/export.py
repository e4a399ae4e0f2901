"""From a model to one ONNX file, checked against onnxruntime before it appears."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn

from svdcli.engine.compute import Compute
from svdcli.engine.publish import check_place, disk_errors
from svdcli.errors import SvdcliError, UsageError
from svdcli.files.checkpoint import STANDARD, check_names_model, open_checkpoint
from svdcli.files.report import JSON_VERSION
from svdcli.files.workspace import Workspace
from svdcli.files.writer import sync
from svdcli.models.experts import SeparateExperts
from svdcli.models.load import load_quietly
from svdcli.plan.words import STORED_AS
from svdcli.progress import Progress, silent

_DTYPES = {"F32": torch.float32, "F16": torch.float16}
# How far onnxruntime may be from torch, as a share of the largest output.
_TOLERANCES = {"F32": 1e-4, "F16": 2e-2}
_STEPS = ("load", "trace", "optimize", "write", "check")
_IN_ONE_FILE = 1_500_000_000  # a protobuf message ends at 2 GiB
_PRODUCTS = ("MatMul", "Gemm")


@dataclass(frozen=True)
class Exported:
    """What was written: bytes counts FILE and, for large models, FILE.data; matmuls the matrix
    products in the graph.

    checked is the largest difference from torch's outputs as a share of the largest output, or None
    where onnxruntime is not installed.
    """

    path: Path
    bytes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    matmuls: int
    checked: float | None

    def to_json(self) -> dict[str, Any]:
        return (
            {"svdcli_json": JSON_VERSION, "kind": "export"}
            | asdict(self)
            | {"path": str(self.path)}
        )


def export_onnx(
    model: str | Path,
    out: str | Path,
    *,
    dtype: str = "F32",
    compute: Compute | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Exported:
    """Write a model directory as ONNX: factors (out, r) and (r, in) stay two products, by their
    names in the model.

    Text models take input_ids and attention_mask (batch, sequence) and vision models pixel_values
    (batch, channels, height, width); batch and sequence are free, the sizes of images are not.
    Decoders are exported without a cache of keys and values. dtype is float32 or float16 (or F32,
    F16); compute may name the CPU alone. `out` appears whole or not at all, and only after
    onnxruntime, where it is installed, has given torch's outputs for other inputs of other sizes.
    trust_remote_code runs Python that the model's folder brings along.

    Raises SvdcliError where a library is missing, `out` exists, the model is of another kind or
    cannot be traced, or the outputs differ; UsageError for other dtypes and names of `out`; and
    what `svdcli.load` raises.
    """
    # All that can be refused before the model is in memory
    file = Path(out)
    dtype = STORED_AS.get(dtype, dtype)
    if dtype not in _DTYPES:
        raise UsageError(f"{dtype} cannot be exported to ONNX", "use float32 or float16")
    _check_paths(model, file, force)
    device = _start(compute or Compute())
    _check_libraries()

    step = _stepper(progress)
    with _hushed():
        step()
        network = load_quietly(model, device, _DTYPES[dtype], trust_remote_code=trust_remote_code)
        call = _call_for(network)

        # What a killed run left is never continued, since tracing starts from nothing: no other
        # run has this identity, and whatever fails leaves no workspace
        workspace = Workspace(file, is_file=True)
        with disk_errors(file, resumes=False), workspace.locked():
            workspace.resume(uuid4().hex, force=True)
            try:
                return _export_into(workspace, call, _TOLERANCES[dtype], step)
            except BaseException:
                workspace.remove()
                raise


def _check_libraries() -> None:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise SvdcliError(
            f"exporting to ONNX needs {' and '.join(missing)}", "pip install 'svdcli[onnx]'"
        )


def _start(compute: Compute) -> torch.device:
    """Models are traced on the CPU. Raises UsageError for other devices."""
    if compute.device not in ("auto", "cpu"):
        raise UsageError(f"--device {compute.device} exports nothing", "use cpu or auto")
    return replace(compute, device="cpu").start()


def _check_paths(path: str | Path, file: Path, force: bool) -> None:
    if str(path) == STANDARD or Path(path).is_file():
        raise UsageError(
            "export takes a model directory with a config.json, not a single file",
            "compress the directory",
        )
    for taken, ending in ((file, ".onnx"), (_weights_of(file), ".data")):
        check_place(taken, ending, source=Path(path), force=force, option="--onnx FILE")
    with open_checkpoint(path) as checkpoint:
        check_names_model(checkpoint, "export the directory of a model")


# What to feed a model -----------------------------------------------------------------------------


class _Call(nn.Module):
    """A model as a function from a fixed list of tensors to a fixed list of tensors."""

    def __init__(
        self,
        model: nn.Module,
        inputs: tuple[str, ...],
        fixed: dict[str, Any],
        sizes: dict[str, int],
    ) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs
        self.fixed = fixed
        self.sizes = sizes
        self.outputs: tuple[str, ...] = ()
        for module in model.modules():
            if "svd_rows" in module._buffers:
                # torch indexes with int32, ONNX does not
                module.svd_rows = module.get_buffer("svd_rows").long()

    def forward(self, *tensors: Tensor) -> dict[str, Tensor]:
        """(input, ...) in the order of `inputs` -> {name: tensor}."""
        answer = self.model(**dict(zip(self.inputs, tensors, strict=True)), **self.fixed)
        return {name: value for name, value in answer.items() if isinstance(value, Tensor)}

    def example(self, batch: int, length: int) -> tuple[Tensor, ...]:
        """Random inputs of a batch. Sequences (batch, length) are in turn not padded, padded on the
        left and padded on the right."""
        random = torch.Generator().manual_seed(length)
        if self.inputs == ("pixel_values",):
            shape = (batch, self.sizes["channels"], self.sizes["height"], self.sizes["width"])
            dtype = next(self.model.parameters()).dtype
            return (torch.randn(shape, generator=random).to(dtype),)
        ids = torch.randint(self.sizes["vocabulary"], (batch, length), generator=random)
        mask = torch.ones_like(ids)
        mask[1::3, : length // 3] = 0
        mask[2::3, -(length // 3) :] = 0
        return (ids, mask)[: len(self.inputs)]

    def axes(self) -> dict[str, Any]:
        """The free axes of each input, as torch.export wants them."""
        free = {0: "batch"} if self.inputs == ("pixel_values",) else {0: "batch", 1: "sequence"}
        return {"tensors": tuple(free for _ in self.inputs)}


def _call_for(model: Any) -> _Call:
    """The model with the inputs that it takes, tried out. Raises SvdcliError for a model that needs
    more than text or than one image."""
    # What kind of model it is
    name = type(model).__name__
    main_input = getattr(model, "main_input_name", "")
    is_pair = getattr(model.config, "is_encoder_decoder", False)
    if is_pair or main_input not in ("input_ids", "pixel_values"):
        raise SvdcliError(
            f"{name} is neither a text encoder, a decoder nor a vision model",
            "export knows only those",
        )

    if any(isinstance(module, SeparateExperts) for module in model.modules()):
        raise SvdcliError(
            f"{name} has experts one by one, and which of them compute depends on the text",
            "mixtures of experts do not export",
        )

    # What it is called with, besides the tensors
    parameters = inspect.signature(model.forward).parameters
    fixed = {"return_dict": True}
    if "use_cache" in parameters:
        fixed["use_cache"] = False
    if main_input == "pixel_values":
        call = _Call(model, ("pixel_values",), fixed, _image_sizes(model.config))
    else:
        inputs: tuple[str, ...] = ("input_ids",)
        if "attention_mask" in parameters:
            inputs = ("input_ids", "attention_mask")
        call = _Call(
            model, inputs, fixed, {"vocabulary": model.get_input_embeddings().weight.shape[0]}
        )

    # A first run names the outputs, and meets models that lack an input
    try:
        with torch.inference_mode():
            call.outputs = tuple(call(*call.example(2, 8)))
    except (ValueError, TypeError, RuntimeError, IndexError, AttributeError) as error:
        raise SvdcliError(
            f"{name} does not run on {' and '.join(call.inputs)}: {_first_line(error)}"
        ) from error
    return call.eval()


def _image_sizes(config: Any) -> dict[str, int]:
    """Channels, height and width of the images that a vision model takes."""
    size = getattr(config, "image_size", None) or 224
    if isinstance(size, int):
        size = (size, size)
    return {
        "channels": getattr(config, "num_channels", 3),
        "height": size[0],
        "width": size[-1],
    }


# Writing ------------------------------------------------------------------------------------------


def _export_into(
    workspace: Workspace, call: _Call, tolerance: float, step: Callable[[], None]
) -> Exported:
    """Trace, optimize, write and check, in the steps of `_STEPS`; then put the files in place."""
    step()
    program = _traced(call)

    # Names come before the optimizer, which makes a weight of each transposed one
    step()
    _name_like_model(program.model.graph)
    program.optimize()
    _drop_notes(program.model.graph)

    step()
    workspace.data.mkdir(exist_ok=True)
    graph = workspace.data / workspace.out.name
    program.save(graph, external_data=_nbytes(call) > _IN_ONE_FILE)
    matmuls = sum(node.op_type in _PRODUCTS for node in program.model.graph)
    del program  # its weights are in memory a second time

    # Not `checked > tolerance`: NaN must not pass
    step()
    checked = _difference(graph, call)
    if checked is not None and not checked <= tolerance:
        raise SvdcliError(
            f"onnxruntime's outputs differ from torch's by {checked:.1e} of the largest, "
            f"more than {tolerance:.0e}",
            "nothing was written; report this with the name of the model",
        )
    size = sum(path.stat().st_size for path in (graph, _weights_of(graph)) if path.exists())
    _publish(workspace)
    return Exported(workspace.out, size, call.inputs, call.outputs, matmuls, checked)


def _traced(call: _Call) -> Any:
    """What torch.onnx makes of it. Raises SvdcliError with the first line of what it says."""
    try:
        # Not optimized here, since the weights get their names first; batch and length are not
        # those of the check
        with torch.no_grad():
            return torch.onnx.export(
                call,
                call.example(3, 8),
                dynamo=True,
                optimize=False,
                verbose=False,
                input_names=call.inputs,
                output_names=call.outputs,
                dynamic_shapes=call.axes(),
            )
    except (
        RuntimeError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        NotImplementedError,
    ) as error:
        why = _first_line(error.__cause__ or error)
        raise SvdcliError(f"torch.onnx cannot export {type(call.model).__name__}: {why}") from error


def _name_like_model(graph: Any) -> None:
    """P.svd_up.weight keeps its name; transposed, as the optimizer will store most, it is
    P.svd_up.weight.T."""
    for value in list(graph.initializers.values()):
        value.name = value.name.removeprefix("model.")
    for node in graph:
        if node.op_type == "Transpose" and node.inputs[0].is_initializer():
            node.outputs[0].name = f"{node.inputs[0].name}.T"


def _drop_notes(graph: Any) -> None:
    """Remove the exporter's notes of where in which source file each node came from: megabytes, and
    paths of this machine."""
    for node in graph.all_nodes():
        for annotated in (node, *node.outputs):
            annotated.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()


def _publish(workspace: Workspace) -> None:
    """Put the graph, and its weights where they are a file of their own, in the place of what was
    there."""
    graph, new_graph = workspace.out, workspace.target
    weights, new_weights = _weights_of(graph), _weights_of(new_graph)
    for path in (new_graph, new_weights):
        if path.exists():
            with path.open("rb") as stream:
                sync(stream.fileno())
    # A graph must never stand beside the weights of another: the old one goes first
    if weights.exists() or new_weights.exists():
        graph.unlink(missing_ok=True)
        weights.unlink(missing_ok=True)
    if new_weights.exists():
        os.replace(new_weights, weights)
    workspace.publish({})


def _weights_of(file: Path) -> Path:
    """Where the exporter puts the weights of a model that is too large for one file."""
    return file.with_name(f"{file.name}.data")


def _nbytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


# Checking -----------------------------------------------------------------------------------------


def _difference(file: Path, call: _Call) -> float | None:
    """The largest difference between onnxruntime and torch, as a share of the largest output, where
    the attention mask is 1; None where onnxruntime is not installed."""
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    # Another batch and length than was traced: a graph that fixed one of them fails here
    inputs = call.example(4, 11)
    arrays = {name: value.numpy() for name, value in zip(call.inputs, inputs, strict=True)}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors alone
    try:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        answers = session.run(list(call.outputs), arrays)
    except Exception as error:  # onnxruntime's own exceptions share no other base
        raise SvdcliError(
            f"onnxruntime does not run what torch.onnx wrote: {_first_line(error)}"
        ) from error

    with torch.inference_mode():
        wanted = call(*inputs)
    mask = inputs[1].bool() if len(inputs) > 1 else None
    return max(
        _distance(torch.from_numpy(answer), wanted[name], mask)
        for name, answer in zip(call.outputs, answers, strict=True)
    )


def _distance(answer: Tensor, wanted: Tensor, mask: Tensor | None) -> float:
    """max|answer - wanted| / max|wanted|, where the mask (batch, length) is true; infinite where
    shapes differ."""
    if answer.shape != wanted.shape:
        return float("inf")
    if mask is not None and wanted.shape[:2] == mask.shape:
        answer, wanted = answer[mask], wanted[mask]
    largest = wanted.double().abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float((answer.double() - wanted.double()).abs().max() / largest)


# Around it ----------------------------------------------------------------------------------------


def _stepper(progress: Progress) -> Callable[[], None]:
    """A function that tells of the next of `_STEPS` whenever it is called."""
    steps: Iterator[tuple[int, str]] = iter(enumerate(_STEPS))

    def step() -> None:
        done, name = next(steps)
        progress("export", name, done, len(_STEPS))

    return step


@contextmanager
def _hushed() -> Iterator[None]:
    """Silence warnings and logs: the exporter and what it imports warn about themselves, which a
    user can do nothing about."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _first_line(error: BaseException) -> str:
    lines: Sequence[str] = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
