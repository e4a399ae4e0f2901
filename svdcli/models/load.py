"""Open what compress wrote: as a transformers model, or into a module of one's own."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from svdcli.errors import BadCheckpointError, SvdcliError, UsageError
from svdcli.files.checkpoint import Checkpoint, check_names_model, open_checkpoint
from svdcli.files.compressed_tensors import METHOD as OTHERS
from svdcli.files.config import METHOD, method_for, method_of
from svdcli.files.dtypes import TORCH_DTYPES
from svdcli.files.record import check_listed, left_out_copies, record_of, stacks_of, stored_layers
from svdcli.models import own_code
from svdcli.models.modules import (
    SPAN,
    UNPACKED,
    WEIGHT,
    WHOLE,
    PackedLinear,
    low_rank_like,
    share,
    shared_like,
)
from svdcli.plan.groups import spans_of
from svdcli.plan.packing import PLAIN, SHAPE
from svdcli.plan.plan import FORMAT, LayerPlan
from svdcli.plan.tensors import TensorInfo

_SMALL = 4 * 10**9  # bytes of a model that is opened in float32 on a CPU


def load(path: str | Path, *, into: nn.Module | None = None, **options: Any) -> nn.Module:
    """Open a checkpoint, compressed or not, for inference or training.

    A directory with a config.json becomes the transformers model that its config names, or the
    class that fits its weights best where it names none, in the stored dtype; options go to
    `from_pretrained` (dtype, device_map, attn_implementation, trust_remote_code). What that class
    ignores or makes anew it ignores or makes anew here too, with transformers' own remark. With
    `into`, a file or directory is loaded into that module instead: layers that are factored are
    replaced by low-rank modules, in place; names may differ by what torch.compile (`_orig_mod`) and
    DDP (`module.`) add to them.

    Raises BadCheckpointError where a factor or another tensor of the record is missing, a rank or
    shape disagrees, the format is newer, or the directory was edited; SvdcliError where a factored
    layer of the model was not filled, where transformers refuses, and, with `into`, where the
    module has no place for a tensor, or lacks one.
    """
    # Into a module of one's own
    if into is not None:
        with open_checkpoint(path) as checkpoint:
            _check(checkpoint)
            if options:
                raise UsageError(
                    f"{', '.join(options)} cannot be used with into=",
                    "the module decides by itself",
                )
            return _load_into(into, checkpoint)

    # As the transformers model that its config names
    return _load_named(path, "give the module: load(path, into=module)", options)


def _load_named(path: str | Path, hint: str, options: dict[str, Any]) -> nn.Module:
    """Load the transformers model that config.json names. Raises SvdcliError with this hint where
    it names none."""
    with open_checkpoint(path) as checkpoint:
        _check(checkpoint)
        check_names_model(checkpoint, hint)
        return _load_transformers(checkpoint, options)


def load_quietly(
    path: str | Path,
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    trust_remote_code: bool = False,
) -> Any:
    """Return a transformers model for svdcli's own commands, on its device and without the
    library's progress bars.

    Without dtype: float32 on a CPU for models of up to 4 GB (many CPUs are an order slower in 16
    bits), else as stored.
    """
    with open_checkpoint(path) as checkpoint:
        small = sum(checkpoint.files.values()) <= _SMALL
    if dtype is None and device.type == "cpu" and small:
        dtype = torch.float32
    return _without_bars(path, dtype or "auto", trust_remote_code).to(device).eval()


def load_stored(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """Return a transformers model in its stored dtype, whose weights stay in the file until they
    are used, and whose experts are layers of their own; nothing is trained."""
    model: Any = _without_bars(path, "auto", trust_remote_code).requires_grad_(False).eval()
    from svdcli.models.hf import separate_experts

    with open_checkpoint(path) as checkpoint:
        separate_experts(model, checkpoint.tensors)
    return model


def _without_bars(path: str | Path, dtype: torch.dtype | str, trust_remote_code: bool) -> nn.Module:
    """Load without the library's progress bars. Without the option nothing of the folder's
    own code runs; with it, what that code raises is told in a line."""
    runs_own_code = trust_remote_code and bool(own_code.model_sources(Path(path)))
    with _no_progress_bars():
        try:
            how = {"dtype": dtype, "trust_remote_code": runs_own_code}
            return _load_named(path, "give the directory of a Hugging Face model", how)
        except SvdcliError:
            raise
        except Exception as error:
            # Of transformers' own code it is a bug, and shown as one
            if not runs_own_code:
                raise
            failure = f"{type(error).__name__}: {_first_lines(error)}"
            raise SvdcliError(
                f"the code that {path} brings along fails ({failure})",
                f"see which versions it was made for, or leave out {own_code.OPTION} "
                f"where transformers has the class",
            ) from error


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Have transformers show no progress bars as long as the context lasts."""
    logging = _transformers().utils.logging
    with warnings.catch_warnings():
        # It warns where the environment decides about bars
        warnings.filterwarnings("ignore", message="Cannot (en|dis)able progress bars")
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.enable_progress_bar()


