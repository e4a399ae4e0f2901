"""Options that several commands share, and what their text is turned into."""

from __future__ import annotations

import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from svdcli.cli.panels import PANELS
from svdcli.errors import SvdcliError, UsageError
from svdcli.plan import words

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from svdcli.engine.compute import Compute
    from svdcli.plan.plan import Plan
    from svdcli.plan.recipe import Wanted


# Sizes --------------------------------------------------------------------------------------------


# Letters of any case are taken: they are made capitals first.
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
    # Exact: 1.1GB is 1100000000, which floats need not give
    from fractions import Fraction

    return int(Fraction(match[1]) * _SIZES[unit])


# Panels of the help text: every option lies in the one that its helper is called after.
# Single-use options of one command are beside that command. The text of `compress` and `calibrate`
# is there to calibrate on; that of `eval` and `heal` has a panel of its own.


def _in(panel: str) -> Callable[..., Any]:
    return partial(typer.Option, rich_help_panel=panel)


_target, _calibration, _text_to_read, _storage, _selection, _run, _output = map(_in, PANELS)


def _size(option: Callable[..., Any], name: str, help_: str) -> Any:
    def parse(text: str) -> int:
        return parse_size(text, name)

    return option(name, help=help_, parser=parse, metavar="SIZE")


# Arguments ----------------------------------------------------------------------------------------


def _out(help_: str) -> Any:
    return typer.Argument(help=help_, metavar="OUT")


Model = Annotated[
    str,
    typer.Argument(
        help="A .safetensors, .bin, .pt or .pth file, a directory, or - for standard input.",
        metavar="MODEL",
    ),
]


Output = Annotated[str, _out("What compress wrote.")]


Parts = Annotated[
    list[str],
    typer.Argument(help="What calibrate --part wrote, every part once.", metavar="PART..."),
]


OutputOrPipe = Annotated[str, _out("What compress wrote, or - for standard input.")]


OutputOrNewest = Annotated[str | None, typer.Argument(help="What compress wrote.", metavar="[OUT]")]


OutputOrModel = Annotated[str, _out("What compress wrote, or any model directory.")]


OutputWithFactors = Annotated[str, _out("What compress wrote, with factors or packed layers.")]


# Of several commands, each in its own words -------------------------------------------------------


def _against(help_: str) -> Any:
    return typer.Option("--against", help=help_, metavar="MODEL")


def _new_tokens(help_: str) -> Any:
    return typer.Option("--new-tokens", help=help_)


AgainstToVerify = Annotated[
    str | None, _against("The original: recompute errors, compare what was copied.")
]


AgainstToEval = Annotated[
    str | None, _against("The original: adds excess loss, KL divergence, agreement.")
]


AgainstToBench = Annotated[str, _against("The model to compare with: the original.")]


NewTokensToEval = Annotated[int, _new_tokens("Length of the continuations.")]


NewTokensToBench = Annotated[int, _new_tokens("Tokens written after it.")]


# Target -------------------------------------------------------------------------------------------


Rank = Annotated[int | None, _target("--rank", help="This rank in every layer.")]


Keep = Annotated[
    float | None,
    _target("--keep", help="Share of the selected layers' parameters that remain."),
]


KeepBytes = Annotated[
    float | None,
    _target("--keep-bytes", help="Share of the selected layers' bytes that remain."),
]


Size = Annotated[int | None, _size(_target, "--size", "Bytes of the whole output, such as 350MB.")]


Energy = Annotated[
    float | None,
    _target("--energy", help="Share of each layer's squared singular values to keep."),
]


Error = Annotated[
    float | None,
    _target("--error", help="Relative Frobenius error that no layer exceeds."),
]


PlanFile = Annotated[
    str | None, _target("--plan", help="Run this saved plan again.", metavar="FILE")
]


Allocate = Annotated[
    words.Allocation | None,
    _target(
        "--allocate",
        help="Ranks evenly, or where they are worth most (uniform; with text: global).",
    ),
]


Floor = Annotated[
    float | None,
    _target(
        "--floor",
        help="With global: least rank, as a share of the uniform one (0.6; with text: 0).",
    ),
]


MultipleOf = Annotated[int, _target("--multiple-of", help="Only ranks that are multiples of this.")]


# Calibration --------------------------------------------------------------------------------------


def _text(option: Callable[..., Any]) -> Any:
    return option(
        "--text",
        help="Text to read: a file, a folder of files, or - for standard input.",
        metavar="PATH",
    )


def _stdlib(option: Callable[..., Any]) -> Any:
    return option("--stdlib", help="Modules of Python's standard library, in place of --text.")


