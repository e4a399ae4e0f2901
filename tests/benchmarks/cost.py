"""Time and memory of calibrate, compress and heal over sizes of models, and what they come to for
7B and 70B on one GPU.

    python tests/benchmarks/cost.py  everything, about 30 minutes on two cores
    python tests/benchmarks/cost.py --size 100M  one size; repeatable
    python tests/benchmarks/cost.py --estimate  the second table alone: it is counted, not measured
    python tests/benchmarks/cost.py --json FILE  what was measured, as JSON

Llama-shaped models with random weights and the sample model's tokenizer read the standard library,
each command in a process of its own. The largest shape is that of TinyLlama-1.1B with 2 of its 22
layers. Reading is counted in float32 operations, solving in float64 ones, and the first table says
how many a second they came to: what should not change with the size, and does not hold where a
model is too small for its overheads. heal takes the time that it is given: what is measured is a
few steps of each block and of the whole model.

The second table divides the operations for 7B and 70B by what one data-centre GPU is assumed to
sustain. No GPU was measured.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import (
    HERE,
    Run,
    building_in,
    circumstances,
    mega,
    parser,
    python,
    say,
    svdcli,
    table,
    write_json,
)
from llama import LARGE, Shape

SAMPLE = HERE.parents[1] / "sample_models" / "tiny-llama"
STEPS = 4
FULL_OUTPUTS = 4096  # as in models.calibrate
TOKENS = 131072
KEEP = 0.6
READING, SOLVING, DISK = (
    25e12,
    1e12,
    2e9,
)  # assumed of a GPU: float32 and float64 operations a second; bytes a second
COMMANDS = ("calibrate --no-gradients", "calibrate", "compress --calibration", "heal")


@dataclass(frozen=True)
class Size:
    """A shape as it is built, the layers of the whole model, and how many windows are read."""

    shape: Shape
    whole: int
    windows: int
    length: int = 512

    @property
    def tokens(self) -> int:
        return self.windows * self.length


SIZES = {
    "6M": Size(Shape(256, 768, 8, 4, 6, 2048), 6, 64),
    "100M": Size(Shape(768, 2048, 12, 4, 12, 2048), 12, 16),
    "1.1B": Size(Shape(2048, 5632, 32, 4, 2, 2048), 22, 8),
}
ESTIMATED = {name: LARGE[name] for name in ("7B", "70B")}


# What is to be computed ---------------------------------------------------------------------------


def weights(shape: Shape) -> list[tuple[int, int]]:
    """(m, n) of the linear layers of one block."""
    return [(size[0], size[1]) for size in shape.layer.values() if len(size) == 2]


def moments(shape: Shape) -> tuple[int, int]:
    """Numbers in the second moments of one block: of its four distinct inputs, and of its
    outputs."""
    return 3 * shape.hidden**2 + shape.ffn**2, sum(
        m * m if m <= FULL_OUTPUTS else m for m, _ in weights(shape)
    )


def reading(shape: Shape, tokens: int, *, gradients: bool) -> float:
    """Float32 operations of calibrate: a pass forwards, and with gradients the same again and one
    backwards; half of every moment, since it is symmetric."""
    matrices = shape.layers * sum(m * n for m, n in weights(shape)) + shape.vocab * shape.hidden
    inputs, outputs = moments(shape)
    return tokens * (
        (6 if gradients else 2) * matrices + shape.layers * (inputs + (outputs if gradients else 0))
    )


def solving(shape: Shape) -> float:
    """Float64 operations of compress with a calibration: every layer's spectrum for the allocation,
    then its factors."""
    total = 0.0
    for m, n in weights(shape):
        k = min(m, n)
        root = m**3 / 3 + m * m * n if m <= FULL_OUTPUTS else m * n
        qr = 2 * m * n * n - 2 * n**3 / 3 if m > n else 0
        total += 2 * (root + qr + 2 * k * n * n + 2 * k * k * n) + (4 / 3 + 9) * k**3
    return shape.layers * total


def estimates() -> list[tuple[str, ...]]:
    """Lines for the large shapes: operations, time and bytes."""
    lines = []
    for name, shape in ESTIMATED.items():
        block = sum(m * n for m, n in weights(shape))
        model = 2 * (shape.layers * block + 2 * shape.vocab * shape.hidden)
        inputs, outputs = moments(shape)
        for gradients in (False, True):
            file = 4 * shape.layers * (inputs + (outputs if gradients else 0))
            work = reading(shape, TOKENS, gradients=gradients)
            seconds = work / READING + ((2 if gradients else 1) * model + 2 * file) / DISK
            device = 4 * block + 4 * (inputs + (outputs if gradients else 0))
            lines.append(
                (
                    f"{name}: {COMMANDS[gradients]}",
                    f"{work:.1e}",
                    minutes(seconds),
                    giga(file),
                    giga(device),
                )
            )
        work, (m, n) = solving(shape), (shape.hidden, shape.ffn)
        seconds = work / SOLVING + (model + file) / DISK
        device = 8 * (1.5 * n * n + 4 * m * n + 4 * m * m)
        lines.append(
            (f"{name}: compress --calibration", f"{work:.1e}", minutes(seconds), "", giga(device))
        )
        work = 1000 * 2048 * (2 + 6 * KEEP) * shape.layers * block
        memory = [4 * (1 + 4 * KEEP) * count for count in (block, model / 2)]
        what = f"{name}: heal, 1,000 steps each, keep {KEEP:g}"
        device = f"{giga(memory[0])} in blocks, {giga(memory[1])} whole"
        lines.append(
            (what, f"{work:.1e}", minutes(work / READING) + " in blocks or whole", "", device)
        )
    return lines


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def giga(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


# What is measured ---------------------------------------------------------------------------------


def measure(folder: Path, name: str) -> dict[str, Run]:
    """Build one model and run every command on it once."""
    size = SIZES[name]
    model, stats, out = folder / name, folder / f"{name}-stats.safetensors", folder / f"{name}-svd"
    if not model.is_dir():
        say(f"building {name}")
        shape = size.shape
        python(
            HERE / "llama.py",
            model,
            shape.hidden,
            shape.ffn,
            shape.heads,
            shape.key_heads,
            shape.layers,
            shape.vocab,
        )
        for part in SAMPLE.glob("tokenizer*"):
            shutil.copy(part, model)
    text = ["--stdlib", "--samples", size.windows, "--seq-len", size.length, "-q"]
    say(f"{name}: calibrate")
    found = {
        "calibrate --no-gradients": svdcli(
            "calibrate", model, *text, "--no-gradients", "-o", stats, "--force"
        )
    }
    found["calibrate"] = svdcli("calibrate", model, *text, "--gradients", "-o", stats, "--force")
    say(f"{name}: compress")
    where = ["--calibration", stats, "-o", out, "--force", "-q"]
    found["compress --calibration"] = svdcli("compress", model, "--keep", KEEP, *where)
    say(f"{name}: heal")
    found["heal"] = svdcli(
        "heal",
        out,
        "--teacher",
        model,
        *text,
        "--steps",
        STEPS,
        "-o",
        folder / f"{name}-healed",
        "--force",
    )
    return found


def rows(name: str, found: dict[str, Run], start: Run) -> list[tuple[str, ...]]:
    """For each command its work, seconds, operations a second without start-up, the time of the
    whole model on `TOKENS` tokens at that rate, and peak memory above imports."""
    size = SIZES[name]
    whole, lines = replace(size.shape, layers=size.whole), []
    layers = (
        f"{size.shape.layers} of {size.whole} layers"
        if size.shape.layers < size.whole
        else f"{size.whole} layers"
    )
    for command in COMMANDS:
        run = found[command]
        seconds, memory = max(0.1, run.seconds - start.seconds), mega(run.peak - start.peak)
        if command == "heal":
            lines.append(
                (
                    f"{name}: heal",
                    f"{layers}, {STEPS} steps each",
                    f"{run.seconds:.0f} s",
                    "",
                    "as asked",
                    memory,
                )
            )
            continue
        if command.startswith("compress"):
            work, everything, what = solving(size.shape), solving(whole), layers
        else:
            gradients = command == "calibrate"
            work = reading(size.shape, size.tokens, gradients=gradients)
            everything, what = (
                reading(whole, TOKENS, gradients=gradients),
                f"{layers}, {size.tokens:,} tokens",
            )
        rate = work / seconds
        lines.append(
            (
                f"{name}: {command}",
                what,
                f"{run.seconds:.0f} s",
                f"{rate / 1e9:.0f} G",
                minutes(everything / rate),
                memory,
            )
        )
    return lines


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--size", choices=SIZES, action="append", help="this size; repeatable")
    made.add_argument("--estimate", action="store_true", help="measure nothing")
    options = made.parse_args()
    if not options.estimate:
        with building_in(options.folder) as folder:
            start = python(
                "-c", "import torch, transformers, svdcli.verbs.heal; transformers.LlamaForCausalLM"
            )
            found = {name: measure(folder, name) for name in options.size or SIZES}
        print(
            circumstances(max(run.others for runs in found.values() for run in runs.values()))
            + "\n"
        )
        head = (
            "what",
            "work",
            "time",
            "operations a second",
            f"whole model, {TOKENS:,} tokens",
            "peak memory above imports",
        )
        print(
            table(
                [head, *(line for name, runs in found.items() for line in rows(name, runs, start))]
            )
            + "\n"
        )
        raw: dict[str, Any] = {
            name: {
                command: {"seconds": run.seconds, "peak_bytes": run.peak - start.peak}
                for command, run in runs.items()
            }
            for name, runs in found.items()
        }
        write_json(options.json, raw)
    about = (
        f"{READING / 1e12:g} TFLOP/s in float32, {SOLVING / 1e12:g} in float64, "
        f"{DISK / 1e9:g} GB/s of disk"
    )
    print(f"Counted, not measured: {TOKENS:,} tokens on a GPU that is assumed to sustain {about}\n")
    print(
        table(
            [("what", "operations", "time", "file of moments", "memory on the GPU"), *estimates()]
        )
    )


if __name__ == "__main__":
    main()
