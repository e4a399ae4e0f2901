"""Weights that other tools stored as codes and scales are read as these tools read them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from helpers import cli, complaint, load_all, weight
from safetensors.torch import load_file, save_file
from torch import Tensor

import svdcli
from svdcli.errors import BadCheckpointError, SvdcliError
from svdcli.files.checkpoint import open_checkpoint

Written = Callable[..., Path]
F8 = torch.float8_e4m3fn
BLOCK = 32
PACK = "compressed_tensors.compressors.pack_quantized"
NAIVE = "compressed_tensors.compressors.naive_quantized"
WORDS = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
FP8 = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}


def in_blocks(w: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales) of a matrix, a scale for each block, as DeepSeek stores it."""
    m, n = w.shape
    padded = torch.nn.functional.pad(w.float(), (0, -n % BLOCK, 0, -m % BLOCK))
    scales = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).abs().amax((1, 3)) / 448
    spread = scales.repeat_interleave(BLOCK, 0)[:m].repeat_interleave(BLOCK, 1)[:, :n]
    return (w.float() / spread).to(F8), scales


def quantised(source: Path, out: Path, details: dict[str, Any], store: Callable[..., Any]) -> Path:
    """A copy of a model whose block linears are what `store` makes of them, by the end of the
    name."""
    shutil.copytree(source, out)
    tensors: dict[str, Tensor] = {}
    for name, w in load_file(source / "model.safetensors").items():
        if w.ndim == 2 and ".layers." in name:
            tensors |= {name + end: part for end, part in store(w).items()}
        else:
            tensors[name] = w
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": details}))
    return out


def deepseek(w: Tensor) -> dict[str, Tensor]:
    codes, scales = in_blocks(w)
    return {"": codes, "_scale_inv": scales}


@pytest.fixture
def fp8(readable: Written, tmp_path: Path) -> Path:
    return quantised(readable("llama", torch.bfloat16), tmp_path / "fp8", FP8, deepseek)


@pytest.fixture
def twin(fp8: Path, tmp_path: Path) -> Path:
    """The same as ordinary numbers, by transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(fp8)
    numbers = model.state_dict()
    out = shutil.copytree(fp8, tmp_path / "twin")
    save_file(numbers, out / "model.safetensors", {"format": "pt"})
    config = json.loads((fp8 / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    return out


# As other libraries read them ---------------------------------------------------------------------


def test_blocks_of_float8_are_what_transformers_makes_of_them(fp8: Path, twin: Path) -> None:
    numbers = load_file(twin / "model.safetensors")
    with open_checkpoint(fp8) as checkpoint:
        assert checkpoint.tensors.keys() == numbers.keys()
        assert len(checkpoint.quantised) == 14
        for name, w in numbers.items():
            assert torch.equal(checkpoint.read_tensor(name), w), name
            assert b"".join(map(bytes, checkpoint.chunks(name))) == bytes(
                w.contiguous().view(torch.uint8).flatten().tolist()
            )


SCHEMES: dict[str, dict[str, Any]] = {
    "int4 in groups": {"num_bits": 4, "strategy": "group", "group_size": 32},
    "int4 with zero points": {
        "num_bits": 4,
        "strategy": "group",
        "group_size": 32,
        "symmetric": False,
    },
    "int8 in words": {"num_bits": 8, "strategy": "channel"},
    "int8 with zero points": {"num_bits": 8, "strategy": "channel", "symmetric": False},
    "int8": {"num_bits": 8, "strategy": "channel"},
    "float8 a row": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "float8": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    "float8 in blocks": {
        "num_bits": 8,
        "type": "float",
        "strategy": "block",
        "block_structure": [32, 32],
    },
}


@pytest.mark.parametrize("kind", SCHEMES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_formats_of_compressed_tensors_are_what_that_library_reads(
    kind: str, tmp_path: Path
) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    packs = "int4" in kind or "words" in kind or kind == "int8 with zero points"
    compressor = (
        pytest.importorskip(PACK).PackedQuantizationCompressor
        if packs
        else pytest.importorskip(NAIVE).NaiveQuantizationCompressor
    )
    arguments = quantization.QuantizationArgs(**SCHEMES[kind])
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments)
    w = weight(96, 160).to(torch.bfloat16)
    scale, zero = scales_of(w, SCHEMES[kind])
    parts = {"weight": w, "weight_scale": scale}
    if zero is not None:
        parts["weight_zero_point"] = zero
    stored = compressor.compress(parts, scheme)
    expected = compressor.decompress(stored, scheme)["weight"]

    formats = "pack-quantized" if packs else "naive-quantized"
    details = {
        "quant_method": "compressed-tensors",
        "format": formats,
        "config_groups": {"group_0": json.loads(scheme.model_dump_json())},
    }
    source = folder_of(
        tmp_path / "m", {f"a.{name}": part for name, part in stored.items()}, details
    )
    with open_checkpoint(source) as checkpoint:
        assert list(checkpoint.tensors) == ["a.weight"]
        found = checkpoint.read_tensor("a.weight")
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.to(torch.bfloat16))
    assert (found - w).norm() < 0.2 * w.norm()


def scales_of(w: Tensor, scheme: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Scales that use most of the codes, and zero points where they are asked for."""
    m, n = w.shape
    width = {"group": scheme.get("group_size"), "block": 32}.get(scheme["strategy"], n)
    height = {"block": 32, "tensor": m}.get(scheme["strategy"], 1)
    blocks = w.float().unflatten(0, (-1, height)).unflatten(2, (-1, width))
    highest = 448 if scheme.get("type") == "float" else 2 ** (scheme["num_bits"] - 1) - 1
    if scheme.get("symmetric", True):
        scale = (blocks.abs().amax((1, 3)) / highest).to(torch.bfloat16)
        return (scale.flatten() if scheme["strategy"] == "tensor" else scale), None
    low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    scale = ((high - low) / (2 * highest + 1)).to(torch.bfloat16)
    zero = (-highest - 1 - low / scale.float()).round().clamp(-highest - 1, highest)
    return scale, zero.to(torch.int8)


