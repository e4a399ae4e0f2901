"""What fewer bits, lower rank and both together cost in quality, by the bytes that remain: one
table.

    python tests/benchmarks/bits.py              the sample model; an hour of it is healing
    python tests/benchmarks/bits.py --quick      few windows, two budgets
    python tests/benchmarks/bits.py --json FILE  what was measured, as JSON
    python tests/benchmarks/bits.py --json FILE --rows healed --shares 0.2 0.16
        some rows, at some budgets; what else is in FILE stays as it is

Every row reads the same calibration (the training half of Python's standard library) and is judged
on text that it never saw, by the excess of its loss over the original's. Bytes are those of the
block linears, as a share of bfloat16. Round to nearest and GPTQ (Frantar et al., 2022: columns in
order of falling diagonal, damped by 1 %) store the matrices themselves, symmetric, 8 bits with a
scale a row, fewer in groups of 64; both are this project's own rounding, without coupling of rows.
No two layers share a basis here: sharing.py has what that gains.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from common import HERE, building_in, parser, say, table, write_json
from safetensors.torch import load_file, save_file
from torch import Tensor

import svdcli
from svdcli.calibration.moments import LayerMoments, open_moments
from svdcli.linalg.rounding import Grid, rounded
from svdcli.text.texts import read_texts

SAMPLE = HERE.parents[1] / "sample_models" / "tiny-llama"
SAMPLES = 128
SHARES = (0.5, 0.4, 0.3, 0.267, 0.203, 0.2, 0.16, 0.141, 0.13)  # 0.203, 0.141: 3 and 2 bits
HEALED = (0.267, 0.203, 0.2, 0.16, 0.141, 0.13)
MINUTES = 10
GROUP = 64
GRIDS = {8: Grid(8), 4: Grid(4, GROUP), 3: Grid(3, GROUP), 2: Grid(2, GROUP)}
Round = Callable[[Tensor, Grid, LayerMoments], Tensor]


def to_nearest(w: Tensor, grid: Grid, _: LayerMoments) -> Tensor:
    return rounded(w, grid, torch.bfloat16).values(torch.float32)


def gptq(w: Tensor, grid: Grid, moments: LayerMoments) -> Tensor:
    matrix = rounded(w, grid, torch.bfloat16, moments.inputs.double())
    return matrix.values(torch.float32)


def share_of_bytes(shapes: Sequence[torch.Size], bits: int, width: Callable[[int], int]) -> float:
    """The bytes of whole matrices at that many bits, as a share of bfloat16; width(n) columns share
    a scale."""
    stored, before = 0.0, 0
    for m, n in shapes:
        groups = -(-n // width(n))
        stored += m * n * bits / 8 + 2 * m * groups
        before += 2 * m * n
    return stored / before


class Bench:
    """The sample model, its calibration, and the text that everything is judged on."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder = folder
        self.windows = 16 if options.quick else 128
        self.shares = (0.267, 0.2) if options.quick else options.shares or SHARES
        self.samples = 32 if options.quick else SAMPLES
        self.held_out = read_texts(None, stdlib=True, held_out=True)

    @cached_property
    def moments(self) -> Path:
        """The calibration, measured where it is not there yet."""
        path = self.folder / "moments.safetensors"
        if not path.exists():
            say("calibrating")
            text = read_texts(None, stdlib=True)
            svdcli.calibrate(SAMPLE, path, text, samples=self.samples, precision="float32")
        return path

    def excess(self, model: Path) -> tuple[float, float]:
        """Excess loss in nats a token, and its standard error over windows."""
        found = svdcli.evaluate(
            model, self.held_out, against=SAMPLE, seq_len=256, samples=self.windows
        )
        assert found.drift is not None
        excess = found.drift.excess_loss
        return excess.value, excess.error or 0.0

    def bits_alone(self, rounding: Round, bits: int) -> dict[str, Any]:
        """Every block linear on a grid, by itself."""
        model = self.folder / "rounded"
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(SAMPLE, model)
        weights = load_file(SAMPLE / "model.safetensors")
        moments = open_moments(self.moments)
        shapes = []
        for name in moments.layers:
            w, measured = weights[name].float(), moments.of(name)
            assert measured is not None
            weights[name] = rounding(w, GRIDS[bits], measured).to(torch.bfloat16)
            shapes.append(w.shape)
        save_file(weights, model / "model.safetensors", {"format": "pt"})
        value, error = self.excess(model)
        share = share_of_bytes(shapes, bits, GRIDS[bits].width)
        return {"bytes": share, "excess": value, "error": error}

    def budget(self, share: float, **wanted: Any) -> dict[str, Any] | None:
        """svdcli's own choice within a share of the bytes; None where it cannot be reached."""
        out = self.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        try:
            outcome = svdcli.compress(
                SAMPLE, out, calibration=self.moments, keep_bytes=share, share="never", **wanted
            )
        except svdcli.SvdcliError:
            return None
        selected = outcome.report.selected
        value, error = self.excess(out)
        share_kept = selected.bytes_after / selected.bytes_before
        predicted = outcome.report.expected_loss
        return {"bytes": share_kept, "excess": value, "error": error, "expected": predicted}

    def healed(self, share: float) -> dict[str, Any]:
        """The same after so many minutes of healing."""
        measured = self.budget(share)
        assert measured is not None
        out = self.folder / "healed"
        text = read_texts(None, stdlib=True)
        effort = svdcli.Effort(seconds=60 * MINUTES)
        svdcli.heal(self.folder / "out", out, teacher=SAMPLE, texts=text, effort=effort, force=True)
        value, error = self.excess(out)
        return {"bytes": measured["bytes"], "excess": value, "error": error}


