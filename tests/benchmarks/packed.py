"""Speed and memory of models of few-bit integers, against bounds.

    python tests/benchmarks/packed.py  everything
    python tests/benchmarks/packed.py --form "int4 whole"  one of them
    python tests/benchmarks/packed.py --no-compile  without torch.compile, which takes most of it
    python tests/benchmarks/packed.py --json tests/benchmarks/packed.json
        what was measured, for svdcli/docs/bits.md

Each form of a Llama-shaped model (369 M parameters, as wide as TinyLlama) and torchao's int8
weight-only are measured beside dense bfloat16 by turns, each model in a process of its own, as
`svdcli bench` does. Integers are random and laid out as compress lays them out: speed and memory do
not depend on their values.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from common import (
    HERE,
    building_in,
    built,
    busy_seconds,
    circumstances,
    parser,
    say,
    table,
    verdict,
    write_json,
)
from llama import SHAPES, Shape

from svdcli.engine.compute import Compute
from svdcli.files.writer import Unit, WeightWriter, lay_out
from svdcli.plan.packing import SHAPE, Packing
from svdcli.plan.tensors import TensorInfo
from svdcli.verbs import bench as speed

MODEL = "tinyllama"
FILE = "model.safetensors"
GROUP = 64
TORCHAO = "torchao int8"
KEPT = ("decode", "compiled", "prefill", "memory_bytes", "file_bytes")  # of what bench tells
MEMORY_BOUND, SPARE_BYTES, PREFILL_BOUND = 1.15, 2e8, 0.8


@dataclass(frozen=True)
class Form:
    """Bits of every number of the blocks, whether they are factored, the share of their bytes, and
    how many times as fast as dense they are to decode."""

    bits: int
    factored: bool
    share: float
    decode_bound: float

    def tensors(self, name: str, m: int, n: int) -> Iterator[TensorInfo]:
        """What stands for one weight."""
        packing = Packing(self.bits, GROUP)
        if not self.factored:
            yield from packing.tensors(f"{name}.weight", (m, n), "BF16")
            return
        bytes_of_rank = (m + n) * (1 if self.bits == 8 else 0.5 + 2 / GROUP)
        step = 16 if self.bits == 8 else GROUP
        rank = int(self.share * 2 * m * n / bytes_of_rank) // step * step
        yield from packing.tensors(f"{name}.svd_up.weight", (m, rank), "BF16")
        yield from packing.tensors(f"{name}.svd_down.weight", (rank, n), "BF16")


FORMS = {
    "int8 whole": Form(8, factored=False, share=0.5, decode_bound=1.5),
    "int8 factored": Form(8, factored=True, share=0.25, decode_bound=2.5),
    "int4 whole": Form(4, factored=False, share=0.266, decode_bound=2.5),
    "int4 factored": Form(4, factored=True, share=0.25, decode_bound=2.5),
}


def build(folder: Path, form: Form, shape: Shape) -> None:
    """Write a model whose blocks have random integers of that form."""
    tensors: list[TensorInfo] = []
    sizes: dict[str, tuple[int, ...]] = {}
    for tensor in [*shape.ends, *shape.layers_from(0, shape.layers)]:
        if not tensor.name.startswith("model.layers") or len(tensor.shape) == 1:
            tensors.append(tensor)
            continue
        m, n = tensor.shape
        tensors += form.tensors(tensor.module, m, n)
    for tensor in tensors:
        sizes[tensor.name] = tensor.shape

    folder.mkdir(parents=True)
    unit = Unit("model", "copy", (), tuple(tensors), FILE)
    file = lay_out(FILE, [unit], {"format": "pt"})
    writer = WeightWriter(folder, [file])
    for tensor in tensors:
        writer.write(tensor.name, [_content(tensor, sizes)])
    writer.finish(FILE, {"format": "pt"})
    config = json.loads(shape.config)
    config["quantization_config"] = {"quant_method": "svdcli", "format": 1, "group": GROUP}
    (folder / "config.json").write_text(json.dumps(config))


def _content(tensor: TensorInfo, sizes: dict[str, tuple[int, ...]]) -> bytes:
    """Random integers, and scales with which a layer's answers are as large as its inputs."""
    import torch

    from svdcli.files.dtypes import bytes_of

    if tensor.name.endswith(SHAPE):
        rows, words = sizes[tensor.name.removesuffix(SHAPE) + "_packed"]
        return bytes(bytes_of(torch.tensor([rows, 8 * words])))
    if tensor.dtype != "BF16":
        return os.urandom(tensor.nbytes)
    kind = torch.bfloat16
    if tensor.name.endswith("_scale"):
        name = tensor.name.removesuffix("_scale")
        if name in sizes:
            columns, width = sizes[name][1], 74.0
        else:
            columns, width = 8 * sizes[f"{name}_packed"][1], 4.6
        return bytes(bytes_of(torch.full(tensor.shape, columns**-0.5 / width, dtype=kind)))
    if len(tensor.shape) == 1:
        return bytes(bytes_of(torch.ones(tensor.shape, dtype=kind)))
    return bytes(bytes_of(torch.randn(tensor.shape).mul_(tensor.shape[1] ** -0.5).to(kind)))


