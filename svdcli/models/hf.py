"""The transformers plugin: after this import, stock `from_pretrained` opens what svdcli wrote.

Everything that reaches into transformers is in this file; it imports nothing of svdcli but the
modules beside it and the plan's parts, since `compress --self-contained` ships them in one file.
Written for transformers 5.12 and later.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import (
    HfQuantizer,
    auto,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from svdcli.models.modules import LOW_RANK, dense_weight, is_row_order, low_rank_like, weight_of
from svdcli.plan.parts import tripwires

logger = logging.get_logger(f"transformers.{__name__}")

METHOD, FORMAT = "svdcli", 1
UP, DOWN, ROWS = "svd_up.weight", "svd_down.weight", "svd_rows"
# By layout, what a layer has in a weight file.
PARTS = {"factored": (UP, DOWN), "pivoted": (UP, DOWN, ROWS)}

# A second registration raises: the installed plugin and a copy shipped with a model may meet in one
# process.
for _table in (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING):
    _table.pop(METHOD, None)


@dataclass(frozen=True)
class Stored:
    """One factored layer as the headers of the weight files show it: the stored weight's shape,
    rank and layout."""

    shape: tuple[int, int]
    rank: int
    layout: str

    @property
    def parts(self) -> tuple[str, ...]:
        return PARTS[self.layout]

    @property
    def has_rows(self) -> bool:
        return ROWS in self.parts


@register_quantization_config(METHOD)
class SvdConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of a config.json. dequantize=True multiplies every layer out while
    loading.

    Raises ValueError for a format that this version does not know.
    """

    def __init__(
        self,
        format: int = FORMAT,  # noqa: A002
        layout: str = "factored",
        dequantize: bool = False,
        **extra: Any,
    ) -> None:
        if not isinstance(format, int) or format > FORMAT:
            raise ValueError(
                f"this model has svdcli's format {format}, this svdcli knows {FORMAT}; "
                f"upgrade svdcli"
            )
        self.quant_method = METHOD
        self.format = format
        self.layout = layout
        self.dequantize = dequantize
        self.extra = extra

    def get_loading_attributes(self) -> dict[str, Any]:
        """What `from_pretrained(quantization_config=SvdConfig(...))` decides, whatever the
        config.json says."""
        return {"dequantize": self.dequantize}

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD, "format": self.format, "layout": self.layout} | self.extra


auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*auto.LOADING_ATTRIBUTES_CONFIG_TYPES, SvdConfig)


class MergeFactors(ConversionOps):  # type: ignore[misc]
    """Multiply factors out while loading: for dequantize=True, and for layers whose module cannot
    hold factors.

    parts maps each pattern of the converter that this belongs to, to a source of `original` and a
    part of it ("weight" or one of a factor). original is the model's own converter, which gets the
    weights next; without one there is a single weight.
    """

    def __init__(
        self,
        hf_quantizer: SvdQuantizer,
        parts: dict[str, tuple[str, str]],
        original: WeightConverter | None = None,
    ) -> None:
        self.hf_quantizer = hf_quantizer
        self.parts = parts
        self.original = original

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: Any = None,
        target_patterns: Any = None,
        full_layer_name: str = "",
        model: Any = None,
        **more: Any,
    ) -> dict[str, Any]:
        dtype = model.get_parameter_or_buffer(full_layer_name).dtype
        found: dict[str, dict[str, list[Tensor]]] = {}
        for pattern, value in input_dict.items():
            source, part = self.parts.get(pattern, ("", "weight"))
            found.setdefault(source, {})[part] = value if isinstance(value, list) else [value]
        weights: dict[str, Any] = {}
        for source, parts in found.items():
            weights[source] = self._in_order(
                parts, self.hf_quantizer.stacks.get((full_layer_name, source)), dtype
            )
        if self.original is None:
            return {full_layer_name: weights[""][0]}

        # on to the model's own operations, and from the names that they give to those of the model
        own = self.original
        how = {"source_patterns": own.source_patterns, "target_patterns": own.target_patterns}
        for operation in own.operations:
            weights = operation.convert(
                weights, full_layer_name=full_layer_name, model=model, **how, **more
            )
        before, _, after = next(
            full_layer_name.partition(key) for key in weights if key in full_layer_name
        )
        return {f"{before}{key}{after}": weight for key, weight in weights.items()}

    def _in_order(
        self, parts: dict[str, list[Tensor]], order: list[bool] | None, dtype: torch.dtype
    ) -> list[Tensor]:
        """The weights of one source: those that are factored, multiplied out, among those that are
        not."""
        up, down = parts.get(UP, []), parts.get(DOWN, [])
        rows = parts.get(ROWS, [None] * len(up))
        merged = [_product(u, d, r).to(dtype) for u, d, r in zip(up, down, rows, strict=True)]
        # a zero-size tensor only warns other loaders
        dense = [tensor for tensor in parts.get("weight", ()) if tensor.numel()]
        if order is None:
            return merged + dense
        sources = {True: iter(merged), False: iter(dense)}
        return [next(sources[factored]) for factored in order]


