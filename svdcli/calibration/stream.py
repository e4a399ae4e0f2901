"""Run a model over many batches one block at a time, forwards and, where asked, backwards.

Every batch's forward pass runs in a thread of its own that stops where the next block begins; the
blocks take their turns, each with its weights in memory once for all batches. That works for any
architecture, since the code between the blocks is the model's own. Backwards, every block is
computed again from its kept inputs. Memory follows the largest block and the hidden states between
blocks, not the model, whose stored weights stay in the file until their turn. Where hidden states
are more than a card holds, they wait on the host, and each batch is brought to its block and back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from svdcli.errors import SvdcliError
from svdcli.models.modules import LOW_RANK, PackedLinear

Visit = Callable[[str, str, int, int], None]
Gradients = Callable[[str, int, Tensor], None]
Cotangent = Callable[[int, Any], tuple[Tensor, Tensor]]
Read = Callable[[int, Any], None]


def _ignore(phase: str, unit: str, batch: int, total: int) -> None:
    """Do nothing on a visit."""


@contextmanager
def caches_off(model: nn.Module) -> Iterator[None]:
    """Let no part of the model keep keys and values for later: a block that is computed twice would
    cache twice. Afterwards every config is as it was."""
    # By identity, since parts of a model may share a config, and configs cannot be hashed
    configs: dict[int, Any] = {}
    for part in model.modules():
        config: Any = getattr(part, "config", None)
        if hasattr(config, "use_cache"):
            configs[id(config)] = config
    before = [(config, config.use_cache) for config in configs.values()]
    for config in configs.values():
        config.use_cache = False
    try:
        yield
    finally:
        for config, value in before:
            config.use_cache = value


def units_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that take turns, by name: the members of every list of blocks, and all
    modules outside them that own parameters.

    A module around blocks that owns some besides (a scale, a token) takes no turn of its own. A
    compressed model has the same units as its original: a low-rank or packed module counts as the
    layer that it stands for.
    """
    units: dict[str, nn.Module] = {}

    def walk(name: str, module: nn.Module) -> None:
        # A unit: what owns parameters, unless there are blocks in it
        owns = next(module.parameters(recurse=False), None) is not None
        around_blocks = any(map(_is_list_of_blocks, module.modules()))
        compressed = isinstance(module, (*LOW_RANK, PackedLinear))
        if compressed or (owns and not around_blocks):
            units[name] = module
            return

        # Blocks are units as a whole; everything else is looked into
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
    """Tell whether it is a list of modules, with parameters."""
    return isinstance(module, nn.ModuleList) and next(module.parameters(), None) is not None


@dataclass
class _Gradient:
    """The gradient that arrives at one output of a unit; value is the output itself, until it is
    handed on."""

    value: Tensor | None
    grad: Tensor | None = None


