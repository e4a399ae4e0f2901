"""Llama-shaped bfloat16 models with random weights: `python llama.py FOLDER SHAPE` writes one to a
single file; `sparse` writes the headers of one alone.

SHAPE is a name, or the numbers of a Shape in their order. Each named one has layers as wide as
those of a known model and as many as 300 M parameters need; its vocabulary is small, since
embedding and head stay dense, and in so shallow a model they would hide what the layers gain.
Importing this imports no torch.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from svdcli.files.header import render_header
from svdcli.plan.tensors import TensorInfo

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Shape:
    """Widths of one layer, how many of them, and the words of the vocabulary."""

    hidden: int
    ffn: int
    heads: int
    key_heads: int
    layers: int
    vocab: int = 4096

    @property
    def layer(self) -> dict[str, tuple[int, ...]]:
        """The tensors of one layer."""
        hidden, keys = self.hidden, self.hidden // self.heads * self.key_heads
        return {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (self.ffn, hidden),
            "mlp.up_proj": (self.ffn, hidden),
            "mlp.down_proj": (hidden, self.ffn),
        }

    @property
    def ends(self) -> list[TensorInfo]:
        """Embedding, last norm and head."""
        table = (self.vocab, self.hidden)
        sizes = {"model.embed_tokens": table, "model.norm": (self.hidden,), "lm_head": table}
        return [TensorInfo(f"{name}.weight", "BF16", size) for name, size in sizes.items()]

    def layers_from(self, first: int, count: int) -> list[TensorInfo]:
        """Every tensor of that many layers, or of as many as there are left."""
        numbers = range(first, min(first + count, self.layers))
        return [
            TensorInfo(f"model.layers.{i}.{name}.weight", "BF16", size)
            for i in numbers
            for name, size in self.layer.items()
        ]

    @property
    def config(self) -> str:
        """The text of config.json."""
        found = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
        }
        return json.dumps(found, indent=2)


SHAPES = {"llama-3-8b": Shape(4096, 14336, 32, 8, 2), "tinyllama": Shape(2048, 5632, 32, 4, 8)}

# As large as they are; their vocabulary too.
LARGE = {
    "7B": Shape(4096, 11008, 32, 32, 32, 32000),
    "70B": Shape(8192, 28672, 64, 8, 80, 32000),
    "405B": Shape(16384, 53248, 128, 8, 126, 128256),
}


def shards_of(shape: Shape, layers_each: int) -> list[list[TensorInfo]]:
    """Embedding and head in a shard of their own, then a few layers to each."""
    starts = range(0, shape.layers, layers_each)
    return [shape.ends, *(shape.layers_from(first, layers_each) for first in starts)]


def shard_name(number: int, count: int) -> str:
    """Of the number-th, from 1 on, of so many."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def write_beside(folder: Path, shape: Shape, shards: list[list[TensorInfo]]) -> None:
    """Write config.json and the index of these shards."""
    weight_map = {
        tensor.name: shard_name(number, len(shards))
        for number, tensors in enumerate(shards, 1)
        for tensor in tensors
    }
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(shape.config)


def sparse(folder: Path, shape: Shape, layers_each: int) -> None:
    """A checkpoint of headers: its weights are holes in the files, which take no room on disk. Each
    tensor begins with its name, as no two tensors of a model begin alike."""
    folder.mkdir(parents=True)
    shards = shards_of(shape, layers_each)
    for number, tensors in enumerate(shards, 1):
        with (folder / shard_name(number, len(shards))).open("wb") as stream:
            stream.write(render_header(tensors, {"format": "pt"}))
            for tensor in tensors:
                begin = stream.tell()
                stream.write(tensor.name.encode())
                stream.seek(begin + tensor.nbytes)
            stream.truncate()
    write_beside(folder, shape, shards)


def build(folder: Path, shape: Shape) -> None:
    """Write config.json and one weight file, tensor by tensor."""
    import torch

    from svdcli.files.dtypes import bytes_of

    folder.mkdir(parents=True)
    tensors = [*shape.ends, *shape.layers_from(0, shape.layers)]
    generator = torch.Generator().manual_seed(0)
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(render_header(tensors, {"format": "pt"}))
        for tensor in tensors:
            stream.write(bytes_of(_weight(tensor, generator)))
    (folder / "config.json").write_text(shape.config)


def _weight(tensor: TensorInfo, generator: torch.Generator) -> torch.Tensor:
    import torch

    if len(tensor.shape) == 1:
        return torch.ones(tensor.shape, dtype=torch.bfloat16)
    return (
        torch.randn(tensor.shape, generator=generator)
        .mul_(tensor.shape[1] ** -0.5)
        .to(torch.bfloat16)
    )


if __name__ == "__main__":
    target, *asked = sys.argv[1:]
    build(Path(target), SHAPES[asked[0]] if len(asked) == 1 else Shape(*map(int, asked)))
