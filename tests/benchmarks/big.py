"""One model as large as Llama-7B, in bfloat16 and shards, through `svdcli compress`; and plans of
70 B and 405 B parameters from headers alone.

    python tests/benchmarks/big.py --folder FOLDER --json tests/benchmarks/big.json
        everything: 50 GB of free disk, on two quiet cores about an hour. FOLDER keeps the
        checkpoint of 13 GB for the next time
    python tests/benchmarks/big.py --blocks 2            2 of the 32 blocks, and 1 where few are run
    python tests/benchmarks/big.py --shape tinyllama --blocks 2   narrower too: a minute or two
    python tests/benchmarks/big.py --only plans          one part: plain, scaling, calibrated, plans

`plain` compresses the whole checkpoint at keep 0.6 with even ranks, in a process of its own, and
compares the time with what a dry run said before. `scaling` runs a few blocks with one worker and
has the jobs' measured times wait in a queue for more workers, which is a simulation. `calibrated`
calibrates the same few blocks on the standard library, with the sample model's tokenizer, and
compresses them to a fifth of their bytes, ranks and bits by what each layer counts. `plans` are dry
runs on sparse files. `--only` keeps what a JSON file has of the other parts.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import (
    HERE,
    Run,
    building_in,
    machine,
    mega,
    parser,
    processor,
    python,
    say,
    svdcli,
    table,
    verdict,
    write_json,
)
from llama import LARGE, SHAPES, Shape, sparse

from svdcli.plan.queueing import estimate

WANTED = json.dumps({"keep": 0.6})
SAMPLE = HERE.parents[1] / "sample_models" / "tiny-llama"
WORKER = HERE / "big_worker.py"
PARTS = ("plain", "scaling", "calibrated", "plans")
FULL = {"7B": LARGE["7B"], "tinyllama": replace(SHAPES["tinyllama"], vocab=32000, layers=22)}
FEW = 1  # block for one worker, and for a calibration
SIMULATED = (4, 8, 16, 32, 64)
PLANNED_FOR = (8, 64)
PLANS, LAYERS_EACH, PLAN_RUNS = ("70B", "405B"), 4, 3
PLAN_BOUND, FACTOR_BOUND, MEMORY_BOUND = 5.0, 1.5, 2e9
TOKENS = {"--samples": 16, "--seq-len": 512}


@dataclass(frozen=True)
class Bench:
    """Where the files lie, and how much is measured."""

    folder: Path
    kind: str
    blocks: int

    @property
    def few(self) -> int:
        return min(FEW, max(1, self.blocks // 2))

    def model(self, blocks: int) -> Path:
        """The checkpoint with so many blocks, built when it is first asked for."""
        path = self.folder / f"{self.kind}-{blocks}"
        if not path.is_dir():
            shape = replace(FULL[self.kind], layers=blocks)
            check_free(self.folder, nbytes(shape), f"a checkpoint of {blocks} blocks")
            say(f"building a checkpoint of {blocks} blocks, {nbytes(shape) / 1e9:.1f} GB")
            partly = path.with_name(f"{path.name}.partial")
            shutil.rmtree(partly, ignore_errors=True)
            python(HERE / "synthetic.py", partly, blocks, "--shape", self.kind)
            for part in SAMPLE.glob("tokenizer*"):
                shutil.copy(part, partly)
            partly.rename(path)
        return path

    def compress(self, blocks: int, threads: int) -> dict[str, Any]:
        """What big_worker.py found, with the memory that its process took. The output goes."""
        model, out = self.model(blocks), self.folder / "out"
        check_free(self.folder, nbytes(replace(FULL[self.kind], layers=blocks)), "the output")
        remove(out)
        say(f"compress, {blocks} blocks{', one worker' if threads == 1 else ''}")
        run = python(WORKER, "run", model, out, WANTED, threads)
        remove(out)
        return run.json | about(run) | {"blocks": blocks}


def nbytes(shape: Shape) -> int:
    """Bytes of a checkpoint of that shape."""
    return sum(tensor.nbytes for tensor in (*shape.ends, *shape.layers_from(0, shape.layers)))


def check_free(folder: Path, needed: int, what: str) -> None:
    """Stop where the disk has no room for it."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise SystemExit(f"{what} takes {needed / 1e9:.1f} GB; {folder} has {free / 1e9:.1f} free")