def _check(checkpoint: Checkpoint) -> None:
    """Check that headers, record and config.json agree."""
    # What config.json says, in a format that this version knows
    record = record_of(checkpoint)
    config = checkpoint.config or {}
    method = method_of(config)
    if method == METHOD:
        _check_format(checkpoint, config["quantization_config"])
    if record is None:
        return

    # What the record says: every tensor of it is there, and no file was changed
    layers = stored_layers(checkpoint, record)
    check_listed(checkpoint, record)
    for name, entry in (record.get("files") or {}).items():
        if name in checkpoint.files and checkpoint.files[name] != entry.get("bytes"):
            raise BadCheckpointError(
                f"{checkpoint.path / name} was changed after svdcli wrote it", "see `svdcli verify`"
            )

    # Without its entry in config.json transformers would make up the compressed layers
    needed = method_for(layers)
    if needed is not None and checkpoint.transformers_opens_it and method != needed:
        raise BadCheckpointError(
            f"{checkpoint.path / checkpoint.config_name} lost its quantization_config",
            "write the output again, or restore it",
        )


def _needs_module(layer: LayerPlan) -> bool:
    """Tell whether a layer is stored in another way than as its weight."""
    return layer.keeps_factors or layer.packing.bits != UNPACKED


def _check_format(checkpoint: Checkpoint, quantised: Mapping[str, Any]) -> None:
    if "format" not in quantised:
        raise BadCheckpointError(
            f"the quantization_config of {checkpoint.shown} has no format",
            "restore its config.json",
        )
    if not isinstance(quantised["format"], int) or quantised["format"] > FORMAT:
        raise BadCheckpointError(
            f"{checkpoint.shown} has format {quantised['format']!r}, this svdcli knows {FORMAT}",
            "upgrade svdcli",
        )


def _load_transformers(checkpoint: Checkpoint, options: dict[str, Any]) -> nn.Module:
    """Return the model of the class that fits. options take precedence over how the files are
    stored."""
    model_class = _model_class(checkpoint, options)
    options = _as_stored(checkpoint) | options
    if method_of(checkpoint.config or {}) == OTHERS and record_of(checkpoint) is not None:
        options = {"config": _config_for_plugin(checkpoint, options)} | options
    source: Path | None = checkpoint.path
    if checkpoint.quantised:
        source, options = None, options | _as_numbers(checkpoint, options)
    try:
        model: nn.Module = model_class.from_pretrained(source, **options)
    except (ValueError, RuntimeError, KeyError) as error:
        raise SvdcliError(
            f"{checkpoint.shown} does not load: {_first_lines(error)}", "see `svdcli verify`"
        ) from error
    return model


class _Unread:
    """A tensor of a checkpoint that is read when transformers asks for its numbers, as it does of
    those in safetensors files."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self.checkpoint = checkpoint
        self.name = name

    @property
    def info(self) -> TensorInfo:
        return self.checkpoint.tensors[self.name].info

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = TORCH_DTYPES[self.info.dtype]
        return dtype

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.info.shape)

    def get_shape(self) -> list[int]:
        return list(self.info.shape)

    def get_dtype(self) -> str:
        return self.info.dtype

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def __getitem__(self, index: Any) -> Tensor:
        return self.checkpoint.read_tensor(self.name)[index]


def _as_numbers(checkpoint: Checkpoint, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `from_pretrained` that open a checkpoint of quantised weights as the
    numbers that they stand for, which not every device, nor transformers, could compute with as
    they are."""
    config = options.get("config") or _transformers().AutoConfig.from_pretrained(
        checkpoint.path, trust_remote_code=options.get("trust_remote_code")
    )
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    numbers = {name: _Unread(checkpoint, name) for name in checkpoint.tensors}
    return {"config": config, "state_dict": numbers}


