"""The transformers plugin: after this import, stock `from_pretrained` opens what svdcli wrote.

Everything that reaches into transformers is in this file; it imports nothing of svdcli but the
modules beside it and the plan's parts, since `compress --self-contained` ships them in one file.
Written for transformers 5.12 and later.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from types import MappingProxyType, SimpleNamespace
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
    base,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from svdcli.models.experts import (
    SeparateExperts,
    TransposedLinear,
    separate,
    stack_again,
    stack_of,
    stacks_as_they_are,
    stacks_taken_apart,
)
from svdcli.models.modules import (
    DOWN,
    HOLDERS,
    LOW_RANK,
    PACKED,
    ROWS,
    SCALE,
    SHAPE,
    SHARED,
    SPAN,
    UNPACKED,
    UP,
    WEIGHT,
    WHOLE,
    PackedLinear,
    PackedMatrix,
    SharedLinear,
    dense_weight,
    is_row_order,
    low_rank_like,
    matrix_parts,
    packed_shapes,
    part_names,
    share,
    shared_like,
    unpacked,
    weight_of,
)
from svdcli.plan.parts import tripwires

logger = logging.get_logger(f"transformers.{__name__}")

METHOD = "svdcli"
FORMAT = 1
PARTS = (UP, DOWN, ROWS)

# Of factors and of whole weights, packed or not; long names before those that they begin with,
# since early transformers take the first pattern that fits.
_SUFFIXES = (PACKED, SCALE, SHAPE, "")
_FACTOR_PARTS = (*map("".join, product((UP, DOWN), _SUFFIXES)), ROWS)
_ALL_PARTS = (*_FACTOR_PARTS, *map("".join, product((WEIGHT,), _SUFFIXES)))

# Modules that stand for a dense layer.
COMPRESSED: tuple[type[nn.Module], ...] = (*LOW_RANK, PackedLinear, SharedLinear)

# A second registration raises: the installed plugin and a copy shipped with a model may meet in one
# process.
for _table in (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING):
    _table.pop(METHOD, None)


class Member(NamedTuple):
    """A layer that shares a basis with others: its name, the number of their group, its first
    output in that and the one after its last."""

    name: str
    number: int
    start: int
    stop: int


@dataclass(frozen=True)
class Stored:
    """One factored or packed layer as the headers of the weight files show it: the stored weight's
    shape, rank and layout; the bits of its numbers, and how many columns share a scale at 4;
    whether those of 8 bits are stored as words; the layers of which it is the weight, one below the
    other, where they share a basis."""

    shape: tuple[int, int]
    rank: int
    layout: str
    bits: int = UNPACKED
    group: int | None = None
    in_words: bool = False
    members: tuple[Member, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of its tensors in a weight file, after the layer's."""
        return part_names(self.layout, self.bits, in_words=self.in_words)

    @property
    def has_rows(self) -> bool:
        """Is there an order of rows among them?"""
        return ROWS in self.parts


class Declared(NamedTuple):
    """What shapes do not say of stored layers: how many columns share a scale at four bits, None
    where nothing is packed; {matrix: its shape} as files declare it at four bits; the names of
    matrices of int8; the layers that share a basis with others."""

    group: int | None = None
    shapes: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    int8: Set[str] = frozenset()
    members: tuple[Member, ...] = ()


_NOTHING_DECLARED = Declared()


@register_quantization_config(METHOD)
class SvdConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of a config.json. dequantize=True multiplies every layer out while
    loading. group is how many columns share a scale in layers of four bits, None where nothing is
    packed.

    Raises ValueError for a format that this version does not know.
    """

    def __init__(
        self,
        format: int = FORMAT,  # noqa: A002
        layout: str = "factored",
        dequantize: bool = False,
        group: int | None = None,
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
        self.group = group
        self.extra = extra

    def get_loading_attributes(self) -> dict[str, Any]:
        """Return what `from_pretrained(quantization_config=SvdConfig(...))` decides, whatever the
        config.json says."""
        return {"dequantize": self.dequantize}

    def to_dict(self) -> dict[str, Any]:
        values = {"quant_method": METHOD, "format": self.format, "layout": self.layout}
        if self.group is not None:
            values["group"] = self.group
        return values | self.extra


auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*auto.LOADING_ATTRIBUTES_CONFIG_TYPES, SvdConfig)


class MergeFactors(ConversionOps):  # type: ignore[misc]
    """Multiply factors out, and unpack integers, while loading: for dequantize=True, and for layers
    whose module cannot hold them.

    parts maps each pattern of the converter that this belongs to, to a source of `original` and a
    part of it ("weight" or one of a factored or packed layer). original is the model's own
    converter, which gets the weights next; without one there is a single weight.
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

    def __deepcopy__(self, memo: dict[int, Any]) -> MergeFactors:
        # Transformers copies a converter for every tensor: not all that the quantizer knows, too
        return MergeFactors(self.hf_quantizer, self.parts, copy.deepcopy(self.original, memo))

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: Any = None,
        target_patterns: Any = None,
        full_layer_name: str = "",
        model: Any = None,
        **options: Any,
    ) -> dict[str, Any]:
        # What was read, by source of the model's own converter and by part
        read: dict[str, dict[str, list[Tensor]]] = {}
        for pattern, value in input_dict.items():
            source, part = self.parts.get(pattern, ("", "weight"))
            read.setdefault(source, {})[part] = value if isinstance(value, list) else [value]

        # Multiplied out, each source's weights in the order in which the model stacks them
        dtype = model.get_parameter_or_buffer(full_layer_name).dtype
        weights: dict[str, Any] = {}
        for source, parts in read.items():
            members = self.hf_quantizer.stacks.get((full_layer_name, source))
            weights[source] = _weights_of(parts, members, dtype)
        if self.original is None:
            return {full_layer_name: weights[""][0]}

        # On to the model's own operations
        for operation in self.original.operations:
            weights = operation.convert(
                weights,
                source_patterns=self.original.source_patterns,
                target_patterns=self.original.target_patterns,
                full_layer_name=full_layer_name,
                model=model,
                **options,
            )

        # From the names that these give, which end alike, to those of the model
        target = next(key for key in weights if key in full_layer_name)
        before, _, after = full_layer_name.partition(target)
        return {f"{before}{key}{after}": weight for key, weight in weights.items()}


