"""Several ranks write what one process writes, and go on from the journal when some are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import held_rank
import pytest
import torch
from agents import COMMAND, ranks_alone, two_agents, until
from held_rank import AT_ONCE
from helpers import tree, weight
from safetensors.torch import save_file

import svdcli
from svdcli.engine import crew as crew_module
from svdcli.engine.compute import Compute
from svdcli.engine.crew import Crew
from svdcli.errors import UsageError

LAYERS, SIZE = 40, 512
Asked = tuple[Path, list[str], Path]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """(a file of many layers, how it is compressed, the output of one process with one thread)."""
    folder = tmp_path_factory.mktemp("many")
    tensors = {
        f"layers.{i}.weight": weight(SIZE, SIZE, seed=i).to(torch.bfloat16) for i in range(LAYERS)
    }
    save_file(tensors, folder / "m.safetensors")
    one = folder / "one.safetensors"
    svdcli.compress(folder / "m.safetensors", one, keep=0.5, compute=Compute(threads=1))
    return folder / "m.safetensors", ["--keep", "0.5"], one


def begun(out: Path) -> Callable[[], bool]:
    """Are all units in the journal that `held_rank` does at once."""
    journal = out.with_name(f"{out.name}.partial") / "journal.jsonl"
    return lambda: journal.exists() and journal.read_bytes().count(b'"unit"') >= AT_ONCE


def finished(out: Path) -> Callable[[], bool]:
    return lambda: out.exists() and not out.with_name(f"{out.name}.partial").exists()


@pytest.mark.parametrize(
    "killed", [pytest.param("a worker", marks=pytest.mark.slow), "the machine that leads"]
)
def test_ranks_that_are_killed_cost_nothing_but_time(
    killed: str, many: Asked, tmp_path: Path
) -> None:
    model, how, one = many
    out, holding = tmp_path / "o.safetensors", tmp_path / "holding"
    holding.touch()
    program = [held_rank.__file__, holding, "compress", model, "-o", out, *how]
    with two_agents(program, tmp_path) as (first, second):
        until(begun(out), "work has begun")
        if killed == "a worker":
            os.kill(second.ranks()[1], signal.SIGKILL)
        else:
            first.kill()
        holding.unlink()
        until(finished(out), "the output is there")
        until(lambda: "started 2 times" in first.said() + second.said(), "the report says so")
    assert out.read_bytes() == one.read_bytes()


def test_local_processes_write_the_same_bytes_with_one_of_them_killed(
    many: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, one = many
    crews: list[Crew] = []
    answered = 0
    plain = Crew.__init__

    def keep(crew: Crew, *args: Any) -> None:
        crews.append(crew)
        plain(crew, *args)

    def kill_one(stage: str, *_: object) -> None:
        nonlocal answered
        answered += stage == "write"
        if answered == 3:
            crews[0].processes[1].kill()

    monkeypatch.setattr(Crew, "__init__", keep)
    monkeypatch.setattr(crew_module, "_cores", lambda: 2)
    out = tmp_path / "o.safetensors"
    compute = Compute(threads=2, jobs=2)
    outcome = svdcli.compress(model, out, keep=0.5, compute=compute, progress=kill_one)
    assert out.read_bytes() == one.read_bytes()
    assert any("was killed" in note and "done again" in note for note in outcome.report.notes)


def test_spectra_and_calibrated_layers_come_from_all_ranks(
    readable: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew_module, "_cores", lambda: 2)
    model = readable("llama")
    text = svdcli.Texts("words", (" ".join(f"w{i % 90 + 2}" for i in range(2000)),))
    svdcli.calibrate(model, tmp_path / "m.safetensors", text, samples=8, seq_len=32)
    how: dict[str, Any] = {"keep": 0.5, "calibration": tmp_path / "m.safetensors"}
    svdcli.compress(model, tmp_path / "one", compute=Compute(threads=1), **how)
    svdcli.compress(model, tmp_path / "two", compute=Compute(threads=2, jobs=2), **how)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def torchrun(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Two ranks on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, "-m", "svdcli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )


def test_one_rank_speaks_and_an_error_is_told_once(many: Asked, tmp_path: Path) -> None:
    model, how, _ = many
    (tmp_path / "o.safetensors").write_bytes(b"")
    done = torchrun("compress", model, "-o", tmp_path / "o.safetensors", *how)
    said = [line for line in done.stderr.splitlines() if line.startswith("svdcli: ")]
    assert done.returncode == 1
    assert len(said) == 1
    assert "exists; use --force" in said[0]
    assert done.stdout == ""


@pytest.mark.parametrize("other", ["--keep 0.6 -o o", "--keep 0.5 -o p", "--threads 2 --keep 0.5"])
def test_ranks_with_a_store_of_their_own_hear_why_the_first_ends(
    other: str, many: Asked, tmp_path: Path
) -> None:
    """Its store ends with it."""
    both = "--keep 0.5 -o o", other
    lines = [("compress", many[0], "-q", *how.split()) for how in both]
    with ranks_alone(COMMAND, lines, tmp_path) as ranks:
        first, second = [rank.end(120) for rank in ranks]
    assert "rank 1 was asked for something else than rank 0" in first.err
    assert (first.code, second.code, second.err) == (2, 2, "")


def test_ranks_have_no_standard_input_to_read_a_text_from(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1" if name == "RANK" else "2")
    with pytest.raises(UsageError, match="several ranks cannot read"):
        svdcli.read_texts("-", stdlib=False, held_out=False)


def test_numbers_of_processes_are_checked() -> None:
    with pytest.raises(UsageError, match="--jobs 0"):
        Compute(jobs=0)
