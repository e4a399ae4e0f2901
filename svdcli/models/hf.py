"""The transformers plugin: after this import, stock `from_pretrained` opens what svdcli wrote.

Everything that reaches into transformers is in this file; it imports nothing of svdcli but the modules beside it, since
`compress --self-contained` ships both in one file. Written for transformers 5.12 and later.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers import HfQuantizer, auto, register_quantization_config, register_quantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from svdcli.models.modules import LOW_RANK, dense_weight, is_row_order, low_rank_like, weight_of

logger = logging.get_logger(f"transformers.{__name__}")

METHOD, FORMAT = "svdcli", 1
UP, DOWN, ROWS = "svd_up.weight", "svd_down.weight", "svd_rows"

# A second registration raises: the installed plugin and a copy shipped with a model may meet in one process.
for _table in (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING):
    _table.pop(METHOD, None)


@dataclass(frozen=True)
class Stored:
    """One factored layer as the headers of the weight files show it: the stored weight's shape, rank and layout."""

    shape: tuple[int, int]
    rank: int
    pivoted: bool


@register_quantization_config(METHOD)
class SvdConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of a config.json. dequantize=True multiplies every layer out while loading.

    Raises ValueError for a format that this version does not know.
    """

    def __init__(self, format: int = FORMAT, layout: str = "factored", dequantize: bool = False, **extra: Any) -> None:  # noqa: A002
        if not isinstance(format, int) or format > FORMAT:
            raise ValueError(f"this model has svdcli's format {format}, this svdcli knows {FORMAT}; upgrade svdcli")
        self.quant_method, self.format, self.layout, self.dequantize, self.extra = METHOD, format, layout, dequantize, extra

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD, "format": self.format, "layout": self.layout} | self.extra


class MergeFactors(ConversionOps):  # type: ignore[misc]
    """Multiply factors out while loading: for dequantize=True, and for experts that transformers keeps in one stack."""

    def __init__(self, hf_quantizer: SvdQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], full_layer_name: str = "", model: Any = None, **_: Any) -> dict[str, Any]:
        dtype = model.get_parameter_or_buffer(full_layer_name).dtype
        parts = {key: value if isinstance(value, list) else [value] for key, value in input_dict.items()}
        out: dict[str, Any] = {}
        for key, value in parts.items():
            if key.endswith(UP):
                base = key.removesuffix(UP)
                rows = parts.get(base + ROWS, [None] * len(value))
                triples = zip(value, parts[base + DOWN], rows, strict=True)
                dense = [dense_weight(up.float(), down.float(), r).to(dtype) for up, down, r in triples]
                out |= {f"{base}weight": dense} if base else {full_layer_name: dense[0]}
            elif not key.endswith((DOWN, ROWS)) and value[0].numel():  # a zero-size tensor only warns other loaders
                out[key] = value
        return out


@register_quantizer(METHOD)
class SvdQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts low-rank modules where the weight files hold factors, before transformers loads the weights.

    Raises ValueError where factors are incomplete, disagree with each other or have no module to go to.
    """

    requires_calibration = True  # only weights that are factored already

    def __init__(self, quantization_config: SvdConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.replaced: dict[str, Stored] = {}
        self.fused: list[str] = []
        self.same_rows: dict[str, str] = {}

    def get_weight_conversions(self) -> list[Any]:
        if not self.quantization_config.dequantize:
            return []
        return [WeightConverter([UP, DOWN, ROWS], "weight", [MergeFactors(self)])]

    def update_weight_conversions(self, weight_conversions: list[Any], *_: Any) -> list[Any]:
        """Converters that stack weights (experts) also collect the factors, and multiply them out first."""
        out = []
        for converter in weight_conversions:
            sources = _sources(converter)
            stacks = isinstance(converter, WeightConverter) and all(source.endswith(".weight") for source in sources)
            if stacks and (self.quantization_config.dequantize or self.fused):
                more = [source.removesuffix("weight") + part for source in sources for part in ("weight", UP, DOWN, ROWS)]
                converter = _converter_like(converter, more, [MergeFactors(self), *converter.operations])
            out.append(converter)
        return out + self.get_weight_conversions()

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Iterable[Any] | None = None, **_: Any) -> None:
        if self.quantization_config.dequantize:
            return
        stored = read_stored(str(file) for file in checkpoint_files or ())
        self._replace(model, stored)
        self._ignore_tripwire(model)
        self.same_rows = _tie_factors(model, self.replaced)
        if self.same_rows:
            known = getattr(model, "_keys_to_ignore_on_load_missing", None)
            both = {*(known or ()), *(rf"^{re.escape(name)}\.{ROWS}$" for name in self.same_rows)}
            model._keys_to_ignore_on_load_missing = both if isinstance(known, set) else list(both)

    def _replace(self, model: Any, stored: dict[str, Stored]) -> None:
        modules = dict(model.named_modules())
        homeless = []
        for name, target in module_names(model, stored).items():
            if target is None:
                self.fused.append(name)
            elif target in modules:
                model.set_submodule(target, _low_rank(target, modules[target], stored[name]))
                self.replaced[target] = stored[name]
            else:
                homeless.append(name)
        self._tell_homeless(model, stored, homeless)
        if self.fused:
            logger.warning(
                f"svdcli: {len(self.fused)} factored layers (such as {self.fused[0]}) are multiplied out while loading: "
                f"{type(model).__name__} keeps them in one stack"
            )

    def _tell_homeless(self, model: Any, stored: dict[str, Stored], homeless: list[str]) -> None:
        """A head that this class does not have may be left out, as for dense checkpoints; anything else is an error."""
        prefix = f"{model.base_model_prefix}."
        heads = {name for name in homeless if not name.startswith(prefix)} if any(n.startswith(prefix) for n in stored) else set()
        other_class = type(model).__name__ not in (model.config.architectures or [])
        if set(homeless) <= heads and other_class:
            for name in homeless:
                logger.warning(f"svdcli: {type(model).__name__} has no module {name}, its factors are left out")
        elif homeless:
            raise ValueError(
                f"{type(model).__name__} has no module {homeless[0]!r}, which is factored ({len(homeless)} such layers); "
                f"open the model as {' or '.join(model.config.architectures or ['the class it was made from'])}"
            )

    def _ignore_tripwire(self, model: Any) -> None:
        """The zero-size tensor under an old name is for loaders without this plugin."""
        prefix = f"{model.base_model_prefix}."
        known = getattr(model, "_keys_to_ignore_on_load_unexpected", None)  # a set, a list or None, by version
        more = {rf"(^|\.){re.escape(name.removeprefix(prefix))}\.weight$" for name in self.replaced}
        both = set(known or ()) | more
        model._keys_to_ignore_on_load_unexpected = both if isinstance(known, set) else list(both)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        """What was multiplied out stays so: `save_pretrained` must revert only the model's own conversions."""
        conversions = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [plain for item in conversions if (plain := _without_merge(item)) is not None]
        for target, source in self.same_rows.items():
            model.get_submodule(target).svd_rows = model.get_submodule(source).svd_rows
        for target, layer in self.replaced.items():
            if layer.pivoted:
                _check_rows(target, model.get_submodule(target).svd_rows)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        state = model.state_dict()
        if self.replaced:
            state[f"{next(iter(self.replaced))}.weight"] = torch.empty(0)
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

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for name, module in list(model.named_modules()):
            if isinstance(module, LOW_RANK):
                if not hasattr(module, "in_features"):
                    raise ValueError(f"{name} cannot be made dense in memory; load with SvdConfig(dequantize=True)")
                weight = weight_of(module)
                dense = nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None, device="meta")
                dense.weight = nn.Parameter(weight.to(dtype or weight.dtype))
                dense.bias = module.bias  # type: ignore[assignment]
                model.set_submodule(name, dense)
        return model


