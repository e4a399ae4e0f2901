"""Options and plans that cannot be met: one line that says why, an exit code, and nothing on the
disk that was not there before."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    DOWN,
    OUT,
    UP,
    cli,
    compress_refused,
    refused,
    size_of,
    small_tensors,
    weight,
    works,
    write_model,
)
from safetensors.torch import save_file

# What was asked -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "names"),
    [
        ([], "exactly one target"),
        (["--rank", "4", "--keep", "0.5"], "exactly one target"),
        (["--size", "1MB", "--energy", "0.9", "--error", "0.1"], "exactly one target"),
        (["--rank", "0"], "--rank 0"),
        (["--rank", "-3"], "--rank -3"),
        (["--rank", "1.5"], "--rank"),
        (["--rank", "many"], "--rank"),
        *[
            (["--keep", value], f"--keep {value}")
            for value in ("0", "-1", "1.5", "nan", "inf", "-inf")
        ],
        *[(["--energy", value], f"--energy {value}") for value in ("0", "-0.5", "1.01", "nan")],
        *[(["--error", value], f"--error {value}") for value in ("0", "-1", "1", "nan")],
        *[
            (["--size", value], "--size")
            for value in ("0", "-5", "nan", "1e9", "5 parsecs", "", "MB")
        ],
        (["--rank", "4", "--solver", "magic"], "'magic' is not one of"),
        (["--rank", "4", "--layout", "magic"], "'magic' is not one of"),
        (["--rank", "4", "--allocate", "magic"], "'magic' is not one of"),
        (["--rank", "4", "--nonfinite", "magic"], "'magic' is not one of"),
        (["--rank", "4", "--dtype", "magic"], "'magic'"),
        (
            ["--rank", "4", "--dtype", "int8"],
            "'--dtype': 'int8' is not one of 'float32', 'float16', 'bfloat16', 'float64'",
        ),
        (
            ["--rank", "4", "--device", "magic"],
            "'--device': 'magic' is not one of 'auto', 'cpu', 'cuda', 'mps'",
        ),
        (["--rank", "4", "--device", ""], "--device"),
        (["--rank", "4", "--threads", "0"], "--threads 0"),
        (["--rank", "4", "--threads", "99999999999999999999"], "--threads"),
        (["--rank", "4", "--solver", "randomized", "--seed", "9" * 30], "--seed"),
        (["--rank", "4", "--multiple-of", "0"], "--multiple-of 0"),
        (["--rank", "4", "--floor", "nan"], "--floor nan"),
        (["--rank", "4", "--floor", "2"], "--floor 2"),
        (["--error", "0.1", "--allocate", "global"], "--allocate global"),
        (["--size", "15KB", "--layout", "dense"], "--size cannot be met"),
        (["--rank", "4", "--max-shard-size", "1MB"], "--max-shard-size is for directories"),
        (["--rank", "4", "--magic"], "--magic"),
        (["--rank", "4", "--include", "re:("], "is not a regular expression"),
        (["--rank", "4", "--exclude", "re:*"], "is not a regular expression"),
        (["--plan", "p.json", "--rank", "4"], "--plan decides"),
        (["--plan", "p.json", "--include", "*"], "--plan decides by itself, and --include"),
        (["--plan", "p.json", "--layout", "dense"], "--plan decides by itself, and --layout"),
        (["--plan", "p.json", "--seed", "0"], "--plan decides by itself, and --seed"),
        (
            ["--plan", "p.json", "--self-contained"],
            "--plan decides by itself, and --self-contained",
        ),
        (["--rank", "4", "--multiple-of", "8"], "--rank 4 is below --multiple-of 8"),
        (["--keep", "0.5", "--floor", "0.5"], "--floor is for --allocate global"),
        (
            ["--error", "0.1", "--solver", "randomized"],
            "--solver randomized may miss what --error asks for",
        ),
        (
            ["--energy", "0.9", "--solver", "randomized"],
            "--solver randomized may miss what --energy asks for",
        ),
    ],
)
def test_requests_that_cannot_be_met(small: Path, args: list[str], names: str) -> None:
    assert names in compress_refused(*args, "-o", OUT)


@pytest.mark.parametrize(
    ("args", "near"),
    [
        (["--include", "layers.O.up"], "layers.0.up"),
        (["--exclude", "layers.0.dwn*"], "layers.0.down"),
        (["--include", "re:emb_tokens"], "embed_tokens"),
        (["--include", "dwn"], "layers.0.down"),
        (["--include", "laiers"], "layers.0"),
        (["--include", "*dwn*"], "layers.0.down"),
        (["--exclude", r"re:\.dwn$"], "layers.0.down"),
        (["--include", "0.dwn.weight"], "layers.0.down"),
    ],
)
def test_a_pattern_that_matches_nothing_shows_near_names(
    small: Path, args: list[str], near: str
) -> None:
    assert near in compress_refused("--rank", "4", *args, "-o", OUT).partition("near names")[2]
    assert near in refused("inspect", small, *args, code=2).partition("near names")[2]


@pytest.mark.parametrize(
    ("listed", "code", "names"),
    [
        (b"layers.0.sideways\n", 2, "'layers.0.sideways'"),
        (b"layers.0.up\nnone\n", 2, "'none'"),
        (b"", 2, "names no layer"),
        (b"\n \n", 2, "names no layer"),
        (b"\xff\xfe", 1, "UTF-8"),
        (b"odd.scalar\n", 3, "no layer"),
    ],
)
def test_lists_of_layers_that_cannot_be_met(
    small: Path, listed: bytes, code: int, names: str
) -> None:
    Path("list.txt").write_bytes(listed)
    assert names in compress_refused(
        "--rank", "4", "-o", OUT, "--layers-from", "list.txt", code=code
    )
    assert names in refused(
        "compress", small, "--rank", "4", "-o", OUT, "--layers-from", "-", input=listed, code=code
    )


def test_lists_of_layers_that_are_no_file(small: Path) -> None:
    assert "none.txt" in compress_refused("--rank", "4", "--layers-from", "none.txt", code=1)
    compress_refused("--rank", "4", "--layers-from", ".", code=1)
    assert "cannot be both" in refused(
        "compress", "-", "--rank", "4", "--layers-from", "-", "-o", "-", code=2
    )


@pytest.mark.parametrize(
    "extra", [[], ["--layout", "pivoted"], ["--allocate", "global"], ["--multiple-of", "3"]]
)
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_the_smallest_size_is_named_and_works(folder: Path, kind: str, extra: list[str]) -> None:
    source = write_model(folder / "model", tensors=small_tensors())
    model, out = (
        (source, Path("out")) if kind == "directory" else (source / "model.safetensors", Path(OUT))
    )
    line = refused("compress", model, "--size", "1", *extra, "-o", out, code=2)
    named = re.search(r"use --size (\d+)", line)
    assert named, line
    refused("compress", model, "--size", str(int(named[1]) - 1), *extra, "-o", out, code=2)
    works("compress", model, "--size", named[1], *extra, "-o", out)
    assert size_of(out) <= int(named[1])


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--rank", "30"], "would not save bytes"),
        (["--keep", "1"], "no layer"),
        (["--error", "1e-9"], "rounding"),
        (["--energy", "1"], "would not save bytes"),
        (["--keep", "0.5", "--multiple-of", "1000"], "multiple"),
        (["--rank", "4", "--exclude", "*"], "no layer"),
        (["--rank", "4", "--include", "odd.scalar"], "no layer"),
    ],
)
def test_nothing_to_do_is_exit_code_3(small: Path, args: list[str], says: str) -> None:
    assert says in compress_refused(*args, "-o", OUT, code=3)


def test_no_arguments_show_the_help() -> None:
    done = cli()
    assert "Usage:" in done.out.decode() + done.err
    assert "compress" in done.out.decode() + done.err
    assert "error" not in done.err


@pytest.mark.parametrize("args", [["compress"], ["magic"], ["report", "a", "b"]])
def test_command_lines_that_make_no_sense(folder: Path, args: list[str]) -> None:
    assert "--help" in refused(*args, code=2)


# Plans --------------------------------------------------------------------------------------------


def saved_plan() -> dict[str, Any]:
    works("compress", "m.safetensors", "--rank", "8", "--dry-run", "--save-plan", "plan.json")
    plan: dict[str, Any] = json.loads(Path("plan.json").read_text())
    return plan


GARBAGE = ["", "{", "[]", "null", "3", '"x"', "{}", '{"format":1}', '{"format":"1"}', "[" * 50_000]


@pytest.mark.parametrize("text", GARBAGE)
def test_a_plan_that_is_none(small: Path, text: str) -> None:
    Path("plan.json").write_text(text)
    compress_refused("--plan", "plan.json", "-o", OUT)


def test_a_plan_that_is_not_there(small: Path) -> None:
    assert "none.json" in compress_refused("--plan", "none.json", "-o", OUT, code=1)


def test_a_plan_of_a_newer_format(small: Path) -> None:
    Path("plan.json").write_text(json.dumps({**saved_plan(), "format": 99}))
    assert "upgrade" in compress_refused("--plan", "plan.json", "-o", OUT)


@pytest.mark.parametrize(
    "change",
    [
        {"rank": 0},
        {"rank": -1},
        {"rank": 41},
        {"rank": "x"},
        {"rank": [1]},
        {"layout": "magic"},
        {"solver": "magic"},
        {"stored_dtype": "magic"},
        {"stored_dtype": "I8"},
        {"dtype": "F16"},
        {"shape": [40, 48]},
        {"shape": [1, 2, 3]},
        {"shape": "x"},
    ],
    ids=str,
)
def test_a_plan_that_does_not_fit(small: Path, change: dict[str, Any]) -> None:
    plan = saved_plan()
    plan["layers"][UP].update(change)
    Path("plan.json").write_text(json.dumps(plan))
    compress_refused("--plan", "plan.json", "-o", OUT)
    compress_refused("--plan", "plan.json", "--dry-run")


@pytest.mark.parametrize(
    "field", ["format", "recipe", "fingerprint", "layers", "dense", "skipped", "notes"]
)
def test_a_plan_that_lacks_something(small: Path, field: str) -> None:
    plan = saved_plan()
    del plan[field]
    Path("plan.json").write_text(json.dumps(plan))
    compress_refused("--plan", "plan.json", "-o", OUT)


@pytest.mark.parametrize(
    "tensors", [{"other.weight": (48, 40)}, {UP: (48, 41), DOWN: (40, 48)}], ids=["names", "shapes"]
)
def test_a_plan_for_another_model(small: Path, tensors: dict[str, tuple[int, int]]) -> None:
    saved_plan()
    save_file({name: weight(*shape) for name, shape in tensors.items()}, "other.safetensors")
    line = compress_refused("--plan", "plan.json", "-o", OUT, model="other.safetensors")
    assert "the model it was made for" in line