def _weights_of(
    parts: dict[str, list[Tensor]], members: list[Stored | None] | None, dtype: torch.dtype
) -> list[Tensor]:
    """Return the weights of one source in their order, each of them factored, packed or, where
    members says None, neither; all of them dense without members. parts has the tensors of all
    members that have such a part."""
    # A zero-size weight only warns other loaders
    tensors = {part: iter(read) for part, read in parts.items()}
    tensors[WEIGHT] = iter([tensor for tensor in parts.get(WEIGHT, ()) if tensor.numel()])
    if members is None:
        return list(tensors[WEIGHT])
    weights: list[Tensor] = []
    for layer in members:
        if layer is None:
            weights.append(next(tensors[WEIGHT]))
            continue
        read = {part: next(tensors[part]) for part in layer.parts}
        weights.append(_weight_of_parts(layer, read).to(dtype))
    return weights


def _weight_of_parts(layer: Stored, read: Mapping[str, Tensor]) -> Tensor:
    """Return the dense weight of one layer from its tensors, computed in at least float32."""
    n = layer.shape[1]
    if layer.layout == WHOLE:
        return _matrix(layer, WEIGHT, read, n)
    up = _matrix(layer, UP, read, layer.rank)
    down = _matrix(layer, DOWN, read, n)
    return dense_weight(up, down, read.get(ROWS))


