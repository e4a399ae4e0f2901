"""Stand-ins for low-rank layers while a whole model is trained: the same weights, in coordinates in
which all steps cost alike.

With G = L_G L_G^T the second moment of a layer's inputs and H = L_H L_H^T that of the loss gradient
at its outputs, a change D of its weight costs about ||L_H^T D L_G||^2 / 2 (K-FAC; Martens and
Grosse, 2015). A layer W = up @ down is trained as the balanced factors A @ B of L_H^T W L_G: a step
there is worth the same in every direction, whatever the layout stores.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from svdcli.calibration.loss import ModelLoss
from svdcli.calibration.rows import MomentSums, without_padding
from svdcli.healing.refit import put_factors
from svdcli.healing.replicas import ALONE, Replicas
from svdcli.linalg.balance import balanced
from svdcli.linalg.damping import damped_root
from svdcli.linalg.solvers import Factors, transposed
from svdcli.models.modules import LOW_RANK, factors_of, is_conv, is_linear, is_packed
from svdcli.text.tokens import Batch

FULL = 2048  # wider sides are scaled by their diagonal
_DAMPING_INPUTS = 0.01  # of the mean diagonal
_DAMPING_OUTPUTS = 0.1


class WhitenedLinear(nn.Module):
    """y = x (outputs A B inputs)^T + b, with A (m, r) and B (r, n) to train; outputs and inputs
    undo the coordinates."""

    def __init__(self, module: nn.Module, conv: bool, inputs: Tensor, outputs: Tensor) -> None:
        super().__init__()
        # The dense layer's two factors, (m, r) and (r, n), whatever the layout
        up, down, rows = factors_of(module)
        if rows is not None:  # pivoted: the kept rows are those of `down` themselves
            up = torch.cat((torch.eye(down.shape[0]).to(up), up))[rows.long()]
        if conv:  # stored as (in, out)
            up, down = down.T, up.T

        # In the coordinates of the moments, with the same size of entries in both
        left, undo_left = _root(outputs, _DAMPING_OUTPUTS)
        right, undo_right = _root(inputs, _DAMPING_INPUTS)
        whitened_up = _times(_transpose(left), up)
        whitened_down = _times(_transpose(right), down.T).T
        a, b = balanced(whitened_up, whitened_down)
        self.conv = conv
        self.bias = getattr(module, "bias", None)
        self.a = nn.Parameter(a.float(), requires_grad=False)
        self.b = nn.Parameter(b.float(), requires_grad=False)
        self.outputs = nn.Parameter(_transpose(undo_left).float(), requires_grad=False)
        self.inputs = nn.Parameter(_transpose(undo_right).float(), requires_grad=False)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return (up, down) of the weight as (out, in)."""
        up = _times(self.outputs, self.a)
        down = _times(self.inputs, self.b.T).T
        return up, down

    @property
    def trained(self) -> list[nn.Parameter]:
        """What is trained."""
        return [self.a, self.b]

    @property
    def weight(self) -> Tensor:
        """The dense weight as it is stored, for model code that looks at it."""
        up, down = self.factors()
        return (up @ down).T if self.conv else up @ down

    def store(self, module: nn.Module) -> None:
        """Set the factors of a low-rank layer to what was learned."""
        up, down = (factor.detach() for factor in self.factors())
        factors = Factors(up, down, up.new_empty(0), 0.0)
        if self.conv:  # stored as (in, out)
            factors = transposed(factors)
        put_factors(module, factors)

    def forward(self, x: Tensor) -> Tensor:
        up, down = self.factors()
        y = nn.functional.linear(nn.functional.linear(x, down), up)
        return y if self.bias is None else y + self.bias