def _config_for_plugin(checkpoint: Checkpoint, options: Mapping[str, Any]) -> Any:
    """Return the config of an output for other loaders, so that svdcli's plugin opens it: then it
    stays packed, which it does not with the library that it is made for."""
    record = record_of(checkpoint)
    assert record is not None
    config = _transformers().AutoConfig.from_pretrained(
        checkpoint.path, trust_remote_code=options.get("trust_remote_code")
    )
    groups = [layer.packing.group for layer in stored_layers(checkpoint, record)]
    config.quantization_config = {
        "quant_method": METHOD,
        "format": FORMAT,
        "layout": "dense",
        "group": groups[0],
    }
    return config


def _as_stored(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the options of `from_pretrained` that open these files as they are."""
    options: dict[str, Any] = {"dtype": "auto"}
    if checkpoint.variant is not None:
        options["variant"] = checkpoint.variant
    return options


def _transformers() -> Any:
    """Import transformers, with svdcli's plugin."""
    try:
        import transformers

        import svdcli.models.hf  # noqa: F401
    except ImportError as error:
        raise SvdcliError(
            "opening a model needs transformers 5.12 or later", "pip install 'svdcli[transformers]'"
        ) from error
    return transformers


def _model_class(checkpoint: Checkpoint, options: dict[str, Any]) -> Any:
    """Return the class that `architectures` names; the folder's own, by the option, where it has
    one."""
    transformers = _transformers()
    config = checkpoint.config or {}
    name = str((config.get("architectures") or [""])[0])
    stock = getattr(transformers, name, None) if name else None

    # The folder's own, where it is asked for or nothing else will do
    own_class = own_code.auto_class(checkpoint.config)
    trusted = options.get("trust_remote_code")
    if own_class is not None and hasattr(transformers, own_class) and (trusted or stock is None):
        if not trusted:
            raise own_code.refusal(checkpoint.shown, f"the class {name or own_class}")
        return getattr(transformers, own_class)

    # Transformers' own
    if not name:
        return _best_class(checkpoint)
    if stock is None:
        raise SvdcliError(f"{checkpoint.shown}: this transformers has no {name}", "upgrade it")
    return stock


# Where a config.json names no class: what it may be, the likelier first, since order decides
# between classes that fit alike.
_LIKELIEST = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForImageTextToText",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForImageClassification",
    "AutoModelForAudioClassification",
    "AutoModelForCTC",
)
_LEAST_LIKELY = ("AutoModel", "AutoModelForTextEncoding")


def _best_class(checkpoint: Checkpoint) -> Any:
    """Return the class of this config that takes the checkpoint's tensors best: the fewest missing,
    then the fewest unexpected."""
    transformers = _transformers()
    from svdcli.models.hf import unfilled

    shapes = {name: ref.info.shape for name, ref in checkpoint.tensors.items()}
    integers = _declared(checkpoint)
    scores: dict[Any, tuple[int, int]] = {}

    # Trying a class prints nothing
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint.path)
        for candidate in _classes_of(config):
            try:
                scores[candidate] = unfilled(_empty(candidate, config), shapes, integers)
            except (ImportError, NotImplementedError, RuntimeError, TypeError, AttributeError):
                continue  # no class for this config after all, or not without memory
            if scores[candidate] == (0, 0):
                break
    except ValueError as error:
        raise SvdcliError(
            f"{checkpoint.shown} does not load: {_first_lines(error)}", "see `svdcli verify`"
        ) from error
    finally:
        transformers.utils.logging.set_verbosity(verbosity)

    # Of classes that fit alike the first, which is the likeliest
    return min(scores, key=lambda candidate: scores[candidate], default=transformers.AutoModel)


