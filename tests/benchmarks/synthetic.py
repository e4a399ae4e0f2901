"""Build a random Hugging Face checkpoint in the shape of TinyLlama-1.1B: `python synthetic.py
FOLDER LAYERS [FROM]`.

bfloat16 shards, written one tensor at a time. Every matrix is a random power-law part plus noise,
so its singular values fall as those of trained layers do: fast at first, then slowly, down to the
smallest. The numbers depend on the tensor's name only: a deeper checkpoint begins with the same
layers, and its shards are links to those of a shallower one, FROM.
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import torch
from llama import SHAPES

from svdcli.files.dtypes import bytes_of
from svdcli.files.header import render_header
from svdcli.plan.tensors import TensorInfo

TINYLLAMA = replace(SHAPES["tinyllama"], vocab=32000)
STRENGTH, DECAY, DIRECTIONS, SCALE = 0.5, 0.5, 256, 0.02
LAYERS_PER_SHARD = 2


def build(folder: Path, layers: int, shallower: Path | None = None) -> None:
    """Write config.json, the index and every shard; a shard that `shallower` has too becomes a hard
    link to it."""
    folder.mkdir(parents=True)
    known = _contents(shallower) if shallower is not None else {}
    shape = replace(TINYLLAMA, layers=layers)
    # embedding and head in a shard of their own, then a few layers to each
    shards = [
        shape.ends,
        *(
            shape.layers_from(first, LAYERS_PER_SHARD)
            for first in range(0, layers, LAYERS_PER_SHARD)
        ),
    ]
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= {tensor.name: name for tensor in tensors}
        twin = known.get(frozenset(tensor.name for tensor in tensors))
        if twin is not None:
            os.link(twin, folder / name)
        else:
            _write_shard(folder / name, tensors)
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(shape.config)


def _contents(folder: Path) -> dict[frozenset[str], Path]:
    """Which shard of a checkpoint holds which tensors."""
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    shards: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        shards.setdefault(shard, set()).add(tensor)
    return {frozenset(tensors): folder / shard for shard, tensors in shards.items()}


def _write_shard(path: Path, tensors: list[TensorInfo]) -> None:
    with path.open("wb") as stream:
        stream.write(render_header(tensors, {"format": "pt"}))
        for tensor in tensors:
            stream.write(bytes_of(_weight(tensor)))


def _weight(tensor: TensorInfo) -> torch.Tensor:
    """Ones for a norm, plain noise for embedding and head, for a layer noise plus STRENGTH * sum of
    k^-DECAY u_k v_k^T."""
    if len(tensor.shape) == 1:
        return torch.ones(tensor.shape, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(zlib.crc32(tensor.name.encode()))
    rows, columns = tensor.shape
    weight = torch.randn(rows, columns, generator=generator)
    if TINYLLAMA.vocab not in tensor.shape:
        fall = STRENGTH * torch.arange(1, DIRECTIONS + 1).pow(-DECAY)
        left = torch.randn(rows, DIRECTIONS, generator=generator) * fall
        weight.addmm_(left, torch.randn(DIRECTIONS, columns, generator=generator))
    return weight.mul_(SCALE).to(torch.bfloat16)


if __name__ == "__main__":
    build(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else None)