@register_quantizer(METHOD)
class SvdQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts low-rank modules where the weight files hold factors, before transformers loads the
    weights.

    Factors that the class has no place for are left out, as their weights would be. Raises
    ValueError where factors are incomplete or disagree with each other, and where a place of the
    class was not filled from the files.
    """

    requires_calibration = True  # only weights that are factored already

    def __init__(self, quantization_config: SvdConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.replaced: dict[str, Stored] = {}
        self.merged: dict[str, str] = {}  # {module in the files: weight in the model}
        # of these, modules that share no parameter with another layer, as transformers calls them
        self.lone: list[str] = []
        self.stacks: dict[tuple[str, str], list[bool]] = {}
        self.renamed: dict[
            str, str
        ] = {}  # {module as the model's renamings call its factors: as they call its weight}
        self.ties: Any = None  # what the model ties, before factors took the places of weights
        self.tied: set[str] = set()
        self.same_rows: dict[str, str] = {}
        self.unspoken: set[str] = set()
        self.settled = False

    def get_weight_conversions(self) -> list[Any]:
        """Converters for single weights that are multiplied out."""
        if self.quantization_config.dequantize:
            return [_merging({part: ("", part) for part in (UP, DOWN, ROWS)}, "weight", self)]
        conversions = []
        for name in self.lone:
            patterns = {rf"^{re.escape(name)}\.{part}": ("", part) for part in (UP, DOWN, ROWS)}
            conversions.append(_merging(patterns, f"{name}.weight", self))
        return conversions

    def update_weight_conversions(self, weight_conversions: list[Any], *_: Any) -> list[Any]:
        """A converter of the model's that takes factored weights (to stack, to split) gives way to
        one that takes factors too.

        It stays behind that one where it also takes biases.
        """
        taken = {source for _, source in self.stacks}
        out = []
        for converter in weight_conversions:
            sources = set(getattr(converter, "source_patterns", ()))
            new = (
                _for_factors(converter, self)
                if isinstance(converter, WeightConverter) and sources & taken
                else None
            )
            if new is not None:
                out.append(new)
            if new is None or sources.isdisjoint(new.source_patterns):
                out.append(converter)
        # renamings apply in order: these go last, and first when names are changed back
        follow = [
            WeightRenaming(rf"^{re.escape(name)}\.svd_", f"{plain}.svd_")
            for name, plain in self.renamed.items()
        ]
        return out + follow + self.get_weight_conversions()

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Iterable[Any] | None = None, **_: Any
    ) -> None:
        shapes, stored = read_stored(str(file) for file in checkpoint_files or ())
        named = Naming(model)
        homes = {name: named(f"{name}.weight") for name in stored}
        self.stacks = _stacks(named, homes, shapes)
        self.renamed = _renamed(named, stored)

        self._place(model, named, homes, stored)
        self._tell_merged(model)
        self.ties = (model.all_tied_weights_keys, model._tied_weights_keys)
        self.tied, self.same_rows = _tie_factors(model, named, self.replaced, shapes)
        self.unspoken = _unspoken(model, homes, shapes)
        self._watch(model)

    def _place(
        self, model: Any, named: Naming, homes: dict[str, Home], stored: dict[str, Stored]
    ) -> None:
        """Low-rank modules for what the class has; what cannot be one is noted to be multiplied
        out."""
        paths: dict[int, list[str]] = {}  # custom classes register a module under several names
        for path, module in model.named_modules(remove_duplicate=False):
            paths.setdefault(id(module), []).append(path)
        for name, (key, pattern) in homes.items():
            if key not in named.state:
                continue
            if pattern is not None:
                self.merged[name] = key
                continue
            target, new = key.removesuffix(".weight"), None
            old = model.get_submodule(target)
            if not self.quantization_config.dequantize and _partners_can_hold(
                model, target, stored[name]
            ):
                new = _low_rank(target, old, stored[name])
            if new is None:
                self.merged[name] = key
                self.lone.append(named.plainly(f"{name}.weight").removesuffix(".weight"))
                continue
            for path in paths[id(old)]:
                model.set_submodule(path, new)
            self.replaced[target] = stored[name]

    def _tell_merged(self, model: Any) -> None:
        if self.merged and not self.quantization_config.dequantize:
            logger.warning(
                f"svdcli: {len(self.merged)} factored layers (such as {next(iter(self.merged))}) "
                f"are multiplied out while "
                f"loading: {type(model).__name__} has no module for them that could hold factors"
            )

    def _watch(self, model: Any) -> None:
        """Check transformers' account of the loading before missing weights are made anew, and
        before it is shown."""
        expected, prefix = model.state_dict(), f"{model.base_model_prefix}."
        _first(
            model,
            "mark_tied_weights_as_initialized",
            lambda info: _as_declared(model, expected, info),
        )
        _first(
            model, "_adjust_missing_and_unexpected_keys", lambda info: self._settle(info, prefix)
        )

    def _settle(self, info: Any, prefix: str) -> None:
        """Raises ValueError where a factor, or the weight of a factored layer, was not filled from
        the files."""
        self.settled = True
        info.unexpected_keys -= self.unspoken
        info.missing_keys -= {f"{name}.{ROWS}" for name in self.same_rows}
        made_up = info.missing_keys | {key for key, *_ in info.mismatched_keys}

        # what this class should have got, and what nobody took though the class lacks just that
        wanted = set(self.merged.values())
        for name, layer in self.replaced.items():
            wanted |= {f"{name}.{part}" for part in layer.parts}
        for key in (key for key in info.unexpected_keys if key.endswith(UP)):
            weight = f"{key.removesuffix(UP)}weight"
            wanted |= {weight, prefix + weight, weight.removeprefix(prefix)}
        wanted |= {key for key, shape, _ in info.mismatched_keys if tuple(shape) == (0,)}
        lost = sorted(made_up & wanted)
        if lost:
            raise ValueError(
                f"{lost[0]} is factored, and was not filled from the weight files ({len(lost)} "
                f"such tensors); "
                "write or download them again, and give from_pretrained their folder"
            )

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        """What was multiplied out stays so: `save_pretrained` must revert only the model's own
        conversions."""
        if not self.settled:
            raise RuntimeError(
                "this transformers loads weights in a way that svdcli does not know; see README "
                "for its versions"
            )
        if getattr(model, "_weight_conversions", None) is not None:
            own = [_without_merge(item) for item in model._weight_conversions]
            model._weight_conversions = list(
                {id(item): item for item in own if item is not None}.values()
            )
        self.same_rows = {
            target: source
            for target, source in self.same_rows.items()
            if _are_tied(model, target, source)
        }
        for target, source in self.same_rows.items():
            model.get_submodule(target).svd_rows = model.get_submodule(source).svd_rows
        for target, layer in self.replaced.items():
            if layer.has_rows:
                _check_rows(target, model.get_submodule(target).svd_rows)
        if self.quantization_config.dequantize:
            _forget_method(model.config)
        _let_cast(model)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        state = model.state_dict()
        for name in tripwires(name for name in self.replaced if name not in self.tied):
            state[f"{name}.weight"] = torch.empty(0)
        for target in self.same_rows:
            del state[f"{target}.{ROWS}"]
        return state, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True  # else the Trainer refuses: the factors are ordinary parameters

    @property
    def is_compileable(self) -> bool:
        return True

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """The model with ordinary layers, in the dtype that it has now."""
        return super().dequantize(model, dtype or model.dtype)

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        weights: dict[
            int, nn.Parameter
        ] = {}  # tied layers have the same factors, and get the same weight
        for name, module in list(model.named_modules()):
            if isinstance(module, LOW_RANK):
                key = id(module.get_parameter(UP))
                if key not in weights:
                    trained = module.get_parameter(UP).requires_grad
                    weights[key] = nn.Parameter(weight_of(module).detach().to(dtype), trained)
                model.set_submodule(name, _dense(module, weights[key]))
        if self.ties is not None:
            model.all_tied_weights_keys, model._tied_weights_keys = self.ties
        _forget_method(model.config)
        return model


class Home(NamedTuple):
    """Where transformers puts one tensor of a checkpoint: its key in the model's state, which the
    model may lack, and the pattern of the converter that takes it there, None where it goes there
    as it is."""

    key: str
    pattern: str | None


class Naming:
    """What transformers calls the tensors of a checkpoint in one model. state is the model's
    own."""

    def __init__(self, model: Any) -> None:
        mapping = get_model_conversion_mapping(model)
        self.state = model.state_dict()
        self._prefix = model.base_model_prefix
        self._renamings = [item for item in mapping if isinstance(item, WeightRenaming)]
        self._converters = [item for item in mapping if isinstance(item, WeightConverter)]

    def __call__(self, name: str) -> Home:
        key, pattern = rename_source_key(
            name, self._renamings, self._converters, self._prefix, self.state
        )
        if key not in self.state and name in self.state:
            key, pattern = rename_source_key(name, [], [], self._prefix, self.state)
        return Home(key, pattern)

    def plainly(self, name: str) -> str:
        """What a tensor is called when converters look at it: renamed, and its prefix as it is in
        the files."""
        return str(rename_source_key(name, self._renamings, [])[0])


def module_names(model: Any, stored: Iterable[str]) -> dict[str, str | None]:
    """Where transformers puts what a checkpoint calls `name`: the name of a module, which may not
    exist in this model, or None where several weights of the checkpoint go into one parameter."""
    named = Naming(model)
    places: dict[str, str | None] = {}
    for name in stored:
        key, pattern = named(f"{name}.weight")
        places[name] = None if pattern is not None else key.removesuffix(".weight")
    return places


def unfilled(model: Any, shapes: dict[str, tuple[int, ...]]) -> tuple[int, int]:
    """(how many tensors of `model` a checkpoint of these shapes lacks, how many of the checkpoint's
    it does not take), by transformers' own account. Factored layers count as their weights, tied
    weights as there where one of them is."""
    named = Naming(model)
    stored = stored_in(shapes)
    parts = {f"{name}.{part}" for name in stored for part in (UP, DOWN, ROWS)}
    whole = {name: shape for name, shape in shapes.items() if name not in parts}
    whole |= {f"{name}.weight": layer.shape for name, layer in stored.items()}

    # match names and shapes
    found: set[str] = set()
    unexpected: set[str] = set()
    for name, shape in whole.items():
        key, pattern = named(name)
        fits = key in named.state and (
            pattern is not None or tuple(named.state[key].shape) == shape
        )
        (found if fits else unexpected).add(key)
    for target, source in model.all_tied_weights_keys.items():
        if found & {target, source}:
            found |= {target, source}

    # leave out what the class ignores
    info = SimpleNamespace(missing_keys=named.state.keys() - found, unexpected_keys=unexpected)
    model._adjust_missing_and_unexpected_keys(info)
    return len(info.missing_keys), len(info.unexpected_keys)


def read_stored(files: Iterable[str]) -> tuple[dict[str, tuple[int, ...]], dict[str, Stored]]:
    """(the shape of every tensor, the factored layers by module name) in safetensors files, from
    the headers alone.

    Raises ValueError where a factor is missing, the shapes of a layer's parts disagree, or the
    files' own record does.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    recorded: dict[str, Any] = {}
    for file in files:
        if file.endswith(".safetensors"):
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  no mapping
                    shapes[name] = tuple(opened.get_slice(name).get_shape())
                record = json.loads((opened.metadata() or {}).get(METHOD, "{}"))
                shared = record.get("every_layer", {})
                recorded |= {name: shared | item for name, item in record.get("layers", {}).items()}
    stored = stored_in(shapes)
    for name, item in recorded.items():
        layer = name.removesuffix(".weight")
        if item["layout"] == "dense":
            continue
        if layer not in stored:
            raise ValueError(
                f"the factors of {layer} are missing from the weight files; write or download "
                f"them again"
            )
        if (stored[layer].rank, list(stored[layer].shape)) != (item["rank"], item["shape"]):
            raise ValueError(
                f"the factors of {layer} are not those that svdcli recorded in the file; write "
                f"them again"
            )
    return shapes, stored


