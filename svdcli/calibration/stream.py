"""Run a model over many batches one block at a time, forwards and, where asked, backwards.

Every batch's forward pass runs in a thread of its own that stops where the next block begins; the
blocks take their turns, each with its weights in memory once for all batches. That works for any
architecture, since the code between the blocks is the model's own. Backwards, every block is
computed again from its kept inputs. Memory follows the largest block and the hidden states between
blocks, not the model, whose stored weights stay in the file until their turn.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from svdcli.errors import SvdcliError
from svdcli.models.modules import LOW_RANK

Visit = Callable[[str, str, int, int], None]
Seed = Callable[[int, Any], tuple[Tensor, Tensor]]
Read = Callable[[int, Any], None]


def units_of(model: nn.Module) -> dict[str, nn.Module]:
    """What takes turns, by name: the members of every list of blocks, and all modules outside them
    that own parameters.

    A module around blocks that owns some besides (a scale, a token) takes no turn of its own. A
    compressed model has the same units as its original: a low-rank module counts as the layer that
    it stands for.
    """
    units: dict[str, nn.Module] = {}

    def walk(name: str, module: nn.Module) -> None:
        owns = next(module.parameters(recurse=False), None) is not None
        if isinstance(module, LOW_RANK) or (
            owns and not any(map(_is_list_of_blocks, module.modules()))
        ):
            units[name] = module
            return
        blocks = _is_list_of_blocks(module)
        for child_name, child in module.named_children():
            path = f"{name}.{child_name}" if name else child_name
            if blocks and next(child.parameters(), None) is not None:
                units[path] = child
            else:
                walk(path, child)

    walk("", model)
    return units


def _is_list_of_blocks(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.ModuleList)
        and len(module) > 1
        and next(module.parameters(), None) is not None
    )


@dataclass
class _Gradient:
    """What arrives at one output of a unit; value is the output itself, until it is handed on."""

    value: Tensor | None
    grad: Tensor | None = None


class _Start(torch.autograd.Function):
    """Where the code after a unit begins to be differentiated: the unit's output, as something that
    may be changed in place."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, kept: _Gradient) -> Tensor | None:
        ctx.kept, value, kept.value = kept, kept.value, None
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        kept = ctx.kept
        kept.grad = gradient if kept.grad is None else kept.grad + gradient
        return None, None


@dataclass
class _Call:
    """One pass of one batch through one unit: what went in and came out, and how the code around it
    is differentiated."""

    unit: str
    leaves: list[Any]
    spec: Any
    outer: list[Tensor | None]
    outputs: list[_Gradient]
    versions: list[int]


@dataclass
class _Batch:
    """A forward pass that can be stopped and continued. Only one runs at any time."""

    index: int
    run: Callable[[], None]
    calls: list[_Call] = field(default_factory=list)
    waits_for: str | None = None
    arguments: tuple[Any, Any] = ((), {})
    result: Any = None
    error: BaseException | None = None
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    arrived: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    abandoned: bool = False

    def body(self) -> None:
        try:
            self.go.acquire()
            if not self.abandoned:
                self.run()
        except BaseException as error:
            self.error = error
        self.waits_for = None
        self.arrived.release()

    def advance(self) -> None:
        """Continue until the next unit begins, or to the end. Raises what the forward pass
        raised."""
        self.go.release()
        self.arrived.acquire()
        if self.error is not None:
            raise self.error

    def stop_before(self, unit: str, args: Any, kwargs: Any) -> None:
        self.waits_for, self.arguments = unit, (args, kwargs)
        self.arrived.release()
        self.go.acquire()
        self.waits_for = None
        if self.abandoned:
            raise _AbandonedError


class _AbandonedError(BaseException):
    """Ends the threads that are still waiting after an error in another one."""


@dataclass
class Turn:
    """One unit, in memory, and the batches that wait before it. call is its forward pass, for
    whoever wants to try it."""

    name: str
    unit: nn.Module
    call: Callable[..., Any]
    batches: list[_Batch]
    advance: Callable[[_Batch], None]

    @property
    def arguments(self) -> list[tuple[Any, Any]]:
        """(args, kwargs) of the unit for every batch, cut off from the graph that made them."""
        return [_detached(batch.arguments) for batch in self.batches]

    def go(self, *, keep: bool = False) -> list[Tensor]:
        """Send every batch through the unit, as far as the next one; with keep, what came out of it
        (its first tensor)."""
        results = []
        for batch in self.batches:
            self.advance(batch)
            if keep:
                results.append(first_tensor(batch.result))
            batch.result = None
        return results


