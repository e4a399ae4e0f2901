"""Blocks that take turns, against the ordinary passes of the whole model."""

from __future__ import annotations

import itertools
import threading
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from zoo import albert

import svdcli
from svdcli.calibration.stream import Stream, first_tensor, units_of
from svdcli.errors import SvdcliError

CPU = torch.device("cpu")
Batch = dict[str, Tensor]
Written = Callable[[str], Path]
Compressed = Callable[..., Path]
State = dict[str, tuple[int, torch.dtype, Tensor]]


def quiet(*_: Any) -> None:
    """A visit that does nothing."""


def batches_of(inputs: Batch) -> list[Batch]:
    """The inputs; the same the other way round, partly padded where there is a mask; one row
    alone."""
    turned = {key: value.flip(0) for key, value in inputs.items()}
    if "attention_mask" in turned:
        turned["attention_mask"] = turned["attention_mask"].clone()
        turned["attention_mask"][0, -4:] = 0
    return [inputs, turned, {key: value[:1] for key, value in inputs.items()}]


def frozen(model: Any) -> Any:
    return model.requires_grad_(False).eval()


def build(family: str) -> Any:
    return frozen(zoo.FAMILIES[family].build())


def ends_of(family: str) -> Callable[[Any], Tensor]:
    """What of a model's output counts."""
    return lambda output: getattr(output, zoo.FAMILIES[family].answer)


def state_of(model: nn.Module) -> State:
    """Where every parameter and buffer lies, and what it holds."""
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    return {
        name: (tensor.data_ptr(), tensor.dtype, tensor.detach().clone()) for name, tensor in tensors
    }