def _matrix(layer: Stored, name: str, read: Mapping[str, Tensor], columns: int) -> Tensor:
    """Return one matrix of a layer, unpacked, in at least float32."""
    first = read[matrix_parts(name, layer.bits, in_words=layer.in_words)[0]]
    if layer.bits == UNPACKED:
        return first.to(torch.promote_types(first.dtype, torch.float32))
    scales = read[name + SCALE]
    wide = torch.promote_types(scales.dtype, torch.float32)
    return unpacked(first, scales, columns, layer.group, wide)


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
        # Layers that are low-rank modules now, and {module in the files: weight in the model} for
        # those that are multiplied out
        self.replaced: dict[str, Stored] = {}
        self.merged: dict[str, str] = {}
        # Of the latter, as transformers calls them, those that share no parameter with others
        self.lone: dict[str, Stored] = {}
        # What each weight in the model is made of, by the source of the converter that makes it,
        # "" where there is none: layers in their order, None for dense ones
        self.stacks: dict[tuple[str, str], list[Stored | None]] = {}
        # {beginning of a layer's parts after the model's renamings: after those of its weight}
        self.renamed: dict[str, str] = {}
        # What the model ties, before factors took the places of weights
        self.ties: Any = None
        # Which model it is, for conversions that it has no place for
        self.model: Any = None
        # Modules whose factors are tied to others', and {target: source} of tied row orders and of
        # tied packed weights
        self.tied: set[str] = set()
        self.same_rows: dict[str, str] = {}
        self.same_buffers: dict[str, str] = {}
        # Keys that transformers need not report
        self.unspoken: set[str] = set()
        self.settled = False
        # What can be multiplied out after loading alone: a basis that layers share, as one weight
        # for all, and experts that are slices of a stack in the model
        self.afterwards = False

    @property
    def merges(self) -> bool:
        """Is every layer multiplied out while it is read?"""
        return bool(self.quantization_config.dequantize) and not self.afterwards

    def get_weight_conversions(self) -> list[Any]:
        """Return converters for single weights that are multiplied out."""
        conversions = []
        lone = self.lone
        if self.merges:
            factors = {part: ("", part) for part in _FACTOR_PARTS}
            conversions.append(_merging(factors, WEIGHT, self))
            lone = {name: layer for name, layer in lone.items() if layer.layout == WHOLE}
        for name, layer in lone.items():
            parts = sorted(layer.parts, key=len, reverse=True)
            patterns = {rf"^{re.escape(name)}\.{part}": ("", part) for part in parts}
            conversions.append(_merging(patterns, f"{name}.weight", self))
        return conversions

    def update_weight_conversions(self, weight_conversions: list[Any], *_: Any) -> list[Any]:
        """Replace every converter of the model's that takes factored weights (to stack, to split)
        by one that takes factors too.

        It stays behind that one where it also takes biases.
        """
        factored = {source for _, source in self.stacks}
        conversions: list[Any] = []
        for converter in _places_in(self.model, weight_conversions):
            sources = set(getattr(converter, "source_patterns", ()))
            if not isinstance(converter, WeightConverter) or sources.isdisjoint(factored):
                conversions.append(converter)
                continue
            for_factors = _for_factors(converter, self)
            conversions.append(for_factors)
            if sources.isdisjoint(for_factors.source_patterns):
                conversions.append(converter)

        # Renamings apply in order: these go last, and first when names are changed back
        for name, plain in self.renamed.items():
            conversions.append(WeightRenaming(f"^{re.escape(name)}", plain))
        return conversions + self.get_weight_conversions()

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Iterable[Any] | None = None, **_: Any
    ) -> None:
        # What the files hold, and where the model has it; experts one by one, where files do
        self.model = model
        files = [str(file) for file in checkpoint_files or ()]
        shapes, all_stored = read_stored(files, self.quantization_config.group)
        stored = {name: layer for name, layer in all_stored.items() if not layer.members}
        shared = {name: layer for name, layer in all_stored.items() if layer.members}
        members = [member.name for layer in shared.values() for member in layer.members]
        names = [*shapes, *(f"{name}.weight" for name in (*stored, *members))]
        self.afterwards = bool(shared) or _has_slices(Naming(model), names)
        if not self.merges and _are_of_stacks(Naming(model), (*stored, *members)):
            separate_experts(model, names)
        named = Naming(model)
        homes = {name: named(f"{name}.weight") for name in stored}
        self.stacks = _stacks(named, homes, shapes, stored)
        self.renamed = _renamed(named, stored, members)

        # Low-rank modules in the model, tied as its weights were
        self._place(model, named, homes, stored)
        self._place_shared(model, named, shared.values())
        self._warn_of_merged(model)
        self.ties = (model.all_tied_weights_keys, model._tied_weights_keys)
        self.tied, self.same_rows, self.same_buffers = _tie_factors(
            model, named, self.replaced, self.merged, shapes
        )

        # Then transformers loads, and its account of that is checked
        self.unspoken = _unspoken(model, homes, shapes, stored)
        for layer in shared.values():
            warning = f"{layer.members[0].name}.weight"
            self.unspoken |= {named(warning).key} if 0 in shapes.get(warning, ()) else set()
        self._watch(model)

    def _place(
        self, model: Any, named: Naming, homes: dict[str, Home], stored: dict[str, Stored]
    ) -> None:
        """Put low-rank modules where the class has a place for them; note what is to be multiplied
        out."""
        paths = _paths(model)
        for name, (key, pattern) in homes.items():
            # Left out, as its weight would be; or a part of a parameter, which a converter makes
            if key not in named.state:
                continue
            if pattern is not None:
                self.merged[name] = key
                continue

            # A module of its own: low-rank, or its weight multiplied out
            target = key.removesuffix(".weight")
            old = model.get_submodule(target)
            new = self._module_for(model, target, old, stored[name])
            if new is None:
                self.merged[name] = key
                self.lone[named.plainly(f"{name}.weight").removesuffix(".weight")] = stored[name]
                self.stacks[key, ""] = [stored[name]]
                continue
            for path in paths[id(old)]:
                model.set_submodule(path, new)
            self.replaced[target] = stored[name]

    def _place_shared(self, model: Any, named: Naming, shared: Iterable[Stored]) -> None:
        """Put modules that share a basis where the class has those layers. Raises ValueError where
        it has some of them in another way."""
        paths = _paths(model)
        for layer in shared:
            # Left out, as their weights would be
            homes = [named(f"{member.name}.weight") for member in layer.members]
            if not any(key in named.state for key, _ in homes):
                continue
            olds = [_module_of(model, home, named.state) for home in homes]
            news = _sharing(olds, layer)
            if news is None:
                first, *others = (member.name for member in layer.members)
                raise ValueError(
                    f"{first} shares its factors with {', '.join(others)}, and not all of them are "
                    f"linear layers of {type(model).__name__} in that shape; "
                    f"`svdcli expand` makes an ordinary checkpoint of it"
                )
            for old, new in zip(olds, news, strict=True):
                for path in paths[id(old)]:
                    model.set_submodule(path, new)
            holder = f"{homes[0].key.removesuffix('.weight')}.{SHARED}"
            self.replaced[holder] = replace(layer, members=())

    def _module_for(
        self, model: Any, target: str, old: nn.Module, layer: Stored
    ) -> nn.Module | None:
        """Return the low-rank module for one layer, None where its weight is to be multiplied
        out."""
        if self.merges:
            return None
        if layer.bits != UNPACKED and target in _all_tied(model) and layer.layout != WHOLE:
            return None
        if not _partners_can_hold(model, target, layer):
            return None
        return _low_rank(target, old, layer)

    def _warn_of_merged(self, model: Any) -> None:
        """Say that layers take the memory of dense ones, where that was not asked for."""
        if self.merged and not self.merges:
            logger.warning(
                f"svdcli: {len(self.merged)} factored layers (such as {next(iter(self.merged))}) "
                f"are multiplied out while "
                f"loading: {type(model).__name__} has no module for them that could hold factors"
            )

    def _watch(self, model: Any) -> None:
        """Check transformers' account of the loading before missing weights are made anew, and
        before it is shown."""
        declare = partial(self._declare, model, model.state_dict())
        settle = partial(self._settle, prefix=f"{model.base_model_prefix}.")
        _first(model, "mark_tied_weights_as_initialized", declare)
        _first(model, "_adjust_missing_and_unexpected_keys", settle)

    def _declare(self, model: Any, expected: dict[str, Tensor], info: Any) -> None:
        """Give tied modules what was read of packed weights, and do what `_as_declared` does."""
        _as_declared(model, expected, info)
        for target, source in self.same_buffers.items():
            share(_packed(model, source), _packed(model, target))
        info.missing_keys -= {f"{name}.{part}" for name, part in self._shared_parts()}

    def _settle(self, info: Any, prefix: str) -> None:
        """Check that every factor, and the weight of every factored layer, was filled from the
        files. Raises ValueError where one was not."""
        # Without what is no fault: row orders that are shared, tensors that only warn
        self.settled = True
        info.unexpected_keys -= self.unspoken
        info.missing_keys -= {f"{name}.{ROWS}" for name in self.same_rows}
        made_up = info.missing_keys | {key for key, *_ in info.mismatched_keys}

        # What this class should have got
        wanted = set(self.merged.values())
        for name, layer in self.replaced.items():
            wanted |= {f"{name}.{part}" for part in layer.parts}
        experts: set[str] = set()
        for path, module in self.model.named_modules():
            if isinstance(module, SeparateExperts):
                experts |= {f"{path}.{name}" for name, _ in module.named_parameters()}

        # What nothing took though the class lacks just that, with or without its prefix
        for key in info.unexpected_keys:
            layer_name = _layer_of(key)
            if layer_name is not None:
                for name in (f"{layer_name}.weight", stack_of(layer_name)):
                    wanted |= {name, prefix + name, name.removeprefix(prefix)}
        wanted |= {key for key, shape, _ in info.mismatched_keys if tuple(shape) == (0,)}
        lost = sorted(made_up & wanted) or sorted(made_up & experts)
        if lost:
            what = (
                "is factored" if lost[0] in wanted else "is an expert beside one that is factored"
            )
            raise ValueError(
                f"{lost[0]} {what}, and was not filled from the weight files ({len(lost)} "
                f"such tensors); "
                "write or download them again, and give from_pretrained their folder"
            )

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        """Leave what was multiplied out as it is: `save_pretrained` must revert only the model's
        own conversions."""
        if not self.settled:
            raise RuntimeError(
                "this transformers loads weights in a way that svdcli does not know; see README "
                "for its versions"
            )
        # The model's own conversions, each once: one that took factors had given way to another
        if getattr(model, "_weight_conversions", None) is not None:
            converters: dict[int, Any] = {}
            for converter in model._weight_conversions:
                converter = _without_merge(converter)
                if converter is not None:
                    converters[id(converter)] = converter
            model._weight_conversions = list(converters.values())

        # Row orders of tied modules, and a look at each
        for target, source in list(self.same_rows.items()):
            if not _are_tied(model, target, source):
                del self.same_rows[target]
                continue
            model.get_submodule(target).svd_rows = model.get_submodule(source).svd_rows
        for target, layer in self.replaced.items():
            if layer.has_rows:
                _check_rows(target, model.get_submodule(target).svd_rows)
            if layer.in_words:
                _packed(model, target).take_words()
                self.replaced[target] = replace(layer, in_words=False)

        # From here on it is a model as any other
        if self.quantization_config.dequantize and self.afterwards:
            self._dequantize(model, model.dtype)
        if self.quantization_config.dequantize:
            _forget_method(model.config)
        _let_cast(model)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        state = model.state_dict()
        factored = [name for name, layer in self.replaced.items() if layer.layout != WHOLE]
        loud = [name.removesuffix(f".{SHARED}") for name in factored if name not in self.tied]
        slices = stacks_as_they_are(model)
        for name in tripwires(loud):
            stack = stack_of(name)
            state[stack if stack in slices else f"{name}.weight"] = torch.empty(0)
        for target in self.same_rows:
            del state[f"{target}.{ROWS}"]
        for target, part in self._shared_parts():
            del state[f"{target}.{part}"]
        return state, {}

    def _shared_parts(self) -> Iterator[tuple[str, str]]:
        """Yield (module, part) of packed weights that are another module's too."""
        for name in self.same_buffers:
            for part in self.replaced[name].parts:
                yield name, part

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
        """Return the model with ordinary layers, in the dtype that it has now."""
        return super().dequantize(model, dtype or model.dtype)

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        # Tied layers have the same factors, and get the same weight
        weights: dict[int, nn.Parameter] = {}
        for name, module in _compressed_modules(model):
            first = _first_numbers(module)
            same = id(module) if isinstance(module, SharedLinear) else id(first)
            if same not in weights:
                weight = weight_of(module).detach().to(dtype, memory_format=torch.contiguous_format)
                trains = first.requires_grad or not first.is_floating_point()
                weights[same] = nn.Parameter(weight, trains)
            model.set_submodule(name, _dense(module, weights[same]))
        stack_again(model)
        if self.ties is not None:
            model.all_tied_weights_keys, model._tied_weights_keys = self.ties
        _forget_method(model.config)
        return model


