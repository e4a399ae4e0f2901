"""What a config.json says where the weights are those of the compressed-tensors library (0.20): its
own `quantization_config`, with which transformers and vLLM open them without svdcli."""

from __future__ import annotations

from typing import Any

from svdcli.plan.packing import Packing
from svdcli.plan.plan import Plan

METHOD = "compressed-tensors"
_FORMAT = "pack-quantized"  # words of codes, for weights whose inputs are not rounded


def quantization_config(plan: Plan) -> dict[str, Any]:
    """As that library writes it. A single scheme is that of every linear layer but those to ignore;
    several name their layers."""
    # Layers by what they are packed as
    layers: dict[Packing, list[str]] = {}
    for layer in plan.factored:
        layers.setdefault(layer.packing, []).append(layer.tensor.module)
    schemes = sorted(layers, key=lambda packing: packing.bits, reverse=True)
    groups = {}
    for index, packing in enumerate(schemes):
        targets = ["Linear"] if len(schemes) == 1 else layers[packing]
        groups[f"group_{index}"] = _scheme(packing, targets)

    return {
        "config_groups": groups,
        "quant_method": METHOD,
        "kv_cache_scheme": None,
        "format": _FORMAT,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": _ignored(plan),
        "moe_sparsity_config": None,
    }


def _scheme(packing: Packing, targets: list[str]) -> dict[str, Any]:
    grouped = packing.bits < 8
    return {
        "targets": targets,
        "weights": {
            "num_bits": packing.bits,
            "type": "int",
            "symmetric": True,
            "group_size": packing.group if grouped else None,
            "strategy": "group" if grouped else "channel",
            "dynamic": False,
        },
        "input_activations": None,
        "output_activations": None,
        "format": _FORMAT,
    }


def _ignored(plan: Plan) -> list[str]:
    """Every module that may be linear and is not packed: matrices that stay dense, whatever they
    do, and those that the plan names besides."""
    dense = [layer.tensor for layer in plan.layers if layer.rank is None]
    dense += [skipped.tensor for skipped in plan.skipped]
    names = [
        tensor.module
        for tensor in dense
        if len(tensor.shape) == 2 and tensor.name.endswith(".weight")
    ]
    return list(dict.fromkeys((*names, *plan.ignored)))
