"""`--layout dense --bits`: the output is a checkpoint of the compressed-tensors library, which
stock transformers opens without svdcli."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from helpers import cli, complaint, contents, load_all, refused, run_code, weight, works
from safetensors.torch import load_file, save_file
from torch import nn

import svdcli
from svdcli.errors import NothingSelectedError, SvdcliError, UsageError
from svdcli.linalg.codes import pack_int8, unpack_int8
from svdcli.models.modules import PackedLinear
from svdcli.plan.packing import Packing

Written = Callable[[str], Path]

GROUP = 32
FAMILIES = ["llama", "llama-tied", "mixtral", "bert-classifier", "whisper", "vit", "marian"]
LIBRARY = "compressed_tensors.compressors.pack_quantized"


def groups(bits: int) -> dict[str, Any]:
    return {"group_size": GROUP} if bits == 4 else {}


@pytest.fixture(scope="module")
def rounded(written: Written, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(family, bits) -> the directory of its layers at so many bits."""
    made: dict[tuple[str, int], Path] = {}

    def make(family: str, bits: int) -> Path:
        if (family, bits) not in made:
            out = tmp_path_factory.mktemp(f"{family}-{bits}") / "out"
            how: Any = {"layout": "dense", "bits": bits, "allow_larger": True} | groups(bits)
            svdcli.compress(written(family), out, **how)
            made[family, bits] = out
        return made[family, bits]

    return make


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def dense_of(folder: Path, out: Path) -> Any:
    """The stock model of the numbers that the packed weights stand for."""
    svdcli.expand(folder, out)
    assert "quantization_config" not in config_of(out)
    return svdcli.load(out).eval()


# Other loaders ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_stock_transformers_opens_it(
    family: str, bits: int, rounded: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    folder = rounded(family, bits)
    stock = getattr(transformers, config_of(folder)["architectures"][0])
    model, info = stock.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    dense = dense_of(folder, tmp_path / "dense")
    assert torch.equal(zoo.answer(family, model.eval()), zoo.answer(family, dense))
    assert any(hasattr(module, "quantization_scheme") for module in model.modules())


def test_without_svdcli(rounded: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    folder = rounded("llama", 4)
    code = (
        "import sys, torch, transformers\n"
        "sys.modules['svdcli'] = None\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "torch.save(model(torch.arange(12)[None]).logits, 'logits.pt')\n"
    )
    done = run_code(code, folder, folder=tmp_path)
    assert done.code == 0, done.err
    dense = dense_of(folder, tmp_path / "dense")
    expected = dense(torch.arange(12)[None]).logits
    # another process may have other threads, which add in another order
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_library_reads_and_writes_the_same(
    bits: int, rounded: Callable[..., Path], tmp_path: Path
) -> None:
    compressor = pytest.importorskip(LIBRARY).PackedQuantizationCompressor
    quantization = pytest.importorskip("compressed_tensors.quantization")
    folder = rounded("llama", bits)
    written = config_of(folder)["quantization_config"]
    parsed = quantization.QuantizationConfig.model_validate(written)
    assert json.loads(parsed.model_dump_json()) == written
    [scheme] = parsed.config_groups.values()

    stored = load_all(folder)
    svdcli.expand(folder, tmp_path / "dense")
    dense = load_all(tmp_path / "dense")
    packed = [name for name in stored if name.endswith(".weight_packed")]
    assert len(packed) == 14
    for name in packed:
        layer = name.removesuffix(".weight_packed")
        parts = {
            part: stored[f"{layer}.{part}"]
            for part in ("weight_packed", "weight_scale", "weight_shape")
        }
        unpacked = compressor.decompress(parts, scheme)["weight"]
        assert torch.equal(unpacked, dense[f"{layer}.weight"])
        again = compressor.compress(
            {"weight": unpacked, "weight_scale": parts["weight_scale"]}, scheme
        )
        assert torch.equal(again["weight_packed"], parts["weight_packed"])
        assert torch.equal(again["weight_shape"], parts["weight_shape"])


@pytest.mark.parametrize("n", [4, 5, 7, 64])
def test_words_of_eight_bits_are_those_of_the_library(n: int) -> None:
    helpers = pytest.importorskip(f"{LIBRARY}.helpers")
    codes = torch.randint(-128, 128, (6, n), generator=torch.Generator().manual_seed(n))
    codes = codes.to(torch.int8)
    assert torch.equal(pack_int8(codes), helpers.pack_to_int32(codes, 8))
    assert torch.equal(unpack_int8(pack_int8(codes), n), codes)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "mixtral", "whisper"])
def test_every_linear_module_is_packed_or_ignored(
    family: str, rounded: Callable[..., Path]
) -> None:
    folder = rounded(family, 4)
    ignored = set(config_of(folder)["quantization_config"]["ignore"])
    packed = {name.removesuffix(".weight_packed") for name in load_all(folder)}
    with torch.device("meta"):
        model = zoo.FAMILIES[family].build()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert (name in packed) != (name in ignored), name