def stored_in(shapes: dict[str, tuple[int, ...]]) -> dict[str, Stored]:
    """The factored layers among tensors of these shapes. Raises ValueError as `read_stored`."""
    layers = {
        name.removesuffix(f".{part}")
        for name in shapes
        for part in (UP, DOWN, ROWS)
        if name.endswith(f".{part}")
    }
    return {layer: _stored(layer, shapes) for layer in sorted(layers)}


def _stored(layer: str, shapes: dict[str, tuple[int, ...]]) -> Stored:
    up, down, rows = (shapes.get(f"{layer}.{part}") for part in (UP, DOWN, ROWS))
    if up is None or down is None:
        raise ValueError(
            f"{layer}.{UP if up is None else DOWN} is missing from the weight files; write or "
            f"download them again"
        )
    matrices = len(up) == len(down) == 2 and up[1] == down[0]
    if not matrices or (rows is not None and rows != (up[0] + down[0],)):
        raise ValueError(
            f"the factors of {layer} disagree: up {up}, down {down}, rows {rows}; write them again"
        )
    if rows is None:
        return Stored((up[0], down[1]), down[0], "factored")
    return Stored((rows[0], down[1]), down[0], "pivoted")


def _low_rank(name: str, old: nn.Module, layer: Stored) -> nn.Module | None:
    """The module for one layer's factors, or None where `old` cannot be replaced by one."""
    if isinstance(old, LOW_RANK):
        return old
    expected = tuple(old.weight.shape)  # type: ignore[arg-type]
    if expected != layer.shape:
        raise ValueError(
            f"the factors of {name} stand for a weight {list(layer.shape)}, the model has "
            f"{list(expected)}"
        )
    return low_rank_like(old, layer.rank, layout=layer.layout)


