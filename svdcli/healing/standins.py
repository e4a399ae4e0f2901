"""Modules that stand in for the layers of a model while these are trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from torch import nn


class StandIn(Protocol):
    """What answers as a layer does, with weights that can be trained."""

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
