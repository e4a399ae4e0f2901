"""Options that several commands share, and what their text is turned into."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from svdcli.errors import SvdcliError, UsageError
from svdcli.plan import words

if TYPE_CHECKING:
    from collections.abc import Mapping

    from svdcli.engine.compute import Compute
    from svdcli.plan.plan import Plan
    from svdcli.plan.recipe import Wanted


# Sizes --------------------------------------------------------------------------------------------


_SIZES = {
    "": 1,
    "B": 1,
    **dict.fromkeys(("K", "KB"), 10**3),
    **dict.fromkeys(("M", "MB"), 10**6),
    **dict.fromkeys(("G", "GB"), 10**9),
    **dict.fromkeys(("T", "TB"), 10**12),
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_size(text: str, option: str) -> int:
    """350MB -> 350000000. KB, MB, GB, TB are powers of 1000, KiB and so on of 1024."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = match[2].upper() if match else ""
    if match is None or unit not in _SIZES:
        raise UsageError(f"{option} {text!r} is not a size", "give bytes such as 350MB or 1.5GiB")
    from fractions import Fraction

    return int(Fraction(match[1]) * _SIZES[unit])


def _size(option: str, help_: str) -> Any:
    def parse(text: str) -> int:
        return parse_size(text, option)

    return typer.Option(option, help=help_, parser=parse, metavar="SIZE")


Size = Annotated[int | None, _size("--size", "Target: bytes of the whole output, such as 350MB.")]


MaxShardSize = Annotated[
    int | None, _size("--max-shard-size", "Largest weight file of a directory, such as 5GB.")
]


# What is read and written -------------------------------------------------------------------------


def _written(help_: str, metavar: str) -> Any:
    return typer.Option("-o", "--output", help=help_, metavar=metavar)


def _against(help_: str) -> Any:
    return typer.Option("--against", help=help_, metavar="MODEL")


def _output(help_: str) -> Any:
    return typer.Argument(help=help_, metavar="OUT")


Model = Annotated[
    str,
    typer.Argument(
        help="A .safetensors, .bin, .pt or .pth file, a directory, or - for standard input.",
        metavar="MODEL",
    ),
]


Output = Annotated[str, _output("What compress wrote.")]


OutputOrPipe = Annotated[str, _output("What compress wrote, or - for standard input.")]


OutputOrNewest = Annotated[str | None, typer.Argument(help="What compress wrote.", metavar="[OUT]")]


OutputOrModel = Annotated[str, _output("What compress wrote, or any model directory.")]


OutputWithFactors = Annotated[str, _output("What compress wrote, factored or pivoted.")]


Out = Annotated[str | None, _written("Where to write; - for standard output.", "PATH")]


OutOfCalibrate = Annotated[str, _written("The file of moments to write.", "FILE")]


OutOfHeal = Annotated[str | None, _written("Where to write; by default OUT with -healed.", "PATH")]


Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]


AgainstToVerify = Annotated[
    str | None, _against("The original: recompute errors, compare what was copied.")
]


AgainstToEval = Annotated[
    str | None, _against("The original: adds excess loss, KL divergence, agreement.")
]


AgainstToBench = Annotated[str, _against("The model to compare with: the original.")]


# What is printed ----------------------------------------------------------------------------------


def _json(more: str = "") -> Any:
    return typer.Option("--json", help=f"Print JSON on standard output{more}.")


def _csv(row: str) -> Any:
    return typer.Option("--csv", help=f"Print CSV on standard output, a line a {row}.")


Json = Annotated[bool, _json()]


JsonBesidePipe = Annotated[bool, _json("; with -o - on standard error")]


Csv = Annotated[bool, _csv("layer")]


CsvOfMeasures = Annotated[bool, _csv("measure")]


EveryLayer = Annotated[
    bool, typer.Option("--every-layer", help="A table line for every layer, not for every kind.")
]


Group = Annotated[
    bool | None,
    typer.Option(
        "--group/--every-layer",
        help="A line for each kind of layer, or for each; kinds where layers are many.",
    ),
]


Quiet = Annotated[
    bool, typer.Option("-q", "--quiet", help="No table and no progress; errors are still told.")
]


# Which layers -------------------------------------------------------------------------------------


Include = Annotated[
    list[str] | None,
    typer.Option(
        "--include",
        help="Only layers that match this glob (or re:REGEX). Repeatable. A full name overrides "
        "the name rules.",
    ),
]


Exclude = Annotated[
    list[str] | None,
    typer.Option("--exclude", help="No layer that matches this glob (or re:REGEX). Repeatable."),
]


