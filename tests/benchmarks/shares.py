"""Where the time of a decoded token goes, in the layers that compression changes and in all the
rest.

    python tests/benchmarks/shares.py  both shapes of decode.py, about 6 minutes on two cores
    python tests/benchmarks/shares.py --shape tinyllama  one of them
    python tests/benchmarks/shares.py --json FILE  what was measured, as JSON

The models are those of decode.py. Every selected layer is timed from its call to its return while
one token after the other is decoded; the median over tokens counts. What is not in them is
attention, norms, activations, the head and Python.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from common import (
    HERE,
    building_in,
    built,
    circumstances,
    compressed,
    parser,
    python,
    say,
    table,
    write_json,
)
from llama import SHAPES

KEEP = 0.5
PROMPT, TOKENS = 32, 48


def measure(folder: Path) -> dict[str, float]:
    """Milliseconds of a token of the model in that folder: in all, in the layers, and bytes read in
    the layers."""
    import torch

    import svdcli

    model = svdcli.load(folder)
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    layers = [module for name, module in model.named_modules() if name.rsplit(".", 1)[-1] in names]
    spent, began = [0.0], [0.0]
    for layer in layers:
        layer.register_forward_pre_hook(lambda *_: began.__setitem__(0, time.perf_counter()))
        layer.register_forward_hook(
            lambda *_: spent.__setitem__(0, spent[0] + time.perf_counter() - began[0])
        )
    times = []
    with torch.inference_mode():
        output = model(torch.arange(2, 2 + PROMPT)[None], use_cache=True)
        for _ in range(TOKENS):
            word, spent[0], begin = output.logits[:, -1:].argmax(-1), 0.0, time.perf_counter()
            output = model(word, past_key_values=output.past_key_values, use_cache=True)
            times.append((time.perf_counter() - begin, spent[0]))
    whole, inside = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
    size = sum(
        tensor.numel() * tensor.element_size() for layer in layers for tensor in layer.parameters()
    )
    return {
        "token_ms": whole,
        "layers_ms": inside,
        "layers": len(layers),
        "gigabytes_a_second": size / inside / 1e6,
    }


def rows(shape: str, dense: dict[str, float], small: dict[str, float]) -> list[tuple[str, ...]]:
    rest = [side["token_ms"] - side["layers_ms"] for side in (dense, small)]
    lines = [(shape, "whole token", dense["token_ms"], small["token_ms"])]
    lines += [
        ("", "in the layers", dense["layers_ms"], small["layers_ms"]),
        ("", "in all the rest", *rest),
    ]
    found = [(a, b, f"{x:.1f} ms", f"{y:.1f} ms", f"{x / y:.2f}") for a, b, x, y in lines]
    speeds = [f"{side['gigabytes_a_second']:.1f} GB/s" for side in (dense, small)]
    return [*found, ("", "weights of the layers read at", *speeds, "")]


def main() -> None:
    made = parser(__doc__)
    made.add_argument(
        "--shape",
        choices=SHAPES,
        action="append",
        help="layers as wide as this model's; repeatable",
    )
    options = made.parse_args()
    found: dict[str, Any] = {}
    others = 0.0
    with building_in(options.folder) as folder:
        for shape in options.shape or SHAPES:
            dense = built(folder, shape)
            small = compressed(dense, folder / f"{shape}-factored", "--keep", KEEP)
            say(f"decoding {shape}")
            runs = [python(HERE / "shares.py", "--measure", path) for path in (dense, small)]
            others = max(others, *(run.others for run in runs))
            found[shape] = [run.json for run in runs]
    print(circumstances(others) + "\n")
    head = ("layers as wide as", "", "original", f"keep {KEEP}", "ratio")
    print(table([head, *(line for shape, pair in found.items() for line in rows(shape, *pair))]))
    write_json(options.json, found)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(Path(sys.argv[2]))))
    else:
        main()
