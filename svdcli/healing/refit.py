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

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from svdcli.calibration.gather import FULL_OUTPUTS
from svdcli.calibration.rows import MomentSums, without_padding
from svdcli.calibration.stream import first_tensor
from svdcli.healing.learned import grid_of, put_rounded
from svdcli.healing.replicas import ALONE, Replicas
from svdcli.linalg.layouts import CODECS
from svdcli.linalg.packed import packed_factors, packed_matrix
from svdcli.linalg.solvers import Factors, transposed
from svdcli.linalg.whitening import Metric, weighted
from svdcli.models.experts import SeparateExperts
from svdcli.models.modules import (
    LOW_RANK,
    PackedLinear,
    PackedMatrix,
    is_conv,
    is_linear,
    is_packed_conv,
    layout_of,
)
from svdcli.plan.layouts import LAYOUTS

RIDGE = 0.01  # of the mean diagonal of E[x x^T], against directions that were hardly seen
_MOMENT_BATCHES = 8
_SAME_CHANGE = 1e-3  # error, as a share of the change, up to which two changes are the same

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


@dataclass(frozen=True)
class LayerPair:
    """A low-rank layer, by its name in the block, and the dense one that it stands for.

    refits_bias says that the layer's bias may change; feeds_output that its output is added to the
    block's; output_moment is the second moment of the loss gradient at its output, None where none
    arrives there; scale_dtype is the dtype in which scales are stored, None for layers without.
    """

    name: str
    student: nn.Module
    teacher: nn.Module
    refits_bias: bool
    feeds_output: bool
    output_moment: Tensor | None
    scale_dtype: torch.dtype | None

    def weight(self) -> Tensor:
        """Return the dense weight, (out, in), float64."""
        weight = cast(Tensor, self.teacher.weight).detach().to(torch.float64)
        return weight.T if is_conv(self.teacher) else weight


@dataclass
class Block:
    """Both models' block, what it should answer, and which entries of each batch count (None:
    all).

    scale_dtypes has, for every packed matrix by its name in the block, the dtype in which its
    scales are stored.
    """

    student: BlockRun
    teacher: BlockRun
    targets: Sequence[Tensor]
    masks: Sequence[Tensor | None]
    scale_dtypes: Mapping[str, torch.dtype]

    def rows(self, values: Tensor, index: int) -> Tensor:
        """Return (tokens, width), without padding."""
        return without_padding(values, self.masks[index])

    def target(self, index: int, answer: Tensor) -> Tensor:
        """Return what the block should answer to a batch, where this answer is."""
        return self.targets[index].to(answer.device)


@torch.no_grad()
def refit(
    block: Block,
    indices: Sequence[int],
    root: Tensor | None,
    allowed: Callable[[str], bool],
    better: Callable[[], bool],
    replicas: Replicas = ALONE,
) -> None:
    """Solve the block's low-rank layers anew from the batches at `indices`, group by group;
    `better` judges each result, and a group whose result is no better is put back. root is L with
    H = L L^T at the block's output; allowed tells which biases may change. Sums are over the
    batches of all ranks, and each layer is solved by one of them."""
    # Group by group: each meets what the groups before it now send on
    for group in _groups(block, indices, root, allowed, replicas):
        before: list[tuple[Tensor, Tensor]] = []
        for pair in group:
            for tensor in pair.student.state_dict(keep_vars=True).values():
                before.append((tensor, tensor.data))

        sums = _sums_of(block, indices, group, replicas)
        for number, pair in enumerate(group):
            if number % replicas.size == replicas.rank:
                _solve(pair, sums[pair.name])
        for number, pair in enumerate(group):
            _put(pair.student, replicas.same(_own(pair.student), number % replicas.size))
        if not better():
            for tensor, data in before:
                tensor.data = data


def _own(module: nn.Module) -> dict[str, Tensor]:
    """Return all tensors of a module by name."""
    return {name: tensor.data for name, tensor in module.state_dict(keep_vars=True).items()}


