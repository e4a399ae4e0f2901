"""Speed and memory of `svdcli compress` as ratios in one run, printed as one table.

    python tests/benchmarks/speed.py  everything, about 14 minutes on two cores
    python tests/benchmarks/speed.py --quick
        2 layers in place of 22, 1 of them solved by the straight script
    python tests/benchmarks/speed.py --only startup  one part: speed, memory or startup
    python tests/benchmarks/speed.py --baseline-layers 22 nothing scaled
    python tests/benchmarks/speed.py --repeats 1          every run once
    python tests/benchmarks/speed.py --json results.json  what was measured, as JSON

A synthetic bfloat16 checkpoint (synthetic.py) goes through `svdcli compress --keep 0.5` and through
the straight script (straight.py), each in a process of its own with torch's default threads, in
turn and twice: the quicker run of each counts, since whatever else a machine does only adds.
torch.linalg.svd takes as long for one layer as for the next, so the straight script solves only
some layers, and the time of its solving, nothing else, is scaled up. This process imports no torch:
a child's peak memory would count its parent's.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from common import (
    HERE,
    Run,
    building_in,
    circumstances,
    machine,
    mega,
    parser,
    python,
    say,
    svdcli,
    table,
    verdict,
    write_json,
)

KEEP = "0.5"
LARGEST_LAYER = 2048 * 5632 * 4  # in float32
STARTUP_RUNS = 7
FLOAT32_LAYERS = 4  # before rounding, errors are compared on at most so many layers
PARTS = ("speed", "memory", "startup")


@dataclass(frozen=True)
class Row:
    """One line of the table. holds says whether the measured value keeps the bound, None where
    there is none."""

    what: str
    measured: str
    bound: str = ""
    holds: bool | None = None


@dataclass
class Bench:
    """Where the files lie, how much is measured, and what came of it."""

    folder: Path
    layers: int
    baseline_layers: int
    repeats: int
    rows: list[Row] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)
    runs: dict[str, Run] = field(default_factory=dict)

    def model(self, layers: int) -> Path:
        """The checkpoint with that many layers, built when it is first asked for."""
        path = self.folder / f"synthetic-{layers}"
        if not path.is_dir():
            say(f"building a checkpoint of {layers} layers")
            shallower = [self.folder / f"synthetic-{self.layers}"] if layers > self.layers else []
            partly = path.with_name(f"{path.name}.partial")
            shutil.rmtree(partly, ignore_errors=True)
            self.note(
                f"building {layers}",
                python(HERE / "synthetic.py", partly, layers, *filter(Path.is_dir, shallower)),
            )
            partly.rename(path)
        return path

    def output(self, name: str) -> Path:
        return self.folder / name

    def compress(self, layers: int, again: bool = False) -> Run:
        """`svdcli compress --keep 0.5` on that many layers; what an earlier run took unless it is
        to run again."""
        name = f"compress {layers}"
        if again or name not in self.runs:
            model, out = self.model(layers), self.output(f"svdcli-{layers}")
            say(f"svdcli compress --keep {KEEP}, {layers} layers")
            self.runs[name] = svdcli(
                "compress", model, "-o", out, "--force", "--keep", KEEP, "--json"
            )
            self.note(name, self.runs[name])
        return self.runs[name]

    def note(self, name: str, run: Run) -> None:
        self.raw[name] = {
            "seconds": run.seconds,
            "peak_bytes": run.peak,
            "cores_busy_with_others": run.others,
        }

    def row(self, what: str, measured: str, bound: str = "", holds: bool | None = None) -> None:
        self.rows.append(Row(what, measured, bound, holds))


# Speed and accuracy -------------------------------------------------------------------------------


def measure_speed(bench: Bench) -> None:
    """The whole job by svdcli and by the straight script, then the errors of what both wrote."""
    ranks = ranks_of(bench.compress(bench.layers).json)
    solved = [name for name in ranks if int(name.split(".")[2]) < bench.baseline_layers]
    scale = bench.layers / bench.baseline_layers

    def whole_job(run: Run) -> float:
        return run.seconds + float(run.json["solving"]) * (scale - 1)

    straights = [straight_script(bench, "bfloat16", ranks, solved)]
    runs = [bench.compress(bench.layers)]
    for _ in range(1, bench.repeats):
        runs.append(bench.compress(bench.layers, again=True))
        straights.append(straight_script(bench, "bfloat16", ranks, solved))
    ours, straight = min(runs, key=lambda run: run.seconds), min(straights, key=whole_job)
    seconds, solving = whole_job(straight), straight.json["solving"]
    bench.raw["speed"] = {
        "svdcli": [run.seconds for run in runs],
        "straight script": [whole_job(run) for run in straights],
    }
    of_each = f", of {bench.repeats} runs the quicker" if bench.repeats > 1 else ""
    bench.row(
        f"svdcli compress --keep {KEEP}, {bench.layers} layers{of_each}", f"{ours.seconds:.1f} s"
    )
    how = f"{solving:.1f} s of solving × {scale:g}" if scale > 1 else "nothing scaled"
    what = (
        f"straight script, {bench.baseline_layers} of {bench.layers} layers solved; {how}{of_each}"
    )
    bench.row(what, f"{seconds:.1f} s")
    ratio = seconds / ours.seconds
    bench.row("svdcli is faster by", f"{ratio:.2f} ×", "≥ 4 ×", ratio >= 4)
    bench.row("peak memory, straight script / svdcli", f"{straight.peak / ours.peak:.2f} ×")
    fell_back = sum(bool(layer["fell_back"]) for layer in ours.json["layers"])
    bench.row("layers whose first solver fell back", f"{fell_back} of {len(ours.json['layers'])}")
    compare_errors(bench, "as stored, bfloat16", solved, bench.output(f"svdcli-{bench.layers}"))
    compare_before_rounding(bench)


def compare_before_rounding(bench: Bench) -> None:
    """The errors of the mathematics alone: both write float32 factors of a few layers."""
    blocks = min(bench.baseline_layers, FLOAT32_LAYERS)
    pattern = rf"re:^model\.layers\.({'|'.join(map(str, range(blocks)))})\."
    model, out = bench.model(bench.layers), bench.output("svdcli-float32")
    say(f"svdcli and the straight script with float32 factors, {blocks} layers")
    ours = svdcli(
        "compress",
        model,
        "-o",
        out,
        "--force",
        "--keep",
        KEEP,
        "--dtype",
        "float32",
        "--include",
        pattern,
        "--json",
    )
    ranks = ranks_of(ours.json)
    straight_script(bench, "float32", ranks, list(ranks))
    compare_errors(bench, "before rounding, float32", list(ranks), out)


def straight_script(bench: Bench, dtype: str, ranks: dict[str, int], solved: list[str]) -> Run:
    say(f"straight script, {len(solved)} of {len(ranks)} weights solved, {dtype} factors")
    plan = bench.output("ranks.json")
    plan.write_text(
        json.dumps(
            {name: ranks[name] for name in sorted(ranks, key=lambda name: name not in solved)}
        )
    )
    out = bench.output(f"straight-{dtype}.safetensors")
    done = python(HERE / "straight.py", bench.model(bench.layers), out, plan, dtype, len(solved))
    bench.note("straight script" if dtype == "bfloat16" else f"straight script {dtype}", done)
    return done


def ranks_of(report: dict[str, Any]) -> dict[str, int]:
    return {layer["name"]: layer["rank"] for layer in report["layers"] if layer["rank"] is not None}


def compare_errors(bench: Bench, kind: str, names: list[str], ours: Path) -> None:
    """Sum of the layers' relative errors by both, recomputed from the files."""
    dtype = kind.rsplit(" ", 1)[1]
    say(f"errors {kind}, {len(names)} weights")
    wanted = bench.output("names.json")
    wanted.write_text(json.dumps(names))
    straight = bench.output(f"straight-{dtype}.safetensors")
    found = python(HERE / "errors.py", bench.model(bench.layers), wanted, ours, straight).json
    mine, theirs = (sum(errors.values()) for errors in found)
    excess = mine / theirs - 1
    bench.raw[f"errors {kind}"] = {
        "weights": len(names),
        "svdcli": mine,
        "straight": theirs,
        "excess": excess,
    }
    bench.row(
        f"summed relative error {kind}, {len(names)} weights: svdcli / straight - 1",
        f"{excess:+.1e}",
        "≤ 1e-6",
        excess <= 1e-6,
    )


