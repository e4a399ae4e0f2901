"""Modules that stand in for the layers of a model while these are trained, and those that let an
original answer where its compressed model does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol, cast

from torch import nn

from svdcli.healing.sharing import gathered
from svdcli.models.modules import SharedLinear, StackedLinear, is_linear


def stack_alike(teacher: nn.Module, student: nn.Module) -> None:
    """Have the layers of the teacher that share a basis in the student answer as one layer there,
    too, under the same names: their weights one below the other, which stay where they are."""
    groups: dict[int, dict[str, SharedLinear]] = {}
    for name, layer in student.named_modules():
        if isinstance(layer, SharedLinear):
            groups.setdefault(id(layer.first), {})[name] = layer
    for group in groups.values():
        originals = {name: teacher.get_submodule(name) for name in group}
        if all(map(is_linear, originals.values())):  # or else nothing of them is refined
            _stack(teacher, originals, group)


def _stack(
    teacher: nn.Module, originals: Mapping[str, nn.Module], group: Mapping[str, SharedLinear]
) -> None:
    stacked = {}
    for name, layer in group.items():
        number, start, stop = layer.svd_span.tolist()
        new = SharedLinear(layer.in_features, (number, start, stop), bias=False)
        new.bias = cast("nn.Parameter | None", originals[name].bias)
        stacked[name] = new
        teacher.set_submodule(name, new)
    in_order = sorted(stacked, key=lambda name: stacked[name].start)
    weights = [originals[name].get_parameter("weight") for name in in_order]
    SharedLinear.join([stacked[name] for name in in_order], StackedLinear(weights))


class StandIn(Protocol):
    """What answers as a layer does, with weights that can be trained."""

    @property
    def trained(self) -> list[nn.Parameter]:
        """What is trained."""

    def store(self, module: nn.Module) -> None:
        """Set the layer's own tensors to what was learned."""


class StandIns:
    """A model, or a part of it, with a stand-in for some of its layers, by their names in it."""

    def __init__(self, model: nn.Module, layers: Mapping[str, StandIn]) -> None:
        self.model = model
        self.layers = layers
        self.originals = {name: model.get_submodule(name) for name in layers}

    @contextmanager
    def training(self) -> Iterator[None]:
        """Put the stand-ins in place of the model's own layers, which come back afterwards."""
        self._use(self.layers)
        try:
            yield
        finally:
            self._use(self.originals)

    @contextmanager
    def stored(self) -> Iterator[None]:
        """Put what would be stored of the layers in place of them, inside `training`."""
        for name, layer in self.layers.items():
            assert isinstance(layer, nn.Module)
            with gathered(layer):
                layer.store(self.originals[name])
        self._use(self.originals)
        try:
            yield
        finally:
            self._use(self.layers)

    def _use(self, modules: Mapping[str, object]) -> None:
        for name, module in modules.items():
            assert isinstance(module, nn.Module)
            self.model.set_submodule(name, module)