def same_state(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(
        one[name][:2] == other[name][:2] and torch.equal(one[name][2], other[name][2])
        for name in one
    )


def upstream(answer: Tensor, index: int) -> Tensor:
    """The gradient that batch `index` begins with."""
    return torch.randn(answer.shape, generator=torch.Generator().manual_seed(index))


class Gradients:
    """What arrives at every linear layer's output, by layer and batch: one gradient for each call,
    the last call first."""

    def __init__(self, model: nn.Module) -> None:
        self.batch, self.phase = 0, "backward"
        self.found: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
                module.register_forward_hook(partial(self._hook, name))

    def _hook(self, name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if self.phase == "backward" and output.requires_grad:
            output.register_hook(partial(self._keep, (name, self.batch)))

    def _keep(self, key: tuple[str, int], gradient: Tensor) -> None:
        self.found[key].append(gradient.clone())

    def visit(self, phase: str, unit: str, batch: int, total: int) -> None:
        self.phase, self.batch = phase, batch


def in_one_piece(model: Any, batches: list[Batch], end: Callable[[Any], Tensor]) -> Gradients:
    """The gradients of ordinary backward passes."""
    gradients = Gradients(model.requires_grad_(True))
    for index, batch in enumerate(batches):
        gradients.batch = index
        answer = end(model(**batch))
        answer.backward(upstream(answer, index))
    return gradients


def in_turns(
    model: Any, batches: list[Batch], end: Callable[[Any], Tensor], wanted: tuple[str, ...] = ()
) -> Gradients:
    gradients = Gradients(model)
    gradients.phase = ""
    stream = Stream(model, CPU, torch.float32, gradients.visit)
    stream.run(batches, lambda index, output: (end(output), upstream(end(output), index)), wanted)
    return gradients


def assert_same(found: Gradients, expected: Gradients, layers: set[str] | None = None) -> None:
    keys = {key for key in expected.found if layers is None or key[0] in layers}
    assert keys
    assert keys == {key for key in found.found if layers is None or key[0] in layers}
    for key in keys:
        assert len(found.found[key]) == len(expected.found[key]), key
        for one, other in zip(found.found[key], expected.found[key], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))
            rows, others = one.flatten(0, -2), other.flatten(0, -2)
            sums = others.T @ others
            torch.testing.assert_close(
                rows.T @ rows, sums, rtol=1e-4, atol=1e-5 * float(sums.abs().max())
            )


# Units --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_units_hold_every_parameter_and_none_holds_another(family: str) -> None:
    model = build(family)
    units = units_of(model)
    assert {id(p) for unit in units.values() for p in unit.parameters()} == {
        id(p) for p in model.parameters()
    }
    assert all(model.get_submodule(name) is unit for name, unit in units.items())
    assert not any(
        one != other and f"{other}.".startswith(f"{one}.") for one in units for other in units
    )


def test_a_run_leaves_the_caches_of_the_model_as_they_were() -> None:
    model = build("llama")
    assert model.config.use_cache
    during: list[bool] = []
    Stream(model, CPU, torch.float32, lambda *_: during.append(model.config.use_cache)).run(
        batches_of(zoo.TEXT)
    )
    assert model.config.use_cache
    assert not any(during)


def belongings_of(model: nn.Module) -> dict[str, Any]:
    """All that a model holds besides its parameters: buffers, hooks, a forward pass of its own, its
    config."""
    held: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, buffer in module.named_buffers(recurse=False):
            held[f"{name}.{key}"] = id(buffer), buffer.device, buffer.dtype
        held[f"{name} hooks"] = [
            len(vars(module)[kind]) for kind in sorted(vars(module)) if kind.endswith("_hooks")
        ]
        held[f"{name} forward"] = vars(module).get("forward")
        config = getattr(module, "config", None)
        held[f"{name} config"] = config.to_dict() if hasattr(config, "to_dict") else config
    return held


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["llama", "t5", "bert", "vit"])
def test_what_a_model_holds_is_as_it_was_after_every_way_to_run_it(
    family: str, device: str
) -> None:
    model, end = build(family), ends_of(family)
    batches = batches_of(zoo.FAMILIES[family].inputs)
    block = next(unit for name, unit in units_of(model).items() if name.endswith(".1"))
    block.forward = block.forward  # as libraries do that wrap the pass of one module
    before, state = belongings_of(model), state_of(model)
    stream = Stream(model, torch.device(device), torch.float32)

    stream.run(batches)
    assert belongings_of(model) == before
    stream.run(batches, lambda index, output: (end(output), torch.ones_like(end(output))))
    assert belongings_of(model) == before
    for turn in stream.turns(batches):
        turn.send_on()
    assert belongings_of(model) == before
    left_early = stream.turns(batches)
    next(left_early).send_on()
    left_early.close()
    assert belongings_of(model) == before

    def fail(index: int, output: Any) -> None:
        raise TripError

    with pytest.raises(TripError):
        stream.run(batches, read=fail)
    assert belongings_of(model) == before
    assert same_state(state, state_of(model))


def test_a_buffer_that_the_model_replaces_meanwhile_stays_replaced() -> None:
    """As rotary frequencies are where they grow with the text."""

    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("frequencies", torch.ones(2))
            self.layer = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.register_buffer("frequencies", self.get_buffer("frequencies") + 1)
            return self.layer(x * self.get_buffer("frequencies"))

    model = frozen(Growing())
    Stream(model, CPU, torch.float32).run([{"x": torch.ones(3, 2)}] * 2)
    assert model.frequencies.tolist() == [3, 3]


def test_blocks_are_units_as_a_whole() -> None:
    assert list(units_of(build("llama"))) == [
        "model.embed_tokens",
        "model.layers.0",
        "model.layers.1",
        "model.norm",
        "lm_head",
    ]
    assert {"encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"} <= units_of(
        build("t5")
    ).keys()