# Memory -------------------------------------------------------------------------------------------


def measure_memory(bench: Bench) -> None:
    """Peak resident memory against what `import torch` alone takes, and against twice the depth."""
    torch_alone = python("-c", "import torch")
    bench.note("import torch", torch_alone)
    shallow, deep = bench.compress(bench.layers), bench.compress(2 * bench.layers)
    shutil.rmtree(bench.output(f"svdcli-{2 * bench.layers}"))
    extra, bound = shallow.peak - torch_alone.peak, 200_000_000 + 8 * LARGEST_LAYER
    bench.row(
        f"peak memory above `import torch` ({mega(torch_alone.peak)}), {bench.layers} layers",
        mega(extra),
        f"≤ {mega(bound)}",
        extra <= bound,
    )
    bench.row("the same in float32 copies of the largest layer", f"{extra / LARGEST_LAYER:.1f}")
    growth = deep.peak / shallow.peak - 1
    bench.row(
        f"growth of peak memory from {bench.layers} to {2 * bench.layers} layers",
        f"{growth:+.1%}",
        "≤ 5 %",
        growth <= 0.05,
    )


# Start-up -----------------------------------------------------------------------------------------


def measure_startup(bench: Bench) -> None:
    """Median wall clock of the commands that need no tensors."""
    model, out = bench.model(bench.layers), bench.output(f"svdcli-{bench.layers}")
    bench.compress(bench.layers)
    say("start-up")
    nothing = median_seconds(partial(python, "-c", "pass"))
    bench.raw["python -c pass"] = {"seconds": nothing}
    commands: dict[str, tuple[str | Path, ...]] = {
        "--help": ("--help",),
        "inspect": ("inspect", model),
        "report": ("report", out),
    }
    for name, arguments in commands.items():
        seconds = median_seconds(partial(svdcli, *arguments))
        bench.raw[f"svdcli {name}"] = {"seconds": seconds}
        measured = f"{seconds:.3f} s, {seconds / nothing:.1f} × `python -c pass`"
        bench.row(f"svdcli {name}, median of {STARTUP_RUNS}", measured, "≤ 0.25 s", seconds <= 0.25)


