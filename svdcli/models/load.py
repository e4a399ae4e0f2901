"""Open what compress wrote: as a transformers model, or into a module of one's own."""

from __future__ import annotations

import warnings
from collections.abc import Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svdcli.errors import BadCheckpointError, SvdcliError, UsageError
from svdcli.files.checkpoint import Checkpoint, open_checkpoint
from svdcli.files.record import record_of, stored_layers
from svdcli.models.modules import low_rank_like
from svdcli.plan.recipe import FORMAT, LayerPlan

METHOD = "svdcli"
_SMALL = 4 * 10**9


def load(path: str | Path, *, into: nn.Module | None = None, **options: Any) -> nn.Module:
    """Open a checkpoint, compressed or not, for inference or training.

    A directory with a config.json becomes the transformers model that its config names, in the stored dtype; options go to
    `from_pretrained` (dtype, device_map, attn_implementation, trust_remote_code). With `into`, a file or directory is loaded
    into that module instead: layers that are factored are replaced by low-rank modules, in place.

    Raises BadCheckpointError where a factor is missing, a rank or shape disagrees, the format is newer, or the directory was
    edited; SvdcliError where the model has no place for a tensor, or lacks one. Never leaves a weight at random.
    """
    with open_checkpoint(path) as checkpoint:
        _check(checkpoint)
        if into is not None:
            if options:
                raise UsageError(f"{', '.join(options)} cannot be used with into=", "the module decides by itself")
            return _load_into(into, checkpoint)
        if not checkpoint.is_directory or not checkpoint.transformers_opens_it:
            raise UsageError(
                f"{checkpoint.shown} has no config.json that names a model", "give the module: load(path, into=module)"
            )
        return _load_transformers(checkpoint, options)


def load_quietly(path: str | Path, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """A transformers model for svdcli's own commands, on its device and without the library's progress bars.

    Without dtype: float32 on a CPU for models of up to 4 GB (many CPUs are an order slower in 16 bits), else as stored.
    """
    with open_checkpoint(path) as checkpoint:
        small = sum(checkpoint.files.values()) <= _SMALL
    if dtype is None and device.type == "cpu" and small:
        dtype = torch.float32
    return _without_bars(path, dtype or "auto").to(device).eval()


def load_stored(path: str | Path) -> Any:
    """A transformers model in its stored dtype, whose weights stay in the file until they are used; nothing is trained."""
    return _without_bars(path, "auto").requires_grad_(False).eval()


def _without_bars(path: str | Path, dtype: torch.dtype | str) -> nn.Module:
    logging = _transformers().utils.logging
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Cannot (en|dis)able progress bars")  # where the environment decides that
        logging.disable_progress_bar()
        try:
            return load(path, dtype=dtype)
        finally:
            logging.enable_progress_bar()


def _check(checkpoint: Checkpoint) -> None:
    """Headers, record and config.json must tell the same story."""
    record = record_of(checkpoint)
    quantised = (checkpoint.config or {}).get("quantization_config") or {}
    method = quantised.get("quant_method") if isinstance(quantised, dict) else None
    if method == METHOD and "format" not in quantised:
        raise BadCheckpointError(f"the quantization_config of {checkpoint.shown} has no format", "restore its config.json")
    if method == METHOD and (not isinstance(quantised["format"], int) or quantised["format"] > FORMAT):
        raise BadCheckpointError(
            f"{checkpoint.shown} has format {quantised.get('format')!r}, this svdcli knows {FORMAT}", "upgrade svdcli"
        )
    if record is None:
        return
    layers = stored_layers(checkpoint, record)
    for name, item in (record.get("files") or {}).items():
        if name in checkpoint.files and checkpoint.files[name] != item.get("bytes"):
            raise BadCheckpointError(f"{checkpoint.path / name} was changed after svdcli wrote it", "see `svdcli verify`")
    factored = any(layer.layout != "dense" for layer in layers)
    if factored and checkpoint.transformers_opens_it and method != METHOD:
        raise BadCheckpointError(
            f"{checkpoint.path / checkpoint.config_name} lost its quantization_config", "write the output again, or restore it"
        )


def _load_transformers(checkpoint: Checkpoint, options: dict[str, Any]) -> nn.Module:
    model_class = _model_class(checkpoint, options)
    try:
        model, info = model_class.from_pretrained(checkpoint.path, output_loading_info=True, **(_as_stored(checkpoint) | options))
    except (ValueError, RuntimeError, KeyError) as error:
        raise SvdcliError(f"{checkpoint.shown} does not load: {_first_lines(error)}", "see `svdcli verify`") from error
    for kind, what in (("missing_keys", "lacks"), ("unexpected_keys", "holds more than the model takes:")):
        names = sorted(info[kind])
        if names:
            raise SvdcliError(f"{checkpoint.shown} {what} {names[0]} ({len(names)} such tensors)", "see `svdcli verify`")
    if info["mismatched_keys"]:
        raise SvdcliError(
            f"{checkpoint.shown} and the model disagree on {next(iter(info['mismatched_keys']))}", "see `svdcli verify`"
        )
    result: nn.Module = model
    return result


def _as_stored(checkpoint: Checkpoint) -> dict[str, Any]:
    """What `from_pretrained` must be told to open these files as they are."""
    options: dict[str, Any] = {"dtype": "auto"}
    if checkpoint.variant is not None:
        options["variant"] = checkpoint.variant
    return options


def _transformers() -> Any:
    try:
        import transformers

        import svdcli.models.hf  # noqa: F401
    except ImportError as error:
        raise SvdcliError("opening a model needs transformers 5.12 or later", "pip install 'svdcli[transformers]'") from error
    return transformers


def _model_class(checkpoint: Checkpoint, options: dict[str, Any]) -> Any:
    transformers = _transformers()
    names = (checkpoint.config or {}).get("architectures") or ["AutoModel"]
    found = getattr(transformers, str(names[0]), None)
    if found is not None:
        return found
    remote = (checkpoint.config or {}).get("auto_map") or {}
    auto = next((getattr(transformers, name) for name in remote if name != "AutoConfig" and hasattr(transformers, name)), None)
    if auto is None or not options.get("trust_remote_code"):
        raise SvdcliError(
            f"{checkpoint.shown}: this transformers has no {names[0]}", "upgrade it, or pass trust_remote_code=True where it fits"
        )
    return auto


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:4])


