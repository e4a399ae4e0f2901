"""Permissions of an output are those of its source, as `cp -r` gives them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import run, write_model, write_small

from svdcli.plan.recipe import Recipe
from svdcli.verbs.compress import compress
from svdcli.verbs.expand import expand

HALF = Recipe("keep", 0.5)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_as_cp_would_give_them(tmp_path: Path, umask: int) -> None:
    source = write_model(tmp_path / "m")
    (source / "code").mkdir()
    (source / "code" / "run.sh").write_text("#!/bin/sh\n")
    for name, bits in {
        "model.safetensors": 0o640,
        "config.json": 0o604,
        "tokenizer.json": 0o666,
        "code/run.sh": 0o755,
        "code": 0o750,
        "": 0o711,
    }.items():
        (source / name).chmod(bits)
    subprocess.run(["cp", "-r", source, tmp_path / "copy"], check=True)
    out = compress(source, tmp_path / "out", HALF).path
    assert out is not None
    for name in ("", "code", "code/run.sh", "config.json", "tokenizer.json", "model.safetensors"):
        assert oct(mode(out / name)) == oct(mode(tmp_path / "copy" / name)), name
    assert mode(out / "svdcli.json") == mode(out / "model.safetensors")


def test_a_private_file_stays_private(tmp_path: Path) -> None:
    source = write_small(tmp_path / "m.safetensors")
    source.chmod(0o600)
    out = compress(source, None, HALF).path
    assert out is not None
    assert mode(out) == 0o600
    dense = expand(out)
    assert dense is not None
    assert mode(dense) == 0o600


def test_a_folder_that_nobody_writes_to(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m")
    (source / "model.safetensors").chmod(0o444)
    source.chmod(0o555)
    out = compress(source, tmp_path / "out", HALF).path
    assert out is not None
    assert (mode(out), mode(out / "model.safetensors")) == (0o555, 0o444)
    again = compress(source, tmp_path / "out", HALF, force=True).path
    assert again == out
    source.chmod(0o755)
    out.chmod(0o755)


def test_what_came_through_a_pipe_is_a_new_file(tmp_path: Path) -> None:
    raw = write_small(tmp_path / "m.safetensors").read_bytes()
    before = os.umask(0o027)
    try:
        done = run("compress", "-", "--keep", "0.5", "-o", tmp_path / "o.safetensors", input=raw)
    finally:
        os.umask(before)
    assert done.code == 0, done.err
    assert mode(tmp_path / "o.safetensors") == 0o640