def _paths(model: Any) -> dict[int, list[str]]:
    """Return the names of every module: custom classes register one under several."""
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    return paths


class Home(NamedTuple):
    """The place where transformers puts one tensor of a checkpoint: its key in the model's state,
    which the model may lack, and the pattern of the converter that takes it there, None where it
    goes there as it is."""

    key: str
    pattern: str | None


def _places_in(model: Any, conversions: Iterable[Any]) -> list[Any]:
    """Return the conversions without those that stack experts which are separate here."""
    taken = stacks_taken_apart(model)
    return [
        entry
        for entry in conversions
        if not isinstance(entry, WeightConverter) or taken.isdisjoint(entry.target_patterns)
    ]


def separate_experts(model: Any, files: Iterable[str] = ()) -> list[str]:
    """Make layers of the experts that transformers stacks; return the paths of what holds them.
    files are names of tensors or layers in the checkpoint: they tell whether it has stacks as they
    are or experts one by one, where the model takes both."""
    named = Naming(model)
    as_they_are: set[str] = set()
    for name in files:
        as_they_are |= {named.as_it_is(name), named.stack_of(name)} & named.state.keys()
    return separate(model, get_model_conversion_mapping(model), as_they_are)


class Naming:
    """The names that transformers gives to the tensors of a checkpoint in one model. state is the
    model's own."""

    def __init__(self, model: Any) -> None:
        mapping = _places_in(model, get_model_conversion_mapping(model))
        self.state = model.state_dict()
        self._prefix = model.base_model_prefix
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]

    def __call__(self, name: str) -> Home:
        key, pattern = rename_source_key(
            name, self._renamings, self._converters, self._prefix, self.state
        )
        # A file that names tensors as the model does needs no conversion
        if key not in self.state and name in self.state:
            key, pattern = rename_source_key(name, [], [], self._prefix, self.state)
        return Home(key, pattern)

    def as_it_is(self, name: str) -> str:
        """Return the key of a tensor that no converter takes."""
        return str(rename_source_key(name, self._renamings, [], self._prefix, self.state)[0])

    def stack_of(self, name: str) -> str:
        """Return the key of the stack that the weight of an expert is a slice of, "" where it is
        none of one that the model has."""
        stack = stack_of(self.as_it_is(name).removesuffix(".weight"))
        before = f"{self._prefix}."
        for key in (stack, before + stack, stack.removeprefix(before)):
            if stack and key in self.state:
                return key
        return ""

    def plainly(self, name: str) -> str:
        """Return what a tensor is called when converters look at it: renamed, and its prefix as it
        is in the files."""
        return str(rename_source_key(name, self._renamings, [])[0])


def _module_of(model: Any, home: Home, state: Mapping[str, Tensor]) -> nn.Module | None:
    """Return the module whose weight goes to that place, None where it has none of its own."""
    if home.pattern is not None or home.key not in state:
        return None
    module: nn.Module = model.get_submodule(home.key.removesuffix(".weight"))
    return module


def _sharing(olds: Sequence[nn.Module | None], layer: Stored) -> list[SharedLinear] | None:
    """Return the modules that will share this layer's factors, None where the old ones are not
    what it is the weight of."""
    modules = [old for old in olds if old is not None]
    if len(modules) < len(olds):
        return None
    number = layer.members[0].number
    kind = {"layout": layer.layout, "bits": layer.bits, "group": layer.group}
    news = shared_like(modules, layer.rank, number, **kind)  # type: ignore[arg-type]
    if news is None or news[0].in_features != layer.shape[1]:
        return None
    spans = [(new.start, new.stop) for new in news]
    return news if spans == [(member.start, member.stop) for member in layer.members] else None


def _are_of_stacks(named: Naming, stored: Iterable[str]) -> bool:
    """Tell whether the model has one of these layers in a stack with others: by a converter, or by
    its own name without the number of an expert."""
    for name in stored:
        weight = f"{name}.weight"
        if named.stack_of(weight) or named(weight).pattern is not None:
            return True
    return False


