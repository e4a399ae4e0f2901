"""Every model class of transformers' auto mappings, built from its config on the meta device: no
weights, no downloads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from following import weights_that_choose
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto import modeling_auto

from svdcli.models.hf import module_names
from svdcli.models.modules import low_rank_like
from svdcli.plan.tensors import module_of

# A number that no other size has by chance: what has as many rows is a classifier's head.
LABELS = 37
# Deep enough for every kind of layer that a stack repeats; patterns of names and shapes are the
# same as at full depth.
DEPTH = 8

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_INDEXED = {
    "indexer_budget": 2048,
    "indexer_compress_ratio": 32,
    "indexer_n_heads": 16,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
}
# What a class wants to be told before it can be built from the defaults of its config.
CONFIGURED: Mapping[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 24},
    "chameleon": {"vocabulary_map": {"<image>": 8}},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "doge": {"is_moe": True},
    "dots1": {
        "n_routed_experts": 128,
        "n_shared_experts": 2,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 6,
    },
    "esm": {"vocab_size": 33},
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 4, "num_hidden_layers": 8},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 16},
    "hunyuan_vl": {"text_config": {"head_dim": 128}},
    "hunyuan_vl_text": {"head_dim": 128},
    "informer": {"prediction_length": 24},
    "lfm2_moe": {
        "layer_types": ["conv", "conv", "full_attention", "conv"] * 2,
        "num_hidden_layers": 8,
    },
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8, "head_dim": 192},
    "qwen4_exp": {"text_config": _INDEXED},
    "qwen4_exp_text": _INDEXED,
    "reformer": {"is_decoder": True},
    "step3p7": {"text_config": {"sliding_window": 512}},
    "time_series_transformer": {"prediction_length": 24},
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
}


@dataclass(frozen=True)
class Weight:
    """One weight as save_pretrained names it: its shape, the parameter it comes from (None where
    one becomes several), and whether something in the model can hold its factors: a module, or a
    stack that they are multiplied into."""

    shape: tuple[int, ...]
    parameter: str | None
    held: bool


def families() -> dict[str, list[str]]:
    """{model type: names of its classes} of all auto mappings, in the order of the alphabet."""
    found: dict[str, dict[str, None]] = {}
    for mapping in sorted(vars(modeling_auto)):
        if not (mapping.startswith("MODEL_") and mapping.endswith("MAPPING_NAMES")):
            continue
        for kind, names in getattr(modeling_auto, mapping).items():
            found.setdefault(kind, {}).update(
                dict.fromkeys([names] if isinstance(names, str) else names)
            )
    return {kind: sorted(found[kind]) for kind in sorted(found)}


def build(kind: str, name: str) -> PreTrainedModel:
    """A class of a family, at DEPTH layers where that changes no pattern of names and shapes.
    Raises what transformers does."""
    model_class = getattr(transformers, name)
    full = _on_meta(model_class, _config(kind, model_class, {}))
    depths = _shallow(full.config)
    if not depths:
        return full
    try:
        small = _on_meta(model_class, _config(kind, model_class, depths))
    except Exception:
        return full
    return small if _patterns(small) == _patterns(full) else full


def config_json(model: PreTrainedModel) -> dict[str, Any]:
    """What save_pretrained would write as config.json."""
    read: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=True))
    return read


def pattern_of(name: str) -> str:
    """A name with its numbers replaced: what all layers of a kind have in common."""
    return re.sub(r"\d+", "*", name)


def stored_weights(model: PreTrainedModel) -> dict[str, Weight]:
    """{name in the file: weight} for every tensor of two or more dimensions that save_pretrained
    would write."""
    tied = set(model.all_tied_weights_keys)
    state = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name not in tied
    }
    owners = {id(tensor): name for name, tensor in state.items()}
    files: dict[str, Tensor] = {
        n: t for n, t in revert_weight_conversion(model, dict(state)).items() if t.dim() > 1
    }
    held = _held(model, files)
    weights = {}
    for name, tensor in files.items():
        shape = tuple(tensor.shape)
        weights[name] = Weight(shape, owners.get(id(tensor)), held[pattern_of(name), shape])
    return weights


def what_they_do(
    model: PreTrainedModel, weights: Mapping[str, Weight], *, follow: bool
) -> dict[str, str]:
    """The letters of table.Row for every stored weight; follow runs the model to see what feeds a
    choice."""
    inputs, outputs = _embedding(model, "input"), _embedding(model, "output")
    # In the layers that ran: the others are like them.
    chosen = {pattern_of(name) for name in weights_that_choose(model)} if follow else set()
    letters = {}
    for name, weight in weights.items():
        said = {
            "i": weight.parameter is not None and weight.parameter == inputs,
            "o": weight.parameter is not None and weight.parameter == outputs,
            "l": weight.shape[0] in (LABELS, LABELS + 1),
            "c": weight.parameter is not None and pattern_of(weight.parameter) in chosen,
            "x": len(weight.shape) == 2 and not weight.held,
        }
        letters[name] = "".join(letter for letter, true in said.items() if true)
    return letters


def _embedding(model: PreTrainedModel, kind: str) -> str | None:
    """The parameter of get_input_embeddings, where it looks ids up, or of get_output_embeddings."""
    try:
        module = getattr(model, f"get_{kind}_embeddings")()
    except (NotImplementedError, AttributeError, TypeError):
        return None
    weight = getattr(module, "weight", None)
    if weight is None or (kind == "input" and not isinstance(module, nn.Embedding)):
        return None
    return next((name for name, parameter in model.named_parameters() if parameter is weight), None)


def _config(kind: str, model_class: Any, depths: Mapping[str, Any]) -> PreTrainedConfig:
    """The default config, with LABELS labels where the class takes any number of them."""
    known = kind in CONFIG_MAPPING  # a lazy mapping, without a get that imports
    config_class = CONFIG_MAPPING[kind] if known else model_class.config_class
    if not issubclass(config_class, model_class.config_class):
        config_class = model_class.config_class
    told = _merged(CONFIGURED.get(kind, {}), depths)
    labels = {} if model_class.__name__.endswith("ForQuestionAnswering") else {"num_labels": LABELS}
    return config_class(**labels, **told)


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(one)
    for key, value in other.items():
        both[key] = _merged(both[key], value) if isinstance(both.get(key), dict) else value
    return both


def _shallow(config: PreTrainedConfig) -> dict[str, Any]:
    """Arguments that make a config's stacks, and those of the configs in it, at most DEPTH layers
    deep."""
    found: dict[str, Any] = {}
    if (
        getattr(config, "num_hidden_layers", None).__class__ is int
        and config.num_hidden_layers > DEPTH
    ):
        found["num_hidden_layers"] = DEPTH
    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig) and (inner := _shallow(value)):
            found[key] = {"model_type": value.model_type} | inner
    return found


def _on_meta(model_class: Any, config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = model_class(config)
    return model.eval()


def _patterns(model: PreTrainedModel) -> set[tuple[str, tuple[int, ...]]]:
    return {(pattern_of(name), tuple(tensor.shape)) for name, tensor in model.state_dict().items()}


def _held(
    model: PreTrainedModel, files: Mapping[str, Tensor]
) -> dict[tuple[str, tuple[int, ...]], bool]:
    """Weight.held for each pattern and shape; the plugin is asked where one name of each goes."""
    firsts: dict[tuple[str, tuple[int, ...]], str] = {}
    for name, tensor in files.items():
        firsts.setdefault((pattern_of(name), tuple(tensor.shape)), module_of(name))
    places, modules = module_names(model, firsts.values()), dict(model.named_modules())
    return {key: _holds(places[module], modules) for key, module in firsts.items()}


def _holds(place: str | None, modules: Mapping[str, nn.Module]) -> bool:
    if place is None:
        return True
    return place in modules and low_rank_like(modules[place], 1, layout="factored") is not None
