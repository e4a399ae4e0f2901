"""Mixtures of experts as linear layers one by one, under the names that checkpoints give them.

transformers keeps the weights of all experts of a block in stacks, one parameter each. As modules
of their own they are layers like any other: what they read can be measured, and they can hold
factors or integers.

Torch only, and of svdcli the file beside it: `compress --self-contained` ships both with the
weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence, Set
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from svdcli.models.kernels import Numbered, router_operator

_GATE_UP, _UP, _DOWN = "gate_up_proj", "up_proj", "down_proj"  # transformers' names of the stacks
_BIAS = "_bias"

# `.experts.*.w1.weight` in a converter: one weight of each expert.
_OF_EACH = re.compile(r"experts\.\*\.(?P<name>\w+)\.weight$")
# `experts.3.down_proj`: a layer of an expert.
_NUMBERED = re.compile(r"^(?P<experts>.*\bexperts)\.\d+\.(?P<name>\w+)$")


class Stack(NamedTuple):
    """One stack: what transformers calls it, and what a checkpoint calls the weights of each expert
    in it, which are joined along their outputs."""

    name: str
    layers: tuple[str, ...]


class Stacks(NamedTuple):
    """The first layers of all experts, and the last. converted is what transformers' converters
    call those that they make of one weight an expert."""

    first: Stack
    last: Stack
    converted: tuple[str, ...] = ()


class TransposedLinear(nn.Module):
    """y = x W for a weight W (in, out): the layer of an expert where stacks are stored the other
    way round. transformers' Conv1D is the same with a bias."""

    def __init__(self, weight: Tensor, trains: bool) -> None:
        super().__init__()
        self.nx, self.nf = weight.shape
        self.weight = nn.Parameter(weight, trains)
        self.bias: nn.Parameter | None = None

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class SeparateExperts(nn.Module):
    """Experts, each with linear layers of its own: y = sum over the chosen ones of weight * last(
    act(first(x))), as the stock class computes it, gate and biases included."""

    def __init__(self, stock: nn.Module, stacks: Stacks) -> None:
        """Take over everything of stock, a module with stacks; the layers' weights are views of
        these."""
        super().__init__()
        own = set(self.__dict__)
        for key, value in stock.__dict__.items():
            if key not in own:
                self.__dict__[key] = value
        for name, child in stock.named_children():
            self.add_module(name, child)
        for name, parameter in stock._parameters.items():
            if name not in (stacks.first.name, stacks.last.name):
                self.register_parameter(name, parameter)
        self._buffers.update(stock._buffers)
        self.stock_class: Any = type(stock)
        self.stacks = stacks

        # One after the other, as their names say
        self.count = len(stock.get_parameter(stacks.last.name))
        layer_of = TransposedLinear if getattr(stock, "is_transposed", False) else _linear
        for number in range(self.count):
            expert = nn.Module()
            for stack in (stacks.first, stacks.last):
                parameter = stock.get_parameter(stack.name)
                weights = parameter.detach()[number].chunk(len(stack.layers))
                for name, weight in zip(stack.layers, weights, strict=True):
                    expert.add_module(name, layer_of(weight, parameter.requires_grad))
            self.add_module(str(number), expert)
        self._handle = _MIXTURES.handle(self)
        self.train(stock.training)

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Return (tokens, width) for hidden states of that shape, the numbers of the experts that
        each token was sent to (tokens, k), and their weights."""
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            needs_way_back = torch.is_grad_enabled() and hidden.requires_grad
            if not needs_way_back:
                found: Tensor = _EXPERTS(hidden, chosen, weights, self._handle)
                return found
        return self.summed(hidden, chosen, weights)

    def summed(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Return what `forward` does, expert by expert: which are chosen is known only then."""
        summed = torch.zeros_like(hidden)
        for number in chosen.unique().tolist():
            if number >= self.count:  # of another process
                continue
            token, place = torch.where(chosen == number)
            x = hidden if len(hidden) == 1 else hidden[token]
            y = self._expert(number, x) * weights[token, place, None]
            summed.index_add_(0, token, y.to(summed.dtype))
        return summed

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._handle = _MIXTURES.handle(self)

    def _expert(self, number: int, x: Tensor) -> Tensor:
        """Return what one expert makes of its tokens."""
        inner = self._layers(self.stacks.first, number, x)
        if getattr(self, "has_gate", True):
            inner = self.stock_class._apply_gate(self, inner)
        else:
            inner = cast(nn.Module, self.act_fn)(inner)
        return self._layers(self.stacks.last, number, inner)

    def _layers(self, stack: Stack, number: int, x: Tensor) -> Tensor:
        """Return the outputs of an expert's layers in one stack, side by side."""
        layers = cast(nn.Module, self._modules[str(number)])._modules
        outputs = [cast(nn.Module, layers[name])(x) for name in stack.layers]
        y: Tensor = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        if getattr(self, "has_bias", False):
            y = y + self.get_parameter(stack.name + _BIAS)[number]
        return y

    def stacked(self) -> nn.Module:
        """Return the stock module with the weights of these, which must be ordinary ones."""
        with torch.device("meta"):
            stock: nn.Module = self.stock_class(self.config)
        for name, parameter in self._parameters.items():
            stock._parameters[name] = parameter
        for stack in (self.stacks.first, self.stacks.last):
            weights, trains = [], False
            for number in range(self.count):
                expert = self.get_submodule(str(number))
                layers = [expert.get_parameter(f"{name}.weight") for name in stack.layers]
                trains = trains or layers[0].requires_grad
                weights.append(torch.cat([layer.detach() for layer in layers]))
            stock._parameters[stack.name] = nn.Parameter(torch.stack(weights), trains)
        return stock.train(self.training)