def _unspoken(model: Any, homes: dict[str, Home], shapes: dict[str, tuple[int, ...]]) -> set[str]:
    """Keys that transformers would call unexpected and nobody needs to hear of: zero-size tensors
    that warn other loaders, and factors of a weight that this class ignores."""
    named = Naming(model)
    patterns = model._keys_to_ignore_on_load_unexpected or ()  # a set, a list or None, by version
    keys = {named(f"{name}.weight").key for name in homes if 0 in shapes.get(f"{name}.weight", ())}
    for name, (key, _) in homes.items():
        if any(re.search(pattern, key) for pattern in patterns):
            keys.update(named(f"{name}.{part}").key for part in (UP, DOWN, ROWS))
    return keys


def _stacks(
    named: Naming, homes: dict[str, Home], shapes: dict[str, tuple[int, ...]]
) -> dict[tuple[str, str], list[bool]]:
    """Of every parameter that a converter puts together from factored and other weights: in their
    order, which are factored.

    Keys are that parameter and the converter's pattern.
    """
    stacked = {home for home in homes.values() if home.pattern is not None}
    if not stacked:
        return {}
    members: dict[Home, dict[str, bool]] = {home: {} for home in stacked}
    dense = (name.removesuffix(".weight") for name in shapes if name.endswith(".weight"))
    for name in sorted({*homes, *dense}, key=dot_natural_key):
        home = homes.get(name) or named(f"{name}.weight")
        if home in members:
            members[home][name] = name in homes
    return {(home.key, str(home.pattern)): list(flags.values()) for home, flags in members.items()}