def _has_slices(named: Naming, names: Iterable[str]) -> bool:
    """Tell whether some of these tensors are slices of stacks that no converter puts together."""
    weights = (name for name in names if name.endswith(".weight"))
    return any(named.stack_of(name) and named(name).pattern is None for name in weights)


def module_names(model: Any, stored: Iterable[str]) -> dict[str, str | None]:
    """Return where transformers puts what a checkpoint calls `name`: the name of a module, which
    may not exist in this model, or None where several weights of the checkpoint go into one
    parameter."""
    named = Naming(model)
    places: dict[str, str | None] = {}
    for name in stored:
        key, pattern = named(f"{name}.weight")
        places[name] = None if pattern is not None else key.removesuffix(".weight")
    return places


def replaced_for(model: Any, method: str) -> str:
    """Return the name of a class that transformers replaces by another one in models of this
    `quant_method`, so that weights do not fit any more; "" where the model has none."""
    table = getattr(base, "MODULES_TO_PATCH_FOR_QUANTIZATION", {})
    for module in model.modules():
        name = type(module).__name__
        if method in table.get(name, {}).get("quantization_methods", ()):
            return name
    return ""


def unfilled(
    model: Any, shapes: dict[str, tuple[int, ...]], integers: Declared = _NOTHING_DECLARED
) -> tuple[int, int]:
    """Return (how many tensors of `model` a checkpoint of these shapes lacks, how many of the
    checkpoint's it does not take), by transformers' own account. Compressed layers count as their
    weights, tied weights as there where one of them is."""
    # Shapes as if nothing were factored
    named = Naming(model)
    stored = stored_in(shapes, integers)
    dense = dict(shapes)
    for name, layer in stored.items():
        for part in layer.parts:
            dense.pop(f"{name}.{part}", None)
        for member in layer.members:
            dense.pop(f"{member.name}.{SPAN}", None)
            dense[f"{member.name}.weight"] = (member.stop - member.start, layer.shape[1])
        if not layer.members:
            dense[f"{name}.weight"] = layer.shape

    # Names and shapes that fit
    filled: set[str] = set()
    unexpected: set[str] = set()
    for name, shape in dense.items():
        key, pattern = named(name)
        if key in named.state and (pattern is not None or tuple(named.state[key].shape) == shape):
            filled.add(key)
        else:
            unexpected.add(key)
    for target, source in model.all_tied_weights_keys.items():
        if filled & {target, source}:
            filled |= {target, source}

    # Without what the class ignores
    info = SimpleNamespace(missing_keys=named.state.keys() - filled, unexpected_keys=unexpected)
    model._adjust_missing_and_unexpected_keys(info)
    return len(info.missing_keys), len(info.unexpected_keys)


def read_stored(
    files: Iterable[str], group: int | None = None
) -> tuple[dict[str, tuple[int, ...]], dict[str, Stored]]:
    """Return (the shape of every tensor, the factored and packed layers by module name) in
    safetensors files, from the headers and the declared shapes of packed matrices alone. group is
    that of config.json.

    Raises ValueError where a part of a layer is missing, the shapes of its parts disagree, or the
    files' own record or group does.
    """
    # Shapes and record, from the headers
    shapes: dict[str, tuple[int, ...]] = {}
    declared: dict[str, tuple[int, ...]] = {}
    int8: set[str] = set()
    members: list[Member] = []
    recorded: dict[str, Any] = {}
    for file in files:
        if not file.endswith(".safetensors"):
            continue
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  no mapping
                part = opened.get_slice(name)
                shapes[name] = tuple(part.get_shape())
                if part.get_dtype() == "I8":
                    int8.add(name)
                if name.endswith(f".{WEIGHT}{SHAPE}") and shapes[name] == (2,):
                    declared[name.removesuffix(SHAPE)] = tuple(opened.get_tensor(name).tolist())
                if name.endswith(f".{SPAN}") and shapes[name] == (3,):
                    layer_name = name.removesuffix(f".{SPAN}")
                    members.append(Member(layer_name, *map(int, opened.get_tensor(name).tolist())))
            record = json.loads((opened.metadata() or {}).get(METHOD, "{}"))
        shared = record.get("every_layer", {})
        for name, entry in record.get("layers", {}).items():
            recorded[name] = shared | entry

    # Every layer that is recorded as factored or packed must be there, as it is recorded
    stored = stored_in(shapes, Declared(group, declared, int8, tuple(members)))
    for name, entry in recorded.items():
        if entry["layout"] != "dense" or "bits" in entry:
            layer_name = name.removesuffix(".weight") + (f".{SHARED}" if "members" in entry else "")
            _check_recorded(layer_name, entry, stored, group)
    return shapes, stored


def _check_recorded(
    layer: str, entry: Mapping[str, Any], stored: Mapping[str, Stored], group: int | None
) -> None:
    """Raise ValueError where a layer is not stored as its entry in the record says."""
    what = "integers" if entry["layout"] in (WHOLE, "dense") else "factors"
    if layer not in stored:
        raise ValueError(
            f"the {what} of {layer} are missing from the weight files; write or download them again"
        )
    held = stored[layer]
    bits = entry.get("bits", UNPACKED)
    recorded = (entry["rank"], entry["shape"], bits)
    if (held.rank, list(held.shape), held.bits) != recorded:
        raise ValueError(
            f"the {what} of {layer} are not those that svdcli recorded in the file; write "
            f"them again"
        )
    if bits == 4 and entry.get("group") != group:
        raise ValueError(
            f"{layer} has groups of {entry.get('group')} columns, config.json says {group}; "
            f"restore it"
        )


def stored_in(
    shapes: Mapping[str, tuple[int, ...]], integers: Declared = _NOTHING_DECLARED
) -> dict[str, Stored]:
    """Return the factored and packed layers among tensors of these shapes. Raises ValueError as
    `read_stored`."""
    # Layers by the names of their parts; of integers of 8 bits, one part is called `weight`
    factored: set[str] = set()
    whole: set[str] = set()
    for name in shapes:
        layer = _layer_of(name)
        if name in integers.int8 and name.endswith(f".{WEIGHT}") and layer is None:
            layer = name.removesuffix(f".{WEIGHT}")
        if layer is None:
            continue
        if name.startswith(f"{layer}.svd_"):
            factored.add(layer)
        elif _is_packed(f"{layer}.{WEIGHT}", shapes, integers):
            whole.add(layer)

    # How each is stored, with a look at all of its parts
    stored: dict[str, Stored] = {}
    for layer in sorted(factored | whole):
        if layer in factored:
            stored[layer] = _stored(layer, shapes, integers)
        else:
            shape, bits = _stored_matrix(f"{layer}.{WEIGHT}", shapes, integers)
            m, n = shape
            group = _group(bits, integers)
            in_words = f"{layer}.{WEIGHT}{PACKED}" in shapes and bits == 8
            stored[layer] = Stored((m, n), min(shape), WHOLE, bits, group, in_words)
    return _with_members(stored, integers.members)


