"""Build a random Hugging Face checkpoint in the shape of TinyLlama-1.1B, or of another Llama:
`python synthetic.py FOLDER LAYERS [FROM] [--shape 7B]`.

bfloat16 shards, written one tensor at a time. Every matrix is a random power-law part plus noise,
so its singular values fall as those of trained layers do: fast at first, then slowly, down to the
smallest. The numbers depend on the tensor's name only: a deeper checkpoint begins with the same
layers, and its shards are links to those of a shallower one, FROM.
"""

from __future__ import annotations

import argparse
import json
import os
import zlib
from dataclasses import replace
from pathlib import Path

import torch
from llama import LARGE, SHAPES, shard_name, shards_of, write_beside

from svdcli.files.dtypes import bytes_of
from svdcli.files.header import render_header
from svdcli.plan.tensors import TensorInfo

SHAPES_OF_ALL = {"tinyllama": replace(SHAPES["tinyllama"], vocab=32000), "7B": LARGE["7B"]}
LAYERS_EACH = {"tinyllama": 2, "7B": 4}  # in a shard
STRENGTH, DECAY, DIRECTIONS, SCALE = 0.5, 0.5, 256, 0.02


def build(folder: Path, kind: str, layers: int, shallower: Path | None = None) -> None:
    """Write config.json, the index and every shard; a shard that `shallower` has too becomes a hard
    link to it."""
    folder.mkdir(parents=True)
    known = _contents(shallower) if shallower is not None else {}
    shape = replace(SHAPES_OF_ALL[kind], layers=layers)
    shards = shards_of(shape, LAYERS_EACH[kind])
    for number, tensors in enumerate(shards, 1):
        name = shard_name(number, len(shards))
        twin = known.get(frozenset(tensor.name for tensor in tensors))
        if twin is not None:
            os.link(twin, folder / name)
        else:
            _write_shard(folder / name, tensors, shape.vocab)
    write_beside(folder, shape, shards)


def _contents(folder: Path) -> dict[frozenset[str], Path]:
    """Which shard of a checkpoint holds which tensors."""
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    shards: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        shards.setdefault(shard, set()).add(tensor)
    return {frozenset(tensors): folder / shard for shard, tensors in shards.items()}


def _write_shard(path: Path, tensors: list[TensorInfo], vocab: int) -> None:
    with path.open("wb") as stream:
        stream.write(render_header(tensors, {"format": "pt"}))
        for tensor in tensors:
            stream.write(bytes_of(_weight(tensor, vocab)))


def _weight(tensor: TensorInfo, vocab: int) -> torch.Tensor:
    """Ones for a norm, plain noise for embedding and head, for a layer noise plus STRENGTH * sum of
    k^-DECAY u_k v_k^T."""
    if len(tensor.shape) == 1:
        return torch.ones(tensor.shape, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(zlib.crc32(tensor.name.encode()))
    rows, columns = tensor.shape
    weight = torch.randn(rows, columns, generator=generator)
    if vocab not in tensor.shape:
        fall = STRENGTH * torch.arange(1, DIRECTIONS + 1).pow(-DECAY)
        left = torch.randn(rows, DIRECTIONS, generator=generator) * fall
        weight.addmm_(left, torch.randn(DIRECTIONS, columns, generator=generator))
    return weight.mul_(SCALE).to(torch.bfloat16)


if __name__ == "__main__":
    options = argparse.ArgumentParser()
    options.add_argument("folder", type=Path)
    options.add_argument("layers", type=int)
    options.add_argument("shallower", type=Path, nargs="?")
    options.add_argument("--shape", choices=SHAPES_OF_ALL, default="tinyllama")
    asked = options.parse_args()
    build(asked.folder, asked.shape, asked.layers, asked.shallower)
