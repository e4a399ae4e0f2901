"""Every bad input: one line that says what and why, an exit code, and nothing on the disk that was
not there before."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    cli,
    complaint,
    contents,
    entry,
    framed,
    run,
    size_of,
    small_tensors,
    tree,
    weight,
    write_model,
    write_sharded,
)
from safetensors import safe_open
from safetensors.torch import save_file

from svdcli.files.header import LARGEST_HEADER

OUT = "out.safetensors"
UP, DOWN = "layers.0.up.weight", "layers.0.down.weight"
COMMANDS: list[list[str]] = [
    ["inspect"],
    ["report"],
    ["spectrum"],
    ["verify"],
    ["expand", "-o", OUT],
    ["compress", "--rank", "4", "-o", OUT],
]


def refused(*args: str | Path, code: int = 1, **how: Any) -> str:
    """Run a command that must fail and must leave the current folder as it was."""
    before = tree(Path())
    line = complaint(cli(*args, **how), code)
    assert tree(Path()) == before
    return line


def compress_refused(*args: str | Path, code: int = 2, model: str | Path = "m.safetensors") -> str:
    return refused("compress", model, *args, code=code)


def works(*args: str | Path, **how: Any) -> None:
    done = cli(*args, **how)
    assert done.code == 0, done.err


# Headers that lie ---------------------------------------------------------------------------------

GOOD = framed({"a.weight": entry("F32", [48, 40], [0, 7680])}, bytes(7680))
HOSTILE = {
    "zero bytes": b"",
    "five bytes": b"12345",
    "text": b"#!/bin/sh\necho hello\n" * 5,
    "header beyond the limit": framed({}, length=LARGEST_HEADER + 1),
    "header of exabytes": framed({}, bytes(100), length=2**63),
    "header longer than the file": framed({}, bytes(10), length=5000),
    "duplicate keys": framed(
        '{"a":' + json.dumps(entry()) + ',"a":' + json.dumps(entry()) + "}", b"1234"
    ),
    "overlap": framed({"a": entry(), "b": entry(offsets=[2, 6])}, b"123456"),
    "hole": framed({"a": entry(), "b": entry(offsets=[6, 10])}, bytes(10)),
    "out of range": framed({"a": entry(offsets=[2**40, 2**40 + 4])}, b"1234"),
    "exabytes of weights": framed({"a.weight": entry("F32", [2**30, 2**30], [0, 2**62])}),
    "truncated": GOOD[:-1],
    "cut in the header": GOOD[:30],
    "trailing byte": GOOD + b"x",
    "unknown dtype": framed({"a": entry("F31")}, b"1234"),
    "deeply nested": framed('{"a":' + "[" * 50_000),
    "escape sequences": framed({"\x1b[31mred": entry("\x1b[32mgreen")}, b"1234"),
}


@pytest.mark.parametrize("raw", HOSTILE.values(), ids=HOSTILE)
def test_hostile_files(folder: Path, raw: bytes) -> None:
    Path("bad.safetensors").write_bytes(raw)
    for name, *rest in COMMANDS:
        assert "bad.safetensors" in refused(name, "bad.safetensors", *rest)


@pytest.mark.parametrize("raw", HOSTILE.values(), ids=HOSTILE)
def test_hostile_standard_input(folder: Path, raw: bytes) -> None:
    for name, *rest in COMMANDS:
        assert "standard input" in refused(name, "-", *rest, input=raw)
    assert "standard input" in refused("compress", "-", "--rank", "4", "-o", "-", input=raw)


@pytest.mark.parametrize("raw", [HOSTILE["hole"], HOSTILE["truncated"]], ids=["hole", "truncated"])
def test_hostile_files_in_a_directory(folder: Path, raw: bytes) -> None:
    write_model(folder / "model")
    Path("model/model.safetensors").write_bytes(raw)
    for name, *rest in COMMANDS:
        refused(name, "model", *rest)


def test_a_hostile_file_meets_the_real_command(folder: Path) -> None:
    Path("bad.safetensors").write_bytes(HOSTILE["overlap"])
    assert "'b' overlaps" in complaint(run("inspect", "bad.safetensors"))


def test_a_truncated_pipe_meets_the_real_command(folder: Path) -> None:
    assert "cut short" in complaint(run("compress", "-", "--rank", "4", "-o", "-", input=GOOD[:-1]))
    assert tree(folder) == {}


def test_the_temporary_copy_of_a_pipe_is_removed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    refused("inspect", "-", input=GOOD[:-1])
    refused("compress", "-", "--rank", "0", "-o", "-", input=GOOD, code=2)
    refused("compress", "-", "--rank", "30", "-o", "-", input=GOOD, code=3)


def test_debug_shows_the_traceback(folder: Path) -> None:
    done = run("inspect", "nothing.safetensors", env={"SVDCLI_DEBUG": "1"})
    assert done.code != 0
    assert "Traceback" in done.err
    assert "BadCheckpointError" in done.err


# Weights that cannot be factored ------------------------------------------------------------------


def spoil(value: float, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    bad = weight(48, 40, dtype=dtype)
    bad[17, 3] = value
    return {
        "good.weight": weight(40, 48, 1, dtype),
        "bad.weight": bad,
        "norm": torch.tensor([float("nan")]),
    }


@pytest.mark.parametrize(
    "target", [["--rank", "8"], ["--keep", "0.7", "--allocate", "global"], ["--error", "0.3"]]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity(
    folder: Path, value: float, dtype: torch.dtype, target: list[str]
) -> None:
    save_file(spoil(value, dtype), "m.safetensors")
    line = compress_refused(*target, "-o", OUT, code=1)
    assert "bad.weight" in line
    assert "good.weight" not in line
    assert "--nonfinite skip" in line

    done = cli("compress", "m.safetensors", *target, "-o", OUT, "--nonfinite", "skip", "--json")
    assert done.code == 0, done.err
    layers = {row["name"]: row for row in json.loads(done.out)["layers"]}
    assert layers["bad.weight"]["rank"] is None
    assert "NaN or infinity" in layers["bad.weight"]["reason"]
    assert layers["good.weight"]["rank"]
    assert contents(Path(OUT))["bad.weight"] == contents(Path("m.safetensors"))["bad.weight"]


def test_nan_outside_the_selection_is_nobodys_business(folder: Path) -> None:
    save_file(spoil(float("nan"), torch.float32), "m.safetensors")
    works("compress", "m.safetensors", "--rank", "8", "--exclude", "bad", "-o", OUT)


def test_nan_is_named_by_spectrum_and_dry_run_too(folder: Path) -> None:
    save_file(spoil(float("nan"), torch.float32), "m.safetensors")
    assert "bad.weight" in refused("spectrum", "m.safetensors")
    assert "bad.weight" in compress_refused("--rank", "8", "--dry-run", code=1)


def test_nothing_but_nan(folder: Path) -> None:
    save_file({"bad.weight": torch.full((48, 40), float("nan"))}, "m.safetensors")
    assert "bad.weight" in compress_refused("--rank", "8", "--nonfinite", "skip", code=3)


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_but_finite_weights(folder: Path, value: float, dtype: torch.dtype) -> None:
    """The square of 1e30 is no float32, and a matrix of zeros has no directions."""
    save_file({"a.weight": torch.full((48, 40), value, dtype=dtype)}, "m.safetensors")
    works("spectrum", "m.safetensors")
    for number, target in enumerate(
        (["--rank", "4"], ["--energy", "0.9"], ["--rank", "4", "--layout", "pivoted"])
    ):
        works("compress", "m.safetensors", *target, "-o", f"{number}.safetensors")
        works("verify", f"{number}.safetensors", "--against", "m.safetensors")


def test_a_plan_saved_after_a_fallback_runs_again(folder: Path) -> None:
    save_file({"a.weight": torch.full((48, 40), 3e38)}, "m.safetensors")
    works("compress", "m.safetensors", "--rank", "4", "-o", OUT, "--save-plan", "plan.json")
    works("compress", "m.safetensors", "--plan", "plan.json", "-o", "again.safetensors")
    assert contents(Path("again.safetensors")) == contents(Path(OUT))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scale_of_a_weight_does_not_change_what_is_decided(
    folder: Path, dtype: torch.dtype
) -> None:
    decided = []
    for power in (0, -80, 80):
        save_file({"a.weight": weight(48, 40, dtype=dtype) * 2.0**power}, "m.safetensors")
        done = cli("compress", "m.safetensors", "--error", "0.3", "-o", OUT, "--force", "--json")
        assert done.code == 0, done.err
        (row,) = json.loads(done.out)["layers"]
        assert row["relative_error"] <= 0.3
        decided.append(row["rank"])
    assert len(set(decided)) == 1


# Where the output goes ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["inspect", "report", "spectrum", "verify", "expand", "compress"])
def test_missing_path(folder: Path, name: str) -> None:
    rest = ["--rank", "4"] if name == "compress" else []
    assert "nothing.safetensors does not exist" in refused(name, "nothing.safetensors", *rest)


@pytest.mark.parametrize(
    "out", ["nowhere/out.safetensors", "m.safetensors/out.safetensors", "a/b/c/out.safetensors"]
)
@pytest.mark.parametrize("name", ["compress", "expand"])
def test_output_folder_that_is_none(small: Path, name: str, out: str) -> None:
    works("compress", small, "--rank", "4", "-o", "svd.safetensors")
    args = [small, "--rank", "4"] if name == "compress" else ["svd.safetensors"]
    assert "does not exist" in refused(name, *args, "-o", out)


def unprivileged(folder: Path) -> Sequence[str]:
    """What to put before a command so that file permissions bind it: nothing, or for root a tool
    that drops its powers."""
    prefix = [] if os.geteuid() else ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    if prefix and not shutil.which(prefix[0]):
        pytest.skip("root ignores permissions, and setpriv is missing")
    probe = subprocess.run(
        [*prefix, "mkdir", str(folder / "probe")], capture_output=True, check=False
    )
    if b"ermission" not in probe.stderr:
        pytest.skip("permissions do not bind here")
    return prefix


def test_read_only_output_folder(small: Path, folder: Path) -> None:
    (folder / "locked").mkdir(mode=0o500)
    before = tree(folder)
    done = run(
        "compress",
        small,
        "--rank",
        "4",
        "-o",
        "locked/out.safetensors",
        prefix=unprivileged(folder / "locked"),
    )
    assert "locked/out.safetensors" in complaint(done)
    assert tree(folder) == before


def test_unreadable_input(small: Path, folder: Path) -> None:
    (folder / "locked").mkdir(mode=0o500)
    small.chmod(0)
    done = run("inspect", small, prefix=unprivileged(folder / "locked"))
    small.chmod(0o600)
    assert "m.safetensors: Permission denied" in complaint(done)


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["", "force"])
@pytest.mark.parametrize(
    "out",
    [
        "m.safetensors",
        "./m.safetensors",
        "sub/../m.safetensors",
        "soft.safetensors",
        "hard.safetensors",
    ],
)
def test_the_source_file_is_never_the_output(
    small: Path, folder: Path, out: str, force: list[str]
) -> None:
    (folder / "sub").mkdir()
    (folder / "soft.safetensors").symlink_to(small)
    (folder / "hard.safetensors").hardlink_to(small)
    assert "is the source" in compress_refused("--rank", "4", "-o", out, *force, code=1)


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["", "force"])
@pytest.mark.parametrize(
    "out", ["model", "model/", "model/inside", "model/sub/inside", ".", "..", "link", "link/inside"]
)
def test_the_source_folder_is_never_the_output(folder: Path, out: str, force: list[str]) -> None:
    write_model(folder / "model")
    (folder / "model/sub").mkdir()
    (folder / "link").symlink_to("model")
    assert "is the source, or inside or around it" in compress_refused(
        "--rank", "4", "-o", out, *force, code=1, model="model"
    )


def test_a_hard_linked_shard_is_never_the_output(folder: Path) -> None:
    write_model(folder / "model")
    Path("hard.safetensors").hardlink_to("model/model.safetensors")
    compress_refused(
        "--rank", "4", "-o", "hard.safetensors", "--force", code=1, model="model/model.safetensors"
    )


def test_an_output_that_exists(small: Path, folder: Path) -> None:
    Path(OUT).write_text("precious")
    assert "--force" in compress_refused("--rank", "4", "-o", OUT, code=1)
    write_model(folder / "model")
    Path("model-svd").mkdir()
    assert "--force" in compress_refused("--rank", "4", code=1, model="model")


def test_force_does_not_replace_a_folder_of_something_else(folder: Path) -> None:
    write_model(folder / "model")
    Path("thesis").mkdir()
    Path("thesis/chapter.tex").write_text("precious")
    assert "does not look like a model" in compress_refused(
        "--rank", "4", "-o", "thesis", "--force", code=1, model="model"
    )


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["", "force"])
def test_a_file_is_not_replaced_by_a_folder_nor_a_folder_by_a_file(
    small: Path, folder: Path, force: list[str]
) -> None:
    write_model(folder / "model")
    Path("model-svd").write_text("file")
    Path(OUT).mkdir()
    compress_refused("--rank", "4", *force, code=1, model="model")
    compress_refused("--rank", "4", "-o", OUT, *force, code=1)


def test_a_stranger_in_the_place_of_the_workspace(small: Path) -> None:
    """OUT.partial may be somebody's folder of that name; only svdcli's own is continued or cleared
    away."""
    Path(f"{OUT}.partial").mkdir()
    Path(f"{OUT}.partial/notes.txt").write_text("precious")
    cli("compress", small, "--rank", "4", "-o", OUT)
    assert Path(f"{OUT}.partial/notes.txt").read_text() == "precious"
    Path("b.safetensors.partial").write_text("precious")
    compress_refused("--rank", "4", "-o", "b.safetensors", code=1)


def test_an_output_that_another_run_is_writing(small: Path) -> None:
    Path(f"{OUT}.partial").mkdir()
    with Path(f"{OUT}.partial/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another svdcli run" in compress_refused("--rank", "4", "-o", OUT, code=1)


@pytest.mark.parametrize("out", ["out", "out.bin", "out.pt", "out.SAFETENSORS", "config.json"])
@pytest.mark.parametrize("name", ["compress", "expand"])
def test_an_output_by_another_ending_works_or_is_not_written(
    small: Path, name: str, out: str
) -> None:
    works("compress", small, "--rank", "4", "-o", "svd.safetensors")
    args = [small, "--rank", "4"] if name == "compress" else ["svd.safetensors"]
    before = tree(Path())
    done = cli(name, *args, "-o", out)
    if done.code:
        complaint(done, done.code)
        assert tree(Path()) == before
    else:
        works("inspect", out)
        if name == "compress":
            works("report", out)


@pytest.mark.parametrize("out", ["x" * 300 + ".safetensors", "x" * 240 + ".safetensors"])
def test_output_names_that_no_disk_takes(small: Path, out: str) -> None:
    compress_refused("--rank", "4", "-o", out, code=1)


def test_a_plan_is_never_saved_over_the_model(small: Path) -> None:
    before = small.read_bytes()
    done = cli("compress", small, "--rank", "4", "-o", OUT, "--save-plan", small)
    assert small.read_bytes() == before
    complaint(done, done.code)


def test_what_follows_the_work_is_checked_before_it(small: Path) -> None:
    assert "nowhere" in refused(
        "compress", small, "--rank", "4", "-o", OUT, "--save-plan", "nowhere/plan.json"
    )
    assert "--json and --csv" in compress_refused("--rank", "4", "-o", OUT, "--json", "--csv")


def test_a_directory_does_not_fit_through_a_pipe(folder: Path) -> None:
    write_model(folder / "model")
    compress_refused("--rank", "4", "-o", "-", model="model")


def test_standard_input_needs_a_name_for_the_output(small: Path) -> None:
    assert "-o FILE" in refused("compress", "-", "--rank", "4", input=small.read_bytes(), code=2)


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


# Inputs of the wrong kind -------------------------------------------------------------------------


def test_what_svdcli_wrote_is_not_compressed_again(small: Path, folder: Path) -> None:
    works("compress", small, "--rank", "4", "-o", "svd.safetensors")
    write_model(folder / "model")
    works("compress", "model", "--rank", "4")
    for model in ("svd.safetensors", "model-svd", "model-svd/model.safetensors"):
        assert "already" in compress_refused(
            "--rank", "2", "-o", "twice.safetensors", code=1, model=model
        )


def test_what_svdcli_did_not_write_is_not_reported(small: Path, folder: Path) -> None:
    write_model(folder / "model")
    for model in ("m.safetensors", "model"):
        for name in ("report", "verify", "expand"):
            refused(name, model)
    assert "no output of svdcli" in refused("report")


@pytest.mark.parametrize("config", [{"quant_method": "gptq", "bits": 4}, "anything", [1]])
def test_a_quantised_model(folder: Path, config: Any) -> None:
    write_model(folder / "model", {"model_type": "llama", "quantization_config": config})
    line = compress_refused("--rank", "4", code=1, model="model")
    assert "quantised" in line
    assert "gptq" in line or not isinstance(config, dict)


@pytest.mark.parametrize("raw", [b"", b"[" * 50_000, b"\xff", b"3"])
def test_a_config_that_is_no_json(folder: Path, raw: bytes) -> None:
    write_model(folder / "model")
    Path("model/config.json").write_bytes(raw)
    assert "config.json" in compress_refused("--rank", "4", code=1, model="model")


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


# Outputs that were damaged ------------------------------------------------------------------------


def damaged_output(change: Any) -> None:
    """An output whose record is not what svdcli wrote."""
    works("compress", "m.safetensors", "--rank", "4", "-o", "svd.safetensors")
    with safe_open("svd.safetensors", framework="pt") as file:
        record = json.loads(file.metadata()["svdcli"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(record)
    save_file(tensors, "bad.safetensors", metadata={"svdcli": json.dumps(record)})


def set_in(*path: str, value: Any) -> Any:
    def change(record: dict[str, Any]) -> None:
        for key in path[:-1]:
            record = record[key]
        if value is None:
            del record[path[-1]]
        else:
            record[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("names", "change"),
    [
        (["report", "verify", "expand", "inspect"], set_in("layers", value=None)),
        (["report", "verify", "expand", "inspect"], set_in("layers", value=[])),
        (["report", "verify", "expand", "inspect"], set_in("format", value="x")),
        (["report", "verify", "expand", "inspect"], set_in("format", value=99)),
        (["report", "verify", "expand"], set_in("layers", UP, value=3)),
        (["report", "verify", "expand"], set_in("layers", UP, "shape", value=None)),
        (["report", "verify", "expand"], set_in("layers", UP, "dtype", value="magic")),
        (["verify", "expand"], set_in("layers", UP, "rank", value=5)),
        (["verify", "expand"], set_in("layers", UP, "rank", value=0)),
        (["verify", "expand"], set_in("layers", UP, "layout", value="pivoted")),
        (["verify", "expand"], set_in("layers", UP, "stored_dtype", value="F16")),
        (["report", "verify"], set_in("source", value=None)),
        (["report", "verify"], set_in("skipped", "norm.weight", "reason", value=None)),
        (["report", "verify"], set_in("skipped", "norm.weight", "shape", value=None)),
        (["report", "verify"], set_in("dense", value=[])),
        (["report", "verify"], set_in("notes", value=3)),
        (["report", "verify"], set_in("left_out", value=[])),
    ],
)
def test_a_damaged_record(small: Path, names: list[str], change: Any) -> None:
    damaged_output(change)
    for name in names:
        refused(name, "bad.safetensors")


@pytest.mark.parametrize("text", ["", "{", "null", "3", "{}", "[" * 50_000])
def test_a_record_that_is_none(folder: Path, text: str) -> None:
    save_file({"a.weight": weight(48, 40)}, "bad.safetensors", metadata={"svdcli": text})
    for name, *rest in COMMANDS:
        assert "bad.safetensors" in refused(name, "bad.safetensors", *rest)


# Odd, but sound -----------------------------------------------------------------------------------


def survives(tensors: dict[str, torch.Tensor], *args: str) -> str:
    """Compress, look at, verify and expand; what comes back has the old names, shapes and dtypes.
    Returns all it printed."""
    save_file(tensors, "odd.safetensors")
    before = Path("odd.safetensors").read_bytes()
    said = ""
    for command in (
        ["compress", "odd.safetensors", "--rank", "4", "-o", OUT, *args],
        ["inspect", "odd.safetensors"],
        ["spectrum", "odd.safetensors"],
        ["report", OUT],
        ["verify", OUT, "--against", "odd.safetensors"],
        ["expand", OUT, "-o", "back.safetensors"],
    ):
        done = cli(*command)
        assert done.code == 0, (command, done.err)
        said += done.out.decode() + done.err
    old, new = contents(Path("odd.safetensors")), contents(Path("back.safetensors"))
    assert {name: item[:2] for name, item in old.items()} == {
        name: item[:2] for name, item in new.items()
    }
    assert Path("odd.safetensors").read_bytes() == before
    json.loads(cli("report", OUT, "--json").out)
    return said


@pytest.mark.parametrize(
    "name",
    [
        "a\nb",
        "a\r\tb",
        "层.0.权",
        "émoji😀",
        "\u202eltr",
        "\0",
        " ",
        "",
        'q"\\',
        "a/../b",
        "x" * 2000,
        "weight",
        "svd_up",
    ],
)
def test_odd_names(folder: Path, name: str) -> None:
    survives({f"{name}.weight": weight(48, 40), "other": torch.ones(2)})


def test_a_tensor_called_weight(folder: Path) -> None:
    survives({"weight": weight(48, 40)})
    assert set(contents(Path(OUT))) == {"svd_up.weight", "svd_down.weight"}


def test_markup_in_names_is_shown_as_it_is(folder: Path) -> None:
    said = survives(
        {
            "[bold]x[/bold].weight": weight(48, 40),
            "[/].weight": weight(40, 48),
            ":smile:.weight": weight(40, 40),
        }
    )
    assert all(name in said for name in ("[bold]x[/bold]", "[/]", ":smile:"))


def test_escape_sequences_in_names_never_reach_the_terminal(folder: Path) -> None:
    said = survives({"\x1b[31mred.weight": weight(48, 40), "\x9b32m\x07bell": torch.ones(2)})
    save_file({"\x1b[31mred.weight": torch.full((48, 40), float("nan"))}, "nan.safetensors")
    said += compress_refused("--rank", "4", "-o", "n.safetensors", code=1, model="nan.safetensors")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", said)


def test_a_name_that_is_a_pattern_matches_itself(folder: Path) -> None:
    save_file({"a[0].weight": weight(48, 40), "a0.weight": weight(48, 40)}, "m.safetensors")
    done = cli("inspect", "m.safetensors", "--names", "--include", "a[0]")
    assert "a[0].weight" in done.out.decode().splitlines(), done.err


def test_empty_and_single_tensors(folder: Path) -> None:
    survives(
        {
            **small_tensors(),
            "e.weight": torch.empty(0, 64),
            "f.weight": torch.empty(64, 0),
            "s": torch.tensor(1.0),
        }
    )


@pytest.mark.parametrize("metadata", [None, {"only": "metadata"}])
def test_a_file_without_tensors(folder: Path, metadata: dict[str, str] | None) -> None:
    save_file({}, "m.safetensors", metadata=metadata)
    assert "no tensors" in compress_refused("--rank", "4", code=3)
    refused("spectrum", "m.safetensors", code=3)
    works("inspect", "m.safetensors")


@pytest.mark.parametrize(
    ("taken", "layout"),
    [("p.svd_up.weight", "factored"), ("p.svd_down.weight", "pivoted"), ("p.svd_rows", "pivoted")],
)
def test_a_name_that_a_factor_needs(folder: Path, taken: str, layout: str) -> None:
    save_file({"p.weight": weight(48, 40), taken: torch.ones(3)}, "m.safetensors")
    for extra in ([], ["--dry-run"]):
        assert taken in compress_refused(
            "--rank", "4", "--layout", layout, "-o", OUT, *extra, code=1
        )


def test_factors_of_factors_do_not_collide(folder: Path) -> None:
    survives(
        {
            "p.weight": weight(48, 40),
            "p.svd_up.weight": weight(48, 40, 2),
            "p.svd_up.x.weight": weight(40, 48),
        }
    )


def test_many_tensors(folder: Path) -> None:
    many = {f"t.{number}.weight": torch.ones(1, 2) for number in range(3000)}
    survives({**many, "a.weight": weight(48, 40)}, "--allow-larger")


def test_a_symlinked_source(small: Path) -> None:
    Path("link.safetensors").symlink_to(small)
    before = small.read_bytes()
    works("compress", "link.safetensors", "--rank", "4")
    assert small.read_bytes() == before
    assert Path("link.safetensors").is_symlink()
    assert Path("link.svd.safetensors").is_file()


@pytest.mark.parametrize(
    "shards",
    [
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ["model-00001-of-000002.safetensors", "model-00002-of-000002.safetensors"],
        ["part-a.safetensors", "part-b.safetensors"],
        ["weights/1.safetensors", "weights/2.safetensors"],
        ["./1.safetensors", "./2.safetensors"],
    ],
    ids=lambda names: names[0],
)
def test_shards_by_any_name_stay_a_model(folder: Path, shards: list[str]) -> None:
    """What stock loaders look for is `model.safetensors.index.json`, with every shard where it
    says."""
    tensors = sorted(small_tensors().items())
    write_sharded(folder / "model", {shards[0]: dict(tensors[::2]), shards[1]: dict(tensors[1::2])})
    Path("model/config.json").write_text('{"model_type": "llama"}')
    works("compress", "model", "--rank", "4")
    works("verify", "model-svd", "--against", "model")
    works("expand", "model-svd", "-o", "back")
    for output in (Path("model-svd"), Path("back")):
        weight_map = json.loads((output / "model.safetensors.index.json").read_text())["weight_map"]
        found = {
            name: shard for shard in set(weight_map.values()) for name in contents(output / shard)
        }
        assert found == weight_map
    assert set(weight_map) == set(small_tensors())


@pytest.mark.parametrize(
    "prepare",
    [
        lambda: Path("model/config.json").write_text('{"model_type":"llama","odd":"\\ud800"}'),
        lambda: (Path("model") / os.fsdecode(b"\xff.txt")).write_text("x"),
        lambda: Path("model").rename(os.fsdecode(b"model\xff")),
    ],
    ids=["surrogate in config", "file name", "folder name"],
)
def test_text_that_is_no_unicode_works_or_is_refused(folder: Path, prepare: Any) -> None:
    write_model(folder / "model")
    prepare()
    (model,) = (path for path in folder.iterdir() if path.is_dir())
    before = tree(folder)
    done = cli("compress", model, "--rank", "4", "-o", "out")
    if done.code:
        complaint(done, done.code)
        assert tree(folder) == before
    else:
        works("verify", "out", "--against", model)
        works("inspect", model, "--json")


def test_output_in_a_narrow_encoding(small: Path) -> None:
    """A terminal that knows only ASCII gets question marks, not a failure after the work is
    done."""
    works("compress", small, "--rank", "4", "-o", OUT)
    done = run("report", OUT, env={"PYTHONIOENCODING": "ascii"})
    assert done.code == 0, done.err
    assert done.out