def measure(bench: Bench, wanted: Sequence[str]) -> dict[str, Any]:
    """The rows whose names begin with one of those wanted; all where none is."""
    results: dict[str, Any] = {}
    for name, measured in _rows(bench):
        if not wanted or name.startswith(tuple(wanted)):
            say(name)
            results[name] = [result for result in measured() if result is not None]
    return results


def _rows(bench: Bench) -> Iterator[tuple[str, Callable[[], list[Any]]]]:
    """The name of each row, and what measures it."""
    for name, rounding in (("round to nearest", to_nearest), ("GPTQ", gptq)):
        for bits in GRIDS:
            yield f"{name}, {bits} bits", partial(_one, bench, rounding, bits)
    ranks = {"bits": "16", "layout": "pivoted", "allocate": "global", "floor": 0.0}
    yield "rank alone", lambda: [bench.budget(share, **ranks) for share in bench.shares]
    yield "rank and bits", lambda: [bench.budget(share) for share in bench.shares]
    shares = [share for share in HEALED if share in bench.shares]
    yield f"healed, {MINUTES} minutes", lambda: [bench.healed(share) for share in shares]


def _one(bench: Bench, rounding: Round, bits: int) -> list[Any]:
    return [bench.bits_alone(rounding, bits)]


def merged(before: Sequence[Any], found: Sequence[Any]) -> list[Any]:
    """What was found, and of what there was before the results at other shares, by falling
    share."""

    def is_anew(old: Any) -> bool:
        return any(abs(old["bytes"] - new["bytes"]) < 0.002 for new in found)

    kept = [result for result in before if not is_anew(result)]
    return sorted([*kept, *found], key=lambda result: -result["bytes"])


def markdown(results: dict[str, Any]) -> str:
    """What was measured, a line each."""
    lines = [("way", "bytes", "excess loss, nats a token")]
    for name, found in results.items():
        for result in found:
            shown = f"{result['excess']:.4f} ± {result['error']:.4f}"
            lines.append((name, f"{result['bytes']:.3f}", shown))
    return table(lines)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--quick", action="store_true", help="few windows, two budgets")
    options.add_argument("--rows", nargs="+", default=[], help="rows whose names begin with these")
    options.add_argument("--shares", nargs="+", type=float, help="these budgets alone")
    given = options.parse_args()
    results: dict[str, Any] = {}
    if (given.rows or given.shares) and given.json is not None and given.json.exists():
        results = json.loads(given.json.read_text())
    with building_in(given.folder) as folder:
        for name, found in measure(Bench(folder, given), given.rows).items():
            results[name] = merged(results.get(name, []), found)
    print(markdown(results))
    write_json(given.json, results)


if __name__ == "__main__":
    main()