def module_names(model: Any, stored: Iterable[str]) -> dict[str, str | None]:
    """Where transformers puts what a checkpoint calls `name`: the name of a module, which may not exist in this model, or
    None where several weights of the checkpoint go into one parameter."""
    mapping, meta = get_model_conversion_mapping(model), model.state_dict()
    renamings = [item for item in mapping if isinstance(item, WeightRenaming)]
    converters = [item for item in mapping if isinstance(item, WeightConverter)]
    places: dict[str, str | None] = {}
    for name in stored:
        key, fused = rename_source_key(f"{name}.weight", renamings, converters, model.base_model_prefix, meta)
        places[name] = None if fused is not None else key.removesuffix(".weight")
    return places


def read_stored(files: Iterable[str]) -> dict[str, Stored]:
    """The factored layers in safetensors files by module name, from the headers alone.

    Raises ValueError where a factor is missing, the shapes of a layer's parts disagree, or the files' own record does.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    recorded: dict[str, Any] = {}
    for file in files:
        if file.endswith(".safetensors"):
            with safe_open(file, framework="pt") as opened:
                shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
                recorded |= json.loads((opened.metadata() or {}).get(METHOD, "{}")).get("layers", {})
    layers = {name.removesuffix(f".{part}") for name in shapes for part in (UP, DOWN, ROWS) if name.endswith(f".{part}")}
    stored = {layer: _stored(layer, shapes) for layer in sorted(layers)}
    for name, item in recorded.items():
        layer = name.removesuffix(".weight")
        if item["layout"] == "dense":
            continue
        if layer not in stored:
            raise ValueError(f"the factors of {layer} are missing from the weight files; write or download them again")
        if (stored[layer].rank, list(stored[layer].shape)) != (item["rank"], item["shape"]):
            raise ValueError(f"the factors of {layer} are not those that svdcli recorded in the file; write them again")
    return stored


def _stored(layer: str, shapes: dict[str, tuple[int, ...]]) -> Stored:
    up, down, rows = (shapes.get(f"{layer}.{part}") for part in (UP, DOWN, ROWS))
    if up is None or down is None:
        raise ValueError(f"{layer}.{UP if up is None else DOWN} is missing from the weight files; write or download them again")
    if len(up) != 2 or len(down) != 2 or up[1] != down[0] or (rows is not None and rows != (up[0] + down[0],)):
        raise ValueError(f"the factors of {layer} disagree: up {up}, down {down}, rows {rows}; write them again")
    return Stored((up[0] if rows is None else rows[0], down[1]), down[0], rows is not None)


def _low_rank(name: str, old: nn.Module, layer: Stored) -> nn.Module:
    if isinstance(old, LOW_RANK):
        return old
    new = low_rank_like(old, layer.rank, pivoted=layer.pivoted)
    if new is None:
        raise ValueError(f"{name} is a {type(old).__name__}, which cannot hold factors; load with SvdConfig(dequantize=True)")
    expected = tuple(old.weight.shape)  # type: ignore[arg-type]
    if expected != layer.shape:
        raise ValueError(f"the factors of {name} stand for a weight {list(layer.shape)}, the model has {list(expected)}")
    return new


def _check_rows(name: str, rows: Tensor) -> None:
    """A row order that is none would give wrong answers, or an IndexError far from here."""
    if rows.device.type != "meta" and not is_row_order(rows):
        raise ValueError(f"{name}.{ROWS} is no order of {rows.shape[0]} rows; write or download the weight files again")


def _tie_factors(model: Any, replaced: dict[str, Stored]) -> dict[str, str]:
    """A tie of two weights, {target: source}, becomes the same tie of both factors.

    Row orders are buffers, which transformers does not tie: {target: source} is returned for those.
    """
    tied, same_rows = dict(model.all_tied_weights_keys), {}
    for target, source in list(tied.items()):
        t, s = target.removesuffix(".weight"), source.removesuffix(".weight")
        if s in replaced:
            if t not in replaced:
                model.set_submodule(t, _low_rank(t, model.get_submodule(t), replaced[s]))
                replaced[t] = replaced[s]
            del tied[target]
            tied |= {f"{t}.{part}": f"{s}.{part}" for part in (UP, DOWN)}
            if replaced[s].pivoted:
                same_rows[t] = s
    model.all_tied_weights_keys = tied
    if model._tied_weights_keys and tied:
        model._tied_weights_keys = dict(tied)
    return same_rows


def _sources(converter: Any) -> list[str]:
    return list(getattr(converter, "_original_source_patterns", None) or converter.source_patterns)


def _converter_like(converter: Any, sources: list[str], operations: list[Any]) -> Any:
    """A copy of a converter with other sources and operations; what it targets and where it applies stay."""
    targets = list(getattr(converter, "_original_target_patterns", None) or converter.target_patterns)
    new = WeightConverter(source_patterns=sources, target_patterns=targets, operations=operations)
    for name in ("scope_prefix", "base_model_prefix"):
        if hasattr(converter, name):
            setattr(new, name, getattr(converter, name))
    return new


def _without_merge(converter: Any) -> Any:
    """The converter as the model's own mapping has it; None where it only multiplied factors out."""
    operations = list(getattr(converter, "operations", None) or ())
    own = [operation for operation in operations if not isinstance(operation, MergeFactors)]
    if len(own) == len(operations):
        return converter
    if not own:
        return None
    return _converter_like(converter, [name for name in _sources(converter) if not name.endswith((UP, DOWN, ROWS))], own)