def median_seconds(task: Callable[[], Run]) -> float:
    return statistics.median(task().seconds for _ in range(STARTUP_RUNS))


# The table ----------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--only", choices=PARTS, action="append", help="this part; repeatable")
    options.add_argument("--layers", type=int, default=22, help="layers of the checkpoint (22)")
    options.add_argument(
        "--baseline-layers",
        type=int,
        default=4,
        help="layers that the straight script solves (4); scaled up",
    )
    options.add_argument(
        "--repeats", type=int, default=2, help="runs of each, of which the quicker counts (2)"
    )
    options.add_argument(
        "--quick",
        action="store_true",
        help="the same as --layers 2 --baseline-layers 1 --repeats 1",
    )
    found = options.parse_args()
    if found.quick:
        found.layers, found.baseline_layers, found.repeats = 2, 1, 1
    if not 1 <= found.baseline_layers <= found.layers:
        options.error("--baseline-layers is 1 to --layers")
    if found.repeats < 1:
        options.error("--repeats is at least 1")
    return found


def measure(bench: Bench, parts: Sequence[str]) -> None:
    for part, task in zip(PARTS, (measure_speed, measure_memory, measure_startup), strict=True):
        if part in parts:
            task(bench)


def main() -> None:
    options = parse()
    with building_in(options.folder) as folder:
        bench = Bench(folder, options.layers, options.baseline_layers, options.repeats)
        measure(bench, options.only or PARTS)
    others = max(
        (
            item["cores_busy_with_others"]
            for item in bench.raw.values()
            if item.get("seconds", 0) > 3
        ),
        default=0.0,
    )
    print(circumstances(others))
    lines = [(row.what, row.measured, row.bound, verdict(row.holds)) for row in bench.rows]
    print(table([("what", "measured", "bound", "holds"), *lines]))
    write_json(
        options.json,
        {"machine": machine(), "rows": [asdict(row) for row in bench.rows], "raw": bench.raw},
    )


if __name__ == "__main__":
    main()
