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

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from svdcli.calibration.gather import FULL_OUTPUTS
from svdcli.calibration.rows import without_padding
from svdcli.calibration.stream import first_tensor
from svdcli.linalg.layouts import CODECS
from svdcli.linalg.machine import moment
from svdcli.linalg.solvers import Factors, transposed
from svdcli.linalg.whitening import Metric, weighted
from svdcli.models.modules import LOW_RANK, is_linear, layout_of
from svdcli.plan.layouts import LAYOUTS

RIDGE = 0.01  # of the mean diagonal of E[x x^T], against directions that were hardly seen
_MOMENT_BATCHES = 8
_SAME_CHANGE = 1e-3

Call = tuple[Any, Any]


@dataclass(frozen=True)
class BlockRun:
    """One model's block: its module, how to call it, and its arguments for every batch."""

    unit: nn.Module
    call: Callable[..., Any]
    arguments: Sequence[Call]

    def answer(self, index: int) -> Tensor:
        args, kwargs = self.arguments[index]
        return first_tensor(self.call(*args, **kwargs))


@dataclass
class LayerPair:
    """A low-rank layer, by its name in the block, and the dense one that it stands for.
    feeds_output says that its output is added to the block's; outputs is the second moment of the
    loss gradient there."""

    name: str
    student: nn.Module
    teacher: nn.Module
    bias: bool
    feeds_output: bool = False
    outputs: Tensor | None = None

    def weight(self) -> Tensor:
        """The dense weight, (out, in), float64."""
        weight = self.teacher.get_parameter("weight").data.to(torch.float64)
        return weight if isinstance(self.teacher, nn.Linear) else weight.T


@dataclass
class Block:
    """Both models' block, what it should answer, and which entries of each batch count (None:
    all)."""

    student: BlockRun
    teacher: BlockRun
    targets: Sequence[Tensor]
    masks: Sequence[Tensor | None]

    def rows(self, values: Tensor, index: int) -> Tensor:
        """(tokens, width), without padding."""
        return without_padding(values, self.masks[index])