def _put(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Set the tensors of a module by name."""
    state = module.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        state[name].data = tensor


# The layers ---------------------------------------------------------------------------------------


def _groups(
    block: Block,
    indices: Sequence[int],
    root: Tensor | None,
    allowed: Callable[[str], bool],
    replicas: Replicas,
) -> list[list[LayerPair]]:
    """List what there is to solve, in the order in which it is called; layers with the same input
    together."""
    # One batch tells, and rank 0's does so for all
    grouped_names: list[list[str]] | None = None
    feeding: set[str] | None = None
    if replicas.first:
        grouped_names = _grouped_names(block, indices[0])
        feeding = _feeding(block, indices[0], list(itertools.chain.from_iterable(grouped_names)))
    grouped_names, feeding = replicas.says((grouped_names, feeding)) or (None, None)
    assert grouped_names is not None
    assert feeding is not None
    names = list(itertools.chain.from_iterable(grouped_names))
    if not names:
        return []

    # A moment needs few batches, and each costs a backward pass
    few = max(1, _MOMENT_BATCHES // replicas.size)
    sample = indices[:: max(1, len(indices) // few)][:few]
    moments = _output_moments(block, sample, names, root, replicas)

    def pair_of(name: str) -> LayerPair:
        return LayerPair(
            name=name,
            student=block.student.unit.get_submodule(name),
            teacher=block.teacher.unit.get_submodule(name),
            refits_bias=allowed(f"{name}.bias".removeprefix(".")),
            feeds_output=name in feeding,
            output_moment=moments.get(name),
            scale_dtype=_scale_dtype(block, name),
        )

    return [[pair_of(name) for name in group] for group in grouped_names]


def _scale_dtype(block: Block, name: str) -> torch.dtype | None:
    """Return the dtype in which the scales of a layer, or of its factors, are stored."""
    for matrix in (name, f"{name}.svd_down"):
        if matrix in block.scale_dtypes:
            return block.scale_dtypes[matrix]
    return None


def refittable(unit: nn.Module) -> dict[str, nn.Module]:
    """Return the low-rank modules of a block, and the packed ones that are no factor of these, by
    their names in it; without packed weights that are stored the other way round."""
    layers: dict[str, nn.Module] = {}
    factors: set[int] = set()
    for name, module in unit.named_modules():
        if isinstance(module, LOW_RANK):
            layers[name] = module
            factors |= {id(part) for part in module.modules()}
            if is_packed_conv(module):
                del layers[name]
        elif isinstance(module, PackedMatrix):
            continue
        elif isinstance(module, PackedLinear) and id(module) not in factors:
            layers[name] = module
    return layers


def _grouped_names(block: Block, index: int) -> list[list[str]]:
    """Return the names of the layers that are called exactly once and stand for a linear layer, in
    the order of their calls; neighbours that read the very same tensor make a group.

    Not those of experts: behind a compressed stream the router sends them other tokens than the
    original sends its own, and there is no y for an x.
    """
    calls: list[tuple[str, Tensor]] = []

    def note(name: str) -> Callable[..., None]:
        return lambda module, inputs: calls.append((name, inputs[0]))

    handles = []
    routed = _routed(block.student.unit)
    for name, module in refittable(block.student.unit).items():
        if id(module) not in routed:
            handles.append(module.register_forward_pre_hook(note(name)))
    with _hooked(handles):
        block.student.answer(index)

    # The tensors are kept until here, so that being the same one means having the same input
    called = [name for name, _ in calls]
    groups: list[list[str]] = []
    last: Tensor | None = None
    for name, x in calls:
        if called.count(name) > 1 or not is_linear(block.teacher.unit.get_submodule(name)):
            continue
        if last is x:
            groups[-1].append(name)
        else:
            groups.append([name])
        last = x
    return groups


def _routed(unit: nn.Module) -> set[int]:
    """Return the identities of all modules of experts."""
    routed: set[int] = set()
    for module in unit.modules():
        if isinstance(module, SeparateExperts):
            routed.update(map(id, module.modules()))
    return routed


def _feeding(block: Block, index: int, names: Sequence[str]) -> set[str]:
    """Return those of these layers whose output goes into the block's as it is: a change there
    changes the block's output by just that."""
    plain = block.student.answer(index)
    feeding: set[str] = set()
    for name in names:
        change = torch.zeros(())

        def add(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            nonlocal change
            noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
            change = noise * output.std()
            return output + change

        student = block.student.unit.get_submodule(name)
        with _hooked([student.register_forward_hook(add)]):
            moved = block.student.answer(index) - plain
        if moved.shape != change.shape:
            continue
        if bool((moved - change).norm() < _SAME_CHANGE * change.norm()):
            feeding.add(name)
    return feeding


def _output_moments(
    block: Block,
    indices: Sequence[int],
    names: Sequence[str],
    root: Tensor | None,
    replicas: Replicas,
) -> dict[str, Tensor]:
    """Return H at the output of every layer that a gradient reaches: the block's own, drawn as
    noise of that covariance at its output and led back through the original block."""
    generator = torch.Generator().manual_seed(replicas.rank)
    sums = MomentSums(FULL_OUTPUTS)
    layers = {name: block.teacher.unit.get_submodule(name) for name in names}
    outputs: dict[str, Tensor] = {}

    for index in indices:
        # Forwards, with a graph that begins at what the block is given
        args, kwargs = _differentiable(block.teacher.arguments[index])
        handles = []
        for name, layer in layers.items():
            handles.append(layer.register_forward_hook(_keep_output(outputs, name)))
        with _hooked(handles), torch.enable_grad():
            answer = first_tensor(block.teacher.call(*args, **kwargs))

        # Backwards: noise of covariance H at the end has, at each layer, that of the layer's own H
        noise = torch.randn(answer.shape, generator=generator).to(answer)
        cotangent = noise if root is None else noise @ root.T
        ends = [outputs[name] for name in names]
        gradients = torch.autograd.grad(answer, ends, cotangent, allow_unused=True)
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                sums.add(name, block.rows(gradient, index))
        outputs.clear()
    return replicas.summed(sums.take())


def _keep_output(outputs: dict[str, Tensor], name: str) -> Callable[..., None]:
    """Return a forward hook that puts a layer's output under this name."""

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        outputs[name] = output

    return keep


def _differentiable(call: Call) -> Call:
    """Return the same arguments, as the beginning of a graph."""
    leaves, spec = tree_flatten(call)
    fresh: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            fresh.append(leaf.detach().requires_grad_())
        else:
            fresh.append(leaf)
    args, kwargs = tree_unflatten(fresh, spec)
    return args, kwargs


# What they should answer --------------------------------------------------------------------------


@dataclass
class _Sums:
    """Over all tokens, in float64: y x^T, x x^T, x and y."""

    cross: Tensor
    inputs: Tensor
    x: Tensor
    y: Tensor
    count: int


def _sums_of(
    block: Block, indices: Sequence[int], group: Sequence[LayerPair], replicas: Replicas
) -> dict[str, _Sums]:
    """Sum, for each layer of one group, what it reads now and what it should answer to that, over
    the batches of all ranks."""
    inputs: list[Tensor] = []
    outputs: dict[str, Tensor] = {}

    # A layer that feeds the block's output is aimed at what that lacks, the others at the original
    handles = [group[0].student.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))]
    for pair in group:
        layer = pair.student if pair.feeds_output else pair.teacher
        handles.append(layer.register_forward_hook(_keep_output(outputs, pair.name)))
    needs_teacher = any(not pair.feeds_output for pair in group)

    # In float64, since the regression takes differences of these sums
    sums = MomentSums(dtype=torch.float64)
    count = 0
    with _hooked(handles):
        for index in indices:
            answer = block.student.answer(index)
            if needs_teacher:
                block.teacher.answer(index)
            x = block.rows(inputs.pop(), index)
            sums.add("x x", x)
            sums.add_mean("x", x)
            for pair in group:
                y = outputs[pair.name]
                if pair.feeds_output:
                    y = y + (block.target(index, answer) - answer)
                y = block.rows(y, index)
                sums.add_cross(f"y x {pair.name}", y, x)
                sums.add_mean(f"y {pair.name}", y)
            count += x.shape[0]

    totals = replicas.summed(sums.take())
    count = int(replicas.total([count])[0])
    return {
        pair.name: _Sums(
            cross=totals[f"y x {pair.name}"],
            inputs=totals["x x"],
            x=totals["x"],
            y=totals[f"y {pair.name}"],
            count=count,
        )
        for pair in group
    }