def _samples(option: Callable[..., Any], by_default: str = "") -> Any:
    return option(
        "--samples", help=f"Windows of text, or sentences, spread evenly over it{by_default}."
    )


def _seq_len(option: Callable[..., Any]) -> Any:
    return option("--seq-len", help="Tokens in a window; by default 2048 or what the model takes.")


_SO_MANY = (
    "; by default so many that they hold 131,072 tokens, or 16 for every input of the widest layer"
)


Text = Annotated[str | None, _text(_calibration)]


Stdlib = Annotated[bool, _stdlib(_calibration)]


CalibrationFile = Annotated[
    str | None,
    _calibration(
        "--calibration", help="Count errors by this file of `svdcli calibrate`.", metavar="FILE"
    ),
]


Metric = Annotated[
    words.MetricName, _calibration("--metric", help="How much of a calibration counts.")
]


Precision = Annotated[
    words.Precision,
    _calibration(
        "--precision",
        help="Run the model in this; auto: bfloat16 where it multiplies faster. Sums are in "
        "float32.",
    ),
]


Samples = Annotated[int | None, _samples(_calibration, _SO_MANY)]


SeqLen = Annotated[int | None, _seq_len(_calibration)]


# Text to evaluate on, or to train on --------------------------------------------------------------


TextToRead = Annotated[str | None, _text(_text_to_read)]


StdlibToRead = Annotated[bool, _stdlib(_text_to_read)]


SamplesToEval = Annotated[int, _samples(_text_to_read)]


SamplesToHeal = Annotated[int | None, _samples(_text_to_read, _SO_MANY)]


SeqLenToRead = Annotated[int | None, _seq_len(_text_to_read)]


# Storage ------------------------------------------------------------------------------------------


def _dtype(help_: str) -> Any:
    return _storage("--dtype", help=help_)


Layout = Annotated[
    words.Layout | None,
    _storage(
        "--layout",
        help="How factors are stored (factored; with text: pivoted); dense: none, which with "
        "--bits is a checkpoint of compressed-tensors.",
    ),
]


Bits = Annotated[
    words.Bits | None,
    _storage(
        "--bits",
        help="Bits of a stored number (16: as they are); auto, with text what --size and "
        "--keep-bytes do, chooses them and the ranks for each layer.",
    ),
]


EmbeddingBits = Annotated[
    words.EmbeddingBits,
    _storage("--embedding-bits", help="Bits of a number of an embedding table; 16: as it is."),
]


Share = Annotated[
    words.Share,
    _storage(
        "--share",
        help="One basis for layers that read the same input: where that loses less (auto; with "
        "text), never, or always.",
    ),
]


GroupSize = Annotated[
    int, _storage("--group-size", help="Columns that share a scale at 4 bits: 32, 64 or 128.")
]


DtypeOfFactors = Annotated[words.Dtype | None, _dtype("Of the factors; by default the source's.")]


DtypeToEval = Annotated[
    words.Dtype | None,
    _run(
        "--dtype",
        help="Compute in this; by default float32 for small models on a CPU, else as stored.",
    ),
]


DtypeOfOnnx = Annotated[words.OnnxDtype, _dtype("Of weights and outputs.")]


MaxShardSize = Annotated[
    int | None,
    _size(_storage, "--max-shard-size", "Largest weight file of a directory, such as 5GB."),
]


SelfContained = Annotated[
    bool,
    _storage(
        "--self-contained",
        help="Add a Python file that opens the directory where svdcli is not installed.",
    ),
]


Carry = Annotated[
    list[str] | None,
    _storage(
        "--carry",
        help="Take files that match this glob along, although they would be left out. Repeatable.",
    ),
]


# Selection ----------------------------------------------------------------------------------------


Include = Annotated[
    list[str] | None,
    _selection(
        "--include",
        help="Only layers that match this glob (or re:REGEX). Repeatable. A full name overrides "
        "the name rules.",
    ),
]


Exclude = Annotated[
    list[str] | None,
    _selection("--exclude", help="No layer that matches this glob (or re:REGEX). Repeatable."),
]


LayersFrom = Annotated[
    str | None,
    _selection(
        "--layers-from",
        help="Only the layers named in this file, one a line; - for standard input.",
        metavar="FILE",
    ),
]


StateDict = Annotated[
    str | None,
    _selection(
        "--state-dict",
        help="Key of a PyTorch file under which the tensors lie, such as params_ema.",
        metavar="KEY",
    ),
]


Nonfinite = Annotated[
    words.OnNonfinite,
    _selection("--nonfinite", help="NaN or infinity in a layer: stop, or leave it dense."),
]


# Run ----------------------------------------------------------------------------------------------


def _seed(of_what: str) -> Any:
    return _run("--seed", help=f"Seed of {of_what}.")