def _renamed(named: Naming, stored: Iterable[str]) -> dict[str, str]:
    """{module as the model's renamings call its factors: as they call its weight}, where a renaming
    goes by `weight`."""
    renamed: dict[str, str] = {}
    for name in stored:
        as_factors = named.plainly(f"{name}.{UP}").removesuffix(f".{UP}")
        as_weight = named.plainly(f"{name}.weight").removesuffix(".weight")
        if as_factors != as_weight:
            renamed[as_factors] = as_weight
    return renamed


def _check_rows(name: str, rows: Tensor) -> None:
    """A row order that is none would give wrong answers, or an IndexError far from here."""
    if rows.device.type != "meta" and not is_row_order(rows):
        raise ValueError(
            f"{name}.{ROWS} is no order of {rows.shape[0]} rows; write or download the weight "
            f"files again"
        )


def _tie_factors(
    model: Any, named: Naming, replaced: dict[str, Stored], shapes: dict[str, tuple[int, ...]]
) -> tuple[set[str], dict[str, str]]:
    """A tie of two weights, {target: source}, becomes the same tie of both factors.

    Where the files hold one of the two factored and the other dense, they are two weights and are
    not tied: transformers, too, ties copies only where they are equal. Returns the modules that are
    tied to others, and {target: source} of row orders, which are buffers and not tied by
    transformers.
    """
    ties = {
        t.removesuffix(".weight"): s.removesuffix(".weight")
        for t, s in model.all_tied_weights_keys.items()
    }
    factored = {name for name in replaced if name in ties or name in ties.values()}
    if not factored:
        return set(), {}
    dense = _held_dense(named, shapes, {replaced[name].shape for name in factored})
    new = dict(model.all_tied_weights_keys)
    tied: set[str] = set()
    same_rows: dict[str, str] = {}
    for source in dict.fromkeys(ties.values()):
        group = [source, *(target for target, its in ties.items() if its == source)]
        held = [name for name in group if name in factored or name in dense]
        # What the files hold of the group: the first of them is what the others are tied to, as in
        # transformers.
        root = held[0] if held else source
        for name in group if root in factored else [name for name in group if name in factored]:
            new.pop(f"{name}.weight", None)
            if name == root or root not in factored or name in dense:
                continue
            if name not in factored:
                _replace_tied(model, name, root, replaced)
            if replaced[name] == replaced[root]:
                tied.add(name)
                new |= {f"{name}.{part}": f"{root}.{part}" for part in (UP, DOWN)}
                same_rows |= {name: root} if replaced[root].has_rows else {}
    model.all_tied_weights_keys = new
    if model._tied_weights_keys:
        model._tied_weights_keys = dict(new)
    return tied, same_rows


