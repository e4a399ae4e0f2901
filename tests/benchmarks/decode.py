"""Speed and memory of compressed models, against the bounds that svdcli/docs/benchmarks.md quotes.

    python tests/benchmarks/decode.py  everything, about 25 minutes on two cores
    python tests/benchmarks/decode.py --shape tinyllama --layout factored  one part of it
    python tests/benchmarks/decode.py --threads 1  where other processes need the other cores
    python tests/benchmarks/decode.py --json results.json  what was measured, as JSON

Llama-shaped bfloat16 models with random weights, each with layers as wide as those of a known model
and as many as 300 M parameters need, are compressed with --keep 0.5 and measured beside the
original by `svdcli bench`. The vocabulary is small: embedding and head stay dense, and in so
shallow a model they would hide what the layers gain.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common import (
    building_in,
    built,
    circumstances,
    compressed,
    mega,
    parser,
    say,
    svdcli,
    table,
    verdict,
    write_json,
)
from llama import SHAPES

KEEP = 0.5
SPEED_BOUND, MEMORY_BOUND = 0.85 / KEEP, KEEP + 0.10
LAYOUTS = ("factored", "pivoted")


def measure(folder: Path, name: str, layout: str, options: argparse.Namespace) -> dict[str, Any]:
    """Build, compress and bench one model: what bench printed, and how many cores others kept busy
    meanwhile."""
    dense = built(folder, name)
    out = compressed(dense, folder / f"{name}-{layout}", "--keep", KEEP, "--layout", layout)
    say(f"svdcli bench {name}-{layout}")
    threads = [] if options.threads is None else ["--threads", options.threads]
    asked = [
        "--prompt-tokens",
        options.prompt_tokens,
        "--new-tokens",
        options.new_tokens,
        "--rounds",
        options.rounds,
    ]
    done = svdcli("bench", out, "--against", dense, "--json", *asked, *threads)
    result: dict[str, Any] = done.json | {
        "cores_busy_with_others": done.others,
        "seconds": done.seconds,
    }
    return result


def rows(title: str, found: dict[str, Any]) -> list[tuple[str, ...]]:
    """Lines of the table: what, original, compressed, ratio, bound, whether it holds."""
    ratios, before, after = found["ratios"], found["original"], found["compressed"]
    lines = []
    for name in ("decode", "prefill"):
        ratio = ratios[name]
        text = f"{ratio['median']:.2f} ({ratio['lowest']:.2f} to {ratio['highest']:.2f})"
        speeds = [f"{side[name]['median']:.2f}" for side in (before, after)]
        bound = (
            (f"≥ {SPEED_BOUND:.2f}", verdict(ratio["median"] >= SPEED_BOUND))
            if name == "decode"
            else ("", "")
        )
        lines.append((f"{title}: {name}, tokens/s", *speeds, text, *bound))
    seconds = [f"{side['load_seconds']:.2f} s" for side in (before, after)]
    lines.append((f"{title}: time to load", *seconds, f"{ratios['load_seconds']:.2f}", "", ""))
    for name, what in (
        ("peak_bytes", "peak memory above imports"),
        ("memory_bytes", "memory at rest"),
        ("file_bytes", "weights"),
    ):
        sizes, holds = (
            [mega(side[name]) for side in (before, after)],
            verdict(ratios[name] <= MEMORY_BOUND),
        )
        lines.append(
            (f"{title}: {what}", *sizes, f"{ratios[name]:.3f}", f"≤ {MEMORY_BOUND:.2f}", holds)
        )
    return lines


def parse() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument(
        "--shape",
        choices=SHAPES,
        action="append",
        help="layers as wide as this model's; repeatable",
    )
    options.add_argument(
        "--layout", choices=LAYOUTS, action="append", help="this layout; repeatable"
    )
    options.add_argument(
        "--prompt-tokens", type=int, default=32, help="tokens read in one pass (32)"
    )
    options.add_argument("--new-tokens", type=int, default=32, help="tokens written (32)")
    options.add_argument("--rounds", type=int, default=7, help="rounds that count (7)")
    options.add_argument(
        "--threads", type=int, help="threads of each model; by default torch's own choice"
    )
    return options.parse_args()


def main() -> None:
    options = parse()
    cases = [
        (shape, layout) for shape in options.shape or SHAPES for layout in options.layout or LAYOUTS
    ]
    with building_in(options.folder) as folder:
        found = {
            f"{shape}, {layout}": measure(folder, shape, layout, options) for shape, layout in cases
        }
    first = next(iter(found.values()))
    sizes = {f"{item['original']['parameters'] / 1e6:.0f} M" for item in found.values()}
    others = max(item["cores_busy_with_others"] for item in found.values())
    print(
        f"{' and '.join(sorted(sizes))} parameters, {first['original']['dtype']} on "
        f"{first['device']}, "
        f"{first['threads']} threads, prompt of {first['prompt_tokens']} tokens, "
        f"{first['new_tokens']} new ones, "
        f"{first['rounds']} rounds; {circumstances(others)}\n"
    )
    titles = ("what", "original", "compressed", "ratio", "bound", "holds")
    print(table([titles, *(line for title, item in found.items() for line in rows(title, item))]))
    write_json(options.json, found)


if __name__ == "__main__":
    main()