def _root(moment: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return L with L L^T = the damped moment, and its inverse, in float64; of a diagonal,
    diagonals."""
    root = damped_root(moment, damping)
    if root.ndim == 1:
        return root, 1 / root
    eye = torch.eye(root.shape[0], dtype=root.dtype, device=root.device)
    return root, torch.linalg.solve_triangular(root, eye, upper=False)


def _transpose(root: Tensor) -> Tensor:
    """Return the transpose; of a diagonal, the diagonal."""
    return root.mT if root.ndim == 2 else root


def _times(scale: Tensor, x: Tensor) -> Tensor:
    """Return scale @ x for a matrix; each row of x times its scale for a diagonal."""
    return scale.to(x.dtype) @ x if scale.ndim == 2 else scale.to(x.dtype)[:, None] * x


def whitened_layers(
    teacher: nn.Module,
    student: nn.Module,
    tensors: Mapping[str, Tensor],
    batches: Sequence[Batch],
    call: Callable[..., Any] | None = None,
    seed: int = 0,
    replicas: Replicas = ALONE,
    made: Callable[[str, WhitenedLinear], None] = lambda name, layer: None,
) -> dict[str, WhitenedLinear]:
    """Return a stand-in for every low-rank linear layer of the student whose factors are in
    `tensors`, by the layer's name. batches are what the teacher reads to learn the coordinates, of
    every rank its own; call is what is called with each, if not the whole teacher; seed draws the
    labels; made is told of each as soon as it is there."""
    # The layers to train, where the original has a linear layer
    dense: dict[str, nn.Module] = {}
    for name, module in student.named_modules():
        if not isinstance(module, LOW_RANK) or f"{name}.svd_up.weight" not in tensors:
            continue
        original = teacher.get_submodule(name)
        if is_linear(original) and not is_packed(module):
            dense[name] = original
    if not dense:
        return {}

    # Each in coordinates that its moments scale; a moment that was not met scales nothing
    first = replicas.rank * len(batches)
    sums = moments_of(teacher, dense, batches, call, seed, first)
    inputs, outputs = map(replicas.summed, sums)
    del sums
    layers: dict[str, WhitenedLinear] = {}
    for name, original in dense.items():
        conv = is_conv(original)
        m, n = _stored_shape(student.get_submodule(name))
        if conv:  # stored as (in, out)
            m, n = n, m
        unknown = torch.ones(max(m, n), device=tensors[f"{name}.svd_up.weight"].device)
        layers[name] = WhitenedLinear(
            student.get_submodule(name),
            conv,
            inputs=inputs.pop(name, unknown[:n]),
            outputs=outputs.pop(name, unknown[:m]),
        )
        _put(layers[name], replicas.same(_own(layers[name])))
        made(name, layers[name])
    return layers


def numbers_of_stand_in(module: nn.Module) -> tuple[int, int]:
    """Return how many numbers the stand-in of a low-rank layer has: (A and B, the coordinates)."""
    sides = _stored_shape(module)
    _, down, _ = factors_of(module)
    return len(down) * sum(sides), sum(side**2 if side <= FULL else side for side in sides)


def numbers_of_coordinates(student: nn.Module) -> int:
    """Return how many numbers the coordinates of all stand-ins of a model have."""
    low_rank = [part for part in student.modules() if isinstance(part, LOW_RANK)]
    return sum(numbers_of_stand_in(part)[1] for part in low_rank if not is_packed(part))


def _stored_shape(module: nn.Module) -> tuple[int, int]:
    """Return the shape of the weight that a low-rank module stores."""
    up, down, rows = factors_of(module)
    return len(up) if rows is None else len(rows), down.shape[1]


def _own(layer: WhitenedLinear) -> dict[str, Tensor]:
    """Return what a stand-in made from moments, by name."""
    return {name: getattr(layer, name).data for name in ("a", "b", "outputs", "inputs")}


def _put(layer: WhitenedLinear, tensors: Mapping[str, Tensor]) -> None:
    """Set what a stand-in made from moments to what the first rank has made."""
    for name, tensor in tensors.items():
        getattr(layer, name).data = tensor


def moments_of(
    model: nn.Module,
    names: Collection[str],
    batches: Sequence[Batch],
    call: Callable[..., Any] | None = None,
    seed: int = 0,
    first: int = 0,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the second moments of the inputs and of the loss gradients at the outputs of the named
    layers, summed over the batches, from ordinary passes of a model in memory; diagonals beyond
    `FULL`. Padding counts as zeros in gradients only; seed draws the labels, of
    batches that are numbered from `first` on."""
    input_sums = MomentSums(FULL)
    gradient_sums = MomentSums(FULL)
    ends: list[tuple[str, Tensor]] = []

    def watch(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            input_sums.add(name, without_padding(args[0].detach(), None))
            if not output.requires_grad:  # nothing before this layer is differentiated
                output = output.detach().requires_grad_().clone()
            ends.append((name, output))
            return output

        return hook

    loss = ModelLoss(seed)
    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    try:
        for index, batch in enumerate(batches, first):
            # Forwards, noting every output that a gradient is wanted at
            ends.clear()
            with torch.enable_grad():
                tensor, cotangent = loss.cotangent(index, batch, (call or model)(**batch))

            # Backwards; an output that the loss does not depend on has no gradient
            outputs = [output for _, output in ends]
            gradients = torch.autograd.grad(tensor, outputs, cotangent, allow_unused=True)
            for (name, _), gradient in zip(ends, gradients, strict=True):
                if gradient is not None:
                    gradient_sums.add(name, without_padding(gradient, None))
    finally:
        for handle in handles:
            handle.remove()
    return input_sums.take(), gradient_sums.take()