def test_a_block_by_itself_is_a_unit_too() -> None:
    model = build("llama")
    del model.model.layers[1]
    units = list(units_of(model))
    assert units == ["model.embed_tokens", "model.layers.0", "model.norm", "lm_head"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert"])
def test_a_compressed_model_has_the_units_of_its_original(
    family: str, written: Written, compressed: Compressed
) -> None:
    names = list(units_of(svdcli.load(written(family))))
    assert list(units_of(svdcli.load(compressed(family)))) == names
    assert list(units_of(svdcli.load(compressed(family, "pivoted")))) == names


# Forwards -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_taking_turns_gives_the_model_s_answers(family: str) -> None:
    model, end, found = build(family), ends_of(family), {}
    batches = batches_of(zoo.FAMILIES[family].inputs)
    with torch.no_grad():
        expected = [end(model(**batch)).clone() for batch in batches]
    before = state_of(model)
    Stream(model, CPU, torch.float32, quiet).run(
        batches, read=lambda index, output: found.update({index: end(output)})
    )
    for index, answer in enumerate(expected):
        torch.testing.assert_close(found[index], answer, rtol=1e-6, atol=1e-6)
    assert same_state(before, state_of(model))
    with torch.no_grad():
        assert torch.equal(end(model(**batches[0])), expected[0])


@pytest.mark.parametrize("family", ["llama", "t5", "bert", "gpt2", "mixtral", "vit"])
def test_each_unit_has_one_turn_with_all_batches_in_it(family: str) -> None:
    visits: list[tuple[str, str, int]] = []
    model, end = build(family), ends_of(family)
    batches = batches_of(zoo.FAMILIES[family].inputs)
    stream = Stream(
        model,
        CPU,
        torch.float32,
        lambda phase, unit, batch, total: visits.append((phase, unit, batch)),
    )
    stream.run(batches, lambda index, output: (end(output), torch.zeros_like(end(output))))
    last = next(unit for phase, unit, _ in reversed(visits) if phase == "forward")
    for way in ("forward", "backward"):
        # The last unit is differentiated in its forward turn.
        turns = itertools.groupby((unit, batch) for phase, unit, batch in visits if phase == way)
        order = [key for key, _ in turns]
        units = [unit for unit, _ in itertools.groupby(order, key=lambda key: key[0])]
        assert len(units) == len(set(units))
        assert order == [(unit, batch) for unit in units for batch in range(3)]
        done = [unit for phase, unit, _ in visits if phase == f"{way} done"]
        assert done == [unit for unit in units if way == "forward" or unit != last]
    forwards, backwards = (
        list(dict.fromkeys(u for p, u, _ in visits if p == way)) for way in ("forward", "backward")
    )
    assert backwards == forwards[::-1]
    assert set(forwards) == units_of(model).keys() - {
        "shared"
    }  # T5 has it under other names as well


@pytest.mark.parametrize("family", ["llama", "llama-tied", "t5", "bert", "gpt2", "mixtral"])
def test_only_the_unit_whose_turn_it_is_is_converted(family: str, tmp_path: Path) -> None:
    path = zoo.save(family, tmp_path / "m", torch.bfloat16)
    model, whole, end = (
        frozen(svdcli.load(path)),
        frozen(svdcli.load(path, dtype=torch.float32)),
        ends_of(family),
    )
    odd, found, units = set(), {}, units_of(model)
    floating = [p for p in model.parameters() if p.is_floating_point()]

    def visit(phase: str, unit: str, batch: int, total: int) -> None:
        mine = {id(p) for p in units[unit].parameters()}
        if phase in ("forward", "backward"):
            odd.update(unit for p in floating if (p.dtype == torch.float32) != (id(p) in mine))

    def seed(index: int, output: Any) -> tuple[Tensor, Tensor]:
        found[index] = end(output).detach()
        return end(output), upstream(end(output), index)

    batches, before = batches_of(zoo.FAMILIES[family].inputs), state_of(model)
    assert {p.dtype for p in floating} == {torch.bfloat16}
    Stream(model, CPU, torch.float32, visit).run(batches, seed)
    assert not odd
    assert same_state(before, state_of(model))
    for index, batch in enumerate(batches):
        with torch.no_grad():
            torch.testing.assert_close(found[index], end(whole(**batch)), rtol=1e-5, atol=1e-5)


def test_a_turn_holds_what_the_unit_is_given_and_sends_on_what_it_answers(tmp_path: Path) -> None:
    model = frozen(svdcli.load(zoo.save("llama", tmp_path / "m", torch.bfloat16)))
    batches, before, names = batches_of(zoo.TEXT), state_of(model), []
    for turn in Stream(model, CPU, torch.float32, quiet).turns(batches):
        names.append(turn.name)
        with torch.no_grad():
            expected = [first_tensor(turn.call(*args, **kwargs)) for args, kwargs in turn.arguments]
        for one, other in zip(turn.send_on(keep=True), expected, strict=True):
            assert torch.equal(one, other)
    assert names == list(units_of(model))
    assert same_state(before, state_of(model))


# Backwards ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_gradients_at_every_layer_are_those_of_one_backward_pass(family: str) -> None:
    batches, end = batches_of(zoo.FAMILIES[family].inputs), ends_of(family)
    model = build(family)
    before = state_of(model)
    found, expected = in_turns(model, batches, end), in_one_piece(build(family), batches, end)
    assert_same(found, expected, {name for name, _ in expected.found} - units_of(model).keys())
    assert same_state(before, state_of(model))


@pytest.mark.parametrize("family", ["llama", "bert-classifier", "whisper"])
def test_a_layer_that_is_a_unit_itself_has_its_gradients_too(family: str) -> None:
    batches, end = batches_of(zoo.FAMILIES[family].inputs), ends_of(family)
    model = build(family)
    layers = {name for name, unit in units_of(model).items() if isinstance(unit, nn.Linear)}
    assert layers
    assert_same(in_turns(model, batches, end), in_one_piece(build(family), batches, end), layers)


@pytest.mark.parametrize("family", ["llama", "t5", "bert", "gpt2"])
def test_what_comes_before_the_wanted_layers_is_not_differentiated(family: str) -> None:
    batches, end = batches_of(zoo.FAMILIES[family].inputs), ends_of(family)
    expected = in_one_piece(build(family), batches, end)
    model = build(family)
    linear = list(dict.fromkeys(name for name, _ in expected.found))
    blocks = [
        name for name in units_of(model) if any(layer.startswith(f"{name}.") for layer in linear)
    ]
    layers = {name for name in linear if name.startswith(f"{blocks[-1]}.")}
    found = in_turns(model, batches, end, tuple(layers))
    assert_same(found, expected, layers)
    assert not any(layer.startswith(f"{blocks[0]}.") for layer, _ in found.found)


def test_the_gradients_of_a_compressed_model_are_those_of_one_backward_pass(
    compressed: Compressed,
) -> None:
    path, batches, end = compressed("llama", "pivoted"), batches_of(zoo.TEXT), ends_of("llama")
    found, expected = (
        in_turns(frozen(svdcli.load(path)), batches, end),
        in_one_piece(frozen(svdcli.load(path)), batches, end),
    )
    assert_same(found, expected, {name for name, _ in expected.found} - {"lm_head"})


class Block(nn.Module):
    """A linear layer inside a unit."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.linear = nn.Parameter(torch.tensor(1.5)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.linear(x)


class Odd(nn.Module):
    """Three blocks, and code between them of one shape or another."""

    def __init__(self, shape: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.shape = shape
        self.first, self.second, self.third = Block(), Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        if self.shape == "shared":
            bent = self.first(x).tanh()
            return self.third(bent * self.second(bent).exp()) * bent
        if self.shape == "again":
            return self.third(self.first(self.second(self.first(x).sin())))
        if self.shape == "in place":
            bent = self.first(x)
            bent *= 3
            return self.third(self.second(bent).relu_())
        if self.shape == "spoilt":
            bent = self.first(x)
            bent += self.second(bent)
            return self.third(bent)
        return self.third(self.second(self.second(self.first(x))))


def test_gradients_where_blocks_share_their_layers() -> None:
    batches = batches_of(zoo.TEXT)

    def end(output: Any) -> Tensor:
        return output.last_hidden_state

    assert_same(in_turns(albert(), batches, end), in_one_piece(albert(), batches, end))


@pytest.mark.parametrize("shape", ["shared", "again", "in a row", "in place"])
def test_gradients_through_any_code_between_the_blocks(shape: str) -> None:
    batches = [{"x": upstream(torch.empty(4, 5, 8), seed)} for seed in range(3)]
    expected = in_one_piece(Odd(shape), batches, lambda output: output)
    assert_same(in_turns(frozen(Odd(shape)), batches, lambda output: output), expected)


def test_a_block_whose_input_is_changed_afterwards_is_not_computed_again_from_that() -> None:
    batches = [{"x": upstream(torch.empty(4, 5, 8), 0)}]
    with pytest.raises(SvdcliError, match=r"changes what it gave to second.*--no-gradients"):
        in_turns(frozen(Odd("spoilt")), batches, lambda output: output)


class Around(nn.Module):
    """Blocks inside a module that owns a weight besides, as models of two towers do."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([2.0], dtype=torch.bfloat16))
        self.blocks = nn.ModuleList(nn.Linear(8, 8, dtype=torch.bfloat16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x * self.scale).tanh()
        return x


def test_a_weight_around_blocks_takes_no_turn_and_is_there_in_theirs() -> None:
    torch.manual_seed(0)
    model, whole = frozen(Around()), Around()
    whole.load_state_dict(model.state_dict())
    batches, before = (
        [{"x": upstream(torch.empty(4, 5, 8), seed)} for seed in range(2)],
        state_of(model),
    )
    assert list(units_of(model)) == ["blocks.0", "blocks.1", "blocks.2"]
    assert_same(
        in_turns(model, batches, lambda output: output),
        in_one_piece(whole.float(), batches, lambda output: output),
    )
    assert same_state(before, state_of(model))


# Errors -------------------------------------------------------------------------------------------


class TripError(Exception):
    """Raised on purpose."""


@pytest.mark.parametrize("error", [TripError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["forward", "backward", "unit", "between", "seed", "read"])
def test_an_error_in_one_batch_ends_all_threads_and_is_raised(
    where: str, error: type[BaseException], tmp_path: Path
) -> None:
    model = frozen(svdcli.load(zoo.save("llama", tmp_path / "m", torch.bfloat16)))
    block, found = model.model.layers[1], {}
    with torch.no_grad():
        plain, armed = model(**zoo.TEXT).logits, [True]

    def trip(*here: Any) -> None:
        if armed and where in here:
            raise error(where)

    def visit(phase: str, unit: str, batch: int, total: int) -> None:
        if (unit, batch) == ("model.layers.1", 1):
            trip(phase)

    def seed(index: int, output: Any) -> tuple[Tensor, Tensor]:
        trip("seed")
        return output.logits, torch.ones_like(output.logits)

    def read(index: int, output: Any) -> None:
        trip("read")
        found[index] = output.logits

    block.mlp.register_forward_hook(lambda module, inputs, output: trip("unit"))
    model.model.rotary_emb.register_forward_hook(lambda module, inputs, output: trip("between"))
    before, threads = state_of(model), set(threading.enumerate())
    stream = Stream(model, CPU, torch.float32, visit)
    with pytest.raises(error, match=where):
        stream.run(batches_of(zoo.TEXT), None if where == "read" else seed, read=read)
    assert set(threading.enumerate()) <= threads
    assert same_state(before, state_of(model))
    armed.clear()
    with torch.no_grad():
        assert torch.equal(model(**zoo.TEXT).logits, plain)
    stream.run(batches_of(zoo.TEXT), read=read)
    whole = svdcli.load(tmp_path / "m", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(
            found[2], whole(**batches_of(zoo.TEXT)[2]).logits, rtol=1e-5, atol=1e-5
        )


def test_turns_that_are_left_early_end_all_threads() -> None:
    model, threads = build("llama"), set(threading.enumerate())
    with torch.no_grad():
        plain = model(**zoo.TEXT).logits
    turns = Stream(model, CPU, torch.float32, quiet).turns(batches_of(zoo.TEXT))
    next(turns).send_on()
    turns.close()
    assert set(threading.enumerate()) <= threads
    with torch.no_grad():
        assert torch.equal(model(**zoo.TEXT).logits, plain)