Solver = Annotated[words.Solver, _run("--solver", help="How factors are computed.")]


SeedOfSolver = Annotated[int, _seed("the randomized solver")]


SeedOfLabels = Annotated[int, _seed("the sampled labels")]


SeedOfOrder = Annotated[int, _seed("the order in which text is read")]


Device = Annotated[words.Device, _run("--device", help="Where the mathematics runs.")]


Threads = Annotated[int | None, _run("--threads", help="Threads for the mathematics.")]


Jobs = Annotated[
    int | None,
    _run("--jobs", help="Processes that share the layers, and the threads.", metavar="N"),
]


TrustCode = Annotated[
    bool,
    _run(
        "--trust-remote-code",
        help="Run Python code that a model's folder brings along, where it takes that to open it.",
    ),
]


SavePlan = Annotated[
    str | None, _run("--save-plan", help="Write the plan as JSON.", metavar="FILE")
]


DryRun = Annotated[
    bool, _run("--dry-run", help="Only print the plan, its exact size and the time of a run.")
]


# Output -------------------------------------------------------------------------------------------


def _written(help_: str, metavar: str = "PATH") -> Any:
    return _output("-o", "--output", help=help_, metavar=metavar)


def _json(exception: str = "") -> Any:
    return _output("--json", help=f"Print JSON on standard output{exception}.")


def _csv(row: str) -> Any:
    return _output("--csv", help=f"Print CSV on standard output, a line a {row}.")


Out = Annotated[str | None, _written("Where to write; - for standard output.")]


OutOfCalibrate = Annotated[str, _written("The file to write.", "FILE")]


OutOfHeal = Annotated[str | None, _written("Where to write; by default OUT with -healed.")]


Force = Annotated[bool, _output("--force", help="Replace an existing output.")]


AllowLarger = Annotated[
    bool,
    _output(
        "--allow-larger",
        help="Write an output that is not smaller than MODEL, which else is an error.",
    ),
]


EveryLayer = Annotated[
    bool, _output("--every-layer", help="A table line for every layer, not for every kind.")
]


Group = Annotated[
    bool | None,
    _output(
        "--group/--every-layer",
        help="A line for each kind of layer, or for each; kinds where layers are many.",
    ),
]


Json = Annotated[bool, _json()]


JsonBesidePipe = Annotated[bool, _json("; with -o - on standard error")]


Csv = Annotated[bool, _csv("layer")]


CsvOfMeasures = Annotated[bool, _csv("measure")]


Quiet = Annotated[
    bool, _output("-q", "--quiet", help="No table and no progress; errors are still told.")
]


# Between argv and values --------------------------------------------------------------------------


def check_samples(samples: int | None) -> None:
    """Raises UsageError for an amount of text that is none; None leaves it to the model."""
    if samples is not None:
        at_least_one("--samples", samples)


def read_part(text: str) -> tuple[int, int]:
    """2/8 -> (2, 8). Raises UsageError for anything else."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None:
        raise UsageError(f"--part {text} is no part", "give K/N, such as --part 2/8")
    return int(found[1]), int(found[2])


def at_least_one(option: str, value: int) -> None:
    if value < 1:
        raise UsageError(f"{option} {value} is not a whole number above 0", "give at least 1")


def read_wanted(given: Mapping[str, Any]) -> Wanted:
    """What compress is asked for, out of all that was given to it: both have the same names."""
    from svdcli.plan.recipe import WANTED

    # The list of layers is a path on the command line, and names from here on
    wanted = {name: value for name, value in given.items() if name in WANTED}
    return cast("Wanted", wanted | {"layers": read_layers(given["layers"])})


def read_layers(path: str | None) -> tuple[str, ...] | None:
    """The names in a file or on standard input, one a line; blank lines are passed over."""
    if path is None:
        return None
    text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    names = tuple(line.strip() for line in text.splitlines() if line.strip())
    # An empty list would select nothing
    if not names:
        raise UsageError(f"--layers-from {path} names no layer", "give one tensor name a line")
    return names


def compute_from(device: words.Device, threads: int | None, jobs: int | None = None) -> Compute:
    from svdcli.engine.compute import Compute

    return Compute(device, threads, jobs)


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
    goal = path.resolve()
    taken = [Path(place).resolve() for place in (model, output) if place not in (None, "-")]
    inside = any(goal == place or place in goal.parents for place in taken)
    if inside or path.suffix == ".safetensors" or path.is_dir():
        raise UsageError(
            f"--save-plan {path} is no place for a plan",
            "give a JSON file outside the model and the output",
        )


def write_plan(path: str, plan: Plan) -> None:
    Path(path).write_text(
        json.dumps(plan.to_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