def folder_of(folder: Path, tensors: dict[str, Tensor], details: dict[str, Any] | None) -> Path:
    folder.mkdir()
    save_file({name: part.contiguous() for name, part in tensors.items()}, folder / "m.safetensors")
    config = {} if details is None else {"quantization_config": details}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_groups_out_of_order(tmp_path: Path) -> None:
    """What act-order leaves: a column's group is told by `weight_g_idx`."""
    codes = torch.randint(-8, 8, (32, 64), generator=torch.Generator().manual_seed(0))
    scale = torch.rand(32, 2).to(torch.bfloat16)
    order = torch.randint(0, 2, (64,), generator=torch.Generator().manual_seed(1)).int()
    words = ((codes + 8) << torch.arange(0, 32, 4).repeat(8)).unflatten(1, (-1, 8)).sum(2)
    tensors = {
        "a.weight_packed": words.to(torch.int32),
        "a.weight_scale": scale,
        "a.weight_shape": torch.tensor([32, 64]),
        "a.weight_g_idx": order,
    }
    details = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    with open_checkpoint(folder_of(tmp_path / "m", tensors, details)) as checkpoint:
        expected = codes * scale.float()[:, order.long()]
        assert torch.equal(checkpoint.read_tensor("a.weight"), expected.to(torch.bfloat16))


def test_rows_of_fbgemm_and_scales_of_activations(tmp_path: Path) -> None:
    w = weight(96, 64)
    scale = w.abs().amax(1, keepdim=True) / 448
    tensors = {
        "a.weight": (w / scale).to(F8),
        "a.weight_scale": scale,
        "a.input_scale_ub": torch.tensor(9.0),
        "b.weight": weight(80, 64).to(torch.bfloat16),
    }
    source = folder_of(tmp_path / "m", tensors, {"quant_method": "fbgemm_fp8"})
    with open_checkpoint(source) as checkpoint:
        assert checkpoint.tensors.keys() == {"a.weight", "b.weight"}
        expected = tensors["a.weight"].float() * scale
        assert torch.equal(checkpoint.read_tensor("a.weight"), expected.to(torch.bfloat16))
        assert "1 scale of activations is left out" in checkpoint.notes[-1]


