"""How much memory a model and its hidden states take, and how much is free."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from svdcli.models.modules import is_linear
from svdcli.text.tokens import Batch

SHARE_OF_MEMORY = 0.25


def widest(model: nn.Module, names: Iterable[str]) -> int:
    """The number of inputs of the widest linear layer among these modules."""
    modules = dict(model.named_modules())
    return max(
        (_inputs_of(modules[name]) for name in names if is_linear(modules.get(name))), default=0
    )


def _inputs_of(module: Any) -> int:
    """Of a linear layer, or of a Conv1D, which stores its weight as (in, out)."""
    return int(module.in_features if isinstance(module, nn.Linear) else module.weight.shape[0])


def state_bytes(model: Any, width: int, batches: Sequence[Batch], *, gradients: bool) -> int:
    """Hidden states of the largest batch: what goes into a block, and, with gradients, into every
    block at once."""
    depth = 0
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            depth += len(module)
    largest = max(batch["input_ids"].numel() for batch in batches)
    states = 2 * depth + 4 if gradients else 4
    return largest * width * 4 * states


def whole_bytes(teacher: Any, student: Any, vocabulary: int, batches: Sequence[Batch]) -> int:
    """What it takes, at most, to train the student on the teacher's answers in one piece and in
    float32: the weights of both, gradients and AdamW's two moments, what one batch leaves behind in
    every layer, and a few copies of its logits."""
    weights: list[int] = [
        sum(parameter.numel() for parameter in model.parameters()) for model in (teacher, student)
    ]
    tokens: int = max(batch["input_ids"].numel() for batch in batches)
    widths: int = sum(
        sum(module.weight.shape) for module in teacher.modules() if isinstance(module, nn.Linear)
    )
    return 4 * (weights[0] + 4 * weights[1] + tokens * (3 * widths + 8 * vocabulary))


def width_of(config: Any) -> int:
    """Width of the hidden states between blocks."""
    for name in ("hidden_size", "d_model", "n_embd"):
        width = getattr(config, name, None)
        if isinstance(width, int):
            return width
    return 1024


def free_memory() -> int:
    """Bytes of memory that can be had without swapping, where the system tells; else 4 GB."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 4 * 10**9
