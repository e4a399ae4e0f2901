"""What feeds a choice: a model runs on the meta device, and every result remembers the weights that
it comes from.

A product with a weight remembers that weight alone; what is computed from results afterwards
(softmax, sums, products of two results) remembers all of theirs. The weights behind the argument of
topk, argmax or a sort are those that choose.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

PRODUCTS = {
    "linear",
    "matmul",
    "__matmul__",
    "__rmatmul__",
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "einsum",
    "embedding",
}
CONVOLUTIONS = {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d"}
CHOICES = {"topk", "argmax", "sort", "argsort", "multinomial"}
# What asks for numbers, which the meta device does not have.
ANSWERS = {
    "__bool__": False,
    "equal": False,
    "allclose": False,
    "item": 1,
    "__int__": 1,
    "__index__": 1,
    "__float__": 1.0,
}
TOKENS = 8


def weights_that_choose(model: transformers.PreTrainedModel) -> set[str]:
    """Names of the parameters that feed a choice in the model's forward, as far as it runs without
    numbers: with the first kind of input that it runs through with, or with all of them in vain."""
    _run_experts_at_once(model.config)
    follow = _Follow(model)
    for inputs in _inputs(model):
        try:
            with follow, torch.no_grad(), torch.device("meta"):
                model(**inputs)
        except Exception:
            continue  # what was met until then counts
        break
    return follow.chose


class _Follow(TorchFunctionMode):
    def __init__(self, model: transformers.PreTrainedModel) -> None:
        super().__init__()
        self.names = {
            id(parameter): name
            for name, parameter in model.named_parameters()
            if parameter.dim() > 1
        }
        self.chose: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ANSWERS:
            return ANSWERS[name]
        if name == "tolist" and args[0].is_meta:
            return torch.ones(args[0].shape, dtype=torch.long, device="cpu").tolist()
        if name == "nonzero" or (name == "where" and len(args) == 1):
            return _some_place(args[0], as_tuple=name == "where" or bool(kwargs.get("as_tuple")))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        weights, results = self._behind(tensors)
        if name in CHOICES:
            self.chose |= weights | results
        out = func(*args, **kwargs)
        if name in PRODUCTS | CONVOLUTIONS and weights:
            results, weights = weights, set()
        only_weights = bool(weights) and all(self._is_weight(tensor) for tensor in tensors)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                tensor._behind = (frozenset(weights | results), only_weights)  # type: ignore[attr-defined]
        return out

    def _is_weight(self, tensor: Tensor) -> bool:
        return id(tensor) in self.names or getattr(tensor, "_behind", ((), False))[1]

    def _behind(self, tensors: Sequence[Tensor]) -> tuple[set[str], set[str]]:
        """(weights among these tensors or that they are views of, weights that the others come
        from)."""
        weights: set[str] = set()
        results: set[str] = set()
        for tensor in tensors:
            name, (behind, is_weight) = (
                self.names.get(id(tensor)),
                getattr(tensor, "_behind", ((), False)),
            )
            weights |= {name} if name else set(behind if is_weight else ())
            results |= set() if name or is_weight else set(behind)
        return weights, results


def _some_place(mask: Tensor, *, as_tuple: bool) -> Any:
    """One place, wherever a mask is true: how many there are depends on numbers."""
    if as_tuple:
        return tuple(torch.zeros(1, dtype=torch.long, device="meta") for _ in mask.shape)
    return torch.zeros((1, mask.dim()), dtype=torch.long, device="meta")


def _run_experts_at_once(config: transformers.PreTrainedConfig) -> None:
    """Experts one by one would ask which of them were chosen."""
    for part in (
        config,
        *(
            value
            for value in vars(config).values()
            if isinstance(value, transformers.PreTrainedConfig)
        ),
    ):
        part._experts_implementation = "batched_mm"
        part._attn_implementation = "eager"


def _inputs(model: transformers.PreTrainedModel) -> Iterator[dict[str, Any]]:
    """What a model of this kind may be called with: text, pictures, sound, series."""
    config, takes = model.config, set(inspect.signature(model.forward).parameters)
    ids = torch.zeros((1, TOKENS), dtype=torch.long, device="meta")
    text = {
        "input_ids": ids,
        "attention_mask": torch.ones((1, TOKENS), dtype=torch.long, device="meta"),
    }
    answer = {"decoder_input_ids": ids} if "decoder_input_ids" in takes else {}
    if "input_ids" in takes:
        yield {"input_ids": ids} | answer
        yield {key: value for key, value in text.items() if key in takes} | answer
    side, channels = _number(config, "image_size", 224), _number(config, "num_channels", 3)
    pixels = torch.zeros((1, channels, side, side), device="meta")
    if "pixel_values" in takes:
        yield {"pixel_values": pixels} | answer
        yield {"pixel_values": pixels, "input_ids": ids}
    if "input_values" in takes:
        yield {"input_values": torch.zeros((1, 16000), device="meta")} | answer
    bands = _number(config, "num_mel_bins", 80)
    if "input_features" in takes:
        yield {"input_features": torch.zeros((1, bands, 3000), device="meta")} | answer
        yield {"input_features": torch.zeros((1, 400, bands), device="meta")} | answer
    if "past_values" in takes:
        yield {
            "past_values": torch.zeros((1, _number(config, "context_length", 64), 1), device="meta")
        }


def _number(config: transformers.PreTrainedConfig, name: str, otherwise: int) -> int:
    """A whole number of a config, or of the first config in it that has one (the first of a
    list)."""
    parts = [
        config,
        *(
            value
            for value in vars(config).values()
            if isinstance(value, transformers.PreTrainedConfig)
        ),
    ]
    for part in parts:
        value = getattr(part, name, None)
        value = value[0] if isinstance(value, (list, tuple)) and value else value
        if isinstance(value, int):
            return value
    return otherwise