# svdcli's own opening -----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_svdcli_opens_it_packed(
    family: str, bits: int, rounded: Callable[..., Path], tmp_path: Path
) -> None:
    model: Any = svdcli.load(rounded(family, bits)).eval()
    dense = dense_of(rounded(family, bits), tmp_path / "dense")
    expected = zoo.answer(family, dense)
    torch.testing.assert_close(zoo.answer(family, model), expected, rtol=1e-4, atol=1e-6)
    assert any(isinstance(module, PackedLinear) for module in model.modules())
    model.save_pretrained(tmp_path / "again")
    again = svdcli.load(tmp_path / "again").eval()
    assert torch.equal(zoo.answer(family, again), zoo.answer(family, model))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_file_is_opened_into_a_module(bits: int, tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64))
    tensors = {f"{i}.weight": weight(*module[i].weight.shape, seed=i) for i in range(2)}
    tensors |= {f"{i}.bias": torch.ones(module[i].out_features) for i in range(2)}
    save_file(tensors, tmp_path / "m.safetensors")
    out = tmp_path / "o.safetensors"
    svdcli.compress(tmp_path / "m.safetensors", out, layout="dense", bits=bits, **groups(bits))
    svdcli.expand(out, tmp_path / "d.safetensors")
    dense = load_file(tmp_path / "d.safetensors")
    svdcli.load(out, into=module)
    for i in range(2):
        assert torch.equal(module[i].weight + 0, dense[f"{i}.weight"])
        assert set(module[i].state_dict()) >= {"bias", "weight_scale"}


# The rest of svdcli -------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
def test_report_and_verify(bits: int, rounded: Callable[..., Path], written: Written) -> None:
    folder = rounded("llama", bits)
    assert svdcli.verify(folder, against=written("llama")).ok
    rows = svdcli.report(folder).layers
    assert {row.bits for row in rows} == {bits}
    assert all(row.parameters_after == row.parameters_before for row in rows)
    assert all(row.rounding_share == 1 for row in rows)
    works("report", folder)
    works("inspect", folder)


def test_a_dry_run_predicts_its_bytes(written: Written, tmp_path: Path) -> None:
    how: Any = {"layout": "dense", "bits": 4, "group_size": GROUP}
    predicted = svdcli.compress(written("llama"), tmp_path / "o", dry_run=True, **how)
    outcome = svdcli.compress(written("llama"), tmp_path / "o", **how)
    assert predicted.report.files == outcome.report.files
    assert predicted.plan == outcome.plan
    again = svdcli.compress(written("llama"), tmp_path / "p", plan=outcome.plan)
    assert contents(tmp_path / "o" / "model.safetensors") == contents(
        tmp_path / "p" / "model.safetensors"
    )
    assert again.plan.ignored == outcome.plan.ignored


def test_a_config_that_lost_its_word_is_told(
    rounded: Callable[..., Path], written: Written, tmp_path: Path
) -> None:
    how: Any = {"layout": "dense", "bits": 4, "group_size": GROUP}
    svdcli.compress(written("llama"), tmp_path / "o", **how)
    config = config_of(tmp_path / "o")
    del config["quantization_config"]
    (tmp_path / "o" / "config.json").write_text(json.dumps(config))
    failed = [check for check in svdcli.verify(tmp_path / "o").checks if not check.ok]
    assert [check.subject for check in failed] == ["config.json"]
    with pytest.raises(SvdcliError, match="lost its quantization_config"):
        svdcli.load(tmp_path / "o")


# What does not fit --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "bits", "group", "says"),
    [
        (96, 4, 64, "no multiple of the group of 64: --group-size 32 fits"),
        (96, 4, 32, ""),
        (100, 4, 64, "no multiple of the group of 64"),
        (100, 8, 64, ""),
        (102, 8, 64, "no multiple of the 4 codes of a word"),
    ],
)
def test_columns_that_do_not_fit(columns: int, bits: int, group: int, says: str) -> None:
    found = Packing(bits, group, in_words=True).misfit(columns)
    assert says in found
    assert bool(says) == bool(found)


def test_layers_that_do_not_fit_stay_dense(written: Written, tmp_path: Path) -> None:
    how: Any = {"layout": "dense", "bits": 4, "group_size": 128, "include": ["*.mlp.*"]}
    with pytest.raises(NothingSelectedError, match="160 columns, no multiple of the group of"):
        svdcli.compress(written("llama"), tmp_path / "o", **how)
    how |= {"group_size": 64}
    plan = svdcli.compress(written("llama"), tmp_path / "o", **how).plan
    dense = {layer.tensor.module: layer.reason for layer in plan.layers if layer.rank is None}
    assert set(dense) == {f"model.layers.{i}.mlp.down_proj" for i in range(2)}
    assert set(dense) <= set(config_of(tmp_path / "o")["quantization_config"]["ignore"])


