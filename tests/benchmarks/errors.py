"""Relative Frobenius errors of stored factors against the original weights, in float64, from the
files alone.

python errors.py ORIGINAL LAYERS.json OUT...: LAYERS.json is a list of names; prints, for each OUT
(a folder or a file), the error of every layer.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open


def where(path: Path) -> dict[str, Path]:
    """The file that holds each tensor."""
    found: dict[str, Path] = {}
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        with safe_open(file, framework="pt") as tensors:
            found |= dict.fromkeys(tensors.keys(), file)
    return found


def read(places: dict[str, Path], name: str) -> torch.Tensor:
    with safe_open(places[name], framework="pt") as tensors:
        tensor: torch.Tensor = tensors.get_tensor(name)
        return tensor.double()


def relative_error(weight: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> float:
    """||W - up down||_F / ||W||_F."""
    return float(torch.addmm(weight, up, down, alpha=-1).norm() / weight.norm())


def main(original: Path, names: list[str], outputs: list[Path]) -> None:
    weights, errors = where(original), []
    for places in map(where, outputs):
        modules = {name: name.removesuffix(".weight") for name in names}
        errors.append(
            {
                name: relative_error(
                    read(weights, name),
                    read(places, f"{module}.svd_up.weight"),
                    read(places, f"{module}.svd_down.weight"),
                )
                for name, module in modules.items()
            }
        )
    print(json.dumps(errors))


if __name__ == "__main__":
    main(
        Path(sys.argv[1]),
        json.loads(Path(sys.argv[2]).read_text()),
        [Path(out) for out in sys.argv[3:]],
    )