_MIXTURES = Numbered()


def _summed(hidden: Tensor, chosen: Tensor, weights: Tensor, number: int) -> Tensor:
    y: Tensor = _MIXTURES[number].summed(hidden, chosen, weights)
    return y


_EXPERTS = router_operator("experts", _summed)


def _linear(weight: Tensor, trains: bool) -> nn.Linear:
    """Return a linear layer that has this weight (out, in)."""
    m, n = weight.shape
    layer = nn.Linear(n, m, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, trains)
    return layer


def stacks_in(
    model: nn.Module, converters: Iterable[Any], as_they_are: Set[str] = frozenset()
) -> Iterator[tuple[str, Stacks]]:
    """Yield the path and the stacks of every module that holds experts as `SeparateExperts`
    computes with them: stacks that converters, those that transformers has for this model, make of
    one weight an expert, or that files have as they are. as_they_are are such ones, by their names
    in the model, which a converter might have made too."""
    converters = list(converters)
    for path, module in model.named_modules():
        if not _is_plain(module):
            continue
        first = _GATE_UP if getattr(module, "has_gate", True) else _UP
        most_of_first = 1 if getattr(module, "is_transposed", False) else 2
        found: list[Stack] = []
        converted: list[str] = []
        for name, most in ((first, most_of_first), (_DOWN, 1)):
            key = f"{path}.{name}"
            layers, target = _sources(converters, key)
            if key in as_they_are:
                layers = (name,)
            if 1 <= len(layers) <= most:
                found.append(Stack(name, layers))
                converted += [target] if target else []
        if len(found) == 2 and len(converted) in (0, 2):
            yield path, Stacks(found[0], found[1], tuple(converted))


def _is_plain(module: nn.Module) -> bool:
    """Tell whether a module holds experts in the way that `SeparateExperts` computes."""
    first = _GATE_UP if getattr(module, "has_gate", True) else _UP
    if not hasattr(type(module), "_apply_gate") or getattr(module, "has_post_expert_norm", False):
        return False
    stacks = [module._parameters.get(name) for name in (first, _DOWN)]
    return all(stack is not None and stack.ndim == 3 for stack in stacks)


def _sources(converters: Sequence[Any], key: str) -> tuple[tuple[str, ...], str]:
    """Return what a checkpoint calls the weights of each expert that become this parameter, in the
    order in which they are joined, and what a converter calls the parameter, "" where it is in
    files as it is; nothing where it is made in another way."""
    for converter in converters:
        for target in getattr(converter, "target_patterns", ()):
            if not key.endswith(target) or not hasattr(converter, "operations"):
                continue
            found = [_OF_EACH.search(source) for source in converter.source_patterns]
            names = tuple(match["name"] for match in found if match is not None)
            return (names, str(target)) if len(names) == len(found) else ((), "")
    return (key.rpartition(".")[2],), ""


def separate(
    model: nn.Module, converters: Iterable[Any], as_they_are: Set[str] = frozenset()
) -> list[str]:
    """Put `SeparateExperts` in the place of all stacks for which that can be done; return their
    paths."""
    found = list(stacks_in(model, converters, as_they_are))
    for path, stacks in found:
        model.set_submodule(path, SeparateExperts(model.get_submodule(path), stacks))
    return [path for path, _ in found]


def stack_of(layer: str) -> str:
    """Return the name of the stack that an expert's layer is a slice of, where the file has it as a
    stack; "" for what is no layer of an expert."""
    found = _NUMBERED.search(layer)
    return f"{found['experts']}.{found['name']}" if found else ""


def stacks_taken_apart(model: nn.Module) -> set[str]:
    """Return what converters call the stacks that this model has no more."""
    taken: set[str] = set()
    for module in model.modules():
        if isinstance(module, SeparateExperts):
            taken.update(module.stacks.converted)
    return taken


def stacks_as_they_are(model: nn.Module) -> set[str]:
    """Return the names of the stacks that this model has no more, and whose slices are called after
    them."""
    names: set[str] = set()
    for path, module in model.named_modules():
        if isinstance(module, SeparateExperts):
            for stack in (module.stacks.first, module.stacks.last):
                if stack.layers == (stack.name,):
                    names.add(f"{path}.{stack.name}")
    return names


def stack_again(model: nn.Module) -> None:
    """Put the stock modules back, for experts that are ordinary layers again."""
    for path, module in list(model.named_modules()):
        if isinstance(module, SeparateExperts):
            model.set_submodule(path, module.stacked())
