"""How much memory a model and its hidden states take, and where there is room for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from svdcli.memory import free_memory
from svdcli.models.modules import PackedLinear, is_linear, numbers_of
from svdcli.text.tokens import Batch

SHARE_OF_MEMORY = 0.25


def widest(model: nn.Module, names: Iterable[str]) -> int:
    """Return the number of inputs of the widest linear layer among these modules."""
    modules = dict(model.named_modules())
    most = 0
    for name in names:
        module = modules.get(name)
        if isinstance(module, PackedLinear) or is_linear(module):
            most = max(most, _inputs_of(module))
    return most


def _inputs_of(module: Any) -> int:
    """Return the number of inputs of a linear layer, or of a Conv1D, which stores its weight as
    (in, out)."""
    if isinstance(module, (nn.Linear, PackedLinear)):
        return module.in_features
    return int(module.weight.shape[0])


def state_bytes(
    model: Any, width: int, batches: Sequence[Batch], *, gradients: bool, itemsize: int = 4
) -> int:
    """Return the bytes for the hidden states of the largest batch, of so many bytes a number: what
    goes into a block, and, with gradients, into every block at once."""
    depth = 0
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            depth += len(module)
    largest = max(batch["input_ids"].numel() for batch in batches)

    # A few copies on the way; for the way back also an input and an output of every block
    states = 2 * depth + 4 if gradients else 4
    return largest * width * itemsize * states


def whole_bytes(
    teacher: Any, student: Any, vocabulary: int, batches: Sequence[Batch], coordinates: int
) -> int:
    """Return the bytes that it takes, at most, to train the student on the teacher's answers in one
    piece and in float32; coordinates is how many numbers those have in which factors are
    trained."""
    # The student's weights come with their gradients and AdamW's two moments, its packed ones also
    # with the integers and the weight that they are rounded to
    packed: int = numbers_of(student) - sum(parameter.numel() for parameter in student.parameters())
    weights = numbers_of(teacher) + 4 * numbers_of(student) + 2 * packed + coordinates
    return 4 * weights + batch_bytes(teacher, vocabulary, batches)


def batch_bytes(teacher: Any, vocabulary: int, batches: Sequence[Batch]) -> int:
    """Return the bytes that the largest batch leaves behind, at most, in every layer while a whole
    model is trained in float32, with a few copies of its logits."""
    tokens: int = max(batch["input_ids"].numel() for batch in batches)
    widths = 0
    for module in teacher.modules():
        if isinstance(module, (nn.Linear, PackedLinear)):
            widths += module.in_features + module.out_features
    return 4 * tokens * (3 * widths + 8 * vocabulary)


def width_of(config: Any) -> int:
    """Return the width of the hidden states between blocks; 1024 where the configuration does not
    say it."""
    for name in ("hidden_size", "d_model", "n_embd"):
        width = getattr(config, name, None)
        if isinstance(width, int):
            return width
    return 1024


def memory_for(device: torch.device, sharers: int = 1) -> int:
    """Return the bytes that one of so many processes of this machine can have where it computes: of
    the memory that they share, or of a card, which it has for itself."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_memory() // sharers


def room_for_states(
    needed: int, device: torch.device, sharers: int = 1
) -> tuple[torch.device, int]:
    """Return (where hidden states wait between blocks, how many bytes they may take there): with
    the blocks, unless a card has too little room for what is needed and the host has more."""
    room = int(SHARE_OF_MEMORY * memory_for(device, sharers))
    if device.type == "cpu" or needed <= room:
        return device, room
    host = torch.device("cpu")
    room_there = int(SHARE_OF_MEMORY * memory_for(host, sharers))
    return (host, room_there) if room_there > room else (device, room)