def worker() -> None:
    """The process of one model: as that of bench, with torchao applied where the folder says so."""
    from svdcli.models import bench_worker

    load = bench_worker.Worker.load

    def load_and_quantise(self: Any) -> dict[str, Any]:
        found = load(self)
        if Path(self.task["path"]).name == TORCHAO:
            from torchao.quantization import Int8WeightOnlyConfig, quantize_

            quantize_(self.model, Int8WeightOnlyConfig())
        return found

    bench_worker.Worker.load = load_and_quantise  # type: ignore[method-assign]
    bench_worker.main()


def measure(path: Path, dense: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What bench finds of one model beside the dense one."""
    start = (
        f"import sys; sys.path[:] = [{str(HERE)!r}] + {{path!r}}; import packed; packed.worker()"
    )
    say(f"bench {path.name}")
    work = {"compute": Compute(threads=options.threads), "rounds": options.rounds}
    long = work | {"prompt_tokens": options.prompt_tokens, "rounds": options.long_rounds}
    with mock.patch.object(speed, "_START", start):
        found = speed.bench(
            path,
            dense,
            prompt_tokens=32,
            new_tokens=options.new_tokens,
            compile=not options.no_compile,
            **work,
        ).to_json()
        read = speed.bench(path, dense, new_tokens=1, **long).to_json()
    for side in ("original", "compressed", "ratios"):
        found[side]["prefill"] = read[side]["prefill"]
    sides = {
        side: {key: found[side].get(key) for key in KEPT} for side in ("original", "compressed")
    }
    return sides | {"ratios": found["ratios"]}


def rows(name: str, found: dict[str, Any]) -> list[tuple[str, ...]]:
    """Lines of the table: what, dense, this form, ratio, bound, whether it holds."""
    form = FORMS.get(name)
    before, after, ratios = found["original"], found["compressed"], found["ratios"]
    bounds = {"prefill": PREFILL_BOUND}
    if form is not None:
        bounds["compiled"] = form.decode_bound
    lines = []
    for measure_name in ("decode", "compiled", "prefill"):
        ratio = ratios[measure_name]
        if ratio is None:
            continue
        speeds = [f"{side[measure_name]['median']:.2f}" for side in (before, after)]
        text = f"{ratio['median']:.2f} ({ratio['lowest']:.2f} to {ratio['highest']:.2f})"
        bound = bounds.get(measure_name) if form is not None else None
        holds = None if bound is None else ratio["median"] >= bound
        limit = "" if bound is None else f"≥ {bound}"
        lines.append((f"{name}: {measure_name}, tokens/s", *speeds, text, limit, verdict(holds)))
    mega = [f"{side['memory_bytes'] / 1e6:.0f} MB" for side in (before, after)]
    limit = MEMORY_BOUND * after["file_bytes"] + SPARE_BYTES
    holds = after["memory_bytes"] <= limit if form is not None else None
    size = f"file {after['file_bytes'] / 1e6:.0f} MB"
    bound = f"≤ {limit / 1e6:.0f} MB" if form is not None else ""
    lines.append((f"{name}: memory at rest", *mega, size, bound, verdict(holds)))
    return lines


def markdown(found: dict[str, Any]) -> str:
    """What was measured, a line each."""
    titles = ("what", "dense", "this form", "ratio", "bound", "holds")
    return table([titles, *(line for name, item in found.items() for line in rows(name, item))])


def parse() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument(
        "--form", choices=(*FORMS, TORCHAO), action="append", help="this form; repeatable"
    )
    options.add_argument("--no-compile", action="store_true", help="without torch.compile")
    options.add_argument("--prompt-tokens", type=int, default=512, help="tokens of a prompt (512)")
    options.add_argument("--new-tokens", type=int, default=32, help="tokens written (32)")
    options.add_argument("--rounds", type=int, default=5, help="rounds of decoding that count (5)")
    options.add_argument(
        "--long-rounds", type=int, default=3, help="rounds that count for the prompt (3)"
    )
    options.add_argument("--threads", type=int, help="threads of each model")
    options.add_argument("--build", nargs=2, metavar=("OUT", "FORM"), help=argparse.SUPPRESS)
    return options.parse_args()


def own_seconds() -> float:
    """CPU time of this process and of those that it started."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _path_of(name: str, folder: Path, dense: Path) -> Path:
    """The folder of one form, built where it is not there yet; torchao gets the dense model."""
    path = folder / name
    if path.exists():
        return path
    if name == TORCHAO:
        path.symlink_to(dense.absolute(), target_is_directory=True)
        return path
    say(f"building {name}")
    subprocess.run([sys.executable, __file__, "--build", path, name], check=True)
    return path


def main() -> None:
    options = parse()
    if options.build:
        build(Path(options.build[0]), FORMS[options.build[1]], SHAPES[MODEL])
        return
    found: dict[str, Any] = {}
    begin, busy = time.perf_counter(), busy_seconds()
    with building_in(options.folder) as folder:
        dense = built(folder, MODEL)
        for name in options.form or (*FORMS, TORCHAO):
            found[name] = measure(_path_of(name, folder, dense), dense, options)
            for line in rows(name, found[name]):
                say(" ".join(line))
    others = max(0.0, busy_seconds() - busy - own_seconds()) / (time.perf_counter() - begin)
    print(f"{MODEL}, prompt of {options.prompt_tokens} tokens; {circumstances(others)}\n")
    print(markdown(found))
    write_json(options.json, found)


if __name__ == "__main__":
    main()
