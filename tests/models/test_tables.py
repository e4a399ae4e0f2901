"""`--embedding-bits 8`: embedding tables of int8 rows, unpacked as they are looked up; a tied head
multiplies the same bytes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from helpers import contents, load_all, refused, weight, works
from safetensors.torch import save_file
from torch import nn

import svdcli
from svdcli.errors import UsageError
from svdcli.models.modules import PackedEmbedding, PackedLinear, low_rank_like

Written = Callable[[str], Path]

TABLES = {
    "llama": "model.embed_tokens",
    "llama-tied": "model.embed_tokens",
    "mixtral": "model.embed_tokens",
    "t5": "shared",
    "gpt2": "transformer.wte",
    "bert": "embeddings.word_embeddings",
    "whisper": "model.decoder.embed_tokens",
    "marian": "model.shared",
}
TIED = {"llama-tied": "lm_head", "t5": "lm_head", "gpt2": "lm_head", "whisper": "proj_out"}


@pytest.fixture(scope="module")
def packed(written: Written, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a family whose table has 8 bits and whose layers have rank 16."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family) / "out"
            svdcli.compress(
                written(family), made[family], rank=16, embedding_bits=8, allow_larger=True
            )
        return made[family]

    return make


def dense_of(folder: Path, out: Path) -> Any:
    """The stock model of the numbers that packed rows stand for."""
    svdcli.expand(folder, out)
    return svdcli.load(out).eval()


def same(family: str, model: Any, dense: Any) -> None:
    expected = zoo.answer(family, dense)
    scale = float(expected.abs().max())
    torch.testing.assert_close(zoo.answer(family, model), expected, rtol=1e-4, atol=1e-5 * scale)


# Files --------------------------------------------------------------------------------------------


def test_rows_are_the_nearest_codes(packed: Callable[[str], Path], written: Written) -> None:
    stored = load_all(packed("llama"))
    codes = stored["model.embed_tokens.weight"]
    scales = stored["model.embed_tokens.weight_scale"]
    assert (codes.dtype, scales.shape) == (torch.int8, (96, 1))
    table = load_all(written("llama"))["model.embed_tokens.weight"]
    steps = (table / scales).clamp(-128, 127)
    assert ((steps - codes).abs() <= 0.5 + 1e-3).all()
    assert (codes * scales - table).norm() < 0.01 * table.norm()


def test_report_expand_and_verify(packed: Callable[[str], Path], written: Written) -> None:
    folder = packed("llama-tied")
    assert svdcli.verify(folder, against=written("llama-tied")).ok
    report = svdcli.report(folder)
    [table] = [row for row in report.layers if row.role]
    assert (table.name, table.bits, table.solver) == ("model.embed_tokens.weight", 8, "nearest")
    assert report.embeddings is not None
    assert report.embeddings.bytes_after == table.bytes_after == 96 * 64 + 96 * 4
    selected = sum(row.bytes_after for row in report.layers if not row.role)
    assert report.selected.bytes_after == selected
    done = works_with("report", folder)
    assert "embeddings" in done
    assert "factored        14 of 14 selected layers" in done


def works_with(*arguments: str | Path) -> str:
    from helpers import cli

    done = cli(*arguments)
    assert done.code == 0, done.err
    return done.out.decode()


@pytest.mark.parametrize("target", [{"rank": 16}, {"keep": 0.5}, {"size": 200_000}])
def test_a_dry_run_predicts_its_bytes(
    target: dict[str, Any], written: Written, tmp_path: Path
) -> None:
    how: Any = {"embedding_bits": 8, **target}
    predicted = svdcli.compress(written("llama"), tmp_path / "o", dry_run=True, **how)
    outcome = svdcli.compress(written("llama"), tmp_path / "o", **how)
    assert predicted.report.files == outcome.report.files
    assert predicted.plan == outcome.plan
    if "size" in target:
        assert sum(outcome.report.files.values()) <= target["size"]
    plain = svdcli.compress(written("llama"), tmp_path / "p", **target).plan
    if "keep" in target:
        assert [layer.rank for layer in plain.layers] == [
            layer.rank for layer in outcome.plan.layers if not layer.role
        ]
    again = svdcli.compress(written("llama"), tmp_path / "q", plan=outcome.plan)
    assert again.plan.layers == outcome.plan.layers


def test_an_interrupted_run_goes_on_to_the_same_bytes(written: Written, tmp_path: Path) -> None:
    def stop(phase: str, *_: object) -> None:
        if phase == "write":
            raise KeyboardInterrupt

    how: Any = {"rank": 16, "bits": 8, "embedding_bits": 8}
    svdcli.compress(written("llama"), tmp_path / "a", **how)
    with pytest.raises(KeyboardInterrupt):
        svdcli.compress(written("llama"), tmp_path / "b", progress=stop, **how)
    assert not svdcli.compress(written("llama"), tmp_path / "b", **how).started_over
    file = "model.safetensors"
    assert contents(tmp_path / "a" / file) == contents(tmp_path / "b" / file)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_table_that_is_not_finite_stays_dense(
    value: float, tmp_path: Path, written: Written
) -> None:
    folder = tmp_path / "m"
    tensors = load_all(written("llama"))
    tensors["model.embed_tokens.weight"][3, 5] = value
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text((written("llama") / "config.json").read_text())
    plan = svdcli.compress(folder, tmp_path / "o", rank=16, embedding_bits=8).plan
    [table] = [layer for layer in plan.layers if layer.role]
    assert table.rank is None
    assert "nearest: not finite" in table.reason


# Models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TABLES)
def test_it_answers_as_the_stock_model_of_its_numbers(
    family: str, packed: Callable[[str], Path], tmp_path: Path
) -> None:
    model: Any = svdcli.load(packed(family)).eval()
    assert isinstance(model.get_submodule(TABLES[family]), PackedEmbedding)
    same(family, model, dense_of(packed(family), tmp_path / "dense"))


@pytest.mark.parametrize("family", TABLES)
def test_saved_again_it_is_the_same(
    family: str, packed: Callable[[str], Path], tmp_path: Path
) -> None:
    model: Any = svdcli.load(packed(family)).eval()
    model.save_pretrained(tmp_path / "again")
    file = "model.safetensors"
    if family != "mixtral":  # whose experts, one parameter, are saved multiplied out
        assert contents(tmp_path / "again" / file) == contents(packed(family) / file)
    again = svdcli.load(tmp_path / "again").eval()
    assert torch.equal(zoo.answer(family, again), zoo.answer(family, model))


@pytest.mark.parametrize("family", TIED)
def test_a_tied_head_has_the_same_bytes(family: str, packed: Callable[[str], Path]) -> None:
    model: Any = svdcli.load(packed(family)).eval()
    table, head = model.get_submodule(TABLES[family]), model.get_submodule(TIED[family])
    assert type(head) is PackedLinear

    def holds_one(model: Any) -> bool:
        table, head = model.get_submodule(TABLES[family]), model.get_submodule(TIED[family])
        codes, scales = table.codes, table.scales
        return bool(
            codes.data_ptr() == head.codes.data_ptr()
            and scales.data_ptr() == head.scales.data_ptr()
            and codes.dtype == torch.int8
        )

    assert holds_one(model)
    model.tie_weights()
    assert holds_one(model)
    assert holds_one(model.to(torch.float64))
    assert holds_one(model.half())
    assert holds_one(copy.deepcopy(model))
    assert table.weight.shape == head.weight.shape == (96, 64)


def test_it_generates_as_the_stock_model(packed: Callable[[str], Path], tmp_path: Path) -> None:
    for family in ("llama", "llama-tied"):
        model: Any = svdcli.load(packed(family)).eval()
        dense = dense_of(packed(family), tmp_path / family)
        ids = {"input_ids": zoo.IDS[:1], "max_new_tokens": 8, "do_sample": False}
        assert torch.equal(model.generate(**ids), dense.generate(**ids))


@pytest.mark.parametrize("family", ["llama", "llama-tied", "t5"])
def test_it_unpacks_for_those_who_ask(
    family: str, packed: Callable[[str], Path], tmp_path: Path
) -> None:
    dense = dense_of(packed(family), tmp_path / "dense")
    config = transformers.AutoConfig.from_pretrained(packed(family))
    config.quantization_config["dequantize"] = True
    for model in (
        svdcli.load(packed(family), config=config).eval(),
        svdcli.load(packed(family)).dequantize().eval(),
    ):
        assert model.state_dict().keys() == dense.state_dict().keys()
        assert not any(isinstance(module, PackedLinear) for module in model.modules())
        same(family, model, dense)
        table = model.get_submodule(TABLES[family])
        assert isinstance(table, nn.Embedding)
        if family in TIED:
            assert table.weight is model.get_submodule(TIED[family]).weight


def test_compiles_as_one_graph(packed: Callable[[str], Path]) -> None:
    model: Any = svdcli.load(packed("llama-tied")).eval()
    expected = zoo.answer("llama-tied", model)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    assert torch.allclose(zoo.answer("llama-tied", model), expected, atol=1e-5)


def test_tables_that_do_more_than_look_up_become_dense(tmp_path: Path) -> None:
    config = transformers.BartConfig(
        vocab_size=96,
        d_model=64,
        scale_embedding=True,
        pad_token_id=1,
        encoder_layers=1,
        decoder_layers=1,
        max_position_embeddings=64,
        encoder_ffn_dim=160,
        decoder_ffn_dim=160,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
    )
    torch.manual_seed(0)
    transformers.BartForConditionalGeneration(config).save_pretrained(tmp_path / "m")
    svdcli.compress(tmp_path / "m", tmp_path / "o", rank=16, embedding_bits=8, allow_larger=True)
    model: Any = svdcli.load(tmp_path / "o").eval()
    dense = dense_of(tmp_path / "o", tmp_path / "d")
    ids = {"input_ids": zoo.IDS, "decoder_input_ids": zoo.IDS[:, :6]}
    with torch.no_grad():
        assert torch.allclose(model(**ids).logits, dense(**ids).logits, atol=1e-5)
    assert not any(isinstance(module, PackedEmbedding) for module in model.modules())


def test_which_modules_hold_a_packed_table() -> None:
    how: Any = {"layout": "whole", "bits": 8}
    new = low_rank_like(nn.Embedding(10, 8, padding_idx=3), 8, **how)
    assert isinstance(new, PackedEmbedding)
    assert new.padding_idx == 3
    assert low_rank_like(nn.Embedding(10, 8, max_norm=1.0), 8, **how) is None
    assert low_rank_like(nn.Embedding(10, 8), 8, layout="whole", bits=4, group=32) is None
    assert low_rank_like(nn.Embedding(10, 8), 4, layout="factored", bits=8) is None


def test_into_a_module_of_ones_own(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Embedding(300, 64), nn.Linear(64, 96, bias=False))
    names = {"0.weight": "embed.weight", "1.weight": "up.weight"}
    tensors = {new: weight(*module.state_dict()[old].shape) for old, new in names.items()}
    save_file(tensors, tmp_path / "m.safetensors")
    svdcli.compress(
        tmp_path / "m.safetensors", tmp_path / "o.safetensors", rank=16, embedding_bits=8
    )
    named = nn.ModuleDict({"embed": module[0], "up": module[1]})
    svdcli.load(tmp_path / "o.safetensors", into=named)
    table = named["embed"]
    assert isinstance(table, PackedEmbedding)
    ids = torch.tensor([[1, 5], [299, 0]])
    assert torch.equal(table(ids), (table.codes * table.scales)[ids])
    assert (table(ids) - tensors["embed.weight"][ids]).norm() < 0.02


@pytest.mark.parametrize("family", TIED)
def test_into_a_module_with_a_tied_head(family: str, packed: Callable[[str], Path]) -> None:
    model: Any = svdcli.load(packed(family)).eval()
    config = copy.deepcopy(model.config)
    del config.quantization_config
    own = svdcli.load(packed(family), into=type(model)(config)).eval()
    assert torch.equal(zoo.answer(family, own), zoo.answer(family, model))
    table, head = own.get_submodule(TABLES[family]), own.get_submodule(TIED[family])
    assert table.codes.data_ptr() == head.codes.data_ptr()


# What is asked ------------------------------------------------------------------------------------


def test_an_untied_head_is_a_layer_like_any_other(written: Written, tmp_path: Path) -> None:
    how: Any = {"rank": 16, "bits": 8, "include": ["lm_head", "*.mlp.*"], "embedding_bits": 8}
    svdcli.compress(written("llama"), tmp_path / "o", **how)
    model: Any = svdcli.load(tmp_path / "o").eval()
    assert isinstance(model.lm_head.svd_up, PackedLinear)
    same("llama", model, dense_of(tmp_path / "o", tmp_path / "d"))


def test_words(written: Written, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--embedding-bits '4' is unknown"):
        svdcli.compress(written("llama"), tmp_path / "o", rank=16, embedding_bits=4)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="does not go with --layout dense"):
        svdcli.compress(written("llama"), tmp_path / "o", rank=16, embedding_bits=8, layout="dense")
    with pytest.raises(UsageError, match="has no embedding table to pack"):
        svdcli.compress(
            written("llama"), tmp_path / "o", rank=16, embedding_bits=8, exclude=["*embed*"]
        )
    out = tmp_path / "o"
    works("compress", written("llama"), "--rank", "16", "--embedding-bits", "8", "-o", out)
    assert json.loads((out / "svdcli.json").read_text())["recipe"]["embedding_bits"] == "8"
    assert "--embedding-bits" in refused(
        "compress", written("llama"), "--rank", "16", "--embedding-bits", "3", "-o", out, code=2
    )
