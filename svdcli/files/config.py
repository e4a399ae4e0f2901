"""What compress writes into a config.json, and how expand takes exactly that back."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from svdcli.files import compressed_tensors
from svdcli.plan.packing import PLAIN
from svdcli.plan.parts import part_configs
from svdcli.plan.plan import FORMAT, LayerPlan, Plan

METHOD = "svdcli"
_DTYPE_KEYS = ("dtype", "torch_dtype")  # the key of today, and that of older files
# What configs call dtypes.
_DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}

Path = tuple[str, ...]
Note = list[dict[str, Any]]


def changes_of(
    config: Mapping[str, Any], plan: Plan, auto_map: Mapping[str, str] | None, *, transformers: bool
) -> dict[Path, Any]:
    """{path: value} of what a config.json must say about an output, in it and in the sub-config of
    every part.

    That the plugin, or the compressed-tensors library, is to be asked; where transformers reads it
    the dtype that was asked for, since it casts to the one that it reads; and the classes of
    `--self-contained`.
    """
    factored = plan.recipe.keeps_factors and bool(plan.factored)
    changes: dict[Path, Any] = {}
    if plan.recipe.packs_whole and plan.factored:
        changes[("quantization_config",)] = compressed_tensors.quantization_config(plan)
    for path, part in (((), config), *part_configs(config)):
        if factored:
            changes[(*path, "quantization_config")] = quantization_config(plan)
        if transformers and plan.recipe.dtype is not None:
            # Under the keys that say it already, so that they do not contradict each other.
            keys = [key for key in _DTYPE_KEYS if part.get(key) is not None]
            for key in keys or _DTYPE_KEYS[:1]:
                changes[(*path, key)] = _DTYPE_NAMES[plan.recipe.dtype]
    if factored and auto_map is not None:
        changes[("auto_map",)] = dict(auto_map)
    return changes


def quantization_config(plan: Plan) -> dict[str, Any]:
    """What makes transformers ask the plugin."""
    data = {"quant_method": METHOD, "format": FORMAT, "layout": plan.recipe.layout}
    packed = [layer.packing for layer in plan.factored if layer.packing != PLAIN]
    return data | {"group": packed[0].group} if packed else data


def method_for(layers: Sequence[LayerPlan]) -> str | None:
    """The quant_method with which a loader opens an output that holds these layers in another way
    than as their weights; None where any loader does."""
    if any(layer.keeps_factors for layer in layers):
        return METHOD
    return compressed_tensors.METHOD if any(layer.packing != PLAIN for layer in layers) else None


def method_of(config: Mapping[str, Any]) -> str | None:
    """The quant_method that a config names."""
    quantised = config.get("quantization_config")
    return quantised.get("quant_method") if isinstance(quantised, Mapping) else None


def change(config: Mapping[str, Any], changes: Mapping[Path, Any]) -> tuple[dict[str, Any], Note]:
    """(the config with these changes, a note of what was there before: `path`, and `was` unless
    nothing was)."""
    changed = copy.deepcopy(dict(config))
    note: Note = []
    for path, value in changes.items():
        key = path[-1]
        owner = _owner(changed, path)
        if key in owner and owner[key] == value:
            continue
        entry: dict[str, Any] = {"path": list(path)}
        if key in owner:
            entry["was"] = owner[key]
        note.append(entry)
        owner[key] = value
    return changed, note


def change_back(config: Mapping[str, Any], note: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The config as it was before the changes that `note` tells of; whatever else changed since
    then stays."""
    restored = copy.deepcopy(dict(config))
    for entry in note:
        path = tuple(entry["path"])
        owner = _owner(restored, path)
        if "was" in entry:
            owner[path[-1]] = entry["was"]
        else:
            owner.pop(path[-1], None)
    return restored


def without_note(config: Mapping[str, Any], *, self_contained: bool) -> dict[str, Any]:
    """The config of an output that has no note of its changes, without what compress is known to
    have added."""
    restored = dict(config)
    if method_of(restored) == METHOD:
        del restored["quantization_config"]
    if self_contained:
        restored.pop("auto_map", None)
    return restored


def render_like(text: str, data: Mapping[str, Any]) -> bytes | None:
    """`data` written as `text` is, a JSON file; None where no plain way of writing gives `text` for
    what it says."""
    original = json.loads(text)
    body = text.rstrip()
    ending = text[len(body) :]  # such as a final newline
    for options in _options_of_dumps(text):
        if json.dumps(original, **options) == body:
            return (json.dumps(data, **options) + ending).encode()
    return None


def _options_of_dumps(text: str) -> list[dict[str, Any]]:
    """Options of json.dumps that may have given `text`: by its indent, or, on one line, with either
    kind of separators; with letters beyond ASCII as they are, or escaped."""
    indent = re.match(r"\{\n([ \t]+)", text)
    if indent is not None:
        layouts: list[dict[str, Any]] = [{"indent": indent[1]}]
    else:
        layouts = [{}, {"separators": (",", ":")}]
    escaped = [layout | {"ensure_ascii": True} for layout in layouts]
    plain = [layout | {"ensure_ascii": False} for layout in layouts]
    return escaped + plain


def _owner(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The dictionary in `config` that the last step of `path` is a key of; where there is none, an
    empty one that is not in it."""
    owner = config
    for step in path[:-1]:
        below = owner.get(step)
        owner = below if isinstance(below, dict) else {}
    return owner