def _declared(checkpoint: Checkpoint) -> Any:
    """Return what tells the packed layers of a checkpoint, for the plugin."""
    from svdcli.models.hf import Declared, Member

    members: list[Member] = []
    for name, ref in checkpoint.tensors.items():
        if name.endswith(f".{SPAN}") and ref.info.shape == (3,):
            numbers = map(int, checkpoint.read_tensor(name).tolist())
            members.append(Member(name.removesuffix(f".{SPAN}"), *numbers))
    config = checkpoint.config or {}
    quantised = config.get("quantization_config") or {}
    group = quantised.get("group") if isinstance(quantised, dict) else None
    record = record_of(checkpoint)
    if method_of(config) == OTHERS and record is not None:
        group = stored_layers(checkpoint, record)[0].packing.group
    if group is None:
        return Declared(members=tuple(members))
    declared: dict[str, tuple[int, ...]] = {}
    int8: set[str] = set()
    for name, ref in checkpoint.tensors.items():
        if ref.info.dtype == "I8":
            int8.add(name)
        if name.endswith(f".weight{SHAPE}") and ref.info.shape == (2,):
            declared[name.removesuffix(SHAPE)] = tuple(checkpoint.read_tensor(name).tolist())
    return Declared(group, declared, int8, tuple(members))


def _classes_of(config: Any) -> list[Any]:
    """Return all classes that transformers' auto classes may make of a config, the likelier
    first."""
    from transformers.models.auto import modeling_auto

    # What each auto class has for this config: a class, or a tuple of them
    listed: dict[str, Any] = {}
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        if name.startswith("AutoModel") and mapping is not None and type(config) in mapping:
            listed[name] = mapping[type(config)]

    # An encoder, which transformers can also use as a decoder
    if "AutoModelForMaskedLM" in listed and not getattr(config, "is_decoder", False):
        listed.pop("AutoModelForCausalLM", None)

    # In order, each once
    others = [name for name in listed if name not in _LIKELIEST + _LEAST_LIKELY]
    classes: dict[Any, None] = {}
    for name in (*_LIKELIEST, *others, *_LEAST_LIKELY):
        entry = listed.get(name, ())
        for model_class in entry if isinstance(entry, tuple) else (entry,):
            classes[model_class] = None
    return list(classes)


def empty_model(checkpoint: Checkpoint) -> Any:
    """Return the model that a directory opens as, without its weights. Raises what building it
    raises, SvdcliError where no class is known."""
    model_class = _model_class(checkpoint, {})
    config = _transformers().AutoConfig.from_pretrained(checkpoint.path)
    return _empty(getattr(model_class, "_from_config", model_class), config)


def _empty(model_class: Any, config: Any) -> Any:
    """Return a model of that class whose weights take no memory."""
    with torch.device("meta"):
        return model_class(copy.deepcopy(config))


