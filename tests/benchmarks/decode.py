"""Speed and memory of compressed models, against the bounds that README quotes.

    python tests/benchmarks/decode.py                       everything, about 25 minutes on two cores
    python tests/benchmarks/decode.py --shape tinyllama --layout factored    one part of it
    python tests/benchmarks/decode.py --threads 1           where other processes need the other cores
    python tests/benchmarks/decode.py --json results.json   what was measured, as JSON

Llama-shaped bfloat16 models with random weights, each with layers as wide as those of a known model and as many as 300 M
parameters need, are compressed with --keep 0.5 and measured beside the original by `svdcli bench`. The vocabulary is small:
embedding and head stay dense, and in so shallow a model they would hide what the layers gain.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from svdcli.files.bytes_of import bytes_of
from svdcli.files.header import render_header
from svdcli.plan.tensors import TensorInfo

KEEP = 0.5
VOCAB = 4096
SPEED_BOUND, MEMORY_BOUND = 0.85 / KEEP, KEEP + 0.10
LAYOUTS = ("factored", "pivoted")


@dataclass(frozen=True)
class Shape:
    """Widths of one layer, and how many of them."""

    hidden: int
    ffn: int
    heads: int
    key_heads: int
    layers: int


SHAPES = {"llama-3-8b": Shape(4096, 14336, 32, 8, 2), "tinyllama": Shape(2048, 5632, 32, 4, 8)}


# The model -----------------------------------------------------------------------------------------------------------


def build(folder: Path, shape: Shape) -> None:
    """Write config.json and one weight file, tensor by tensor."""
    folder.mkdir(parents=True)
    tensors = _tensors(shape)
    generator = torch.Generator().manual_seed(0)
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(render_header(tensors, {"format": "pt"}))
        for tensor in tensors:
            stream.write(bytes_of(_weight(tensor, generator)))
    (folder / "config.json").write_text(json.dumps(_config(shape), indent=2))


def _tensors(shape: Shape) -> list[TensorInfo]:
    hidden, ffn, keys = shape.hidden, shape.ffn, shape.hidden // shape.heads * shape.key_heads
    block = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    ends = {"model.embed_tokens.weight": (VOCAB, hidden), "model.norm.weight": (hidden,), "lm_head.weight": (VOCAB, hidden)}
    blocks = {f"model.layers.{i}.{name}.weight": size for i in range(shape.layers) for name, size in block.items()}
    return [TensorInfo(name, "BF16", size) for name, size in (ends | blocks).items()]


def _weight(tensor: TensorInfo, generator: torch.Generator) -> torch.Tensor:
    if len(tensor.shape) == 1:
        return torch.ones(tensor.shape, dtype=torch.bfloat16)
    return torch.randn(tensor.shape, generator=generator).mul_(tensor.shape[1] ** -0.5).to(torch.bfloat16)


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_heads,
        "vocab_size": VOCAB,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


# The measurement -----------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    print(f"... {text}", file=sys.stderr, flush=True)


def svdcli(*arguments: object) -> str:
    command = [sys.executable, "-m", "svdcli", *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout


def busy_seconds() -> float:
    """CPU time that all processes of this machine have used, where Linux counts it; else 0."""
    with suppress(OSError), Path("/proc/stat").open() as stat:
        ticks = [int(value) for value in stat.readline().split()[1:]]
        return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # all but idle and waiting for the disk
    return 0.0


def children_seconds() -> float:
    spent = os.times()
    return spent.children_user + spent.children_system


def measure(folder: Path, name: str, layout: str, options: argparse.Namespace) -> dict[str, Any]:
    """Build, compress and bench one model: what bench printed, and how many cores others kept busy meanwhile."""
    dense, out = folder / name, folder / f"{name}-{layout}"
    if not dense.is_dir():
        say(f"building {name}")
        build(dense, SHAPES[name])
    if not out.is_dir():
        say(f"svdcli compress {name} --keep {KEEP} --layout {layout}")
        svdcli("compress", dense, "-o", out, "--keep", KEEP, "--layout", layout, "-q")
    say(f"svdcli bench {name}-{layout}")
    threads = [] if options.threads is None else ["--threads", options.threads]
    asked = ["--prompt-tokens", options.prompt_tokens, "--new-tokens", options.new_tokens, "--rounds", options.rounds]
    begin, busy, mine = time.perf_counter(), busy_seconds(), children_seconds()
    found = svdcli("bench", out, "--against", dense, "--json", *asked, *threads)
    wall, others = time.perf_counter() - begin, busy_seconds() - busy - (children_seconds() - mine)
    result: dict[str, Any] = json.loads(found) | {"cores_busy_with_others": max(0.0, others) / wall, "seconds": wall}
    return result


def rows(title: str, found: dict[str, Any]) -> list[tuple[str, ...]]:
    """Lines of the table: what, original, compressed, ratio, bound, whether it holds."""
    ratios, before, after = found["ratios"], found["original"], found["compressed"]
    lines = []
    for name in ("decode", "prefill"):
        ratio, bound = ratios[name], f"≥ {SPEED_BOUND:.2f}" if name == "decode" else ""
        text = f"{ratio['median']:.2f} ({ratio['lowest']:.2f} to {ratio['highest']:.2f})"
        speeds = [f"{side[name]['median']:.2f}" for side in (before, after)]
        holds = ("yes" if ratio["median"] >= SPEED_BOUND else "NO") if bound else ""
        lines.append((f"{title}: {name}, tokens/s", *speeds, text, bound, holds))
    seconds = [f"{side['load_seconds']:.2f} s" for side in (before, after)]
    lines.append((f"{title}: time to load", *seconds, f"{ratios['load_seconds']:.2f}", "", ""))
    for name, what in (
        ("peak_bytes", "peak memory above imports"),
        ("memory_bytes", "memory at rest"),
        ("file_bytes", "weights"),
    ):
        sizes = [f"{side[name] / 1e6:.0f} MB" for side in (before, after)]
        holds = "yes" if ratios[name] <= MEMORY_BOUND else "NO"
        lines.append((f"{title}: {what}", *sizes, f"{ratios[name]:.3f}", f"≤ {MEMORY_BOUND:.2f}", holds))
    return lines


def table(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table with its columns lined up."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(f"| {line} |" for line in (padded[0], " | ".join("-" * width for width in widths), *padded[1:]))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="layers as wide as this model's; repeatable")
    parser.add_argument("--layout", choices=LAYOUTS, action="append", help="this layout; repeatable")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="tokens read in one pass (32)")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens written (32)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count (7)")
    parser.add_argument("--threads", type=int, help="threads of each model; by default torch's own choice")
    parser.add_argument(
        "--folder", type=Path, help="build here, or use what is here already, and leave it; else in a temporary one"
    )
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    return parser.parse_args(argv)


def main() -> None:
    options = parse()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="svdcli-decode-"))
    folder.mkdir(parents=True, exist_ok=True)
    cases = [(shape, layout) for shape in options.shape or SHAPES for layout in options.layout or LAYOUTS]
    try:
        found = {f"{shape}, {layout}": measure(folder, shape, layout, options) for shape, layout in cases}
    finally:
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    first = next(iter(found.values()))
    sizes = {f"{item['original']['parameters'] / 1e6:.0f} M" for item in found.values()}
    others = max(item["cores_busy_with_others"] for item in found.values())
    print(
        f"{' and '.join(sorted(sizes))} parameters, {first['original']['dtype']} on {first['device']}, {first['threads']} of "
        f"{os.cpu_count()} cores, torch {version('torch')}, transformers {version('transformers')}; prompt of "
        f"{first['prompt_tokens']} tokens, {first['new_tokens']} new ones, {first['rounds']} rounds; other processes kept up to "
        f"{others:.1f} cores busy meanwhile\n"
    )
    titles = ("what", "original", "compressed", "ratio", "bound", "holds")
    print(table([titles, *(line for title, item in found.items() for line in rows(title, item))]))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
