"""What may happen to a command from outside: readers that leave early, disks behind standard
output, interrupts at any time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import cli, write_model

import svdcli
from svdcli import Recipe
from svdcli.cli.process import interruptible, one_line_errors
from svdcli.errors import UsageError

HERE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("streams") / "m")


@pytest.fixture(scope="module")
def output(model: Path) -> Path:
    svdcli.compress(model, model.parent / "o", Recipe("rank", 20))
    return model.parent / "o"


# Readers that leave -------------------------------------------------------------------------------


def without_readers(*arguments: str | Path, errors_too: bool = False) -> tuple[int, str]:
    """(exit code, standard error) of a command whose standard output is a pipe that nobody reads
    any more."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "svdcli", *map(str, arguments)]
    errors = writer if errors_too else subprocess.PIPE
    try:
        done = subprocess.run(
            command, stdout=writer, stderr=errors, text=True, check=False, timeout=120
        )
    finally:
        os.close(writer)
    return done.returncode, done.stderr or ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "M"],
        ["inspect", "M", "--json"],
        ["report", "O", "--csv"],
        ["--help"],
        ["compress", "--help"],
    ],
)
def test_a_reader_that_left_is_no_failure(arguments: list[str], model: Path, output: Path) -> None:
    paths = {"M": str(model), "O": str(output)}
    assert without_readers(*(paths.get(argument, argument) for argument in arguments)) == (0, "")


def test_a_reader_that_leaves_after_a_line(model: Path) -> None:
    command = f"set -o pipefail; {sys.executable} -m svdcli inspect {model} | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1


def test_work_goes_on_when_nobody_listens(model: Path, tmp_path: Path) -> None:
    """Not even on standard error: the output is written, and so is the plan, which comes last."""
    out, plan = tmp_path / "o", tmp_path / "plan.json"
    code, _ = without_readers(
        "compress", model, "--rank", "20", "-o", out, "--save-plan", plan, errors_too=True
    )
    assert code == 0
    assert svdcli.verify(out, model).ok
    assert plan.is_file()


def test_a_failure_stays_one_when_nobody_listens(output: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    for path in output.iterdir():
        if path.is_file():
            (bad / path.name).write_bytes(path.read_bytes())
    (bad / "model.safetensors").write_bytes((output / "model.safetensors").read_bytes()[:-1] + b"x")
    code, err = without_readers("verify", bad)
    assert code == 1
    assert err.count("\n") == 1
    assert "does not verify" in err


def test_a_disk_that_is_full_behind_standard_output_is_one_line(model: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "svdcli", "inspect", str(model), "--json"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "No space left on device" in done.stderr


# Interrupts ---------------------------------------------------------------------------------------


def interrupted(
    points: int, *arguments: str | Path, ignored: bool = False
) -> list[tuple[int, int, str]]:
    command = [sys.executable, HERE / "interrupting.py", str(points), str(int(ignored)), *arguments]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["imports"] > 100
    assert len(found["ends"]) >= points - 1
    return [tuple(end) for end in found["ends"]]


def test_an_interrupt_at_any_import_is_no_traceback(model: Path) -> None:
    """From the first import of the command line to the last of the command."""
    for point, code, err in interrupted(24, "inspect", model):
        assert (code, err) == (130, "svdcli: interrupted\n"), point


def test_an_interrupt_that_the_parent_ignores_is_ignored(model: Path) -> None:
    assert {(code, err) for _, code, err in interrupted(6, "inspect", model, ignored=True)} == {
        (0, "")
    }


def test_the_library_leaves_signals_and_slow_imports_alone() -> None:
    code = (
        "import signal, sys; before = set(sys.modules); import svdcli; "
        "print(*sorted(set(sys.modules) - before))\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import svdcli.__main__; print(signal.getsignal(signal.SIGINT) is "
        "signal.default_int_handler)"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == ["svdcli svdcli.version", "True"], done.stderr


def test_a_command_leaves_signals_as_it_found_them(model: Path) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    assert cli("inspect", model).code == 0
    assert [signal.getsignal(number) for number in numbers] == before


def test_to_be_told_twice_at_once_is_to_be_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ranks are by a terminal and by their launcher; later it is somebody who insists."""
    raised = 0

    def be_told(number: int) -> None:
        nonlocal raised
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            raised += 1

    with interruptible():
        be_told(signal.SIGINT)
        be_told(signal.SIGTERM)
        assert raised == 1
        monkeypatch.setattr("svdcli.cli.process._ONCE", 0.0)
        be_told(signal.SIGINT)
        assert raised == 2


@pytest.mark.parametrize("alone", [True, False], ids=["this rank alone", "rank 0, too"])
def test_a_rank_that_does_not_lead_lets_rank_0_tell_first(
    alone: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A launcher ends the others once rank 0 has told; one that is still there was alone."""
    values = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "5"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)

    def wait(seconds: float) -> None:
        assert capsys.readouterr().err == ""
        if not alone:
            raise KeyboardInterrupt

    monkeypatch.setattr("svdcli.cli.process.time.sleep", wait)
    with pytest.raises(SystemExit) as end, one_line_errors():
        raise UsageError("nothing is there", "look elsewhere")
    assert end.value.code == (2 if alone else 130)
    said = "svdcli: error: nothing is there; look elsewhere\n"
    assert capsys.readouterr().err == (said if alone else "")
