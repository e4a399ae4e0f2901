"""Options that several commands share, and what their text is turned into."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from svdcli.errors import SvdcliError, UsageError
from svdcli.plan import words

if TYPE_CHECKING:
    from svdcli.engine.executor import Compute
    from svdcli.plan.plan import Plan


Model = Annotated[
    str,
    typer.Argument(
        help="A .safetensors, .bin, .pt or .pth file, a directory, or - for standard input.",
        metavar="MODEL",
    ),
]


Output = Annotated[str | None, typer.Argument(help="What compress wrote.", metavar="[OUT]")]


Out = Annotated[
    str | None,
    typer.Option("-o", "--output", help="Where to write; - for standard output.", metavar="PATH"),
]


Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


Csv = Annotated[bool, typer.Option("--csv", help="Print CSV on standard output, a line a layer.")]


Quiet = Annotated[
    bool, typer.Option("-q", "--quiet", help="No table and no progress; errors are still told.")
]


Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]


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


Device = Annotated[words.Device, typer.Option("--device", help="Where the mathematics runs.")]


Threads = Annotated[int | None, typer.Option("--threads", help="Threads for the mathematics.")]


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
    typer.Option(
        "--samples",
        help="Windows of text, or sentences, spread evenly over it; by default so many that "
        "they hold "
        "131,072 tokens, or 16 for every input of the widest layer.",
    ),
]


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


_DTYPES = {
    **dict.fromkeys(("float32", "fp32", "f32", "float"), "F32"),
    **dict.fromkeys(("float16", "fp16", "f16", "half"), "F16"),
    **dict.fromkeys(("bfloat16", "bf16"), "BF16"),
    **dict.fromkeys(("float64", "fp64", "f64", "double"), "F64"),
}


def dtypes() -> list[str]:
    """What completion offers; `parse_dtype` takes other spellings too."""
    return ["float32", "float16", "bfloat16", "float64"]


# Between argv and values --------------------------------------------------------------------------


def parse_size(text: str, option: str) -> int:
    """350MB -> 350000000. KB, MB, GB, TB are powers of 1000, KiB and so on of 1024."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = match[2].upper() if match else ""
    if match is None or unit not in _SIZES:
        raise UsageError(f"{option} {text!r} is not a size", "give bytes such as 350MB or 1.5GiB")
    from fractions import Fraction

    return int(Fraction(match[1]) * _SIZES[unit])


def check_samples(samples: int | None) -> None:
    if samples is not None:
        at_least_one("--samples", samples)


def at_least_one(option: str, value: int) -> None:
    if value < 1:
        raise UsageError(f"{option} {value} is not a whole number above 0", "give at least 1")


def parse_dtype(text: str | None) -> str | None:
    if text is None:
        return None
    if text.lower() not in _DTYPES:
        raise UsageError(
            f"--dtype {text!r} cannot hold factors", "use float32, float16, bfloat16 or float64"
        )
    return _DTYPES[text.lower()]


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
    from svdcli.engine.executor import Compute

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