def test_a_file_alone_is_read_by_the_names_in_it(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    codes = weight(96, 160).to(F8)
    save_file({"a.weight": codes, "a.weight_scale_inv": torch.tensor([[0.5, 2.0]])}, file)
    out = svdcli.compress(file, tmp_path / "o.safetensors", rank=20).path
    assert out is not None
    svdcli.expand(out, tmp_path / "d.safetensors")
    expected = codes.float()
    expected[:, :128] *= 0.5
    expected[:, 128:] *= 2
    approx = load_file(tmp_path / "d.safetensors")["a.weight"]
    values = torch.linalg.svdvals(expected.double())
    error = torch.linalg.matrix_norm(approx.double() - expected.double())
    assert float(error) == pytest.approx(float(values[20:].norm()), rel=0.01)


@pytest.mark.parametrize(
    ("shape", "block", "said"),
    [
        ((96, 192), 64, None),
        ((192, 160), 32, [128, 128]),
        ((256, 320), 128, [0, "x"]),
        ((64, 100), 64, None),  # one row of blocks
        ((600, 700), 256, None),
    ],
)
def test_blocks_that_nothing_says_are_those_that_fit(
    shape: tuple[int, int], block: int, said: list[Any] | None, tmp_path: Path
) -> None:
    m, n = shape
    codes = weight(m, n).to(F8)
    scales = torch.rand(-(-m // block), -(-n // block)) + 0.5
    file = tmp_path / "m.safetensors"
    tensors = {"a.weight": codes, "a.weight_scale_inv": scales}
    save_file(tensors, file)
    path = file
    if said is not None:
        path = folder_of(tmp_path / "m", tensors, FP8 | {"weight_block_size": said})
    with open_checkpoint(path) as checkpoint:
        spread = scales.repeat_interleave(block, 0)[:m].repeat_interleave(block, 1)[:, :n]
        expected = (codes.float() * spread).to(torch.bfloat16)
        assert torch.equal(checkpoint.read_tensor("a.weight"), expected)
        [note] = [note for note in checkpoint.notes if "by the shapes" in note]
        assert f"{block} x {block} numbers of a.weight, " in note
        assert checkpoint.notes[-1].startswith("1 weight in F8_E4M3")


@pytest.mark.parametrize("shape", [(96, 192, 3, 3), (300, 200, 1, 2), (96, 96, 5, 2)])
def test_blocks_that_could_be_any_are_refused(
    shape: tuple[int, int, int, int], tmp_path: Path
) -> None:
    """They were guessed before, as what fills the matrix evenly."""
    file = tmp_path / "m.safetensors"
    codes = weight(*shape[:2]).to(F8)
    save_file({"a.weight": codes, "a.weight_scale_inv": torch.ones(shape[2:])}, file)
    assert "no scales of a weight" in complaint(cli("compress", file, "--rank", "8"))


def test_what_shapes_tell_needs_no_note(tmp_path: Path) -> None:
    for scales in (torch.ones(96, 1), torch.ones(96), torch.ones(1), torch.ones(1, 160)):
        file = tmp_path / "m.safetensors"
        save_file({"a.weight": weight(96, 160).to(F8), "a.weight_scale_inv": scales}, file)
        with open_checkpoint(file) as checkpoint:
            assert not any("by the shapes" in note for note in checkpoint.notes)


def test_a_config_that_tells_of_no_codes_is_believed(tmp_path: Path) -> None:
    """A loader takes such weights for what they are."""
    codes, scales = in_blocks(weight(96, 128))
    tensors = {"a.weight": codes, "a.weight_scale_inv": scales, "b.weight": weight(64, 64)}
    source = folder_of(tmp_path / "m", tensors, None)
    out = svdcli.compress(source, tmp_path / "o", rank=8).path
    assert out is not None
    again = load_all(out)
    for name in ("a.weight", "a.weight_scale_inv"):
        assert torch.equal(again[name].view(torch.uint8), tensors[name].view(torch.uint8))


# From end to end ----------------------------------------------------------------------------------


def test_everything_is_as_for_the_numbers(fp8: Path, twin: Path, tmp_path: Path) -> None:
    text = svdcli.Texts("words", (" ".join(f"w{i * i % 90 + 2}" for i in range(3000)),))
    for source, out in ((fp8, "a"), (twin, "b")):
        moments = tmp_path / f"{out}.safetensors"
        svdcli.calibrate(source, moments, text, samples=16, seq_len=32)
        svdcli.compress(source, tmp_path / out, keep=0.5, calibration=moments, allow_larger=True)
        svdcli.expand(tmp_path / out, tmp_path / f"{out}-dense")
        svdcli.heal(
            *(tmp_path / out, tmp_path / f"{out}-healed"),
            teacher=source,
            texts=text,
            samples=16,
            seq_len=32,
            effort=svdcli.Effort(steps=2),
        )
        assert svdcli.verify(tmp_path / out, source).ok
    for kind in ("", "-dense", "-healed"):
        ours, theirs = load_all(tmp_path / f"a{kind}"), load_all(tmp_path / f"b{kind}")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    dense = json.loads((tmp_path / "a-dense" / "config.json").read_text())
    assert dense == json.loads((twin / "config.json").read_text())
    [note] = [n for n in svdcli.report(tmp_path / "a").notes if "F8_E4M3" in n]
    assert note.startswith("14 weights in F8_E4M3 (fp8) are read, counted and")


def test_the_model_opens_as_numbers(fp8: Path, twin: Path) -> None:
    ours, theirs = svdcli.load(fp8).eval(), svdcli.load(twin).eval()
    assert torch.equal(zoo.answer("llama", ours), zoo.answer("llama", theirs))


def test_bits_from_bits(fp8: Path, twin: Path, tmp_path: Path) -> None:
    for source, out in ((fp8, "a"), (twin, "b")):
        svdcli.compress(source, tmp_path / out, keep=0.9, bits=4, group_size=32)
    ours, theirs = load_all(tmp_path / "a"), load_all(tmp_path / "b")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_command_says_what_was_read(fp8: Path, tmp_path: Path) -> None:
    done = cli("compress", fp8, "--keep", "0.3", "-o", tmp_path / "o")
    assert "14 weights in F8_E4M3 (fp8)" in " ".join(done.out.decode().split())
    config = json.loads((tmp_path / "o" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "svdcli"


def test_an_output_that_takes_more_than_the_codes_did_is_refused(fp8: Path, tmp_path: Path) -> None:
    """It counts what the source takes on disk, not the numbers that it is read as."""
    with open_checkpoint(fp8) as checkpoint:
        taken = checkpoint.nbytes
    line = complaint(cli("compress", fp8, "--keep", "0.6", "-o", tmp_path / "o"))
    assert f"no fewer than the {taken} of its source, which is stored in 8 or 4 bits" in line
    assert "--bits" in line
    assert "--allow-larger" in line
    assert not (tmp_path / "o").exists()
    report = svdcli.compress(fp8, tmp_path / "o", keep=0.6, allow_larger=True).report
    assert sum(report.files.values()) > taken


# GPT-OSS ------------------------------------------------------------------------------------------


def in_float4(w: Tensor) -> tuple[Tensor, Tensor]:
    """(blocks, scales) of stacks (experts, in, out), as GPT-OSS is published."""
    blocks = w.float().transpose(1, 2).unflatten(-1, (-1, 32))
    exponents = blocks.abs().amax(-1).clamp(min=1e-30).log2().floor() - 2
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    values = torch.cat((values, -values))
    scaled = blocks / exponents.exp2()[..., None]
    codes = (scaled[..., None] - values).abs().argmin(-1).to(torch.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, (exponents + 127).to(torch.uint8)


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny one whose experts are in float4."""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        dtype="bfloat16",
    )
    folder = tmp_path_factory.mktemp("gpt-oss") / "m"
    transformers.GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tensors: dict[str, Tensor] = {}
    for name, w in load_file(folder / "model.safetensors").items():
        if w.ndim == 3:
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = in_float4(w)
        else:
            tensors[name] = w
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    found = json.loads((folder / "config.json").read_text())
    details = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (folder / "config.json").write_text(json.dumps(found | {"quantization_config": details}))
    return folder


def test_float4_is_what_transformers_reads(gpt_oss: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    stored = load_file(gpt_oss / "model.safetensors")
    with open_checkpoint(gpt_oss) as checkpoint:
        assert len(checkpoint.quantised) == 4
        for name in checkpoint.quantised:
            blocks, scales = stored[f"{name}_blocks"], stored[f"{name}_scales"]
            expected = convert_moe_packed_tensors(blocks, scales)
            assert expected.isfinite().all()
            assert torch.equal(checkpoint.read_tensor(name), expected)
        # Each expert is a stretch of both
        whole = {name: checkpoint.read_tensor(name) for name in checkpoint.quantised}
        checkpoint.take_apart(checkpoint.whole_stacks())
        for name, stack in whole.items():
            experts, _, layer = name.rpartition(".")
            for number, matrix in enumerate(stack):
                found = checkpoint.read_tensor(f"{experts}.{number}.{layer}.weight")
                assert torch.equal(found, matrix)


def test_experts_in_float4_are_factored(gpt_oss: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    outcome = svdcli.compress(gpt_oss, out, rank=8, bits=8, allow_larger=True)
    layers = [row for row in outcome.report.layers if ".experts." in row.name]
    assert len(layers) == 16
    assert all(row.rank is not None for row in layers)
    assert svdcli.verify(out, gpt_oss).ok
    svdcli.expand(out, tmp_path / "d")
    dense: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "d", dtype="float32")
    model: Any = svdcli.load(out, dtype=torch.float32)
    with torch.no_grad():
        found, expected = model(zoo.IDS).logits, dense(zoo.IDS).logits
    assert (found - expected).norm() < 0.02 * expected.norm()

    # The original opens as numbers
    original: Any = svdcli.load(gpt_oss)
    stack = original.model.layers[0].mlp.experts.down_proj
    with open_checkpoint(gpt_oss) as checkpoint:
        assert torch.equal(stack, checkpoint.read_tensor("model.layers.0.mlp.experts.down_proj"))


@pytest.mark.parametrize("wrong", ["lacking", "shape"])
def test_float4_without_its_exponents_is_refused(wrong: str, gpt_oss: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(gpt_oss, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj_scales"
    if wrong == "lacking":
        del tensors[name]
    else:
        tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "without model.layers.0.mlp.experts.down_proj_scales" in complaint(
        cli("compress", folder, "--rank", "8")
    )


# What cannot be read ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "details",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq"},
        {"quant_method": "bitsandbytes"},
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
    ],
    ids=str,
)
def test_other_methods_are_refused(details: dict[str, Any], tmp_path: Path) -> None:
    source = folder_of(tmp_path / "m", {"a.weight": weight(64, 64)}, details)
    done = cli("compress", source, "--rank", "8")
    assert details["quant_method"] in complaint(done)
    assert "start from the unquantised model" in done.err


@pytest.mark.parametrize("lacking", ["_scale_inv", "_scale", "_shape"])
def test_codes_without_what_belongs_to_them_are_refused(lacking: str, tmp_path: Path) -> None:
    stored = {"": weight(64, 64).to(F8)}
    if lacking == "_shape":
        stored = {"_packed": torch.zeros(64, 8, dtype=torch.int32), "_scale": torch.ones(64, 1)}
    if lacking == "_scale":
        stored = {
            "_packed": torch.zeros(64, 8, dtype=torch.int32),
            "_shape": torch.tensor([64, 64]),
        }
    tensors = {f"a.weight{end}": part for end, part in stored.items()}
    source = folder_of(tmp_path / "m", tensors, FP8)
    with pytest.raises(BadCheckpointError, match=r"a\.weight"):
        open_checkpoint(source)


@pytest.mark.parametrize("shape", [(5, 7), (63,), (2, 64, 1)])
def test_scales_that_fit_no_blocks_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    tensors = {"a.weight": weight(64, 64).to(F8), "a.weight_scale_inv": torch.ones(shape)}
    with pytest.raises(BadCheckpointError, match="no scales of a weight"):
        open_checkpoint(folder_of(tmp_path / "m", tensors, FP8))


@pytest.mark.parametrize("shape", [[64, 65], [3, 3], [-1, 64], [64, 64, 1]])
def test_a_shape_that_its_words_do_not_fill_is_refused(shape: list[int], tmp_path: Path) -> None:
    tensors = {
        "a.weight_packed": torch.zeros(64, 8, dtype=torch.int32),
        "a.weight_scale": torch.ones(64, 7),
        "a.weight_shape": torch.tensor(shape),
    }
    with pytest.raises(SvdcliError, match=r"a\.weight"):
        open_checkpoint(folder_of(tmp_path / "m", tensors, WORDS))


@pytest.mark.parametrize(
    ("part", "tensor"),
    [
        ("_g_idx", torch.full((64,), 2)),
        ("_g_idx", torch.full((64,), -1)),
        ("_g_idx", torch.zeros(63, dtype=torch.int32)),
        ("_zero_point", torch.zeros(64, 2, dtype=torch.int32)),
    ],
)
def test_parts_that_do_not_fit_are_refused(part: str, tensor: Tensor, tmp_path: Path) -> None:
    tensors = {
        "a.weight_packed": torch.zeros(64, 8, dtype=torch.int32),
        "a.weight_scale": torch.ones(64, 2),
        "a.weight_shape": torch.tensor([64, 64]),
        f"a.weight{part}": tensor,
    }
    with (
        pytest.raises(BadCheckpointError, match=rf"a\.weight{part}"),
        open_checkpoint(folder_of(tmp_path / "m", tensors, WORDS)) as checkpoint,
    ):
        checkpoint.read_tensor("a.weight")