class _Start(torch.autograd.Function):
    """Where the code after a unit begins to be differentiated: the unit's output, as something that
    may be changed in place."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, kept: _Gradient) -> Tensor | None:
        # anchor requires a gradient: without such an argument autograd would not come back here
        ctx.kept = kept
        value = kept.value
        kept.value = None
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        kept = ctx.kept
        kept.grad = gradient if kept.grad is None else kept.grad + gradient
        return None, None


@dataclass
class _Call:
    """One pass of one batch through one unit: what went in and came out, and how the code around it
    is differentiated.

    leaves and spec are its arguments, flattened and cut off from the graph; outer has, for each of
    them, the tensor in the graph before the unit, None where nothing is differentiated there.
    outputs are what came out; versions tell whether an argument was changed in place later.
    """

    unit: str
    leaves: list[Any]
    spec: Any
    outer: list[Tensor | None]
    outputs: list[_Gradient]
    versions: list[int]


@dataclass
class _Batch:
    """A forward pass, in a thread of its own, that can be stopped and continued. Only one runs at
    any time."""

    index: int
    forward: Callable[[], None]
    calls: list[_Call] = field(default_factory=list)
    waits_for: str | None = None
    arguments: tuple[Any, Any] = ((), {})
    result: Any = None
    error: BaseException | None = None
    resumed: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    stopped: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    abandoned: bool = False

    def body(self) -> None:
        """Run the forward pass, in the thread, once the batch is resumed."""
        try:
            self.resumed.acquire()
            if not self.abandoned:
                self.forward()
        except BaseException as error:
            self.error = error  # raised again where the batch was continued
        self.waits_for = None
        self.stopped.release()

    def advance(self) -> None:
        """Continue until the next unit begins, or to the end. Raises what the forward pass
        raised."""
        self.resumed.release()
        self.stopped.acquire()
        if self.error is not None:
            raise self.error

    def stop_before(self, unit: str, args: Any, kwargs: Any) -> None:
        """Wait, in the thread, until the batch is continued. Raises _AbandonedError where it never
        will be."""
        self.waits_for = unit
        self.arguments = (args, kwargs)
        self.stopped.release()
        self.resumed.acquire()
        self.waits_for = None
        if self.abandoned:
            raise _AbandonedError

    def abandon(self) -> None:
        """End the thread, wherever it stands."""
        self.abandoned = True
        self.resumed.release()


class _AbandonedError(BaseException):
    """Ends the threads that are still waiting after an error in another one."""


@dataclass
class Turn:
    """One unit, in memory, and the batches that wait before it. call is its forward pass without
    waiting, to be called on arguments of one's own, wherever they lie; what it returns is where the
    unit is."""

    name: str
    unit: nn.Module
    call: Callable[..., Any]
    batches: list[_Batch]
    advance: Callable[[_Batch], None]

    @property
    def arguments(self) -> list[tuple[Any, Any]]:
        """(args, kwargs) of the unit for every batch, cut off from the graph that made them."""
        return [_detached(batch.arguments) for batch in self.batches]

    def send_on(self, *, keep: bool = False) -> list[Tensor]:
        """Send every batch through the unit, as far as the next one; with keep, return what came
        out of it (its first tensor)."""
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

    states_on is where hidden states wait between the blocks, and where the code between them runs;
    None for the same device. Outputs, and what read and cotangent see, are there.
    visit(phase, unit, batch, batches) is called before every unit of every batch with phase
    "forward" or "backward", and with phase "done" when all batches are through a unit ("forward
    done", "backward done"). call is what is called with each batch, if not the whole model.
    gradients(unit, batch, gradient) gets the gradient at what each unit sends on. Between runs the
    model is as it was: parameters, buffers, configs and forward passes.
    """

    def __init__(
        self,
        model: Any,
        device: torch.device,
        dtype: torch.dtype,
        visit: Visit = _ignore,
        call: Callable[..., Any] | None = None,
        gradients: Gradients | None = None,
        states_on: torch.device | None = None,
    ) -> None:
        self.model = model
        self.device = device
        self.states_on = device if states_on is None else states_on
        self.dtype = dtype
        self.visit = visit
        self.call = model if call is None else call
        self.units = units_of(model)
        self.gradients = gradients

        # The units' own forward passes, and the modules that belong to no unit
        self._plain = {name: unit.forward for name, unit in self.units.items()}
        inside: set[int] = set()
        for unit in self.units.values():
            inside |= {id(module) for module in unit.modules()}
        self._outside = [module for module in model.modules() if id(module) not in inside]

        # The state of a run
        self._anchor = torch.zeros((), requires_grad=True)
        self._current: _Batch | None = None
        self._keep_calls = False

    def run(
        self,
        inputs: Sequence[dict[str, Tensor]],
        cotangent: Cotangent | None = None,
        wanted: Collection[str] = (),
        read: Read | None = None,
        visit: Visit | None = None,
    ) -> None:
        """Run all batches forwards; with cotangent(batch, output) -> (tensor, its gradient)
        backwards as well. visit, where it is given, takes the place of the stream's own for this
        run.

        wanted names the modules whose gradients matter: what comes before the first of them is not
        differentiated. read(batch, output) sees what the model answers to each batch, where nothing
        is differentiated.
        """
        self._keep_calls = cotangent is not None
        visit = self.visit if visit is None else visit
        batches: list[_Batch] = []

        def forward(index: int) -> None:
            with torch.set_grad_enabled(cotangent is not None):
                output = self.call(**self._by_states(inputs[index]))
                if cotangent is None:
                    if read is not None:
                        read(index, output)
                    return
                tensor, gradient = cotangent(index, output)

            # What follows the last unit is differentiated at once, and let go
            del output
            torch.autograd.backward([tensor], [gradient], retain_graph=True)
            del tensor, gradient

            # The last unit still has its turn; its output (logits, as a rule) is too large to keep
            # for later.
            last = batches[index].calls.pop()
            visit("backward", last.unit, index, len(inputs))
            self._differentiate(last, index)

        batches += [_Batch(index, partial(forward, index)) for index in range(len(inputs))]
        with caches_off(self.model), self._outside_by_states():
            with self._taking_turns():
                self._forwards(batches, visit)
            if cotangent is not None:
                self._backwards(batches, wanted, visit)

    def turns(self, inputs: Sequence[dict[str, Tensor]]) -> Iterator[Turn]:
        """Yield the units one after the other; the caller must send each on with `Turn.send_on`.
        Nothing is differentiated."""

        def forward(index: int) -> None:
            with torch.no_grad():
                self.call(**self._by_states(inputs[index]))

        self._keep_calls = False
        batches = [_Batch(index, partial(forward, index)) for index in range(len(inputs))]
        with caches_off(self.model), self._outside_by_states(), self._taking_turns():
            yield from self._turns(batches)

    def _by_states(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: value.to(self.states_on) for key, value in inputs.items()}

    @contextmanager
    def _taking_turns(self) -> Iterator[None]:
        """Have every unit wait for its turn before it runs."""
        with ExitStack() as stack:
            for name, unit in self.units.items():
                stack.enter_context(_forward_replaced(unit, self._turn_taking(name)))
            yield

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
        """Run one unit of one batch, cut off from the graph around it, so that it can be
        differentiated on its own."""
        # Without a graph: where gradients are wanted, the unit is computed again for them
        leaves, spec = tree_flatten((args, kwargs))
        inner = [_detach(leaf) for leaf in leaves]
        args, kwargs = tree_unflatten(inner, spec)
        with torch.no_grad():
            outputs, out_spec = tree_flatten(self._here(name)(*args, **kwargs))
        outputs = [_moved(out, self.states_on) for out in outputs]
        if not self._keep_calls:
            return tree_unflatten(outputs, out_spec)

        # Notes for the way back: what went in, and a place for the gradient of each output
        outer: list[Tensor | None] = []
        for leaf in leaves:
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                outer.append(leaf)
            else:
                outer.append(None)
        kept = [_Gradient(out.detach()) for out in outputs if _differentiable(out)]
        batch.calls.append(_Call(name, inner, spec, outer, kept, _versions(inner)))

        # The outputs anew, each at the beginning of the graph of what follows
        start: Callable[..., Tensor] = _Start.apply
        starts = iter([start(self._anchor, output) for output in kept])
        onward = [next(starts) if _differentiable(out) else out for out in outputs]
        return tree_unflatten(onward, out_spec)

    def _here(self, name: str) -> Callable[..., Any]:
        """Return a unit's forward pass, with its arguments brought to where the unit is."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            leaves, spec = tree_flatten((args, kwargs))
            args, kwargs = tree_unflatten([_moved(leaf, self.device) for leaf in leaves], spec)
            return self._plain[name](*args, **kwargs)

        return forward

    def _forwards(self, batches: Sequence[_Batch], visit: Visit) -> None:
        for turn in self._turns(batches):
            for batch in turn.batches:
                visit("forward", turn.name, batch.index, len(batches))
                self._advance(batch)
                batch.result = None
            visit("forward done", turn.name, len(batches), len(batches))

    def _turns(self, batches: Sequence[_Batch]) -> Iterator[Turn]:
        """Start all batches, and yield again and again the unit that the first of them waits for,
        with all that wait for it."""
        threads = [threading.Thread(target=batch.body, daemon=True) for batch in batches]
        for thread in threads:
            thread.start()
        try:
            for batch in batches:
                self._advance(batch)
            while True:
                waiting = [batch for batch in batches if batch.waits_for is not None]
                if not waiting:
                    break
                name = str(waiting[0].waits_for)
                waiting = [batch for batch in waiting if batch.waits_for == name]
                with self._in_memory(name):
                    yield Turn(name, self.units[name], self._here(name), waiting, self._advance)
        finally:  # those that have ended already do not mind
            for batch in batches:
                batch.abandon()
            for thread in threads:
                thread.join()

    def _advance(self, batch: _Batch) -> None:
        self._current = batch
        batch.advance()

    def _backwards(self, batches: Sequence[_Batch], wanted: Collection[str], visit: Visit) -> None:
        """Differentiate from the last unit to the first that holds a wanted module."""
        order = [call.unit for call in batches[0].calls]
        first = 0
        if wanted:
            while first < len(order) and not _holds_any(order[first], wanted):
                first += 1
        for name in reversed(order[first:]):
            with self._in_memory(name):
                for batch in batches:
                    visit("backward", name, batch.index, len(batches))
                    self._differentiate(batch.calls.pop(), batch.index)
            visit("backward done", name, len(batches), len(batches))

    def _differentiate(self, call: _Call, index: int) -> None:
        """Compute one unit again, this time with a graph, and hand the gradient on to what came
        before it."""
        # The gradients that the code after the unit left; without any there is nothing to do
        gradients = [_moved(out.grad, self.device) for out in call.outputs]
        if self.gradients is not None and gradients[0] is not None:
            self.gradients(call.unit, index, gradients[0])
        if all(gradient is None for gradient in gradients):
            return
        if call.versions != _versions(call.leaves):
            raise SvdcliError(
                f"the model changes what it gave to {call.unit}, which cannot be computed again",
                "--no-gradients reads forwards alone",
            )

        # The unit once more, from its kept inputs, with hooks and a graph
        inner = [_moved(leaf, self.device) for leaf in call.leaves]
        inner = [leaf.requires_grad_() if _differentiable(leaf) else leaf for leaf in inner]
        args, kwargs = tree_unflatten(inner, call.spec)
        with torch.enable_grad():
            result = self._with_hooks(call.unit, args, kwargs)

        # Backwards through the unit: its hooks see gradients now, and its inputs get theirs
        outputs = [out for out in tree_flatten(result)[0] if _differentiable(out)]
        ends: list[Tensor] = []
        end_gradients: list[Tensor] = []
        for out, gradient in zip(outputs, gradients, strict=True):
            if gradient is not None and out.requires_grad:
                ends.append(out)
                end_gradients.append(gradient)
        torch.autograd.backward(ends, end_gradients)

        # On through the code before the unit, to the outputs of the units that it reads
        sources: list[Tensor] = []
        source_gradients: list[Tensor] = []
        for outer, leaf in zip(call.outer, inner, strict=True):
            if outer is not None and leaf.grad is not None:
                sources.append(outer)
                source_gradients.append(_moved(leaf.grad, self.states_on))
        if sources:  # what lies between blocks may lead to several of them
            torch.autograd.backward(sources, source_gradients, retain_graph=True)

    def _with_hooks(self, name: str, args: Any, kwargs: Any) -> Any:
        """Call a unit as the model does, without waiting for its turn: a unit that is a layer
        itself has hooks of its own."""
        unit = self.units[name]
        with _forward_replaced(unit, self._plain[name]):
            return unit(*args, **kwargs)

    @contextmanager
    def _in_memory(self, name: str) -> Iterator[None]:
        """Keep the unit's parameters and buffers on the device in the compute dtype, for as long as
        its turn lasts."""
        unit = self.units[name]
        tensors = [*unit.parameters(), *unit.buffers()]
        with self._cast(tensors, self.device, _computed_once(unit)):
            yield

    @contextmanager
    def _cast(
        self, tensors: Sequence[Tensor], device: torch.device, exact: Collection[int] = ()
    ) -> Iterator[None]:
        """Keep tensors on that device, floating ones in the compute dtype; those whose identities
        are in `exact` lose no digits."""
        stored = [(tensor, tensor.data) for tensor in tensors]
        for tensor, data in stored:
            dtype = self.dtype if data.is_floating_point() else data.dtype
            if id(tensor) in exact and data.is_floating_point():
                dtype = torch.promote_types(dtype, data.dtype)
            tensor.data = data.to(device, dtype)
        try:
            yield
        finally:
            for tensor, data in stored:
                tensor.data = data

    @contextmanager
    def _outside_by_states(self) -> Iterator[None]:
        """Keep what lies outside all units where hidden states wait, for a whole run: parameters in
        the compute dtype, buffers (such as rotary frequencies) in their own."""
        parameters: list[Tensor] = []
        with ExitStack() as stack:
            for module in self._outside:
                parameters += module.parameters(recurse=False)
                for name, buffer in module.named_buffers(recurse=False):
                    stack.enter_context(_buffer_moved(module, name, buffer, self.states_on))
            with self._cast(parameters, self.states_on):
                yield


def _computed_once(unit: nn.Module) -> set[int]:
    """Return the identities of buffers that a model computes when it is built and does not store:
    rotary frequencies lose their meaning in 16 bits."""
    found: set[int] = set()
    for module in unit.modules():
        for name in module._non_persistent_buffers_set:
            found.add(id(module._buffers.get(name)))
    return found


@contextmanager
def _forward_replaced(unit: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Have calls of a module go to `forward` as long as the context lasts."""
    before = vars(unit).get("forward")
    unit.forward = forward
    try:
        yield
    finally:
        del unit.forward  # the class's own again
        if before is not None:
            unit.forward = before


