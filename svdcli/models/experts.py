"""Mixtures of experts as linear layers one by one, under the names that checkpoints give them.

transformers keeps the weights of all experts of a block in stacks, one parameter each. As modules
of their own they are layers like any other: what they read can be measured, and they can hold
factors or integers.

Torch only, and nothing of svdcli: `compress --self-contained` ships this file beside the weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

_GATE_UP, _UP, _DOWN = "gate_up_proj", "up_proj", "down_proj"  # transformers' names of the stacks

# `.experts.*.w1.weight` in a converter: one weight of each expert.
_OF_EACH = re.compile(r"experts\.\*\.(?P<name>\w+)\.weight$")


class ExpertNames(NamedTuple):
    """What a checkpoint calls the linear layers of each expert, gate None where there is none; and
    the names of the stacks that transformers makes of them, as its converters have them."""

    gate: str | None
    up: str
    down: str
    stacks: tuple[str, ...]


class SeparateExperts(nn.Module):
    """Experts, each with linear layers of its own: y = sum over the chosen ones of weight * down(
    act(gate(x)) * up(x)), or down(act(up(x))), as the stock class computes it."""

    def __init__(self, stock: nn.Module, names: ExpertNames) -> None:
        """Take over everything of stock, a module with stacks; the layers' weights are views of
        these."""
        super().__init__()
        own = set(self.__dict__)
        for key, value in stock.__dict__.items():
            if key not in own:
                self.__dict__[key] = value
        for name, child in stock.named_children():
            self.add_module(name, child)
        self.stock_class: Any = type(stock)
        self.names = names

        # One after the other, as their names say
        up = getattr(stock, _UP if names.gate is None else _GATE_UP)
        down = getattr(stock, _DOWN)
        self.count = len(down)
        for number in range(self.count):
            expert = nn.Module()
            halves = up[number].detach()
            if names.gate is not None:
                gate, halves = halves.chunk(2)
                expert.add_module(names.gate, _linear(gate, up.requires_grad))
            expert.add_module(names.up, _linear(halves, up.requires_grad))
            expert.add_module(names.down, _linear(down[number].detach(), down.requires_grad))
            self.add_module(str(number), expert)

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Return (tokens, width) for hidden states of that shape, the numbers of the experts that
        each token was sent to (tokens, k), and their weights."""
        summed = torch.zeros_like(hidden)
        for number in chosen.unique().tolist():
            if number >= self.count:  # of another process
                continue
            token, place = torch.where(chosen == number)
            y = self._expert(number, hidden[token]) * weights[token, place, None]
            summed.index_add_(0, token, y.to(summed.dtype))
        return summed

    def _expert(self, number: int, x: Tensor) -> Tensor:
        """Return what one expert makes of its tokens."""
        expert = self.get_submodule(str(number))
        up: Tensor = getattr(expert, self.names.up)(x)
        if self.names.gate is None:
            inner = cast(nn.Module, self.act_fn)(up)
        else:
            gate = getattr(expert, self.names.gate)(x)
            inner = self.stock_class._apply_gate(self, torch.cat((gate, up), -1))
        y: Tensor = getattr(expert, self.names.down)(inner)
        return y

    def stacked(self) -> nn.Module:
        """Return the stock module with the weights of these, which must be ordinary ones."""
        with torch.device("meta"):
            stock: nn.Module = self.stock_class(self.config)
        gates, ups, downs = [], [], []
        for number in range(self.count):
            expert = self.get_submodule(str(number))
            ups.append(getattr(expert, self.names.up).weight)
            downs.append(getattr(expert, self.names.down).weight)
            if self.names.gate is not None:
                gates.append(getattr(expert, self.names.gate).weight)
        first = torch.stack(ups).detach()
        if gates:
            first = torch.cat((torch.stack(gates).detach(), first), 1)
        trains = ups[0].requires_grad
        stock._parameters[_GATE_UP if gates else _UP] = nn.Parameter(first, trains)
        stock._parameters[_DOWN] = nn.Parameter(torch.stack(downs).detach(), trains)
        return stock.train(self.training)


def _linear(weight: Tensor, trains: bool) -> nn.Linear:
    """Return a linear layer that has this weight (m, n)."""
    m, n = weight.shape
    layer = nn.Linear(n, m, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, trains)
    return layer


def experts_in(model: nn.Module, converters: Iterable[Any]) -> Iterator[tuple[str, ExpertNames]]:
    """Yield the path of every module that holds experts in stacks which converters, those that
    transformers has for this model, make of one weight an expert; and their names."""
    converters = list(converters)
    for path, module in model.named_modules():
        if not _is_plain(module):
            continue
        first = _UP if hasattr(module, _UP) else _GATE_UP
        ups, ups_stack = _sources(converters, f"{path}.{first}")
        downs, downs_stack = _sources(converters, f"{path}.{_DOWN}")
        if len(downs) == 1 and len(ups) == (1 if first == _UP else 2):
            gate = None if first == _UP else ups[0]
            yield path, ExpertNames(gate, ups[-1], downs[0], (ups_stack, downs_stack))


def _is_plain(module: nn.Module) -> bool:
    """Tell whether a module holds experts in the way that `SeparateExperts` computes."""
    down = module._parameters.get(_DOWN)
    if down is None or down.ndim != 3 or not hasattr(type(module), "_apply_gate"):
        return False
    others = ("is_transposed", "has_bias", "has_post_expert_norm")
    if any(getattr(module, name, False) for name in others):
        return False
    has_gate = bool(getattr(module, "has_gate", True))
    return bool(getattr(module, "is_concatenated", True)) and has_gate == (
        _GATE_UP in module._parameters
    )


def _sources(converters: Sequence[Any], key: str) -> tuple[list[str], str]:
    """Return what a checkpoint calls the weights of each expert that become this parameter, in the
    order in which they are joined, and what converters call the parameter; nothing where they are
    not one an expert."""
    for converter in converters:
        for target in getattr(converter, "target_patterns", ()):
            if not key.endswith(target) or not hasattr(converter, "operations"):
                continue
            found = [_OF_EACH.search(source) for source in converter.source_patterns]
            names = [match["name"] for match in found if match is not None]
            if len(names) == len(found) == len(set(names)):
                return names, str(target)
    return [], ""


def separate(model: nn.Module, converters: Iterable[Any]) -> list[str]:
    """Put `SeparateExperts` in the place of all stacks for which that can be done; return their
    paths."""
    found = list(experts_in(model, converters))
    for path, names in found:
        model.set_submodule(path, SeparateExperts(model.get_submodule(path), names))
    return [path for path, _ in found]


def stacks_taken_apart(model: nn.Module) -> set[str]:
    """Return what converters call the stacks that this model has no more."""
    taken: set[str] = set()
    for module in model.modules():
        if isinstance(module, SeparateExperts):
            taken.update(module.names.stacks)
    return taken


def stack_again(model: nn.Module) -> None:
    """Put the stock modules back, for experts that are ordinary layers again."""
    for path, module in list(model.named_modules()):
        if isinstance(module, SeparateExperts):
            model.set_submodule(path, module.stacked())
