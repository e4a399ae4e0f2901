"""The best low-rank weights of a block for what the compressed model really sends it, in closed
form.

A layer of the original answers y to its input; the compressed layer stands behind compressed ones
and meets another input x. Nearest to y comes the weight E[y x^T] E[x x^T]^-1, and among those of
rank r its truncation in the metric of `linalg.whitening` at the second moment of x (sequential
calibration, as in AA-SVD, 2026). Layers that share an input are solved together, in the order in
which the block calls them, so that each group meets what the groups before it now send on. A layer
whose output goes into the block's as it is, as in residual networks the last one does, is aimed at
all that the block's output still lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from svdcli.calibration.gather import FULL_OUTPUTS
from svdcli.calibration.stream import first_tensor
from svdcli.linalg.products import moment
from svdcli.linalg.solvers import Factors, transposed
from svdcli.linalg.storage import to_stored
from svdcli.linalg.whitening import Metric, weighted
from svdcli.models.modules import LOW_RANK, is_linear

RIDGE = 0.01  # of the mean diagonal of E[x x^T], against directions that were hardly seen
_MOMENT_BATCHES = 8
_CLOSING = 1e-3

Call = tuple[Any, Any]


@dataclass(frozen=True)
class Side:
    """One model's block: its module, how to call it, and its arguments for every batch."""

    unit: nn.Module
    call: Callable[..., Any]
    arguments: Sequence[Call]

    def answer(self, place: int) -> Tensor:
        args, kwargs = self.arguments[place]
        return first_tensor(self.call(*args, **kwargs))


@dataclass
class Site:
    """A low-rank layer, by its name in the block, and the dense one that it stands for. closing
    says that its output is added to the block's; outputs is the second moment of the loss gradient
    there."""

    name: str
    ours: nn.Module
    dense: nn.Module
    bias: bool
    closing: bool = False
    outputs: Tensor | None = None

    def weight(self) -> Tensor:
        """The dense weight, (out, in), float64."""
        weight = self.dense.get_parameter("weight").data.to(torch.float64)
        return weight if isinstance(self.dense, nn.Linear) else weight.T


@dataclass
class Block:
    """Both models' block, what it should answer, and which entries of each batch count (None:
    all)."""

    ours: Side
    dense: Side
    targets: Sequence[Tensor]
    masks: Sequence[Tensor | None]

    def rows(self, values: Tensor, place: int) -> Tensor:
        """(tokens, width), without padding."""
        mask = self.masks[place]
        if mask is not None and mask.shape == values.shape[:-1]:
            values = values[mask.to(values.device)]
        return values.reshape(-1, values.shape[-1])