def _first_lines(error: Exception) -> str:
    """Return the first four lines of a message, as one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:4])


# Into a module of one's own -----------------------------------------------------------------------


def _load_into(module: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    """Replace what is factored, then assign every tensor of the checkpoint, one at a time."""
    # Low-rank modules for what is factored
    layers: list[LayerPlan] = []
    record = record_of(checkpoint)
    if record is not None:
        stored = stored_layers(checkpoint, record)
        layers = [layer for layer in stored if _needs_module(layer)]
    fresh, same_buffers = _replace(module, layers, checkpoint.shown)

    # Which tensor goes where: names may differ by prefixes, and one of two tied ones may be missing
    tripwires = {layer.tensor.name for layer in layers if layer.layout != WHOLE}
    for stack in stacks_of(record or {}, checkpoint.shown):
        if stack.name in checkpoint.tensors and not checkpoint.tensors[stack.name].info.parameters:
            tripwires.add(stack.name)
    kept = [name for name in checkpoint.tensors if name not in tripwires]
    sources = _by_plain_name(kept, checkpoint.shown)
    expected = module.state_dict()
    goals = _by_plain_name(expected, "the module")
    names = {goals.get(plain, plain): source for plain, source in sources.items()}
    tied = _tied(module, expected.keys() - names.keys(), names.keys())
    for name, source in _left_out(record, checkpoint.shown).items():
        goal = goals.get(_plain_name(name), name)
        if goal not in tied:
            names.setdefault(goal, source)
    shared = [f"{path}.{WEIGHT}" for path in same_buffers]
    spoken_for = {*tied, *(name for name in expected if name.startswith(tuple(shared)))}
    expected = {name: tensor for name, tensor in expected.items() if name not in spoken_for}
    _check_fit(expected, names, checkpoint)

    # Only now the module changes, since everything fits
    for name, source in sorted(names.items()):
        _assign(module, name, checkpoint.read_tensor(source))
    for target, source in same_buffers.items():
        share(_packed(module, source), _packed(module, target))
    for new in fresh:
        if isinstance(new, PackedLinear):
            new.take_words()
    for name, source in tied.items():
        path, _, leaf = name.rpartition(".")
        module.get_submodule(path)._parameters[leaf] = module.get_parameter(source)
    return module


def _left_out(record: Mapping[str, Any] | None, shown: str) -> dict[str, str]:
    """Return {tensor that was left out: the one that has its bytes}."""
    return {copy.name: source for copy, source in left_out_copies(record or {}, shown)}


def _packed(module: nn.Module, path: str) -> PackedLinear:
    return cast(PackedLinear, module.get_submodule(path))


def _replace(
    module: nn.Module, layers: Sequence[LayerPlan], shown: str
) -> tuple[list[nn.Module], dict[str, str]]:
    """Put low-rank modules, on the meta device, where the module has what is factored. Return them,
    and {path: that of the packed module whose integers it is to share}."""
    # By plain name: of a compiled module the way to what is around it, and the one within
    outer: dict[str, str] = {}
    inner: dict[str, nn.Module] = {}
    for path, child in module.named_modules():
        outer.setdefault(_plain_name(path), path)
        inner[_plain_name(path)] = child

    # All of them before any is put in place, so that a refusal leaves the module as it was
    fresh: dict[str, nn.Module] = {}
    same_buffers: dict[str, str] = {}
    for layer in layers:
        name = _plain_name(layer.tensor.module)
        if not outer.get(name):
            hint = _prefix_hint(name, outer)
            raise SvdcliError(
                f"the module has no {layer.tensor.module}, which is factored in {shown}", hint
            )
        if layer.members:
            fresh |= _shared(inner, outer, layer, shown)
            continue
        fresh[outer[name]] = _low_rank(inner[name], layer, shown)
        if layer.packing != PLAIN and layer.layout == WHOLE:
            for partner in _tied_modules(inner, name):
                fresh[outer[partner]] = _low_rank(inner[partner], layer, shown)
                same_buffers[outer[partner]] = outer[name]
    for path, new in fresh.items():
        module.set_submodule(path, new)
    return list(fresh.values()), same_buffers


def _shared(
    inner: Mapping[str, nn.Module], outer: Mapping[str, str], layer: LayerPlan, shown: str
) -> dict[str, nn.Module]:
    """Return the modules that will hold a group's factors, by the ways to their places."""
    places = {}
    for member in layer.members:
        name = _plain_name(member.module)
        if not outer.get(name):
            raise SvdcliError(
                f"the module has no {member.module}, which is factored in {shown}",
                _prefix_hint(name, outer),
            )
        _check_shape(inner[name], member, shown)
        places[outer[name]] = inner[name]
    news = shared_like(
        list(places.values()),
        int(layer.rank or 0),
        spans_of(layer.members)[0][0],
        layout=layer.layout,
        bits=layer.packing.bits,
        group=layer.packing.group,
    )
    if news is None:
        raise SvdcliError(
            f"{layer.tensor.module} shares its factors with others, and not all of them are plain "
            f"linear layers here",
            "expand the checkpoint first",
        )
    return dict(zip(places, news, strict=True))


def _tied_modules(modules: Mapping[str, nn.Module], name: str) -> list[str]:
    """Return the other modules that have the same weight."""
    weight = getattr(modules[name], WEIGHT, None)
    if weight is None:
        return []
    others = []
    for path, module in modules.items():
        if path != name and module._parameters.get(WEIGHT) is weight:
            others.append(path)
    return others


def _plain_name(name: str) -> str:
    """Return a tensor's or module's name without `_orig_mod`, and without `module.` before it."""
    words = [word for word in name.split(".") if word != "_orig_mod"]
    while words[:1] == ["module"]:
        del words[0]
    return ".".join(words)


