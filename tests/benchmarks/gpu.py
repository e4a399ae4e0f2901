"""What a GPU makes of it: one table of ratios in one run, with the name of the card.

    python tests/benchmarks/gpu.py                       on the first CUDA device
    python tests/benchmarks/gpu.py --device cpu --quick  on a CPU and small, to try it
    python tests/benchmarks/gpu.py --json FILE           what was measured, as JSON

`solve` has weights as wide as Llama-7B's at keep 0.6: svdcli's solvers against torch.linalg.svd of
the same float32 weight on the same device, the better of three runs each, and the largest
difference of what the factors multiply out to from a CPU's, as a share of its largest number.
`verbs` has calibrate, compress and heal of the sample model there against the same on the CPU, all
in float32, and calibrate as it is by default, too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import HERE, building_in, machine, parser, say, table, write_json
from torch import Tensor

import svdcli
from svdcli.linalg.solvers import SOLVERS

SAMPLE = HERE.parents[1] / "sample_models" / "tiny-llama"
SHAPES = ((4096, 4096), (4096, 11008))
SMALL = ((512, 512), (512, 1376))
KEEP, RUNS = 0.6, 3
WINDOWS, STEPS = 64, 10
FEW_WINDOWS, FEW_STEPS = 8, 2


def best_of(device: torch.device, work: Callable[[], Any], runs: int = RUNS) -> tuple[float, Any]:
    """(the seconds of the quickest of a few runs after one to warm up, what it returned)."""
    made, quickest = work(), float("inf")
    for _ in range(runs):
        wait_for(device)
        begin = time.perf_counter()
        made = work()
        wait_for(device)
        quickest = min(quickest, time.perf_counter() - begin)
    return quickest, made


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# Solvers ------------------------------------------------------------------------------------------


def solved(device: torch.device, shape: tuple[int, int]) -> list[dict[str, Any]]:
    """One row for each solver."""
    m, n = shape
    weight = torch.randn(m, n, generator=torch.Generator().manual_seed(0)).bfloat16()
    w = weight.to(device, torch.float32)
    rank = int(KEEP * m * n / (m + n))
    say(f"torch.linalg.svd of {m} x {n}")
    straight, _ = best_of(device, lambda: torch.linalg.svd(w, full_matrices=False), runs=1)
    here = SOLVERS["gram"](weight.float(), rank, 0)
    expected = here.up @ here.down
    rows = []
    for name in ("gram", "svd"):
        say(f"{name} of {m} x {n}")
        seconds, factors = best_of(device, lambda name=name: SOLVERS[name](w, rank, 0))
        product = (factors.up @ factors.down).cpu()
        rows.append(
            {
                "what": f"{name}, {m} x {n}, rank {rank}",
                "seconds": seconds,
                "straight": straight,
                "difference": distance(product, expected),
            }
        )
    return rows


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


# Verbs --------------------------------------------------------------------------------------------


def verbs(device: str, folder: Path, windows: int, steps: int) -> dict[str, float]:
    """Seconds of each verb on the sample model there."""
    folder.mkdir()
    texts = svdcli.read_texts(None, stdlib=True)
    compute = svdcli.Compute(device=device)
    moments, out = folder / "moments.safetensors", folder / "out"
    seconds = {}

    def timed(name: str, work: Callable[..., Any], *args: Any, **how: Any) -> None:
        say(f"{name} on {device}")
        begin = time.perf_counter()
        work(*args, compute=compute, **how)
        seconds[name] = time.perf_counter() - begin

    read = {"samples": windows, "seq_len": 256}
    timed("calibrate", svdcli.calibrate, SAMPLE, moments, texts, precision="float32", **read)
    other = folder / "other.safetensors"
    timed("calibrate, --precision auto", svdcli.calibrate, SAMPLE, other, texts, **read)
    timed("compress", svdcli.compress, SAMPLE, out, keep=KEEP, calibration=moments)
    effort = svdcli.Effort(steps=steps)
    how = {"teacher": SAMPLE, "texts": texts, "effort": effort}
    timed("heal", svdcli.heal, out, folder / "healed", **how, **read)
    return seconds


# One table ----------------------------------------------------------------------------------------


def report(found: dict[str, Any]) -> str:
    lines = [("what", "seconds", "against", "ratio", "difference from a CPU's")]
    for row in found["solve"]:
        against = f"torch.linalg.svd, {row['straight']:.2f} s"
        ratio = f"{row['straight'] / row['seconds']:.1f} times"
        lines.append(
            (row["what"], f"{row['seconds']:.2f}", against, ratio, f"{row['difference']:.1e}")
        )
    for name, seconds in found["verbs"].items():
        cpu = found["verbs_on_cpu"][name]
        lines.append(
            (name, f"{seconds:.1f}", f"CPU, {cpu:.1f} s", f"{cpu / seconds:.1f} times", "")
        )
    return f"On {found['card']}:\n\n{table(lines)}"


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    options.add_argument("--quick", action="store_true", help="small matrices and little text")
    asked: argparse.Namespace = options.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here; --device cpu --quick tries the benchmark")
    device = torch.device(asked.device)

    found: dict[str, Any] = {"card": name_of(device), "machine": machine(), "solve": []}
    for shape in SMALL if asked.quick else SHAPES:
        found["solve"] += solved(device, shape)
    amount = (FEW_WINDOWS, FEW_STEPS) if asked.quick else (WINDOWS, STEPS)
    with building_in(asked.folder) as folder:
        found["verbs"] = verbs(asked.device, folder / "there", *amount)
        found["verbs_on_cpu"] = verbs("cpu", folder / "cpu", *amount)
    print(report(found))
    write_json(asked.json, found)


if __name__ == "__main__":
    main()
