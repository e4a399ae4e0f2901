"""Time and memory of calibrate, compress and heal over sizes of models, and what they come to for larger ones.

    python tests/benchmarks/cost.py                 everything
    python tests/benchmarks/cost.py --size 100M     one size; repeatable
    python tests/benchmarks/cost.py --json FILE     what was measured, as JSON

Llama-shaped models with random weights and the sample model's tokenizer read the standard library. The largest shape is that
of TinyLlama-1.1B with 2 of its 22 layers: time grows with the number of layers and, but for compress, of tokens, which the
table scales up; memory does not grow with layers but for the hidden states between them. heal takes the time that it is given:
what is measured is a few steps of each block and of the whole model. Each command is a process of its own.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import HERE, Run, building_in, circumstances, mega, parser, python, say, svdcli, table, write_json

SAMPLE = HERE.parents[1] / "sample_models" / "tiny-llama"
STEPS = 4


@dataclass(frozen=True)
class Size:
    """A shape, how many of its layers are built, and how much text is read."""

    hidden: int
    ffn: int
    heads: int
    key_heads: int
    layers: int
    whole: int
    windows: int
    length: int = 512

    @property
    def tokens(self) -> int:
        return self.windows * self.length


SIZES = {
    "6M": Size(256, 768, 8, 4, 6, 6, 32),
    "100M": Size(768, 2048, 12, 4, 12, 12, 16),
    "1.1B": Size(2048, 5632, 32, 4, 2, 22, 8),
}
COMMANDS = ("calibrate --no-gradients", "calibrate", "compress --calibration", "heal")


def measure(folder: Path, name: str) -> dict[str, Run]:
    """Build one model and run every command on it once."""
    size = SIZES[name]
    model, stats, out = folder / name, folder / f"{name}-stats.safetensors", folder / f"{name}-svd"
    if not model.is_dir():
        say(f"building {name}")
        python(HERE / "llama.py", model, size.hidden, size.ffn, size.heads, size.key_heads, size.layers, 2048)
        for part in SAMPLE.glob("tokenizer*"):
            shutil.copy(part, model)
    text = ["--stdlib", "--samples", size.windows, "--seq-len", size.length, "-q"]
    say(f"{name}: calibrate")
    found = {"calibrate --no-gradients": svdcli("calibrate", model, *text, "--no-gradients", "-o", stats, "--force")}
    found["calibrate"] = svdcli("calibrate", model, *text, "--gradients", "-o", stats, "--force")
    say(f"{name}: compress")
    found["compress --calibration"] = svdcli("compress", model, "--keep", 0.5, "--calibration", stats, "-o", out, "--force", "-q")
    say(f"{name}: heal")
    found["heal"] = svdcli("heal", out, "--teacher", model, *text, "--steps", STEPS, "-o", folder / f"{name}-healed", "--force")
    return found


def rows(name: str, found: dict[str, Run], imports: int) -> list[tuple[str, ...]]:
    """What, seconds as measured, what they come to for the whole model on 131,072 tokens, peak memory above imports."""
    size = SIZES[name]
    lines = []
    for command in COMMANDS:
        run = found[command]
        reads = 1 if command.startswith("compress") else 131072 / size.tokens
        whole = run.seconds * size.whole / size.layers * reads
        work = f"{size.layers} of {size.whole} layers" if size.layers < size.whole else f"{size.layers} layers"
        work += "" if command.startswith("compress") else f", {size.tokens:,} tokens"
        work += f", {STEPS} steps each" if command == "heal" else ""
        scaled = "as asked" if command == "heal" else f"{whole / 60:.1f} min"
        lines.append((f"{name}: {command}", work, f"{run.seconds:.0f} s", scaled, mega(run.peak - imports)))
    return lines


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--size", choices=SIZES, action="append", help="this size; repeatable")
    options = made.parse_args()
    with building_in(options.folder) as folder:
        imports = python("-c", "import torch, transformers, svdcli.healing; transformers.LlamaForCausalLM").peak
        found = {name: measure(folder, name) for name in options.size or SIZES}
    print(circumstances(max(run.others for runs in found.values() for run in runs.values())) + "\n")
    head = ("what", "work", "time", "whole model, 131,072 tokens", "peak memory above imports")
    print(table([head, *(line for name, runs in found.items() for line in rows(name, runs, imports))]))
    raw: dict[str, Any] = {
        name: {command: {"seconds": run.seconds, "peak_bytes": run.peak - imports} for command, run in runs.items()}
        for name, runs in found.items()
    }
    write_json(options.json, raw)


if __name__ == "__main__":
    main()