def _by_plain_name(names: Iterable[str], shown: str) -> dict[str, str]:
    """Return {plain name: name}. Raises SvdcliError where two names differ by such prefixes
    alone."""
    by_plain_name: dict[str, str] = {}
    for name in names:
        first = by_plain_name.setdefault(_plain_name(name), name)
        if first != name:
            raise SvdcliError(
                f"{shown} has {first} and {name}, which differ by a prefix of torch.compile or "
                f"DDP alone",
                "rename one of them",
            )
    return by_plain_name


def _check_fit(
    expected: Mapping[str, Tensor], names: Mapping[str, str], checkpoint: Checkpoint
) -> None:
    """Raise SvdcliError where tensors are missing, left over, or of another shape."""
    missing = expected.keys() - names.keys()
    left_over = names.keys() - expected.keys()
    _refuse_any(missing, f"{checkpoint.shown} lacks", left_over)
    _refuse_any(left_over, f"{checkpoint.shown} holds, and the module does not,", missing)
    for name, source in sorted(names.items()):
        shape = checkpoint.tensors[source].info.shape
        wanted = tuple(expected[name].shape)
        if shape != wanted:
            raise SvdcliError(
                f"{source} is {list(shape)} in {checkpoint.shown} and {list(wanted)} in the module",
                "check both",
            )


def _refuse_any(names: Set[str], verb: str, others: Iterable[str]) -> None:
    """Raise SvdcliError for the first of these names; others are those of the other side."""
    if names:
        first = min(names)
        raise SvdcliError(
            f"{verb} {first} ({len(names)} such tensors)", _prefix_hint(first, others)
        )


def _prefix_hint(name: str, others: Iterable[str]) -> str:
    """Say what to do where `name` is not on the other side: maybe it is there behind a prefix, or
    without one."""
    for other in sorted(filter(None, others), key=len, reverse=True):
        if name.endswith(f".{other}") or other.endswith(f".{name}"):
            return (
                f"the names of checkpoint and module differ by a prefix ({name}, "
                f"{other}): give a module with the same names"
            )
    return "give the one it was made for"


def _tied(module: nn.Module, missing: Set[str], names: Set[str]) -> dict[str, str]:
    """Return {name that the checkpoint lacks: name in it of the same parameter}."""
    identities: dict[str, int] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        identities[name] = id(parameter)
    sources = {identities[name]: name for name in sorted(names) if name in identities}
    tied: dict[str, str] = {}
    for name in sorted(missing):
        if identities.get(name) in sources:
            tied[name] = sources[identities[name]]
    return tied


def _low_rank(old: nn.Module, layer: LayerPlan, shown: str) -> nn.Module:
    """Return the module that will hold one layer's factors in place of `old`, on the meta
    device."""
    # Linear layers can hold factors and integers, a few others factors alone
    name = layer.tensor.module
    new = low_rank_like(
        old,
        int(layer.rank or 0),
        layout=layer.layout if layer.keeps_factors else WHOLE,
        bits=layer.packing.bits,
        group=layer.packing.group,
    )
    if isinstance(new, PackedLinear) and layer.packing.in_words and new.bits == 8:
        new.expect_words()
    # It must stand for just this weight
    if new is None or not isinstance(getattr(old, "weight", None), Tensor):
        raise SvdcliError(
            f"{name} is a {type(old).__name__}, which cannot hold factors",
            "expand the checkpoint first",
        )
    _check_shape(old, layer.tensor, shown)
    return new


def _check_shape(module: nn.Module, tensor: TensorInfo, shown: str) -> None:
    """Raise SvdcliError where a module has a weight of another shape than the checkpoint."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and tuple(weight.shape) != tensor.shape:
        raise SvdcliError(
            f"{tensor.module} is {list(tensor.shape)} in {shown} and {list(weight.shape)} in the "
            f"module",
            "check both",
        )


def _assign(module: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor in place of a parameter or buffer, on its device; one on the meta device takes
    the value's."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    old = getattr(owner, leaf)
    value = value if old.device.type == "meta" else value.to(old.device)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=value.is_floating_point())
    else:
        owner._buffers[leaf] = value
