"""Peak memory while a compressed model is opened, against the size of its weights.

    python tests/benchmarks/loading.py                      everything, about 4 minutes on two cores
    python tests/benchmarks/loading.py --layout pivoted     one layout
    python tests/benchmarks/loading.py --json results.json  what was measured, as JSON

A Llama-shaped bfloat16 model with random weights (llama.py) is compressed with --keep 0.5 to a
single file and to shards of 100 MB, and `svdcli.load` opens each in a process of its own
(opened.py). Counted is the highest resident memory of that process, above what its imports take.
Weights that are mapped from a file count once they are touched: hence the second figure, after each
was read, and the third, after a pass of a few tokens.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common import (
    HERE,
    building_in,
    built,
    circumstances,
    compressed,
    mega,
    parser,
    python,
    say,
    table,
    verdict,
    write_json,
)
from llama import SHAPES

KEEP = 0.5
BOUND = 1.25
LAYOUTS = ("factored", "pivoted")
FILES: dict[str, tuple[str, ...]] = {"one file": (), "shards": ("--max-shard-size", "100MB")}
MOMENTS = {"opened": "opened", "read": "every weight read", "run": "after a pass"}


def measure(folder: Path, shape: str, layout: str, files: str) -> dict[str, Any]:
    """Build, compress and open one model: what opening it took, and how many cores others kept busy
    meanwhile."""
    out = folder / f"{shape}-{layout}-{files.replace(' ', '-')}"
    compressed(built(folder, shape), out, "--keep", KEEP, "--layout", layout, *FILES[files])
    say(f"opening {out.name}")
    weights = [file.stat().st_size for file in out.glob("*.safetensors")]
    done = python(HERE / "opened.py", out)
    about = {
        "files": len(weights),
        "file_bytes": sum(weights),
        "cores_busy_with_others": done.others,
    }
    return about | done.json


def rows(title: str, found: dict[str, Any]) -> list[tuple[str, ...]]:
    """Lines of the table: what, weights on disk, peak memory, ratio, bound, whether it holds."""
    size, lines = found["file_bytes"], []
    for moment, what in MOMENTS.items():
        ratio = found[moment] / size
        lines.append(
            (
                f"{title}: {what}",
                mega(size),
                mega(found[moment]),
                f"{ratio:.3f}",
                f"≤ {BOUND}",
                verdict(ratio <= BOUND),
            )
        )
    return lines


def parse() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument(
        "--shape",
        choices=SHAPES,
        default="tinyllama",
        help="layers as wide as this model's (tinyllama)",
    )
    options.add_argument(
        "--layout", choices=LAYOUTS, action="append", help="this layout; repeatable"
    )
    return options.parse_args()


def main() -> None:
    options = parse()
    cases = [(layout, files) for layout in options.layout or LAYOUTS for files in FILES]
    with building_in(options.folder) as folder:
        found = {
            f"{layout}, {files}": measure(folder, options.shape, layout, files)
            for layout, files in cases
        }
    first = next(iter(found.values()))
    others = max(item["cores_busy_with_others"] for item in found.values())
    print(
        f"{options.shape}, keep {KEEP}, {first['dtype']}, imports "
        f"{mega(first['imports_bytes'])}; {circumstances(others)}\n"
    )
    titles = ("what", "weights", "peak memory", "ratio", "bound", "holds")
    print(table([titles, *(line for title, item in found.items() for line in rows(title, item))]))
    write_json(options.json, found)


if __name__ == "__main__":
    main()