def _partners_can_hold(model: Any, name: str, layer: Stored) -> bool:
    """Can every module that is tied to this one hold the same factors; else all of them are
    multiplied out."""
    pairs = [
        (t.removesuffix(".weight"), s.removesuffix(".weight"))
        for t, s in model.all_tied_weights_keys.items()
    ]
    root = dict(pairs).get(name, name)
    partners = {root, *(target for target, source in pairs if source == root)} - {name}
    return all(
        _low_rank(other, model.get_submodule(other), layer) is not None for other in partners
    )


def _replace_tied(model: Any, name: str, root: str, replaced: dict[str, Stored]) -> None:
    """Make room for factors in a module that the files lack, since it is tied to `root`, which they
    hold."""
    new = _low_rank(name, model.get_submodule(name), replaced[root])
    if new is None:
        raise ValueError(
            f"{name} is tied to {root} and cannot hold factors; load with "
            f"SvdConfig(dequantize=True)"
        )
    model.set_submodule(name, new)
    replaced[name] = replaced[root]


def _are_tied(model: Any, target: str, source: str) -> bool:
    """After loading: two modules that both came from the files were tied only where their factors
    are equal."""
    return model.get_parameter(f"{target}.{UP}") is model.get_parameter(f"{source}.{UP}")


def _held_dense(
    named: Naming, shapes: dict[str, tuple[int, ...]], wanted: set[tuple[int, int]]
) -> set[str]:
    """Modules whose dense weight, of one of the wanted shapes, is in the weight files."""
    homes = [
        named(name)
        for name, shape in shapes.items()
        if name.endswith(".weight") and shape in wanted
    ]
    return {home.key.removesuffix(".weight") for home in homes if home.pattern is None}


def _first(model: Any, name: str, check: Callable[[Any], None]) -> None:
    """Have `check` look at the argument of a model's method before the method does, once."""
    method = getattr(model, name)

    def checked(info: Any) -> None:
        delattr(model, name)
        check(info)
        method(info)

    setattr(model, name, checked)