def _solve(pair: LayerPair, sums: _Sums) -> None:
    """Put the best factors of the layer's rank into it, and the bias that goes with them."""
    cross, inputs = sums.cross / sums.count, sums.inputs / sums.count
    x, y = sums.x / sums.count, sums.y / sums.count
    bias = getattr(pair.student, "bias", None)

    # A bias that follows the mean leaves only what varies around it; one that stays is given
    if pair.refits_bias:
        cross = cross - torch.outer(y, x)
        inputs = inputs - torch.outer(x, x)
    elif bias is not None:
        cross = cross - torch.outer(bias.data.to(torch.float64), x)

    # The regression of y on x, with a ridge that pulls towards the original weight
    w = pair.weight()
    ridge = RIDGE * inputs.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    damped = inputs + ridge * torch.eye(inputs.shape[0], dtype=inputs.dtype, device=inputs.device)
    best = w + torch.linalg.solve(damped, (cross - w @ inputs).T).T

    # What comes nearest to it of what the layer can store
    matrices = _put_nearest(pair, best, Metric(inputs, pair.output_moment))

    # The bias that takes the mean error out
    if pair.refits_bias and bias is not None:
        mean = x
        for matrix in reversed(matrices):
            mean = matrix @ mean
        bias.data = (y - mean).to(bias.dtype)


