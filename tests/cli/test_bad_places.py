"""Places where an output cannot go, or an input is not: one line that says so, and nothing on the
disk that was not there before."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers import (
    OUT,
    cli,
    complaint,
    compress_refused,
    refused,
    run,
    tree,
    works,
    write_model,
)

# Where the output goes ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["inspect", "report", "spectrum", "verify", "expand", "compress"])
def test_missing_path(folder: Path, name: str) -> None:
    rest = ["--rank", "4"] if name == "compress" else []
    assert "nothing.safetensors does not exist" in refused(name, "nothing.safetensors", *rest)


@pytest.mark.parametrize(
    "arguments",
    [
        ("verify", "mine/out"),
        ("expand", "mine/out"),
        ("report", "mine/out"),
        ("heal", "mine/out", "--teacher", "m.safetensors", "--text", "t.txt"),
        ("compress", "m.safetensors", "--rank", "4", "--calibration", "mine/out"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_what_svdcli_writes_is_on_no_hub(small: Path, arguments: tuple[str, ...]) -> None:
    Path("t.txt").write_text("words " * 99)
    line = refused(*arguments)
    assert "mine/out does not exist" in line
    assert "hf download" not in line


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
