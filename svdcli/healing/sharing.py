"""Frozen weights that several ranks share while they train a whole model: of every matrix that
stays as it is each rank holds its part, and gathers the rest for as long as it is needed (torch's
FSDP2, `fully_shard`).

A block is gathered at a time, besides what lies outside of all blocks. Layers that are refined stay
whole in every rank: their gradients are averaged as ever (`healing.replicas`). So do vectors, which
are small, and what several blocks have in common. Gathering is a meeting of all ranks: each has to
run as many passes as the others.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from svdcli.healing.blocks import REFINED, blocks_of
from svdcli.healing.coordinates import numbers_of_coordinates
from svdcli.healing.replicas import Replicas
from svdcli.models.modules import numbers_of

_FORWARD = "forward"  # which torch gathers for without being told


def can_share(replicas: Replicas) -> bool:
    """Tell whether these ranks can share weights, with this torch: from 2.7 on."""
    if not replicas.gathers:
        return False
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:
        return False
    return "ignored_params" in inspect.signature(fully_shard).parameters


@dataclass(frozen=True)
class SharedModel:
    """A model of which matrices are shared: in groups, each gathered as one, with the module that
    it is gathered for. The last of these is the root, which is called; its group has what no block
    has."""

    model: nn.Module
    groups: Sequence[tuple[nn.Module, list[nn.Parameter]]]

    @staticmethod
    def of(
        model: nn.Module, root: str, ran: Collection[str], trained: Collection[str] = ()
    ) -> SharedModel:
        """Choose what is shared. root is the name of the module that is called, ran has those of
        the modules that run with it, trained those of the tensors that are trained."""
        modules = dict(model.named_modules())
        units = _units(modules, root, blocks_of(model) & set(ran))
        whole = _refined(modules, trained)

        # By unit, but what several of them have
        owners: dict[nn.Parameter, set[str]] = {}
        for name, weight in modules[root].named_parameters(root, remove_duplicate=False):
            if weight.ndim > 1 and weight not in whole:
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
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        mesh = init_device_mesh(replicas.device.type, (replicas.size,))
        root, _ = self.groups[-1]
        for unit, group in self.groups:
            bring(self.model if unit is root else unit, replicas.device)
            whole = set(unit.parameters()) - set(group)
            fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
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
        if not isinstance(module, REFINED) and _unit_of(name, units, root) == root:
            units.append(name)
    return units


def _unit_of(name: str, units: Collection[str], root: str) -> str:
    """Return the unit that a tensor or module of this name is in, root for none."""
    parts = name.split(".")
    for count in range(1, len(parts)):
        above = ".".join(parts[:count])
        if above in units:
            return above
    return root


def _refined(modules: Mapping[str, nn.Module], trained: Collection[str]) -> set[nn.Parameter]:
    """Return the parameters of all layers of which something is trained."""
    refined: set[nn.Parameter] = set()
    for path, module in modules.items():
        if not isinstance(module, REFINED):
            continue
        names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
        if any(f"{path}.{name}" in trained for name in names):
            refined.update(module.parameters())
    return refined


def bring(module: nn.Module, device: torch.device) -> None:
    """Bring what a module holds to the device, numbers in float32; what is shared is there."""
    from torch.distributed.tensor import DTensor

    for tensor in (*module.parameters(), *module.buffers()):
        if not isinstance(tensor, DTensor):
            dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
            tensor.data = tensor.data.to(device, dtype)


def shared_bytes(
    teacher: SharedModel, student: SharedModel, trained: Collection[str], ranks: int
) -> int:
    """Return the bytes that the weights take in each of so many ranks, at most, to train the
    student on the teacher's answers in one piece and in float32."""
    # What stays as it is; one model is gathered at a time
    frozen = teacher.held(ranks) + student.held(ranks)
    frozen += max(teacher.gathered, student.gathered)
    frozen += numbers_of(teacher.model) - teacher.shared

    # What is trained, as it is stored and as it is trained, with its gradients and AdamW's two
    # moments; of packed weights also what they are rounded to
    refined = numbers_of(student.model) - student.shared
    packed = numbers_of(student.model) - sum(map(Tensor.numel, student.model.parameters()))

    # The coordinates, which come from sums of every rank and of all, before gradients do
    coordinates = numbers_of_coordinates(student.model, trained)
    numbers = frozen + 2 * refined + packed + coordinates + max(3 * refined, 2 * coordinates)
    return 4 * numbers