class Stream:
    """A model whose blocks take turns on `device`, computed in `dtype`; its parameters may lie
    anywhere.

    visit(phase, unit, batch, batches) is called before every unit of every batch with phase
    "forward" or "backward", and with phase "done" when all batches are through a unit ("forward
    done", "backward done"). gradients(unit, batch, gradient), where it is set, gets the gradient at
    what each unit sends on. call is what is called with each batch, where that is not the whole
    model.
    """

    def __init__(
        self,
        model: Any,
        device: torch.device,
        dtype: torch.dtype,
        visit: Visit,
        call: Callable[..., Any] | None = None,
    ) -> None:
        self.model, self.device, self.dtype, self.visit = model, device, dtype, visit
        self.call = model if call is None else call
        for config in {
            id(c): c
            for module in model.modules()
            if (c := getattr(module, "config", None)) is not None
        }.values():
            if hasattr(config, "use_cache"):
                config.use_cache = False  # a block that is computed twice would cache twice
        self.units = units_of(model)
        self._plain = {name: unit.forward for name, unit in self.units.items()}
        self.gradients: Callable[[str, int, Tensor], None] | None = None
        self._anchor = torch.zeros((), requires_grad=True)
        self._current: _Batch | None = None
        self._keep = False
        inside = {id(module) for unit in self.units.values() for module in unit.modules()}
        outside = [module for module in model.modules() if id(module) not in inside]
        self._loose = [weight for module in outside for weight in module.parameters(recurse=False)]
        for module in outside:
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))

    def run(
        self,
        inputs: Sequence[dict[str, Tensor]],
        seed: Seed | None = None,
        wanted: Collection[str] = (),
        read: Read | None = None,
    ) -> None:
        """All batches forwards; with seed(batch, output) -> (tensor, its gradient) backwards as
        well.

        wanted names the modules whose gradients matter: what comes before the first of them is not
        differentiated. read(batch, output) sees what the model answers to each batch, where nothing
        is differentiated.
        """
        self._keep = seed is not None
        batches: list[_Batch] = []

        def forward(index: int) -> None:
            with torch.set_grad_enabled(self._keep):
                output = self.call(
                    **{key: value.to(self.device) for key, value in inputs[index].items()}
                )
                if seed is None:
                    if read is not None:
                        read(index, output)
                    return
                tensor, gradient = seed(index, output)
            del output
            torch.autograd.backward([tensor], [gradient], retain_graph=True)
            del tensor, gradient
            # The last unit still has its turn; its output (logits, as a rule) is too large to keep
            # for later.
            last = batches[index].calls.pop()
            self.visit("backward", last.unit, index, len(inputs))
            self._differentiate(last, index)

        batches += [_Batch(index, partial(forward, index)) for index in range(len(inputs))]
        with self._wrapped():
            self._forwards(batches)
        if seed is not None:
            self._backwards(batches, wanted)

    def turns(self, inputs: Sequence[dict[str, Tensor]]) -> Iterator[Turn]:
        """The units one after the other; who asks for the turns must send each on with `Turn.go`.
        Nothing is differentiated."""

        def forward(index: int) -> None:
            with torch.no_grad():
                self.call(**{key: value.to(self.device) for key, value in inputs[index].items()})

        self._keep = False
        batches = [_Batch(index, partial(forward, index)) for index in range(len(inputs))]
        with self._wrapped():
            yield from self._turns(batches)

    @contextmanager
    def _wrapped(self) -> Iterator[None]:
        for name, unit in self.units.items():
            unit.forward = self._turn_taking(name)
        try:
            with self._at_hand(self._loose):
                yield
        finally:
            for unit in self.units.values():
                del unit.forward  # the class's own again

    def _turn_taking(self, name: str) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            batch = self._current
            if batch is None:
                raise RuntimeError(f"{name} was called out of turn")
            batch.stop_before(name, args, kwargs)
            batch.arguments = ((), {})
            self._current = batch
            batch.result = self._call(batch, name, args, kwargs)
            return batch.result

        return forward

    def _call(self, batch: _Batch, name: str, args: Any, kwargs: Any) -> Any:
        """One unit of one batch, cut off from the graph around it, so that it can be differentiated
        on its own."""
        leaves, spec = tree_flatten((args, kwargs))
        inner = [_cut(leaf) for leaf in leaves]
        args, kwargs = tree_unflatten(inner, spec)
        with torch.no_grad():
            result = self._plain[name](*args, **kwargs)
        if not self._keep:
            return result
        outputs, out_spec = tree_flatten(result)
        outer = [
            leaf if isinstance(leaf, Tensor) and leaf.requires_grad else None for leaf in leaves
        ]
        kept = [_Gradient(out.detach()) for out in outputs if _differentiable(out)]
        call = _Call(name, inner, spec, outer, kept, _versions(inner))
        batch.calls.append(call)
        start: Callable[..., Tensor] = _Start.apply
        starts = iter([start(self._anchor, one) for one in kept])
        return tree_unflatten(
            [next(starts) if _differentiable(out) else out for out in outputs], out_spec
        )

    def _forwards(self, batches: Sequence[_Batch]) -> None:
        for turn in self._turns(batches):
            for batch in turn.batches:
                self.visit("forward", turn.name, batch.index, len(batches))
                self._advance(batch)
                batch.result = None
            self.visit("forward done", turn.name, len(batches), len(batches))

    def _turns(self, batches: Sequence[_Batch]) -> Iterator[Turn]:
        """Start all batches; again and again the unit that the first of them waits for, with all
        that wait for it."""
        threads = [threading.Thread(target=batch.body, daemon=True) for batch in batches]
        for thread in threads:
            thread.start()
        try:
            for batch in batches:
                self._advance(batch)
            while (
                name := next((b.waits_for for b in batches if b.waits_for is not None), None)
            ) is not None:
                waiting = [batch for batch in batches if batch.waits_for == name]
                with self._in_memory(name):
                    yield Turn(name, self.units[name], self._plain[name], waiting, self._advance)
        finally:
            for batch in batches:
                batch.abandoned = True
                batch.go.release()
            for thread in threads:
                thread.join()

    def _advance(self, batch: _Batch) -> None:
        self._current = batch
        batch.advance()

    def _backwards(self, batches: Sequence[_Batch], wanted: Collection[str]) -> None:
        order = [call.unit for call in batches[0].calls]
        inside = {
            name
            for name in order
            if any(target == name or target.startswith(f"{name}.") for target in wanted)
        }
        stop = next(
            (place for place, name in enumerate(order) if name in inside or not wanted), len(order)
        )
        for place in range(len(order) - 1, stop - 1, -1):
            name = order[place]
            with self._in_memory(name):
                for batch in batches:
                    self.visit("backward", name, batch.index, len(batches))
                    self._differentiate(batch.calls.pop(), batch.index)
            self.visit("backward done", name, len(batches), len(batches))

    def _differentiate(self, call: _Call, index: int) -> None:
        """Compute one unit again, this time with a graph, and hand the gradient on to what came
        before it."""
        gradients = [out.grad for out in call.outputs]
        if self.gradients is not None and gradients[0] is not None:
            self.gradients(call.unit, index, gradients[0])
        if all(gradient is None for gradient in gradients):
            return
        if call.versions != _versions(call.leaves):
            hint = "--no-gradients reads forwards alone"
            raise SvdcliError(
                f"the model changes what it gave to {call.unit}, which cannot be computed again",
                hint,
            )
        inner = [leaf.requires_grad_() if _differentiable(leaf) else leaf for leaf in call.leaves]
        args, kwargs = tree_unflatten(inner, call.spec)
        with torch.enable_grad():
            outputs = [
                out
                for out in tree_flatten(self._with_hooks(call.unit, args, kwargs))[0]
                if _differentiable(out)
            ]
        pairs = [
            (out, grad)
            for out, grad in zip(outputs, gradients, strict=True)
            if grad is not None and out.requires_grad
        ]
        torch.autograd.backward([out for out, _ in pairs], [grad for _, grad in pairs])
        onward = [
            (outer, leaf.grad)
            for outer, leaf in zip(call.outer, inner, strict=True)
            if outer is not None and leaf.grad is not None
        ]
        if onward:  # what lies between blocks may lead to several of them
            torch.autograd.backward(
                [outer for outer, _ in onward], [grad for _, grad in onward], retain_graph=True
            )

    def _with_hooks(self, name: str, args: Any, kwargs: Any) -> Any:
        """A unit as the model calls it, without waiting for its turn: a unit that is a layer itself
        has hooks of its own."""
        unit = self.units[name]
        waiting = unit.__dict__.get("forward")
        unit.forward = self._plain[name]
        try:
            return unit(*args, **kwargs)
        finally:
            del unit.forward
            if waiting is not None:
                unit.forward = waiting

    @contextmanager
    def _in_memory(self, name: str) -> Iterator[None]:
        """The unit's parameters and buffers on the device in the compute dtype, for as long as its
        turn lasts."""
        unit = self.units[name]
        with self._at_hand([*unit.parameters(), *unit.buffers()]):
            yield

    @contextmanager
    def _at_hand(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        stored = [(tensor, tensor.data) for tensor in tensors]
        for tensor, data in stored:
            tensor.data = data.to(
                self.device, self.dtype if data.is_floating_point() else data.dtype
            )
        try:
            yield
        finally:
            for tensor, data in stored:
                tensor.data = data


def first_tensor(result: Any) -> Tensor:
    """The first floating tensor in what a unit returns: a block's hidden states."""
    found: Tensor = next(leaf for leaf in tree_flatten(result)[0] if _differentiable(leaf))
    return found


def _versions(leaves: Sequence[Any]) -> list[int]:
    """How often each tensor was changed in place."""
    return [leaf._version for leaf in leaves if isinstance(leaf, Tensor)]


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _cut(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _detached(values: Any) -> Any:
    leaves, spec = tree_flatten(values)
    return tree_unflatten([_cut(leaf) for leaf in leaves], spec)