def _as_declared(model: Any, expected: dict[str, Tensor], info: Any) -> None:
    """What early versions leave out where there is a quantizer: other sizes than the model's are
    mismatches, and tensors whose names changed take its dtype too."""
    fixed: dict[str, torch.dtype] = {}
    for declared in {tensor.dtype for tensor in expected.values()}:
        fixed |= model._get_dtype_plan(declared)
    for key, empty in expected.items():
        owner = model.get_submodule(key.rpartition(".")[0])
        leaf = key.rpartition(".")[2]
        places = owner._parameters if leaf in owner._parameters else owner._buffers
        tensor = places.get(leaf)
        if tensor is None or tensor.is_meta:
            continue
        if tensor.shape != empty.shape:
            info.mismatched_keys.add((key, tensor.shape, empty.shape))
            places[leaf] = (
                nn.Parameter(empty, empty.is_floating_point())
                if places is owner._parameters
                else empty
            )
            continue
        wanted = next(
            (d for pattern, d in fixed.items() if re.search(pattern.replace("*", ".*"), key)),
            empty.dtype,
        )
        if tensor.is_floating_point() and tensor.dtype != wanted:
            tensor.data = tensor.data.to(wanted)


def _dense(module: Any, weight: nn.Parameter) -> nn.Module:
    """The ordinary layer that a low-rank module stands for."""
    dense: nn.Module
    if hasattr(module, "in_features"):
        dense = nn.Linear(
            module.in_features, module.out_features, bias=module.bias is not None, device="meta"
        )
    elif hasattr(module, "num_embeddings"):
        dense = nn.Embedding(
            module.num_embeddings, module.embedding_dim, module.padding_idx, device="meta"
        )
    else:
        dense = Conv1D(module.nf, module.nx)
    dense.weight = weight
    if getattr(module, "bias", None) is not None:
        dense.bias = module.bias
    return dense.train(module.training)


def _forget_method(config: Any) -> None:
    """Remove svdcli's quantization_config from a config and everything in it."""
    values = config if isinstance(config, dict) else vars(config)
    quantised = values.get("quantization_config")
    method = (
        quantised.get("quant_method")
        if isinstance(quantised, dict)
        else getattr(quantised, "quant_method", None)
    )
    if method == METHOD:
        del values["quantization_config"]
    for value in values.values():
        if isinstance(value, (dict, PreTrainedConfig)):
            _forget_method(value)


def _let_cast(model: Any) -> None:
    """Factors are ordinary parameters: `.half()`, `.float()` and model code need not take them for
    anything else."""
    model.is_quantized = False
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and hasattr(config, "_is_quantized"):
            del config._is_quantized


def _for_factors(converter: Any, quantizer: SvdQuantizer) -> Any:
    """A converter that takes the factors, and the weights beside them, of what `converter` takes;
    it applies where that does."""
    patterns: dict[str, tuple[str, str]] = {}
    for source in converter.source_patterns:
        stem = _up_to_weight(source)
        patterns |= {stem + part: (source, part) for part in ("weight", UP, DOWN, ROWS)}
    target = converter.target_patterns[0]
    if not converter.source_patterns[0].endswith("weight"):
        target = f"{_up_to_weight(target)}weight"
    new = _merging(patterns, target, quantizer, converter)
    for name in ("scope_prefix", "base_model_prefix", "force_cpu"):
        if hasattr(converter, name):
            setattr(new, name, getattr(converter, name))
    return new


def _up_to_weight(pattern: str) -> str:
    """A pattern of a weight, or of all that a module holds, up to the dot before `weight`."""
    stem = pattern.removesuffix("weight")
    return stem if stem.endswith(".") else f"{stem}."


def _merging(
    patterns: dict[str, tuple[str, str]], target: str, quantizer: SvdQuantizer, original: Any = None
) -> Any:
    return WeightConverter(list(patterns), [target], [MergeFactors(quantizer, patterns, original)])


def _without_merge(converter: Any) -> Any:
    """The converter as the model's own mapping has it; None where it only multiplied factors
    out."""
    for operation in getattr(converter, "operations", None) or ():
        if isinstance(operation, MergeFactors):
            return operation.original
    return converter


def _product(up: Tensor, down: Tensor, rows: Tensor | None) -> Tensor:
    """The dense weight, computed in at least float32."""
    wide = torch.promote_types(up.dtype, torch.float32)
    return dense_weight(up.to(wide), down.to(wide), rows)