def _put_nearest(pair: LayerPair, best: Tensor, metric: Metric) -> tuple[Tensor, ...]:
    """Put what is nearest to a weight (out, in) in the metric into a layer: its truncation, and of
    few-bit integers where the layer is packed. Return the matrices whose product the layer then
    stands for."""
    # A whole matrix of integers
    dtype = pair.scale_dtype
    if isinstance(pair.student, PackedLinear):
        assert dtype is not None
        rounded = packed_matrix(best, grid_of(pair.student), metric, dtype)
        put_rounded(pair.student, rounded)
        return (rounded.values(torch.float64),)

    # Two factors of integers
    rank = int(pair.student.rank)  # type: ignore[arg-type]
    factors = weighted(best, rank, metric)
    if dtype is not None:
        up, down = (pair.student.get_submodule(name) for name in ("svd_up", "svd_down"))
        assert isinstance(up, PackedLinear)
        assert isinstance(down, PackedLinear)
        pieces = packed_factors(best, factors, grid_of(up), metric, dtype)
        for module, rounded in zip((up, down), pieces, strict=True):
            put_rounded(module, rounded)
        return tuple(rounded.values(torch.float64) for rounded in pieces)

    # Two factors as they are
    matrices = (factors.up, factors.down)
    if is_conv(pair.teacher):  # stored as (in, out)
        factors = transposed(factors)
    put_factors(pair.student, factors)
    return matrices


def put_factors(module: nn.Module, factors: Factors) -> None:
    """Set the tensors of a low-rank module to factors of its stored weight, in float32."""
    layout = layout_of(module)
    state = module.state_dict(keep_vars=True)
    m, rank = factors.up.shape
    n = factors.down.shape[1]
    names = LAYOUTS[layout].parts(m, n, rank)
    stored = CODECS[layout].encode(factors, torch.float32)
    for name, tensor in zip(names, stored, strict=True):
        state[name].data = tensor


@contextmanager
def _hooked(handles: Sequence[Any]) -> Iterator[None]:
    """Keep hooks for as long as the context lasts."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
