"""Weights that several ranks share while they train a whole model: of every matrix each rank holds
its part, and gathers the rest for as long as it is needed (torch's FSDP2, `fully_shard`).

Of both models all matrices are shared that stay as they are, a block at a time, besides what lies
outside of all blocks; of what is trained, the stand-ins with their gradients and AdamW's moments,
a layer at a time. What every rank holds whole: the layers that are refined as they are stored,
stand-ins of experts, which run on some texts only, and vectors, which are small. Gathering is a
meeting of all ranks: each has to run as many passes as the others.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from svdcli.healing.replicas import Replicas

_FORWARD = "forward"  # which torch gathers for without being told
# What FSDP2 needs to add up gradients by gloo, too
_IN_SUMS = "set_force_sum_reduction_for_comms"


def can_share(replicas: Replicas) -> bool:
    """Tell whether these ranks can share weights, with this torch."""
    if not replicas.gathers:
        return False
    try:
        from torch.distributed.fsdp import FSDPModule
    except ImportError:
        return False
    return hasattr(FSDPModule, _IN_SUMS)


@dataclass(frozen=True)
class SharedModel:
    """A model of which matrices are shared: in groups, each gathered as one, with the module that
    it is gathered for. The last of these is the root, which is called; its group has what no block
    has."""

    model: nn.Module
    groups: Sequence[tuple[nn.Module, list[nn.Parameter]]]

    @staticmethod
    def of(
        model: nn.Module,
        root: str,
        blocks: Collection[str],
        refined: Collection[nn.Parameter] = (),
    ) -> SharedModel:
        """Choose what is shared. root is the name of the module that is called; blocks has those of
        the members of lists of blocks that run with it; refined is to stay as it is."""
        modules = dict(model.named_modules())
        units = _units(modules, root, blocks)

        # By unit, but what several of them have
        owners: dict[nn.Parameter, set[str]] = {}
        for name, weight in modules[root].named_parameters(root, remove_duplicate=False):
            if weight.ndim > 1 and weight not in refined:
                owners.setdefault(weight, set()).add(_unit_of(name, units, root))
        groups: dict[str, list[nn.Parameter]] = {unit: [] for unit in (*units, root)}
        for weight, names in owners.items():
            if len(names) == 1:
                groups[min(names)].append(weight)
        return SharedModel(
            model,
            [(modules[unit], group) for unit, group in groups.items() if group or unit == root],
        )

    @property
    def shared(self) -> int:
        """Return how many numbers are shared."""
        return sum(weight.numel() for _, group in self.groups for weight in group)

    def held(self, ranks: int) -> int:
        """Return how many of them one rank holds; all parts are equally long."""
        total = 0
        for _, group in self.groups:
            for weight in group:
                total += math.ceil(len(weight) / ranks) * math.prod(weight.shape[1:])
        return total

    @property
    def gathered(self) -> int:
        """Return how many numbers a rank gathers at most: those outside of the blocks and a block,
        and the message in which either comes."""
        *blocks, outside = [sum(map(Tensor.numel, group)) for _, group in self.groups]
        block = max(blocks, default=0)
        return outside + block + max(outside, block)

    def bring(self, replicas: Replicas, method: str = _FORWARD) -> None:
        """Bring the model to the device in float32, block by block, and keep this rank's part of
        each. method is the function of the root that is called. Ends what this tells of the
        model."""
        from torch.distributed.fsdp import register_fsdp_forward_method

        root, _ = self.groups[-1]
        for unit, group in self.groups:
            bring(self.model if unit is root else unit, replicas.device)
            share(unit, group, replicas)
            group.clear()  # the weights themselves, which nobody needs now
        if method != _FORWARD:
            register_fsdp_forward_method(root, method)


def _units(modules: Mapping[str, nn.Module], root: str, blocks: Collection[str]) -> list[str]:
    """Return the names of the outermost of these blocks inside root, in the model's order: those
    further inside, experts, run on some texts only. A layer that is a block by itself is none: its
    class tells what it computes, and sharing changes that."""
    units: list[str] = []
    for name, module in modules.items():
        inside = name.startswith(f"{root}." if root else "") and name != root
        if not inside or name not in blocks or not list(module.children()):
            continue
        if _unit_of(name, units, root) == root:
            units.append(name)
    return units


def _unit_of(name: str, units: Collection[str], root: str) -> str:
    """Return the unit that a tensor or module of this name is in, root for none."""
    parts = name.split(".")
    above = (".".join(parts[:count]) for count in range(1, len(parts)))
    return next((unit for unit in above if unit in units), root)


def runs_always(name: str) -> bool:
    """Tell whether a layer of this name runs whenever its model does: not as experts do, which have
    numbers inside of a numbered block."""
    return sum(part.isdigit() for part in name.split(".")) < 2


def share(module: nn.Module, weights: Collection[nn.Parameter], replicas: Replicas) -> None:
    """Keep this rank's part of these weights of a module, which gathers them when it is called."""
    from torch.distributed.fsdp import fully_shard

    for weight in weights:
        weight.data = weight.data.contiguous()
    shared: Any = fully_shard(
        module,
        mesh=replicas.mesh(),
        reshard_after_forward=True,
        ignored_params=set(module.parameters()) - set(weights),
    )
    getattr(shared, _IN_SUMS)(True)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Gather the weights of a module that are shared, for as long as the context lasts."""
    if not is_shared(module):
        yield
        return
    shared: Any = module
    shared.unshard()
    try:
        yield
    finally:
        shared.reshard()


def is_shared(thing: nn.Module | Tensor) -> bool:
    """Tell whether a tensor, or a weight of a module, is shared."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return False
    from torch.distributed.tensor import DTensor

    weights = [thing] if isinstance(thing, Tensor) else thing.parameters()
    return any(isinstance(weight, DTensor) for weight in weights)


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor that may be shared."""
    if not is_shared(tensor):
        return tensor
    shared: Any = tensor
    gathered: Tensor = shared.full_tensor()
    return gathered


def bring(module: nn.Module, device: torch.device) -> None:
    """Bring what a module holds to the device, numbers in float32; what is shared is there."""
    for tensor in (*module.parameters(), *module.buffers()):
        if not is_shared(tensor):
            dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
            tensor.data = tensor.data.to(device, dtype)