def remove(out: Path) -> None:
    """An output, and what a run that was cut short left of one."""
    for path in (out, out.with_name(f"{out.name}.partial")):
        shutil.rmtree(path, ignore_errors=True)


def about(run: Run) -> dict[str, Any]:
    return {"whole_process_seconds": run.seconds, "peak_bytes": run.peak, "others": run.others}


# The parts ----------------------------------------------------------------------------------------


def plain(bench: Bench) -> dict[str, Any]:
    """The whole checkpoint, and what a dry run said of it before."""
    model = bench.model(bench.blocks)
    say("a dry run before")
    said = python(WORKER, "plan", model, WANTED).json["here"]
    return {"estimate": said} | bench.compress(bench.blocks, 0)


def scaling(bench: Bench, whole: Mapping[str, Any] | None) -> dict[str, Any]:
    """Jobs of a few blocks with one worker, and the seconds of all on more: with the times that
    `plain` measured where there is one, else with those of the few blocks."""
    one = bench.compress(bench.few, 1)
    here = whole or bench.compress(bench.few, 0)
    kinds = mean_by_kind(one["jobs"])
    alone = [kinds[kind_of(name)] for name in here["jobs"]]
    jobs = list(here["jobs"].values())
    return {
        "blocks": here["blocks"],
        "jobs": len(jobs),
        "longest": max(jobs),
        "blocks_of_one_worker": one["blocks"],
        "write_of_one_worker": one["phases"]["write"],
        "others_of_one_worker": one["others"],
        "one": sum(alone),
        "measured_on": here["workers"],
        "measured": here["phases"]["write"],
        "simulated": {
            str(workers): estimate(jobs, workers) for workers in (here["workers"], *SIMULATED)
        },
    }


