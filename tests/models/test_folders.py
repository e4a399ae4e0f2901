"""Which weights of a folder are read: stock transformers, opening the same folder, is the
oracle."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import svdcli
import svdcli.models.hf
from svdcli.files.checkpoint import open_checkpoint

PROBE = "model.norm.weight"
State = dict[str, torch.Tensor]


def single(folder: Path, state: State, name: str) -> None:
    if name.endswith(".bin"):
        torch.save(state, folder / name)
    else:
        save_file(state, folder / name, metadata={"format": "pt"})


def sharded(folder: Path, state: State, stem: str, index: str) -> None:
    """Two shards and their index, which also names a tensor that no shard has."""
    ending = "bin" if ".bin." in index else "safetensors"
    names = sorted(state)
    places = {"model.gone.weight": f"{stem}-00002-of-00002.{ending}"}
    for at, part in enumerate((names[:9], names[9:]), 1):
        shard = f"{stem}-{at:05d}-of-00002.{ending}"
        single(folder, {name: state[name] for name in part}, shard)
        places |= dict.fromkeys(part, shard)
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))


# What may lie in one folder; each set gets a value of its own for the probe.
SETS: dict[str, Callable[[Path, State], None]] = {
    "model.safetensors": lambda folder, state: single(folder, state, "model.safetensors"),
    "index": lambda folder, state: sharded(folder, state, "model", "model.safetensors.index.json"),
    "pytorch_model.bin": lambda folder, state: single(folder, state, "pytorch_model.bin"),
    "bin index": lambda folder, state: sharded(
        folder, state, "pytorch_model", "pytorch_model.bin.index.json"
    ),
    "consolidated": lambda folder, state: sharded(
        folder, state, "consolidated", "consolidated.safetensors.index.json"
    ),
    "fp16": lambda folder, state: single(folder, state, "model.fp16.safetensors"),
    "fp16 index": lambda folder, state: sharded(
        folder, state, "model.fp16", "model.safetensors.index.fp16.json"
    ),
}
PLAIN = ("model.safetensors", "index", "pytorch_model.bin", "bin index")
CHOICES = [
    c for count in (1, 2, 3) for c in itertools.combinations(SETS, count) if set(c) & set(PLAIN)
]


@pytest.mark.parametrize("sets", CHOICES, ids=" + ".join)
def test_the_set_that_transformers_opens_is_read(
    written: Callable[[str], Path], tmp_path: Path, sets: tuple[str, ...]
) -> None:
    source = written("llama")
    state = load_file(source / "model.safetensors")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    for value, name in enumerate(SETS, 1):
        if name in sets:
            SETS[name](tmp_path, state | {PROBE: torch.full_like(state[PROBE], value)})
    opened = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        assert torch.equal(checkpoint.read_tensor(PROBE), opened.get_parameter(PROBE))
        assert checkpoint.tensors.keys() == state.keys()
        read = {*checkpoint.files, "config.json", checkpoint.index_name}
        assert {path.name for path in tmp_path.iterdir()} == (read | set(checkpoint.left_out)) - {
            None
        }


@pytest.mark.parametrize("sets", [("fp16",), ("fp16 index",)], ids=" + ".join)
@pytest.mark.parametrize("shards", [None, 100_000], ids=["as they are", "in shards"])
def test_a_variant_opens_by_the_same_call(
    written: Callable[[str], Path], tmp_path: Path, sets: tuple[str, ...], shards: int | None
) -> None:
    source = written("llama")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_bytes((source / "config.json").read_bytes())
    SETS[sets[0]](tmp_path / "m", load_file(source / "model.safetensors"))
    recipe = svdcli.Recipe("keep", 0.6, max_shard_size=shards)
    out = svdcli.compress(tmp_path / "m", tmp_path / "out", recipe).path
    assert out is not None
    ids = torch.arange(12)[None]
    ours = svdcli.load(out).eval()(ids).logits
    theirs = transformers.LlamaForCausalLM.from_pretrained(out, variant="fp16").eval()(ids).logits
    dense = svdcli.expand(out, tmp_path / "dense")
    assert dense is not None
    expanded = (
        transformers.LlamaForCausalLM.from_pretrained(dense, variant="fp16").eval()(ids).logits
    )
    assert torch.equal(ours, theirs)
    assert torch.allclose(ours, expanded, atol=1e-4)


def test_shards_of_a_pickled_variant_become_safetensors_of_it(
    written: Callable[[str], Path], tmp_path: Path
) -> None:
    source = written("llama")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_bytes((source / "config.json").read_bytes())
    state = load_file(source / "model.safetensors")
    sharded(tmp_path / "m", state, "pytorch_model.fp16", "pytorch_model.bin.index.fp16.json")
    out = svdcli.compress(tmp_path / "m", tmp_path / "out", svdcli.Recipe("keep", 0.6)).path
    assert out is not None
    assert (out / "model.safetensors.index.fp16.json").is_file()
    model = transformers.LlamaForCausalLM.from_pretrained(out, variant="fp16")
    assert sum(p.numel() for p in model.parameters()) < sum(t.numel() for t in state.values())