def _with_members(stored: dict[str, Stored], members: Iterable[Member]) -> dict[str, Stored]:
    """Return the layers, those that others share with the names of these. Raises ValueError where
    such a layer is not the weight of all of them."""
    groups: dict[int, list[Member]] = {}
    for member in members:
        groups.setdefault(member.number, []).append(member)
    held: set[str] = set()
    for group in groups.values():
        group.sort(key=lambda member: member.start)
        name = f"{group[0].name}.{SHARED}"
        starts = [0, *(member.stop for member in group)]
        layer = stored.get(name)
        one_below_the_other = [member.start for member in group] == starts[:-1]
        if layer is None or not one_below_the_other or starts[-1] != layer.shape[0]:
            raise ValueError(
                f"the factors that {group[0].name} shares with other layers are not in the weight "
                f"files, or not those of all of them; write or download them again"
            )
        stored[name] = replace(layer, members=tuple(group))
        held.add(name)
    lonely = [name for name in stored if name.endswith(f".{SHARED}") and name not in held]
    if lonely:
        raise ValueError(
            f"{lonely[0]} is shared by layers of which the weight files do not tell; write or "
            f"download them again"
        )
    return stored


def _layer_of(name: str) -> str | None:
    """Return the layer that a tensor is a part of, by its name: a factor, or what may be one of a
    packed weight; None for any other."""
    layer, _, last = name.rpartition(".")
    if layer.endswith((".svd_up", ".svd_down")) and last.startswith(WEIGHT):
        return layer.rpartition(".")[0]
    if last == ROWS or last in (WEIGHT + PACKED, WEIGHT + SCALE, WEIGHT + SHAPE):
        return layer
    return None


def _is_packed(name: str, shapes: Mapping[str, tuple[int, ...]], integers: Declared) -> bool:
    """Tell whether a weight is stored as integers: others, too, may have scales."""
    if name in shapes:
        return name in integers.int8 and (integers.group is not None or name + SCALE in shapes)
    return name + PACKED in shapes or name + SHAPE in shapes or integers.group is not None


def _stored(layer: str, shapes: Mapping[str, tuple[int, ...]], integers: Declared) -> Stored:
    # Both factors, and an order of all rows where there is one
    up, bits = _stored_matrix(f"{layer}.{UP}", shapes, integers)
    down, down_bits = _stored_matrix(f"{layer}.{DOWN}", shapes, integers)
    rows = shapes.get(f"{layer}.{ROWS}")
    matrices = len(up) == len(down) == 2 and up[1] == down[0] and bits == down_bits
    if not matrices or (rows is not None and (rows != (up[0] + down[0],) or bits != UNPACKED)):
        raise ValueError(
            f"the factors of {layer} disagree: up {up}, down {down}, rows {rows}; write them again"
        )

    # The layout is the one that has just these parts
    parts = (UP, DOWN) if rows is None else PARTS
    layout = next(name for name, holders in HOLDERS.items() if holders.parts == parts)
    m = up[0] if rows is None else rows[0]
    return Stored((m, down[1]), down[0], layout, bits, _group(bits, integers))


def _stored_matrix(
    name: str, shapes: Mapping[str, tuple[int, ...]], integers: Declared
) -> tuple[tuple[int, ...], int]:
    """Return the shape of one matrix, and the bits of its numbers."""
    bits = UNPACKED
    in_words = name + PACKED in shapes or name + SHAPE in shapes
    if in_words:
        bits = _bits_of_words(shapes.get(name + PACKED, ()), integers.shapes.get(name, ()))
    elif name + SCALE in shapes or name in integers.int8:
        bits = 8
    for part in matrix_parts(name, bits, in_words=in_words):
        if part not in shapes:
            raise ValueError(
                f"{part} is missing from the weight files; write or download them again"
            )
    if bits == UNPACKED:
        return shapes[name], bits
    if integers.group is None:
        raise ValueError(
            f"{name} is packed, and the quantization_config of config.json has no group; restore it"
        )

    # What its parts must be by the shape of the matrix
    shape = integers.shapes.get(name, ()) if in_words else shapes[name]
    agrees = len(shape) == 2 and (in_words or name in integers.int8)
    if agrees:
        m, n = shape
        expected = packed_shapes((m, n), bits, integers.group, in_words=in_words)
        for suffix, (wanted, _) in expected.items():
            agrees = agrees and shapes[name + suffix] == wanted
    if not agrees:
        raise ValueError(f"the integers, scales and shape of {name} disagree; write them again")
    return shape, bits


