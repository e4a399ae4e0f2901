"""What one would write without svdcli: load everything, torch.linalg.svd each layer, save.

python straight.py FOLDER OUT.safetensors RANKS.json DTYPE SOLVED: RANKS.json gives the layers and
the rank of each. Only the first SOLVED of them are solved; the others get slices of their weights
for factors, so that loading and saving are those of the whole job. Prints the seconds that the
solving took.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def factor(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best rank-r factors of a weight, the singular values shared between both."""
    u, sigma, vh = torch.linalg.svd(weight.float(), full_matrices=False)
    root = sigma[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


def main(folder: Path, out: Path, ranks: dict[str, int], dtype: torch.dtype, solved: int) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(shard)
    seconds = 0.0
    for number, (name, rank) in enumerate(ranks.items()):
        weight = tensors.pop(name)
        begin = time.perf_counter()
        up, down = (
            factor(weight, rank) if number < solved else (weight[:, :rank], weight[:rank].clone())
        )
        seconds += time.perf_counter() - begin
        module = name.removesuffix(".weight")
        tensors[f"{module}.svd_up.weight"] = up.to(dtype).contiguous()
        tensors[f"{module}.svd_down.weight"] = down.to(dtype).contiguous()
    save_file(tensors, out, metadata={"format": "pt"})
    print(json.dumps({"solving": seconds}))


if __name__ == "__main__":
    source, target, plan, kind, count = sys.argv[1:]
    main(
        Path(source),
        Path(target),
        json.loads(Path(plan).read_text()),
        getattr(torch, kind),
        int(count),
    )