# Into a module of one's own ------------------------------------------------------------------------------------------


def _load_into(module: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    """Replace what is factored, then assign every tensor of the checkpoint, one at a time."""
    record = record_of(checkpoint)
    layers = [layer for layer in stored_layers(checkpoint, record) if layer.layout != "dense"] if record is not None else []
    fresh = {layer.tensor.module: _low_rank(module, layer, checkpoint.shown) for layer in layers}
    for name, new in fresh.items():
        module.set_submodule(name, new)
    tripwires = {layer.tensor.name for layer in layers}
    names = {name for name in checkpoint.tensors if name not in tripwires}
    expected = module.state_dict()
    tied = _tied(module, expected.keys() - names, names)
    expected = {name: tensor for name, tensor in expected.items() if name not in tied}
    for what, odd in (("lacks", expected.keys() - names), ("holds, and the module does not,", names - expected.keys())):
        if odd:
            raise SvdcliError(f"{checkpoint.shown} {what} {min(odd)} ({len(odd)} such tensors)", "give the one it was made for")
    for name in sorted(names):
        shape, wanted = checkpoint.tensors[name].info.shape, tuple(expected[name].shape)
        if shape != wanted:
            raise SvdcliError(f"{name} is {list(shape)} in {checkpoint.shown} and {list(wanted)} in the module", "check both")
    for name in sorted(names):
        _assign(module, name, checkpoint.read_tensor(name))
    for name, source in tied.items():
        owner = module.get_submodule(name.rpartition(".")[0])
        owner._parameters[name.rpartition(".")[2]] = module.get_parameter(source)
    return module


def _tied(module: nn.Module, missing: Set[str], names: Set[str]) -> dict[str, str]:
    """{name that the checkpoint lacks: name in it of the same parameter}."""
    same = {name: id(parameter) for name, parameter in module.named_parameters(remove_duplicate=False)}
    sources = {same[name]: name for name in sorted(names) if name in same}
    return {name: sources[same[name]] for name in sorted(missing) if same.get(name) in sources}


def _low_rank(module: nn.Module, layer: LayerPlan, shown: str) -> nn.Module:
    """The module that will hold one layer's factors, on the meta device."""
    name, shape = layer.tensor.module, layer.tensor.shape
    try:
        old = module.get_submodule(name)
    except AttributeError:
        raise SvdcliError(f"the module has no {name}, which is factored in {shown}", "give the one it was made for") from None
    new = low_rank_like(old, int(layer.rank or 0), pivoted=layer.layout == "pivoted")
    weight = getattr(old, "weight", None)
    if new is None or not isinstance(weight, Tensor):
        raise SvdcliError(f"{name} is a {type(old).__name__}, which cannot hold factors", "expand the checkpoint first")
    if tuple(weight.shape) != shape:
        raise SvdcliError(f"{name} is {list(shape)} in {shown} and {list(weight.shape)} in the module", "check both")
    return new


def _assign(module: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor in place of a parameter or buffer, on its device; one on the meta device takes the value's."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    old = getattr(owner, leaf)
    value = value if old.device.type == "meta" else value.to(old.device)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=value.is_floating_point())
    else:
        owner._buffers[leaf] = value