@contextmanager
def _buffer_moved(
    module: nn.Module, name: str, buffer: Tensor, device: torch.device
) -> Iterator[None]:
    """Keep a module's buffer on another device as long as the context lasts. Where the model put
    another one there meanwhile (rotary frequencies for longer text), that one stays."""
    moved = buffer.to(device)
    setattr(module, name, moved)
    try:
        yield
    finally:
        present = getattr(module, name)
        if present is not moved:
            buffer = present.to(buffer.device)
        setattr(module, name, buffer)


def first_tensor(result: Any) -> Tensor:
    """Return the first floating tensor in what a unit returns: a block's hidden states."""
    first: Tensor = next(leaf for leaf in tree_flatten(result)[0] if _differentiable(leaf))
    return first


def _holds_any(unit: str, modules: Collection[str]) -> bool:
    """Tell whether any of these modules is the unit itself, or inside it."""
    return any(name == unit or name.startswith(f"{unit}.") for name in modules)


def _versions(leaves: Sequence[Any]) -> list[int]:
    """Return how often each tensor was changed in place."""
    return [leaf._version for leaf in leaves if isinstance(leaf, Tensor)]


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _moved(value: Any, device: torch.device) -> Any:
    """Return a tensor on another device: from a card into pinned memory, from where it goes back
    without a detour. Anything else as it is."""
    if not isinstance(value, Tensor) or value.device == device:
        return value
    if value.device.type == "cuda" and device.type == "cpu":
        return torch.empty_like(value, device=device, pin_memory=True).copy_(value)
    return value.to(device, non_blocking=True)


def _detach(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _detached(values: Any) -> Any:
    leaves, spec = tree_flatten(values)
    return tree_unflatten([_detach(leaf) for leaf in leaves], spec)
