"""Products with few-bit integers: those of torch answer as the unpacked matrix does, whatever the
sizes; integers stay one copy, and are the stored ones for whoever asks."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import Finished, run_code
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from svdcli.linalg.codes import pack_int4
from svdcli.models import kernels, modules
from svdcli.models.kernels import KernelCodes, Order
from svdcli.models.modules import PackedLinear

# By what torch has, and not by whether its order is known here, which is to be tested
HAS_ORDER = hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu")
needs_order = pytest.mark.skipif(not HAS_ORDER, reason="this torch has no product with four bits")
BFLOAT16 = torch.bfloat16


def layer(
    n: int, m: int, bits: int, group: int = 32, dtype: torch.dtype = BFLOAT16
) -> PackedLinear:
    """A packed layer of random integers and scales."""
    generator = torch.Generator().manual_seed(n * m)
    packed = PackedLinear(n, m, bits, group, bias=False, dtype=dtype)
    groups = 1 if bits == 8 else -(-n // group)
    scales = (torch.rand(m, groups, generator=generator) + 0.5).to(dtype) / 2**bits
    if bits == 8:
        codes = torch.randint(-127, 128, (m, n), generator=generator, dtype=torch.int8)
        state = {"weight": codes, "weight_scale": scales}
    else:
        codes = torch.randint(-8, 8, (m, n), generator=generator, dtype=torch.int8)
        words = pack_int4(codes)
        state = {"weight_packed": words, "weight_scale": scales}
        state["weight_shape"] = torch.tensor([m, n])
    packed.load_state_dict(state, assign=True)
    return packed


def inputs(rows: int, n: int) -> Tensor:
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(n)).to(BFLOAT16)


def used(packed: PackedLinear) -> PackedLinear:
    """The layer after it has multiplied few rows twice, which is when it changes its order."""
    x = inputs(2, packed.in_features)
    with torch.inference_mode():
        for _ in range(2):
            packed(x)
    return packed


def near(y: Tensor, expected: Tensor) -> None:
    assert (y.double() - expected).norm() <= 0.01 * expected.norm()


# Four bits in the order of torch's product --------------------------------------------------------


SIZES = [(64, 64), (96, 100), (40, 17), (128, 240), (1, 1), (100, 48), (33, 500), (300, 31)]


@needs_order
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_four_bits_multiply_as_their_matrix_does(
    n: int, m: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = layer(n, m, 4, group)
    w = packed.rows(0, m).double()
    x = torch.stack((inputs(3, n), -inputs(3, n)))
    packed = used(packed)
    assert isinstance(packed.held, KernelCodes)
    with torch.inference_mode():
        near(packed(x), x.double() @ w.T)
        near(packed(inputs(70, n)), inputs(70, n).double() @ w.T)
        monkeypatch.setattr(kernels, "unordered", lambda *_: pytest.fail("unpacked"))
        packed(x)


@needs_order
@pytest.mark.parametrize("numbers", [1, 5000])
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_words_and_rows_come_back(
    n: int, m: int, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "NUMBERS_AT_ONCE", numbers)
    before = layer(n, m, 4)
    after = used(layer(n, m, 4))
    assert isinstance(after.held, KernelCodes)
    assert torch.equal(after.codes, before.codes)
    for start, stop in [(0, m), (m // 3, m // 2 + 1), (m - 1, m)]:
        assert torch.equal(after.rows(start, stop), before.rows(start, stop))


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("block", [16, 32, 64])
def test_another_order_is_not_taken_for_this_one(block: int, halves: bool) -> None:
    order = kernels.kernel_order()
    found = all(kernels._is_order(Order(block, halves), rows) for rows in (16, 64, 96))
    assert found == (order == Order(block, halves))


def test_the_bits_that_fill_the_last_word_are_kept() -> None:
    packed = layer(36, 20, 4)
    words = packed.codes.clone()
    words[:, -1] |= 0x7 << 20  # behind the last column
    packed._buffers["weight_packed"] = words
    x = inputs(2, 36)
    expected = x.double() @ layer(36, 20, 4).rows(0, 20).double().T
    assert torch.equal(used(packed).codes, words)
    near(packed(x), expected)


@pytest.mark.parametrize(
    ("n", "group", "dtype"), [(64, 24, BFLOAT16), (64, 32, torch.float32), (64, 512, BFLOAT16)]
)
def test_what_torch_has_no_product_for_stays_as_it_is(
    n: int, group: int, dtype: torch.dtype
) -> None:
    packed = layer(n, 40, 4, group, dtype)
    x = inputs(3, n).to(dtype)
    for _ in range(3):
        near(packed(x), x.double() @ packed.rows(0, 40).double().T)
    assert not isinstance(packed.held, KernelCodes)


def test_without_a_product_of_torch_layers_are_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "kernel_order", lambda: None)
    packed = used(layer(64, 40, 4))
    assert not isinstance(packed.held, KernelCodes)


# One copy -----------------------------------------------------------------------------------------


@needs_order
def test_memory_holds_the_integers_once() -> None:
    packed = used(layer(256, 512, 4, 64))
    held = packed.held
    assert isinstance(held, KernelCodes)
    numbers = held.packed.untyped_storage().nbytes()
    scales = packed.scales.untyped_storage()
    assert numbers == 256 * 512 // 2
    assert scales.data_ptr() == held.scales_and_zeros.untyped_storage().data_ptr()
    stored = 256 * 512 // 2 + 2 * 512 * 4
    assert numbers + scales.nbytes() <= 1.15 * stored
    assert sum(buffer.nbytes for buffer in packed.buffers()) == stored + 16


WAYS: dict[str, Callable[[PackedLinear], PackedLinear]] = {
    "copied": copy.deepcopy,
    "to": lambda packed: packed.to("cpu"),
    "loaded": lambda packed: (packed.load_state_dict(layer(64, 48, 4).state_dict()), packed)[1],
    "moved": lambda packed: packed.moved(torch.device("cpu")),
}


@needs_order
@pytest.mark.parametrize("way", WAYS)
def test_who_asks_gets_what_is_stored(way: str) -> None:
    fresh = layer(64, 48, 4)
    packed = WAYS[way](used(layer(64, 48, 4)))
    for name, tensor in packed.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name])
        assert tensor.is_contiguous()
        assert type(tensor) is Tensor
    near(used(packed)(inputs(1, 64)), inputs(1, 64).double() @ fresh.rows(0, 48).double().T)


@needs_order
def test_it_is_saved_as_it_is_stored() -> None:
    fresh, packed = layer(64, 48, 4), used(layer(64, 48, 4))
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again.codes, fresh.codes)
    assert isinstance(packed.held, KernelCodes)
    packed.float()
    assert packed.scales.dtype == torch.float32
    assert torch.equal(packed.codes, fresh.codes)


@needs_order
def test_other_scales_count_from_then_on() -> None:
    packed = used(layer(64, 48, 4))
    w = packed.rows(0, 48).double()
    packed._buffers["weight_scale"] = 2 * packed.scales
    near(packed(inputs(2, 64)), 2 * inputs(2, 64).double() @ w.T)
    near(used(packed)(inputs(2, 64)), 2 * inputs(2, 64).double() @ w.T)


def test_what_comes_anew_for_each_call_keeps_its_order() -> None:
    """As layers do that wait on a disk."""
    packed = layer(64, 48, 4)
    for _ in range(3):
        packed._buffers["weight_packed"] = packed.codes.clone()
        packed(inputs(1, 64))
        assert not isinstance(packed.held, KernelCodes)


# Eight bits ---------------------------------------------------------------------------------------


def test_integers_that_are_not_aligned_are_moved_once() -> None:
    packed = layer(64, 30, 8)
    w = packed.rows(0, 30).double()
    room = torch.empty(64 * 30 + 1, dtype=torch.int8)
    packed._buffers["weight"] = room[1:].view(30, 64).copy_(packed.codes)
    assert packed.codes.data_ptr() % 16
    near(used(packed)(inputs(2, 64)), inputs(2, 64).double() @ w.T)
    assert packed.codes.data_ptr() % 16 == 0
    held = packed.held
    assert used(packed).held is held


def test_mapped_integers_are_multiplied(tmp_path: Path) -> None:
    """A file whose integers begin anywhere, mapped as safetensors maps it."""
    for bits in (8, 4):
        fresh = layer(96, 80, bits)
        tensors = {"first": torch.zeros(3, dtype=torch.int8), **fresh.state_dict()}
        save_file(tensors, tmp_path / "m.safetensors")
        mapped = load_file(tmp_path / "m.safetensors")
        packed = layer(96, 80, bits)
        for name in fresh.state_dict():
            packed._buffers[name] = mapped[name]
        near(used(packed)(inputs(4, 96)), inputs(4, 96).double() @ fresh.rows(0, 80).double().T)
        assert torch.equal(packed.codes, fresh.codes)
        assert torch.equal(mapped["weight" if bits == 8 else "weight_packed"], fresh.codes)


HOSTILE = """
import torch
from svdcli.models.modules import PackedLinear
for bits in (8, 4):
    for n in (1, 15, 16, 17, 32, 33, 64, 100, 1003):
        for m in (1, 15, 17, 64, 129):
            layer = PackedLinear(n, m, bits, 64, bias=False, dtype=torch.bfloat16)
            for name, buffer in layer._buffers.items():
                room = torch.zeros(buffer.numel() + 1, dtype=buffer.dtype)
                layer._buffers[name] = room[1:].view(buffer.shape)
            for rows in (0, 1, 2, 9, 33):
                x = torch.ones(rows * n + 1, dtype=torch.bfloat16)[1:].view(rows, n)
                strided = torch.ones(n, rows, dtype=torch.bfloat16).T
                with torch.inference_mode():
                    for given in (x, x, strided, x[:1].expand(3, n) if rows else x):
                        y = layer(given)
                        assert y.shape == (*given.shape[:-1], m) and not y.any()
