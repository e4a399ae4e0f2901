"""What other people's packages lose at 8 to 2 bits, on the model and the texts of bits.py: one
table.

    python tests/benchmarks/peers.py                installs both packages first; ten minutes in all
    python tests/benchmarks/peers.py --python PATH  a Python that has them already
    python tests/benchmarks/peers.py --json tests/benchmarks/peers.json

llm-compressor's GPTQ (columns by activation, its default) and AutoRound (200 steps, its default)
run from their packages in an environment of their own, as a person would call them: the model in
its own dtype, symmetric, in groups of 64 (32 where columns are no multiple of 64, which they
refuse), a scale a row at 8 bits. Both read the windows that svdcli's calibration reads, and are
judged as bits.py judges.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from bits import SAMPLE, SAMPLES, Bench, markdown, share_of_bytes
from common import HERE, building_in, parser, say, write_json
from peers_worker import group_of
from safetensors.torch import load_file, save_file

from svdcli.text.texts import read_texts
from svdcli.text.tokens import load_tokenizer, windows_of

PACKAGES = ("llmcompressor==0.14.0.1", "auto-round==0.15.1")
BITS = {"GPTQ of llm-compressor 0.14": (8, 4, 3, 2), "AutoRound 0.15": (4, 3, 2)}
METHODS = {"GPTQ of llm-compressor 0.14": "gptq", "AutoRound 0.15": "auto-round"}


def environment(folder: Path) -> Path:
    """The Python of an environment with both packages, made where it is not there yet."""
    place = folder / "environment"
    python = place / "bin" / "python"
    if not python.exists():
        say(f"installing {' and '.join(PACKAGES)}")
        venv.create(place, with_pip=True)
        torch_too = f"torch=={version('torch').split('+')[0]}"
        command = [python, "-m", "pip", "install", "-q", *PACKAGES, torch_too]
        subprocess.run(command, check=True)
    return python


def write_windows(path: Path) -> None:
    """The token ids (windows, length) that svdcli's calibration reads."""
    length = json.loads((SAMPLE / "config.json").read_text())["max_position_embeddings"]
    windows = windows_of(load_tokenizer(SAMPLE), read_texts(None, stdlib=True), length, SAMPLES)
    save_file({"ids": windows.ids}, path)


def row(bench: Bench, python: Path, method: str, bits: int) -> dict[str, Any]:
    """One package at one number of bits."""
    rounded = bench.folder / "peer.safetensors"
    windows = bench.folder / "windows.safetensors"
    worker = HERE / "peers_worker.py"
    command: Sequence[object] = (python, worker, method, bits, SAMPLE, windows, rounded)
    subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr)

    # The model with these weights, as bits.py judges its own
    weights = load_file(SAMPLE / "model.safetensors")
    found = load_file(rounded)
    weights |= {name: weight.to(torch.bfloat16) for name, weight in found.items()}
    model = bench.folder / "peer"
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(SAMPLE, model)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    value, error = bench.excess(model)
    shapes = [weight.shape for weight in found.values()]
    share = share_of_bytes(shapes, bits, lambda n: n if bits == 8 else group_of(n))
    return {"bytes": share, "excess": value, "error": error}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--quick", action="store_true", help="few windows")
    options.set_defaults(shares=None)
    options.add_argument("--python", type=Path, help="the Python of an environment with both")
    given = options.parse_args()
    results: dict[str, Any] = {}
    with building_in(given.folder) as folder:
        python = given.python or environment(folder)
        bench = Bench(folder, given)
        write_windows(folder / "windows.safetensors")
        for name, widths in BITS.items():
            for bits in widths:
                say(f"{name}, {bits} bits")
                results[f"{name}, {bits} bits"] = [row(bench, python, METHODS[name], bits)]
    print(markdown(results))
    write_json(given.json, results)


if __name__ == "__main__":
    main()
