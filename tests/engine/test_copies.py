"""Tensors with the same bytes are stored once, where what opens the output makes both of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from helpers import cli, complaint, load_all
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import svdcli
from svdcli.files.checkpoint import open_checkpoint
from svdcli.files.duplicates import equal_tensors
from svdcli.files.report import read_report


def with_both(folder: Path, *, tied: bool = True) -> Path:
    """A llama with head and embedding in its file, as many are published."""
    large("llama").save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def large(family: str) -> Any:
    """A tiny model with tables that are worth looking at."""
    model = zoo.FAMILIES[family].build()
    model.resize_token_embeddings(320, mean_resizing=False)
    return model


def pickled(family: str, folder: Path) -> Path:
    """A model as a pickle, in which tied tensors share their storage."""
    model = large(family)
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


@pytest.mark.parametrize("family", ["t5", "llama-tied", "marian", "gpt2"])
def test_tied_pairs_of_a_pickle(family: str, tmp_path: Path) -> None:
    source, out = pickled(family, tmp_path / "m"), tmp_path / "o"
    predicted = svdcli.compress(source, out, keep=0.5, dry_run=True).report
    outcome = svdcli.compress(source, out, keep=0.5)
    assert outcome.report.files == predicted.files
    same = outcome.plan.same
    assert same
    stored = load_all(out)
    assert same.keys().isdisjoint(stored)
    assert set(same.values()) <= stored.keys()
    [note] = [note for note in outcome.report.notes if "stored once" in note]
    assert str(next(iter(same))).removesuffix(".weight") in note
    with open_checkpoint(source) as checkpoint:
        nbytes = sum(checkpoint.tensors[name].info.nbytes for name in same)
        left = sum(checkpoint.tensors[name].info.parameters for name in same)
    assert f"({nbytes} bytes less)" in note
    report = read_report(out)
    saved = report.selected.saved_parameters
    assert report.total.parameters_after == report.total.parameters_before - saved - left
    assert svdcli.verify(out, source).ok

    # Loaded they are one again; expanded both are there
    model: Any = svdcli.load(out)
    names = {name for name, _ in model.named_parameters()}
    assert not any(name in names for name in same)
    svdcli.expand(out, tmp_path / "d")
    dense, original = load_all(tmp_path / "d"), torch.load(source / "pytorch_model.bin")
    assert dense.keys() == original.keys()
    for name, other in same.items():
        assert torch.equal(dense[name], original[name])
        assert torch.equal(dense[name], dense[other])
    expected = zoo.answer(family, svdcli.load(tmp_path / "d").eval())
    torch.testing.assert_close(zoo.answer(family, model.eval()), expected, rtol=1e-4, atol=1e-5)

    # The same plan leaves the same out
    again = svdcli.compress(source, tmp_path / "again", plan=outcome.plan)
    assert again.plan.same == same
    assert again.report.notes == outcome.report.notes
    assert equal(load_all(tmp_path / "again"), stored)


def test_a_head_that_is_equal_is_stored_once_where_the_class_ties_it(tmp_path: Path) -> None:
    tied = with_both(tmp_path / "tied")
    apart = with_both(tmp_path / "apart", tied=False)
    svdcli.compress(tied, tmp_path / "o", keep=0.5)
    svdcli.compress(apart, tmp_path / "p", keep=0.5)
    assert "lm_head.weight" not in load_all(tmp_path / "o")
    assert "lm_head.weight" in load_all(tmp_path / "p")
    model: Any = svdcli.load(tmp_path / "o")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    other: Any = svdcli.load(tmp_path / "p")
    assert other.lm_head.weight is not other.model.embed_tokens.weight

    # Other loaders tie them too
    svdcli.compress(tied, tmp_path / "dense", keep=0.5, layout="dense")
    assert "lm_head.weight" not in load_all(tmp_path / "dense")
    from transformers import AutoModelForCausalLM

    stock, info = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not info["missing_keys"]
    assert stock.lm_head.weight is stock.model.embed_tokens.weight


def test_a_head_that_is_factored_with_its_table_is_not_touched(tmp_path: Path) -> None:
    source = with_both(tmp_path / "m")
    outcome = svdcli.compress(source, tmp_path / "o", keep=0.5, include=["lm_head", "*layers*"])
    assert outcome.plan.same == {}
    assert svdcli.verify(tmp_path / "o", source).ok


def test_a_table_that_is_packed_is_a_weight_of_its_own_and_a_note_says_so(tmp_path: Path) -> None:
    source = with_both(tmp_path / "m")
    outcome = svdcli.compress(source, tmp_path / "o", rank=16, bits=8, embedding_bits=8)
    assert outcome.plan.same == {}
    [note] = [note for note in outcome.report.notes if "weights of their own" in note]
    assert note.startswith("lm_head and model.embed_tokens hold the same numbers: ")
    assert svdcli.verify(tmp_path / "o", source).ok


class Tied(nn.Module):
    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.table = nn.Embedding(320, 64)
        self.head = nn.Linear(64, 320, bias=False)
        if tied:
            self.head.weight = self.table.weight


@pytest.mark.parametrize("tied", [True, False])
def test_a_lone_file(tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tied(tied=True)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, tmp_path / "m.safetensors")
    how: dict[str, Any] = {"rank": 8, "include": ["layer"]}
    outcome = svdcli.compress(tmp_path / "m.safetensors", tmp_path / "o.safetensors", **how)
    assert outcome.plan.same == {"table.weight": "head.weight"}
    assert svdcli.verify(tmp_path / "o.safetensors", tmp_path / "m.safetensors").ok
    svdcli.expand(tmp_path / "o.safetensors", tmp_path / "d.safetensors")
    dense = load_file(tmp_path / "d.safetensors")
    assert dense.keys() == tensors.keys()
    assert torch.equal(dense["table.weight"], tensors["table.weight"])

    into = Tied(tied=tied)
    svdcli.load(tmp_path / "o.safetensors", into=into)
    assert torch.equal(into.table.weight, tensors["table.weight"])
    assert torch.equal(into.head.weight, tensors["head.weight"])
    assert (into.head.weight is into.table.weight) == tied

    # A dense file is for loaders that know nothing of this
    svdcli.compress(
        tmp_path / "m.safetensors", tmp_path / "p.safetensors", layout="dense", force=True, **how
    )
    assert load_file(tmp_path / "p.safetensors").keys() == tensors.keys()


def test_equal_is_every_byte(tmp_path: Path) -> None:
    """Tensors that begin and end alike are read in full."""
    a = torch.randn(160, 128)
    b, c = a.clone(), a.clone()
    c[64, 64] += 1
    tensors = {"a": a, "b": b, "c": c, "d": a.view(80, 256).clone(), "tiny": torch.ones(8)}
    tensors["small"] = tensors["tiny"].clone()
    save_file(tensors, tmp_path / "m.safetensors")
    with open_checkpoint(tmp_path / "m.safetensors") as checkpoint:
        assert equal_tensors(checkpoint, checkpoint.tensors) == {"a": ["b"]}


@pytest.mark.parametrize("entry", [7, {"x": "y"}, ["a"], {"lm_head.weight": "nowhere"}])
def test_a_damaged_record_is_one_line(entry: Any, tmp_path: Path) -> None:
    source = with_both(tmp_path / "m")
    svdcli.compress(source, tmp_path / "o", keep=0.5)
    record = json.loads((tmp_path / "o" / "svdcli.json").read_text()) | {"same": entry}
    (tmp_path / "o" / "svdcli.json").write_text(json.dumps(record))
    for command in ("expand", "verify"):
        done = cli(command, tmp_path / "o")
        assert "Traceback" not in done.err
        assert done.code == 1
    assert complaint(cli("expand", tmp_path / "o"))