def kind_of(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> model.layers.*.mlp.up_proj.weight"""
    return re.sub(r"\.\d+\.", ".*.", name)


def mean_by_kind(jobs: Mapping[str, float]) -> dict[str, float]:
    """Seconds of a job of each kind."""
    kinds: dict[str, list[float]] = {}
    for name, seconds in jobs.items():
        kinds.setdefault(kind_of(name), []).append(seconds)
    return {kind: statistics.mean(seconds) for kind, seconds in kinds.items()}


def calibrated(bench: Bench) -> dict[str, Any]:
    """A few blocks: moments, then ranks and bits by what each layer counts."""
    model, moments, out = bench.model(bench.few), bench.folder / "moments.safetensors", "out"
    options = [part for item in TOKENS.items() for part in item]
    say(f"calibrate, {bench.few} blocks")
    read = svdcli("calibrate", model, "--stdlib", *options, "-o", moments, "--force", "-q")
    size = moments.stat().st_size
    target = bench.folder / out
    remove(target)
    say(f"compress --keep-bytes 0.2 with the calibration, {bench.few} blocks")
    how = ["--calibration", moments, "--keep-bytes", "0.2"]
    packed = svdcli("compress", model, "-o", target, *how, "--json")
    bits = sorted({layer["bits"] for layer in packed.json["layers"]})
    share = packed.json["selected"]["bytes_after"] / packed.json["selected"]["bytes_before"]
    remove(target)
    moments.unlink()
    return {
        "blocks": bench.few,
        "tokens": TOKENS["--samples"] * TOKENS["--seq-len"],
        "moments_bytes": size,
        "calibrate": about(read),
        "compress": about(packed),
        "bits": bits,
        "share_of_bytes": share,
    }


def plans(bench: Bench) -> dict[str, Any]:
    """Dry runs of the command on headers alone, start-up included; then estimates."""
    found = {}
    for name in PLANS:
        model = bench.folder / f"{name}-headers"
        shutil.rmtree(model, ignore_errors=True)
        sparse(model, LARGE[name], LAYERS_EACH)
        say(f"plans of {name}")
        dry = ("compress", model, "--keep", "0.6", "--dry-run", "--json")
        runs = [svdcli(*dry) for _ in range(PLAN_RUNS)]
        report = runs[0].json
        estimates = python(WORKER, "plan", model, WANTED, *PLANNED_FOR).json
        found[name] = {
            "seconds": [run.seconds for run in runs],
            "peak_bytes": max(run.peak for run in runs),
            "others": max(run.others for run in runs),
            "bytes_before": report["total"]["bytes_before"],
            "bytes_after": report["total"]["bytes_after"],
            "layers": len(report["layers"]),
            "estimates": estimates,
        }
        shutil.rmtree(model)
    return found


# What is told -------------------------------------------------------------------------------------


def markdown(results: Mapping[str, Any]) -> str:
    """Every part that was measured, as tables."""
    told = {
        "plain": plain_table,
        "scaling": scaling_table,
        "calibrated": calibrated_table,
        "plans": plans_table,
    }
    parts = [tell(results[part]) for part, tell in told.items() if part in results]
    about = results["machine"]
    where = f"{about['processor']}, {about['cores']} cores, torch {about['torch']}"
    return "\n\n".join((f"As wide as {about['shape']}; {where}.", *parts))


def plain_table(found: Mapping[str, Any]) -> str:
    """What the run took, beside what was hoped for and said before."""
    said, phases, moved = found["estimate"], found["phases"], found["moved"]
    jobs = len(found["jobs"])
    factor = max(found["seconds"] / said["seconds"], said["seconds"] / found["seconds"])
    lines = [
        ("what", "measured", "aim", "holds"),
        ("checkpoint", f"{giga(found['bytes_before'])}, {counted(found['blocks'])}", "", ""),
        ("output", f"{giga(found['bytes_after'])}, keep {found['keep']:.3f}", "", ""),
        ("workers", str(found["workers"]), "", ""),
        ("wall time", span(found["whole_process_seconds"]), "", ""),
        *((f"phase {phase}", span(seconds), "", "") for phase, seconds in phases.items()),
        ("jobs, and jobs a second", f"{jobs}, {jobs / phases['write']:.2f}", "", ""),
        ("longest job", span(max(found["jobs"].values())), "", ""),
    ]
    if moved:
        ways = (("read", "rchar", "read_bytes"), ("written", "wchar", "write_bytes"))
        for way, by_any_call, by_disk in ways:
            before = giga(said[f"bytes_{way}"])
            shown = f"{giga(moved[by_any_call])} (a dry run said {before})"
            lines.append((f"{way} in all ({by_any_call})", shown, "", ""))
            lines.append((f"of these on the disk ({by_disk})", giga(moved[by_disk]), "", ""))
    small, near = found["peak_bytes"] < MEMORY_BOUND, factor <= FACTOR_BOUND
    peak, bound = mega(found["peak_bytes"]), f"below {mega(MEMORY_BOUND)}"
    told = f"{span(said['seconds'])}, a factor of {factor:.2f}"
    lines += [
        ("peak memory", peak, bound, verdict(small)),
        ("time that a dry run said before", told, f"within {FACTOR_BOUND:g}", verdict(near)),
        ("layers whose first solver fell back", str(found["fell_back"]), "", ""),
    ]
    return f"{busy(found['others'])}\n\n{table(lines)}"


def scaling_table(found: Mapping[str, Any]) -> str:
    here, one = found["measured_on"], found["one"]
    few = found["blocks_of_one_worker"]
    how = f"{counted(few)} measured ({span(found['write_of_one_worker'])}), the others as long"
    lines = [
        ("workers", "time of the jobs", "times as fast", "how"),
        ("1", span(one), "1.00", how),
        (str(here), span(found["measured"]), f"{one / found['measured']:.2f}", "measured"),
    ]
    for workers, seconds in found["simulated"].items():
        how = f"simulated with the {found['jobs']} times measured on {here} workers"
        lines.append((workers, span(seconds), f"{one / seconds:.2f}", how))
    where = f"Jobs of {counted(found['blocks'])}. {busy(found['others_of_one_worker'])}"
    return f"{where}\n\n{table(lines)}"


def calibrated_table(found: Mapping[str, Any]) -> str:
    lines = [("what", "time", "peak memory", "result")]
    read, packed = found["calibrate"], found["compress"]
    blocks, tokens = counted(found["blocks"]), found["tokens"]
    moments = f"{giga(found['moments_bytes'])} of moments"
    bits = " and ".join(map(str, found["bits"]))
    result = f"{found['share_of_bytes']:.3f} of the bytes, {bits} bits"
    for what, run, came in (
        (f"calibrate, {blocks}, {tokens:,} tokens", read, moments),
        (f"compress --keep-bytes 0.2, {blocks}", packed, result),
    ):
        lines.append((what, span(run["whole_process_seconds"]), mega(run["peak_bytes"]), came))
    return f"{busy(max(read['others'], packed['others']))}\n\n{table(lines)}"


def plans_table(found: Mapping[str, Any]) -> str:
    head = ["plan of", "layers", "checkpoint", "output", f"dry run, {PLAN_RUNS} times"]
    head += [f"below {PLAN_BOUND:g} s"]
    head += [f"said for {count} workers" for count in PLANNED_FOR]
    lines = [tuple(head)]
    for name, plan in found.items():
        seconds = plan["seconds"]
        line = [name, str(plan["layers"]), giga(plan["bytes_before"]), giga(plan["bytes_after"])]
        line += [f"{min(seconds):.1f} to {max(seconds):.1f} s"]
        line += [verdict(max(seconds) < PLAN_BOUND)]
        line += [span(plan["estimates"][str(count)]["seconds"]) for count in PLANNED_FOR]
        lines.append(tuple(line))
    return f"{busy(max(plan['others'] for plan in found.values()))}\n\n{table(lines)}"


def busy(others: float) -> str:
    return f"Other processes kept {others:.1f} cores busy meanwhile."


def counted(blocks: int) -> str:
    return "1 block" if blocks == 1 else f"{blocks} blocks"


def span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def giga(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


# The command --------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--only", choices=PARTS, action="append", help="this part; repeatable")
    options.add_argument("--blocks", type=int, help="blocks of the checkpoint; all by default")
    options.add_argument("--shape", choices=FULL, default="7B", help="how wide they are (7B)")
    found = options.parse_args()
    found.blocks = found.blocks or FULL[found.shape].layers
    return found


def main() -> None:
    options = parse()
    results: dict[str, Any] = {}
    if options.only and options.json and options.json.exists():
        results = json.loads(options.json.read_text())
    with building_in(options.folder) as folder:
        bench = Bench(folder, options.shape, options.blocks)
        for part in options.only or PARTS:
            if part == "plain":
                results[part] = plain(bench)
            elif part == "scaling":
                whole = results.get("plain")
                same = whole is not None and whole["blocks"] == bench.blocks
                results[part] = scaling(bench, whole if same else None)
            else:
                results[part] = calibrated(bench) if part == "calibrated" else plans(bench)
            # what took an hour is kept, whatever the next part meets
            results["machine"] = machine() | {"processor": processor(), "shape": options.shape}
            write_json(options.json, results)
    print(markdown(results))


if __name__ == "__main__":
    main()