def test_modules_that_are_not_linear_are_named(written: Written, tmp_path: Path) -> None:
    with pytest.raises(NothingSelectedError, match="a Conv1D of GPT2LMHeadModel, not a Linear"):
        svdcli.compress(written("gpt2"), tmp_path / "o", layout="dense", bits=8)


def test_a_class_that_opens_no_packed_weights_is_refused(written: Written, tmp_path: Path) -> None:
    with pytest.raises(SvdcliError, match="does not open a T5ForConditionalGeneration of packed"):
        svdcli.compress(written("t5"), tmp_path / "o", layout="dense", bits=8)
    assert not (tmp_path / "o").exists()


def test_experts_are_packed_alike_or_not_at_all(written: Written, tmp_path: Path) -> None:
    how: Any = {"layout": "dense", "bits": 8, "exclude": ["*experts*"]}
    with pytest.raises(SvdcliError, match="stacks the experts, and opens them packed alike"):
        svdcli.compress(written("mixtral"), tmp_path / "o", **how)


@pytest.mark.parametrize(
    ("inner", "what"),
    [(96, "give --group-size 32,"), (48, "give --bits 8,"), (66, "select all of them")],
)
def test_experts_whose_columns_do_not_fit_get_what_does(
    inner: int, what: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=inner,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "m")
    arguments = ("compress", tmp_path / "m", "--layout", "dense", "-o", tmp_path / "o")
    line = complaint(cli(*arguments, "--bits", "4"))
    assert f"{what}" in line.partition("); ")[2]
    if what.startswith("give"):
        option, value = what.removeprefix("give ").removesuffix(",").split()
        works(*arguments, *(("--bits", "4") if option != "--bits" else ()), option, value)


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ({"rank": 8}, "--rank changes nothing in the dense layout at 4 bits"),
        ({"keep": 0.5}, "--keep 0.5 cuts nothing off in the dense layout at 4 bits"),
        ({"keep_bytes": 0.5}, "--keep-bytes changes nothing in the dense layout at 4 bits"),
    ],
)
def test_targets_that_mean_nothing_are_refused(
    target: dict[str, Any], says: str, written: Written, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=says):
        svdcli.compress(written("llama"), tmp_path / "o", layout="dense", bits=4, **target)


def test_on_the_command_line(written: Written, tmp_path: Path) -> None:
    out = tmp_path / "o"
    works("compress", written("llama"), "--layout", "dense", "--bits", "8", "-o", out)
    assert config_of(out)["quantization_config"]["quant_method"] == "compressed-tensors"
    assert "exactly one target" in refused(
        "compress", written("llama"), "--layout", "dense", "-o", tmp_path / "p", code=2
    )


# Plans of other kinds -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_layers_of_different_bits_are_named_in_groups(written: Written, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    how: Any = {"layout": "dense", "bits": 4, "group_size": GROUP}
    plan = svdcli.compress(written("llama"), tmp_path / "o", dry_run=True, **how).plan
    layers = [
        replace(layer, packing=Packing(8, GROUP, in_words=True))
        if ".mlp." in layer.tensor.name
        else layer
        for layer in plan.layers
    ]
    mixed = replace(plan, layers=tuple(layers))
    svdcli.compress(written("llama"), tmp_path / "o", plan=mixed)
    groups = config_of(tmp_path / "o")["quantization_config"]["config_groups"]
    assert [group["weights"]["num_bits"] for group in groups.values()] == [8, 4]
    assert all(".mlp." in name for name in groups["group_0"]["targets"])
    dense = dense_of(tmp_path / "o", tmp_path / "d")
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "o").eval()
    assert torch.equal(zoo.answer("llama", stock), zoo.answer("llama", dense))
    model: Any = svdcli.load(tmp_path / "o").eval()
    torch.testing.assert_close(zoo.answer("llama", model), zoo.answer("llama", dense))
    assert svdcli.verify(tmp_path / "o", against=written("llama")).ok


def test_a_class_whose_experts_transformers_replaces_is_refused(tmp_path: Path) -> None:
    """It would open with experts that are made up."""
    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=64,
        intermediate_size_mlp=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=2,
    )
    transformers.Llama4ForCausalLM(config).save_pretrained(tmp_path / "m")
    arguments = ("compress", tmp_path / "m", "--bits", "8", "-o", tmp_path / "o")
    line = complaint(cli(*arguments, "--layout", "dense"))
    assert "transformers replaces the Llama4TextExperts of a Llama4ForCausalLM" in line
    assert "leave out --layout dense" in line
    assert not (tmp_path / "o").exists()


def test_where_the_class_is_not_known_a_note_says_so(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: object) -> None:
        raise SvdcliError("opening a model needs transformers", "install it")

    monkeypatch.setattr("svdcli.models.kinds.empty_model", fails)
    how: Any = {"layout": "dense", "bits": 4, "group_size": GROUP}
    plan = svdcli.compress(written("llama-tied"), tmp_path / "o", **how).plan
    assert any("not compared with the model's class: opening" in note for note in plan.notes)
    assert "lm_head" in config_of(tmp_path / "o")["quantization_config"]["ignore"]