LayersFrom = Annotated[
    str | None,
    typer.Option(
        "--layers-from",
        help="Only the layers named in this file, one a line; - for standard input.",
        metavar="FILE",
    ),
]


StateDict = Annotated[
    str | None,
    typer.Option(
        "--state-dict",
        help="Key of a PyTorch file under which the tensors lie, such as params_ema.",
        metavar="KEY",
    ),
]


# How it is computed -------------------------------------------------------------------------------


def _dtype(help_: str) -> Any:
    return typer.Option("--dtype", help=help_)


def _seed(of_what: str) -> Any:
    return typer.Option("--seed", help=f"Seed of {of_what}.")


Device = Annotated[words.Device, typer.Option("--device", help="Where the mathematics runs.")]


Threads = Annotated[int | None, typer.Option("--threads", help="Threads for the mathematics.")]


DtypeOfFactors = Annotated[words.Dtype | None, _dtype("Of the factors; by default the source's.")]


DtypeToEval = Annotated[
    words.Dtype | None,
    _dtype("Compute in this; by default float32 for small models on a CPU, else as stored."),
]


DtypeOfOnnx = Annotated[words.OnnxDtype, _dtype("Of weights and outputs.")]


SeedOfSolver = Annotated[int, _seed("the randomized solver")]


SeedOfLabels = Annotated[int, _seed("the sampled labels")]


SeedOfOrder = Annotated[int, _seed("the order in which text is read")]


# Text ---------------------------------------------------------------------------------------------


def _samples(by_default: str = "") -> Any:
    return typer.Option(
        "--samples", help=f"Windows of text, or sentences, spread evenly over it{by_default}."
    )


def _new_tokens(help_: str) -> Any:
    return typer.Option("--new-tokens", help=help_)


Text = Annotated[
    str | None,
    typer.Option(
        "--text",
        help="Text to read: a file, a folder of files, or - for standard input.",
        metavar="PATH",
    ),
]


Stdlib = Annotated[
    bool, typer.Option("--stdlib", help="Modules of Python's standard library, in place of --text.")
]


Samples = Annotated[
    int | None,
    _samples(
        "; by default so many that they hold 131,072 tokens, or 16 for every input of the widest "
        "layer"
    ),
]


SamplesToEval = Annotated[int, _samples()]


NewTokensToEval = Annotated[int, _new_tokens("Length of the continuations.")]


NewTokensToBench = Annotated[int, _new_tokens("Tokens written after it.")]


TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that a model's folder brings along, where it takes that to open it.",
    ),
]


SeqLen = Annotated[
    int | None,
    typer.Option("--seq-len", help="Tokens in a window; by default 2048 or what the model takes."),
]


# Between argv and values --------------------------------------------------------------------------


def check_samples(samples: int | None) -> None:
    if samples is not None:
        at_least_one("--samples", samples)


def at_least_one(option: str, value: int) -> None:
    if value < 1:
        raise UsageError(f"{option} {value} is not a whole number above 0", "give at least 1")


def read_wanted(given: Mapping[str, Any]) -> Wanted:
    """What compress is asked for, out of all that was given to it: both have the same names."""
    from svdcli.plan.recipe import WANTED

    wanted = {name: value for name, value in given.items() if name in WANTED}
    return cast("Wanted", wanted | {"layers": read_layers(given["layers"])})


def read_layers(path: str | None) -> tuple[str, ...] | None:
    """The names in a file or on standard input, one a line; blank lines are passed over."""
    if path is None:
        return None
    text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    names = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not names:
        raise UsageError(f"--layers-from {path} names no layer", "give one tensor name a line")
    return names


def compute_from(device: words.Device, threads: int | None) -> Compute:
    from svdcli.engine.compute import Compute

    return Compute(device, threads)


def read_plan(path: str) -> Plan:
    from svdcli.plan.plan import Plan

    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON", "write a plan with --save-plan") from error
    return Plan.from_json(data)


def check_plan_path(path: Path, model: str, output: str | None) -> None:
    """A plan is small and is written last: it must neither fail then nor take the place of a
    model."""
    if not path.absolute().parent.is_dir():
        raise SvdcliError(f"the folder of {path} does not exist", "create it first")
    taken = [Path(other).resolve() for other in (model, output) if other not in (None, "-")]
    goal = path.resolve()
    if (
        any(goal == other or other in goal.parents for other in taken)
        or path.suffix == ".safetensors"
        or path.is_dir()
    ):
        raise UsageError(
            f"--save-plan {path} is no place for a plan",
            "give a JSON file outside the model and the output",
        )


def write_plan(path: str, plan: Plan) -> None:
    Path(path).write_text(
        json.dumps(plan.to_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