@torch.no_grad()
def refit(
    block: Block,
    places: Sequence[int],
    root: Tensor | None,
    allowed: Callable[[str], bool],
    better: Callable[[], bool],
) -> None:
    """Solve the block's low-rank layers anew from the batches at `places`, group by group; `better`
    judges each result, and a group that is none is put back. root is L with H = L L^T at the
    block's output; allowed tells which biases may change."""
    groups = _groups(block, places[0], allowed)
    sites = [site for group in groups for site in group]
    _find_closing(block, places[0], sites)
    _add_output_moments(
        block, places[:: max(1, len(places) // _MOMENT_BATCHES)][:_MOMENT_BATCHES], sites, root
    )
    for group in groups:
        before = [
            (tensor, tensor.data)
            for site in group
            for tensor in site.ours.state_dict(keep_vars=True).values()
        ]
        sums = _gather(block, places, group)
        for site in group:
            _solve(site, sums[site.name])
        if not better():
            for tensor, data in before:
                tensor.data = data


def _groups(block: Block, place: int, allowed: Callable[[str], bool]) -> list[list[Site]]:
    """The low-rank layers that are called exactly once, in the order of their calls; those with the
    same input together."""
    calls: list[tuple[str, Tensor]] = []
    modules = {
        name: module
        for name, module in block.ours.unit.named_modules()
        if isinstance(module, LOW_RANK)
    }

    def hook(name: str) -> Callable[..., None]:
        return lambda module, inputs: calls.append((name, inputs[0]))

    with _hooked(module.register_forward_pre_hook(hook(name)) for name, module in modules.items()):
        block.ours.answer(place)
    names = [name for name, _ in calls]
    groups: list[list[Site]] = []
    last: Tensor | None = None
    for name, x in calls:
        dense = block.dense.unit.get_submodule(name)
        if names.count(name) > 1 or not is_linear(dense):
            continue
        site = Site(name, modules[name], dense, allowed(f"{name}.bias" if name else "bias"))
        if last is x:
            groups[-1].append(site)
        else:
            groups.append([site])
        last = x
    return groups


def _find_closing(block: Block, place: int, sites: Sequence[Site]) -> None:
    """A layer closes the block where a change of its output changes the block's by just that."""
    plain = block.ours.answer(place)
    for site in sites:
        change = torch.zeros(())

        def add(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            nonlocal change
            noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
            change = noise * output.std()
            return output + change

        with _hooked([site.ours.register_forward_hook(add)]):
            moved = block.ours.answer(place) - plain
        site.closing = moved.shape == change.shape and bool(
            (moved - change).norm() < _CLOSING * change.norm()
        )


def _add_output_moments(
    block: Block, places: Sequence[int], sites: Sequence[Site], root: Tensor | None
) -> None:
    """H of every layer: the block's own, drawn as noise of that covariance at its output and led
    back through it."""
    generator = torch.Generator().manual_seed(0)
    caught: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: caught.__setitem__(name, output)

    for place in places:
        args, kwargs = _differentiable(block.dense.arguments[place])
        with (
            _hooked(site.dense.register_forward_hook(hook(site.name)) for site in sites),
            torch.enable_grad(),
        ):
            out = first_tensor(block.dense.call(*args, **kwargs))
        noise = torch.randn(out.shape, generator=generator).to(out)
        seed = noise if root is None else noise @ root.T
        found = torch.autograd.grad(
            out, [caught[site.name] for site in sites], seed, allow_unused=True
        )
        for site, gradient in zip(sites, found, strict=True):
            if gradient is not None:
                more = moment(block.rows(gradient, place), FULL_OUTPUTS)
                site.outputs = more if site.outputs is None else site.outputs + more
        caught.clear()


def _differentiable(call: Call) -> Call:
    leaves, spec = tree_flatten(call)
    fresh = [
        x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in leaves
    ]
    args, kwargs = tree_unflatten(fresh, spec)
    return args, kwargs


@dataclass
class _Sums:
    """Over all tokens: y x^T, x x^T, x and y."""

    cross: Tensor
    inputs: Tensor
    x: Tensor
    y: Tensor
    count: int = 0


def _gather(block: Block, places: Sequence[int], group: Sequence[Site]) -> dict[str, _Sums]:
    """What the layers of one group should answer to what they get now."""
    caught: dict[str, Tensor] = {}
    sums: dict[str, _Sums] = {}

    def catch(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: caught.__setitem__(name, output)

    hooks = [
        group[0].ours.register_forward_pre_hook(
            lambda module, inputs: caught.__setitem__("x", inputs[0])
        )
    ]
    hooks += [
        (site.ours if site.closing else site.dense).register_forward_hook(catch(f"y {site.name}"))
        for site in group
    ]
    aside = any(not site.closing for site in group)
    with _hooked(hooks):
        for place in places:
            out = block.ours.answer(place)
            if aside:
                block.dense.answer(place)
            x = block.rows(caught["x"], place)
            inputs = moment(x).to(torch.float64)
            for site in group:
                y = caught[f"y {site.name}"]
                y = block.rows(y + (block.targets[place] - out) if site.closing else y, place)
                more = _Sums(
                    (y.T @ x).to(torch.float64),
                    inputs,
                    x.sum(0).double(),
                    y.sum(0).double(),
                    x.shape[0],
                )
                sums[site.name] = more if site.name not in sums else _added(sums[site.name], more)
    return sums


def _added(one: _Sums, other: _Sums) -> _Sums:
    return _Sums(
        one.cross + other.cross,
        one.inputs + other.inputs,
        one.x + other.x,
        one.y + other.y,
        one.count + other.count,
    )


def _solve(site: Site, sums: _Sums) -> None:
    """Put the best factors of the layer's rank into it, and the bias that goes with them."""
    cross, inputs, x, y = (
        value / sums.count for value in (sums.cross, sums.inputs, sums.x, sums.y)
    )
    bias = getattr(site.ours, "bias", None)
    if site.bias:
        cross, inputs = cross - torch.outer(y, x), inputs - torch.outer(x, x)
    elif bias is not None:
        cross = cross - torch.outer(bias.data.to(torch.float64), x)
    w = site.weight()
    ridge = RIDGE * inputs.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    damped = inputs + ridge * torch.eye(inputs.shape[0], dtype=inputs.dtype, device=inputs.device)
    best = w + torch.linalg.solve(damped, (cross - w @ inputs).T).T
    rank = int(site.ours.rank)  # type: ignore[arg-type]
    factors = weighted(best, rank, Metric(inputs, site.outputs))
    if site.bias and bias is not None:
        bias.data = (y - factors.up @ (factors.down @ x)).to(bias.dtype)
    put_factors(site.ours, factors if isinstance(site.dense, nn.Linear) else transposed(factors))


def put_factors(module: nn.Module, factors: Factors) -> None:
    """Set the tensors of a low-rank module to factors of its stored weight, in float32."""
    state = module.state_dict(keep_vars=True)
    layout, names = _STORED["svd_rows" in state]
    for name, tensor in zip(names, to_stored(factors, layout, torch.float32), strict=True):
        state[name].data = tensor


_STORED: Mapping[bool, tuple[str, tuple[str, ...]]] = {
    False: ("factored", ("svd_up.weight", "svd_down.weight")),
    True: ("pivoted", ("svd_down.weight", "svd_up.weight", "svd_rows")),
}


@contextmanager
def _hooked(handles: Iterator[Any] | Sequence[Any]) -> Iterator[None]:
    """Hooks for as long as the context lasts."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