print("alive")
"""


def run_on(capability: str, code: str, folder: Path) -> Finished:
    """Run code as on a processor of that capability, which torch asks for once in a process."""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    line = [sys.executable, "-c", code]
    done = subprocess.run(
        line, cwd=folder, env=environment, capture_output=True, timeout=120, check=False
    )
    return Finished(done.returncode, done.stdout, done.stderr.decode())


@pytest.mark.parametrize("capability", ["default", "avx2", None])
def test_no_sizes_end_the_process(capability: str | None, tmp_path: Path) -> None:
    if capability is None:
        done = run_code(HOSTILE, folder=tmp_path)
    else:
        done = run_on(capability, HOSTILE, tmp_path)
    assert (done.code, done.out.strip()) == (0, b"alive"), done.err


@needs_order
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_orders_of_other_processors(capability: str, tmp_path: Path) -> None:
    code = (
        "import torch; from svdcli.models.kernels import kernel_order; "
        "print(kernel_order(), torch.backends.cpu.get_cpu_capability())"
    )
    done = run_on(capability, code, tmp_path)
    assert done.out.split()[-1].decode().lower() == capability
    assert done.out.startswith(b"Order("), done.err


# Compilers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
def test_a_compiled_layer_is_one_graph_for_all_of_its_forms(bits: int) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    packed = layer(64, 48, bits)
    w = packed.rows(0, 48).double()
    compiled = torch.compile(packed, backend=backend, fullgraph=True)
    with torch.inference_mode():
        for _ in range(3):
            near(compiled(inputs(2, 64)), inputs(2, 64).double() @ w.T)
    assert len(graphs) == 1
    assert isinstance(packed.held, KernelCodes) == (bits == 4 and HAS_ORDER)


def test_layers_that_are_alike_share_a_graph() -> None:
    graphs: list[object] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    layers = [layer(64, 48, 8) for _ in range(4)]
    layers[-1].codes.neg_()
    x = inputs(2, 64)
    with torch.inference_mode():
        answers = []
        for packed in layers:
            packed.compile(backend=backend, fullgraph=True)
            answers.append(packed(x))
    assert torch.equal(answers[0], -answers[-1])
    assert len(graphs) == 1


@pytest.mark.parametrize("bits", [8, 4])
def test_a_compiled_layer_has_a_way_back(bits: int) -> None:
    packed = used(layer(64, 48, bits))
    x = inputs(5, 64).requires_grad_()
    torch.compile(packed, backend="aot_eager", fullgraph=True)(x).sum().backward()
    assert x.grad is not None
    near(x.grad, packed.rows(0, 48).double().sum(0).expand(5, 64))


@pytest.mark.parametrize("bits", [8, 4])
def test_exporters_see_operators_of_torch_alone(bits: int) -> None:
    packed = used(layer(64, 48, bits))
    exported = torch.export.export(packed, (inputs(5, 64),))
    names = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert names
    assert all(name.startswith("aten.") for name in names)
    near(exported.module()(inputs(5, 64)), packed(inputs(5, 64)).double())


def test_a_copy_is_another_layer_for_compilers() -> None:
    first = nn.Sequential(layer(64, 48, 8))
    second = copy.deepcopy(first)
    second[0].scales.mul_(2)
    first.compile(backend="eager", fullgraph=True)
    second.compile(backend="eager", fullgraph=True)
    with torch.inference_mode():
        assert torch.equal(2 * first(inputs(1, 64)), second(inputs(1, 64)))


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
def test_a_processor_without_16_bit_instructions_multiplies_in_float32(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modules, "multiplies", lambda kind: kind == torch.float32)
    packed = layer(64, 48, 8, dtype=dtype)
    x = inputs(100, 64).to(dtype)
    y = packed(x)
    assert y.dtype == dtype
    near(y, x.double() @ packed.rows(0, 48).double().T)
