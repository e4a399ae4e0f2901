"""What it costs in quality to run the model in bfloat16 while its layers are measured, and how far
the file of moments is from the same in parts: one table.

    python tests/benchmarks/precision.py              the sample model; 10 minutes on 2 cores
    python tests/benchmarks/precision.py --quick      few windows
    python tests/benchmarks/precision.py --json FILE  what was measured, as JSON

Every row is compressed with moments of the same text (the training half of Python's standard
library) and judged on text that calibration never saw, by the excess of its loss over the
original's. Rows differ in the passes of calibration alone; two more in float32 have other labels,
which tells how much of a difference is the draw of them. Moments are summed in float32 everywhere.
Seconds are of calibration, here: a machine without instructions for bfloat16 is slower with it.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

import bits
from bits import SAMPLE
from common import building_in, parser, say, table, write_json
from safetensors.torch import load_file

import svdcli
from svdcli.text.texts import read_texts

KEEPS = (0.6, 0.4)
PARTS = 8
ROWS: dict[str, dict[str, Any]] = {
    "float32": {"precision": "float32"},
    "bfloat16": {"precision": "bfloat16"},
    "float32, other labels": {"precision": "float32", "seed": 1},
    "float32, others again": {"precision": "float32", "seed": 2},
}


class Bench(bits.Bench):
    """The sample model, and the text that it is calibrated with and judged on."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        super().__init__(folder, options)
        self.windows = 16 if options.quick else 256
        self.text = read_texts(None, stdlib=True)

    def row(self, name: str) -> dict[str, Any]:
        """The excess losses of one row, and the seconds of its calibration."""
        moments = self.folder / f"{name}.safetensors"
        begin = time.perf_counter()
        done = svdcli.calibrate(
            SAMPLE, moments, self.text, samples=self.samples, gradients=True, **ROWS[name]
        )
        seconds = time.perf_counter() - begin
        found = []
        for keep in KEEPS:
            out = self.folder / "out"
            shutil.rmtree(out, ignore_errors=True)
            svdcli.compress(SAMPLE, out, keep=keep, calibration=moments)
            value, error = self.excess(out)
            found.append({"keep": keep, "excess": value, "error": error})
        return {"tokens": done.tokens, "seconds": seconds, "excess": found}

    def in_parts(self) -> float:
        """The largest difference between the moments of parts and those of the whole, in the
        largest entry of each."""
        parts = []
        for number in range(1, PARTS + 1):
            parts.append(self.folder / f"part-{number}.safetensors")
            how = {"samples": self.samples, "part": (number, PARTS)}
            svdcli.calibrate(SAMPLE, parts[-1], self.text, **how)
        svdcli.merge_moments(parts, self.folder / "merged.safetensors")
        whole = load_file(self.folder / "float32.safetensors")
        merged = load_file(self.folder / "merged.safetensors")
        return max(
            float((merged[key] - value).abs().max() / value.abs().max())
            for key, value in whole.items()
        )


def measure(bench: Bench) -> dict[str, Any]:
    rows = {}
    for name in ROWS:
        say(name)
        rows[name] = bench.row(name)
    say(f"{PARTS} parts")
    return {"rows": rows, "parts": PARTS, "difference of parts": bench.in_parts()}


def markdown(results: dict[str, Any]) -> str:
    """Excess losses, a line for each row, and how far each is from the first."""
    lines: list[tuple[str, ...]] = [("passes", *(f"keep {keep:g}" for keep in KEEPS), "seconds")]
    first = results["rows"]["float32"]["excess"]
    for name, row in results["rows"].items():
        cells = []
        for found, other in zip(row["excess"], first, strict=True):
            away = found["excess"] / other["excess"] - 1
            cells.append(f"{found['excess']:.4f} ± {found['error']:.4f} ({away:+.2%})")
        lines.append((name, *cells, f"{row['seconds']:.0f}"))
    parts = (
        f"{results['parts']} parts differ from the whole by {results['difference of parts']:.1e}"
    )
    return f"{table(lines)}\n{parts} of the largest entry of a moment at most.\n"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--quick", action="store_true", help="few windows")
    options.set_defaults(shares=None)  # of bits.py, which has budgets in bytes alone
    given = options.parse_args()
    with building_in(given.folder) as folder:
        results = measure(Bench(folder, given))
    print(markdown(results))
    write_json(given.json, results)


if __name__ == "__main__":
    main()
