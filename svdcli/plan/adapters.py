"""Adapters (LoRA and others) are recognised by the names of their tensors: they are small factors,
not a model."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from svdcli.plan.tensors import TensorInfo

# PEFT, kohya, LyCORIS, diffusers' older attention processors.
_FACTOR = re.compile(
    r"(^|[._])(([a-z]+_)?lora\d*[._](a|b|up|down|mid|embedding_a|embedding_b|magnitude_vector)|dora_scale|hada_[wt]\d|lokr_[wt]\d|oft_(R|blocks)|boft_[RS]"
    r"|ia3_l|vera_lambda_\w|to_[qkv]_lora|to_out_lora)([._]|$)",
    re.IGNORECASE,
)
# What PEFT calls the tensors of other methods, such as prompt tuning.
_IN_AN_ADAPTER = re.compile(r"^base_model\.|prompt")
_ADAPTER_CONFIG = "adapter_config.json"


def is_adapter_factor(name: str) -> bool:
    """Is a tensor of this name one factor of an adapter."""
    return _FACTOR.search(name) is not None


def adapter_kind(tensors: Sequence[TensorInfo], beside: Collection[str] = ()) -> str:
    """ "a LoRA adapter" or "an adapter" where these tensors are one; "" for a model, with or
    without adapters in it.

    beside names the other files of the directory.
    """
    matrices = [tensor for tensor in tensors if len(tensor.shape) >= 2]
    factors = [tensor for tensor in matrices if is_adapter_factor(tensor.name)]
    in_factors = sum(tensor.parameters for tensor in factors)
    in_all = sum(tensor.parameters for tensor in matrices)
    if factors and 2 * in_factors >= in_all:  # a model with adapters in it is mostly a model
        if any("lora" in tensor.name for tensor in factors):
            return "a LoRA adapter"
        return "an adapter"
    if _ADAPTER_CONFIG in beside and all(_IN_AN_ADAPTER.search(tensor.name) for tensor in matrices):
        return "an adapter"
    return ""