def _bits_of_words(packed: tuple[int, ...], declared: tuple[int, ...]) -> int:
    """Return the bits of codes in words: 8 where there is a word for every four columns."""
    if len(packed) != 2 or len(declared) != 2 or declared[1] <= 4:
        return 4
    return 8 if packed[1] == -(-declared[1] // 4) else 4


def _group(bits: int, integers: Declared) -> int | None:
    """Return how many columns share a scale, which is not told of eight bits."""
    return integers.group if bits == 4 else None


def _low_rank(name: str, old: nn.Module, layer: Stored) -> nn.Module | None:
    """Return the module for one layer's tensors, or None where `old` cannot be replaced by one."""
    if isinstance(old, (*LOW_RANK, PackedLinear)):
        return old
    expected = tuple(old.weight.shape)  # type: ignore[arg-type]
    if expected != layer.shape:
        raise ValueError(
            f"the factors of {name} stand for a weight {list(layer.shape)}, the model has "
            f"{list(expected)}"
        )
    new = low_rank_like(old, layer.rank, layout=layer.layout, bits=layer.bits, group=layer.group)
    if layer.in_words and isinstance(new, PackedLinear):
        new.expect_words()
    return new


def _unspoken(
    model: Any,
    homes: dict[str, Home],
    shapes: dict[str, tuple[int, ...]],
    stored: dict[str, Stored],
) -> set[str]:
    """Return the keys that transformers would report as unexpected though they are meant to be left
    out: zero-size tensors that warn other loaders, and parts of a weight that this class
    ignores."""
    named = Naming(model)
    patterns = model._keys_to_ignore_on_load_unexpected or ()  # a set, a list or None, by version
    stacks = {stack_of(named.plainly(name)) for name in homes} - {""}
    keys = {named(f"{name}.weight").key for name in homes if 0 in shapes.get(f"{name}.weight", ())}
    for name, shape in shapes.items():
        if shape == (0,) and named.plainly(name) in stacks:
            keys.add(named(name).key)
    for name, (key, _) in homes.items():
        if any(re.search(pattern, key) for pattern in patterns):
            keys.update(named(f"{name}.{part}").key for part in stored[name].parts)
    return keys


def _stacks(
    named: Naming,
    homes: dict[str, Home],
    shapes: dict[str, tuple[int, ...]],
    stored: dict[str, Stored],
) -> dict[tuple[str, str], list[Stored | None]]:
    """Tell, for every parameter that a converter puts together from compressed and other weights,
    how each of these is stored, in their order; None for a dense one.

    Keys are that parameter and the converter's pattern.
    """
    stacked = {home for home in homes.values() if home.pattern is not None}
    if not stacked:
        return {}

    # transformers stacks in the natural order of names: layer 2 before layer 10
    members: dict[Home, dict[str, Stored | None]] = {home: {} for home in stacked}
    dense = (name.removesuffix(".weight") for name in shapes if name.endswith(".weight"))
    for name in sorted({*homes, *dense}, key=dot_natural_key):
        home = homes.get(name) or named(f"{name}.weight")
        if home in members:
            members[home][name] = stored.get(name)
    return {(home.key, str(home.pattern)): list(held.values()) for home, held in members.items()}


def _renamed(named: Naming, stored: Mapping[str, Stored], members: Iterable[str]) -> dict[str, str]:
    """Return {what the model's renamings make of the parts of a layer: what they make of its
    weight}, each up to where parts differ, where a renaming goes by `weight`."""
    parts = {name: ("svd_", layer.parts[0]) for name, layer in stored.items()}
    for name, layer in stored.items():
        if layer.layout == WHOLE:
            parts[name] = ("weight_", WEIGHT + SCALE)
    parts |= dict.fromkeys(members, ("svd_", SPAN))  # and what is shared, after the first of them
    renamed: dict[str, str] = {}
    for name, (beginning, part) in parts.items():
        as_part = named.plainly(f"{name}.{part}").removesuffix(part)
        as_weight = named.plainly(f"{name}.weight").removesuffix("weight")
        if as_part != as_weight:
            renamed[as_part + beginning] = as_weight + beginning
    return renamed


def _check_rows(name: str, rows: Tensor) -> None:
    """Raise ValueError for a row order that is none: it would give wrong answers, or an IndexError
    far from here."""
    if rows.device.type != "meta" and not is_row_order(rows):
        raise ValueError(
            f"{name}.{ROWS} is no order of {rows.shape[0]} rows; write or download the weight "
            f"files again"
        )


def _tie_factors(
    model: Any,
    named: Naming,
    replaced: dict[str, Stored],
    merged: dict[str, str],
    shapes: dict[str, tuple[int, ...]],
) -> tuple[set[str], dict[str, str], dict[str, str]]:
    """Make of a tie of two weights, {target: source}, the same tie of both factors.

    Where the files hold one of the two factored and the other dense, they are two weights and are
    not tied: transformers, too, ties copies only where they are equal. Returns the modules that are
    tied to others, and {target: source} of row orders, and of packed weights, which are buffers and
    not tied by transformers.
    """
    ties = _tied_modules(model)
    factored = {name for name in replaced if name in ties or name in ties.values()}
    if not factored:
        return set(), {}, {}
    dense = _held_dense(named, shapes, {replaced[name].shape for name in factored})
    dense |= {key.removesuffix(".weight") for key in merged.values()}
    new_ties = dict(model.all_tied_weights_keys)
    tied: set[str] = set()
    same_rows: dict[str, str] = {}
    same_buffers: dict[str, str] = {}
    for source in dict.fromkeys(ties.values()):
        # What the files hold of a group of tied modules: the first of them is what the others are
        # tied to, as in transformers
        group = [source, *(target for target, its_source in ties.items() if its_source == source)]
        held = [name for name in group if name in factored or name in dense]
        root = held[0] if held else source
        if root not in factored:
            for name in group:
                if name in factored:
                    new_ties.pop(f"{name}.weight", None)
            continue

        # To a factored one all others are tied that the files hold in no other way
        for name in group:
            new_ties.pop(f"{name}.weight", None)
            if name == root or name in dense:
                continue
            if name not in factored:
                _replace_tied(model, name, root, replaced)
            if replaced[name] == replaced[root]:
                tied.add(name)
                if replaced[root].layout == WHOLE:
                    same_buffers[name] = root
                    continue
                for part in (UP, DOWN):
                    new_ties[f"{name}.{part}"] = f"{root}.{part}"
                if replaced[root].has_rows:
                    same_rows[name] = root

    model.all_tied_weights_keys = new_ties
    if model._tied_weights_keys:
        model._tied_weights_keys = dict(new_ties)
    return tied, same_rows, same_buffers


def _packed(model: Any, name: str) -> PackedLinear:
    module = model.get_submodule(name)
    assert isinstance(module, PackedLinear)
    return module


def _tied_modules(model: Any) -> dict[str, str]:
    """Return {target: source} of modules whose weights are tied."""
    return {
        target.removesuffix(".weight"): source.removesuffix(".weight")
        for target, source in model.all_tied_weights_keys.items()
    }


def _all_tied(model: Any) -> set[str]:
    """Return the modules whose weights are tied, to each other's."""
    ties = _tied_modules(model)
    return {*ties, *ties.values()}


def _partners_can_hold(model: Any, name: str, layer: Stored) -> bool:
    """Tell whether every module that is tied to this one can hold the same factors; else all of
    them are multiplied out."""
    ties = _tied_modules(model)
    root = ties.get(name, name)
    partners = {root, *(target for target, source in ties.items() if source == root)} - {name}
    for partner in partners:
        if _low_rank(partner, model.get_submodule(partner), layer) is None:
            return False
    return True


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
    """Tell whether two modules are tied after loading: transformers ties those that both came from
    the files only where their factors are equal."""
    return model.get_parameter(f"{target}.{UP}") is model.get_parameter(f"{source}.{UP}")


def _held_dense(
    named: Naming, shapes: dict[str, tuple[int, ...]], wanted: set[tuple[int, int]]
) -> set[str]:
    """Return the names of modules whose dense weight, of one of the wanted shapes, is in the weight
    files."""
    dense: set[str] = set()
    for name, shape in shapes.items():
        if name.endswith(".weight") and shape in wanted:
            key, pattern = named(name)
            if pattern is None:
                dense.add(key.removesuffix(".weight"))
    return dense


def _first(model: Any, name: str, check: Callable[[Any], None]) -> None:
    """Have `check` look at the argument of a model's method before the method does, once."""
    method = getattr(model, name)

    def checked(info: Any) -> None:
        delattr(model, name)
        check(info)
        method(info)

    setattr(model, name, checked)


def _as_declared(model: Any, expected: dict[str, Tensor], info: Any) -> None:
    """Do what early versions leave out where there is a quantizer: report other sizes than the
    model's as mismatches, and give tensors whose names changed its dtype too."""
    # Patterns of names whose dtype the class fixes, whatever the others have
    fixed: dict[str, torch.dtype] = {}
    for declared in {tensor.dtype for tensor in expected.values()}:
        fixed |= model._get_dtype_plan(declared)

    for key, empty in expected.items():
        path, _, leaf = key.rpartition(".")
        owner = model.get_submodule(path)
        is_parameter = leaf in owner._parameters
        slots = owner._parameters if is_parameter else owner._buffers
        tensor = slots.get(leaf)
        if tensor is None or tensor.is_meta:  # not in the files
            continue

        # Of another size: made anew, and told of as transformers tells of it
        if tensor.shape != empty.shape:
            info.mismatched_keys.add((key, tensor.shape, empty.shape))
            if is_parameter:
                empty = nn.Parameter(empty, empty.is_floating_point())
            slots[leaf] = empty
            continue

        # Of another dtype
        dtype = _fixed_dtype(key, fixed) or empty.dtype
        if tensor.is_floating_point() and tensor.dtype != dtype:
            tensor.data = tensor.data.to(dtype)


def _fixed_dtype(key: str, fixed: dict[str, torch.dtype]) -> torch.dtype | None:
    """Return the dtype of the first pattern that a name fits."""
    for pattern, dtype in fixed.items():
        if re.search(pattern.replace("*", ".*"), key):
            return dtype
    return None


def _compressed_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) of those that stand for a dense layer, and not those within them."""
    inner: set[int] = set()
    for name, module in list(model.named_modules()):
        if id(module) not in inner and isinstance(module, COMPRESSED):
            inner.update(map(id, module.modules()))
            yield name, module


def _first_numbers(module: nn.Module) -> Tensor:
    """Return what tells whether two modules are tied: the parameter `up`, or integers."""
    if isinstance(module, SharedLinear):
        module = module.first.svd_shared
    matrix = module.get_submodule("svd_up") if isinstance(module, LOW_RANK) else module
    if isinstance(matrix, PackedLinear):
        return matrix.held
    return matrix.get_parameter(WEIGHT)


def _dense(module: Any, weight: nn.Parameter) -> nn.Module:
    """Return the ordinary layer that a low-rank module stands for."""
    dense: nn.Module
    if hasattr(module, "num_embeddings"):
        dense = nn.Embedding(
            module.num_embeddings, module.embedding_dim, module.padding_idx, device="meta"
        )
    elif hasattr(module, "in_features") and not isinstance(module, PackedMatrix):
        dense = nn.Linear(
            module.in_features, module.out_features, bias=module.bias is not None, device="meta"
        )
    elif module.bias is None:
        return TransposedLinear(weight, weight.requires_grad).train(module.training)
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
    if isinstance(quantised, dict):
        method = quantised.get("quant_method")
    else:
        method = getattr(quantised, "quant_method", None)
    if method == METHOD:
        del values["quantization_config"]
    for value in values.values():
        if isinstance(value, (dict, PreTrainedConfig)):
            _forget_method(value)


def _let_cast(model: Any) -> None:
    """Have `.half()`, `.float()` and model code take the factors for what they are: ordinary
    parameters."""
    model.is_quantized = False
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and hasattr(config, "_is_quantized"):
            del config._is_quantized


def _for_factors(converter: Any, quantizer: SvdQuantizer) -> Any:
    """Return a converter that takes the factors, and the weights beside them, of what `converter`
    takes; it applies where that does."""
    # Its sources, each as a weight and as factors
    patterns: dict[str, tuple[str, str]] = {}
    for source in converter.source_patterns:
        stem = _up_to_weight(source)
        for part in _ALL_PARTS:
            patterns[stem + part] = (source, part)

    # Its target, where it takes all that a module holds: the weight there
    target = converter.target_patterns[0]
    if not converter.source_patterns[0].endswith("weight"):
        target = f"{_up_to_weight(target)}weight"
    new = _merging(patterns, target, quantizer, converter)
    for name in ("scope_prefix", "base_model_prefix", "force_cpu"):
        if hasattr(converter, name):
            setattr(new, name, getattr(converter, name))
    return new


def _up_to_weight(pattern: str) -> str:
    """Return a pattern of a weight, or of all that a module holds, up to the dot before
    `weight`."""
    stem = pattern.removesuffix("weight")
    return stem if stem.endswith(".") else f"{stem}."


def _merging(
    patterns: dict[str, tuple[str, str]], target: str, quantizer: SvdQuantizer, original: Any = None
) -> Any:
    return WeightConverter(list(patterns), [target], [MergeFactors(quantizer, patterns, original)])


def _without_merge(converter: Any) -> Any:
    """Return the converter as the model's own mapping has it; None where it only multiplied factors
    out."""
    for operation in getattr(converter, "operations", None) or ():
        if isinstance(operation, MergeFactors):
            return operation.original
    return converter