@torch.no_grad()
def refit(
    block: Block,
    indices: Sequence[int],
    root: Tensor | None,
    allowed: Callable[[str], bool],
    better: Callable[[], bool],
) -> None:
    """Solve the block's low-rank layers anew from the batches at `indices`, group by group;
    `better` judges each result, and a group that is none is put back. root is L with H = L L^T at
    the block's output; allowed tells which biases may change."""
    # What there is to solve, and how errors at each layer's output count
    groups = _groups(block, indices[0], allowed)
    pairs = [pair for group in groups for pair in group]
    _find_feeding(block, indices[0], pairs)
    _add_output_moments(
        block, indices[:: max(1, len(indices) // _MOMENT_BATCHES)][:_MOMENT_BATCHES], pairs, root
    )

    # Group by group: each meets what the groups before it now send on
    for group in groups:
        before = [
            (tensor, tensor.data)
            for pair in group
            for tensor in pair.student.state_dict(keep_vars=True).values()
        ]
        sums = _gather(block, indices, group)
        for pair in group:
            _solve(pair, sums[pair.name])
        if not better():
            for tensor, data in before:
                tensor.data = data


def _groups(block: Block, index: int, allowed: Callable[[str], bool]) -> list[list[LayerPair]]:
    """The low-rank layers that are called exactly once, in the order of their calls; those with the
    same input together."""
    calls: list[tuple[str, Tensor]] = []
    modules = {
        name: module
        for name, module in block.student.unit.named_modules()
        if isinstance(module, LOW_RANK)
    }

    def hook(name: str) -> Callable[..., None]:
        return lambda module, inputs: calls.append((name, inputs[0]))

    with _hooked(module.register_forward_pre_hook(hook(name)) for name, module in modules.items()):
        block.student.answer(index)

    # Neighbours in that order that read the very same tensor make a group
    names = [name for name, _ in calls]
    groups: list[list[LayerPair]] = []
    last: Tensor | None = None
    for name, x in calls:
        dense = block.teacher.unit.get_submodule(name)
        if names.count(name) > 1 or not is_linear(dense):
            continue
        pair = LayerPair(name, modules[name], dense, allowed(f"{name}.bias" if name else "bias"))
        if last is x:
            groups[-1].append(pair)
        else:
            groups.append([pair])
        last = x
    return groups


def _find_feeding(block: Block, index: int, pairs: Sequence[LayerPair]) -> None:
    """A layer closes the block where a change of its output changes the block's by just that."""
    plain = block.student.answer(index)
    for pair in pairs:
        change = torch.zeros(())

        def add(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            nonlocal change
            noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
            change = noise * output.std()
            return output + change

        with _hooked([pair.student.register_forward_hook(add)]):
            moved = block.student.answer(index) - plain
        pair.feeds_output = moved.shape == change.shape and bool(
            (moved - change).norm() < _SAME_CHANGE * change.norm()
        )


def _add_output_moments(
    block: Block, indices: Sequence[int], pairs: Sequence[LayerPair], root: Tensor | None
) -> None:
    """H of every layer: the block's own, drawn as noise of that covariance at its output and led
    back through it."""
    generator = torch.Generator().manual_seed(0)
    caught: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: caught.__setitem__(name, output)

    for index in indices:
        args, kwargs = _differentiable(block.teacher.arguments[index])
        with (
            _hooked(pair.teacher.register_forward_hook(hook(pair.name)) for pair in pairs),
            torch.enable_grad(),
        ):
            out = first_tensor(block.teacher.call(*args, **kwargs))
        noise = torch.randn(out.shape, generator=generator).to(out)
        cotangent = noise if root is None else noise @ root.T
        found = torch.autograd.grad(
            out, [caught[pair.name] for pair in pairs], cotangent, allow_unused=True
        )
        for pair, gradient in zip(pairs, found, strict=True):
            if gradient is not None:
                more = moment(block.rows(gradient, index), FULL_OUTPUTS)
                pair.outputs = more if pair.outputs is None else pair.outputs + more
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


def _gather(block: Block, indices: Sequence[int], group: Sequence[LayerPair]) -> dict[str, _Sums]:
    """What the layers of one group should answer to what they get now."""
    caught: dict[str, Tensor] = {}
    sums: dict[str, _Sums] = {}

    def catch(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: caught.__setitem__(name, output)

    hooks = [
        group[0].student.register_forward_pre_hook(
            lambda module, inputs: caught.__setitem__("x", inputs[0])
        )
    ]
    hooks += [
        (pair.student if pair.feeds_output else pair.teacher).register_forward_hook(
            catch(f"y {pair.name}")
        )
        for pair in group
    ]
    aside = any(not pair.feeds_output for pair in group)
    with _hooked(hooks):
        for index in indices:
            out = block.student.answer(index)
            if aside:
                block.teacher.answer(index)
            x = block.rows(caught["x"], index)
            inputs = moment(x).to(torch.float64)
            for pair in group:
                y = caught[f"y {pair.name}"]
                y = block.rows(y + (block.targets[index] - out) if pair.feeds_output else y, index)
                more = _Sums(
                    (y.T @ x).to(torch.float64),
                    inputs,
                    x.sum(0).double(),
                    y.sum(0).double(),
                    x.shape[0],
                )
                sums[pair.name] = more if pair.name not in sums else _added(sums[pair.name], more)
    return sums


def _added(one: _Sums, other: _Sums) -> _Sums:
    return _Sums(
        one.cross + other.cross,
        one.inputs + other.inputs,
        one.x + other.x,
        one.y + other.y,
        one.count + other.count,
    )


def _solve(pair: LayerPair, sums: _Sums) -> None:
    """Put the best factors of the layer's rank into it, and the bias that goes with them."""
    cross, inputs, x, y = (
        value / sums.count for value in (sums.cross, sums.inputs, sums.x, sums.y)
    )
    bias = getattr(pair.student, "bias", None)
    if pair.bias:
        cross, inputs = cross - torch.outer(y, x), inputs - torch.outer(x, x)
    elif bias is not None:
        cross = cross - torch.outer(bias.data.to(torch.float64), x)

    # The regression of y on x, with a ridge that pulls towards the original weight
    w = pair.weight()
    ridge = RIDGE * inputs.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    damped = inputs + ridge * torch.eye(inputs.shape[0], dtype=inputs.dtype, device=inputs.device)
    best = w + torch.linalg.solve(damped, (cross - w @ inputs).T).T

    # Its truncation, and the bias that takes the mean error out
    rank = int(pair.student.rank)  # type: ignore[arg-type]
    factors = weighted(best, rank, Metric(inputs, pair.outputs))
    if pair.bias and bias is not None:
        bias.data = (y - factors.up @ (factors.down @ x)).to(bias.dtype)
    put_factors(
        pair.student, factors if isinstance(pair.teacher, nn.Linear) else transposed(factors)
    )


def put_factors(module: nn.Module, factors: Factors) -> None:
    """Set the tensors of a low-rank module to factors of its stored weight, in float32."""
    state, layout = module.state_dict(keep_vars=True), layout_of(module)
    m, n, rank = factors.up.shape[0], factors.down.shape[1], factors.down.shape[0]
    names = LAYOUTS[layout].parts(m, n, rank)
    stored = CODECS[layout].encode(factors, torch.float32)
    for name, tensor in zip(names, stored, strict=True):
        state[name].data = tensor


@contextmanager
def _hooked(handles: Iterator[Any] | Sequence[Any]) -> Iterator[None]:
    """Hooks for as long as the context lasts."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
