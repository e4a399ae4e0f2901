"""An output appears whole or not at all, whatever happens on the way; the same command continues;
the source stays as it is."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import cli, complaint, weight, write_model
from killing import snapshot
from safetensors.torch import save_file

import svdcli
from svdcli import Recipe
from svdcli.engine.compute import Compute
from svdcli.errors import BadCheckpointError, SvdcliError
from svdcli.files.workspace import Workspace
from svdcli.progress import Progress, silent
from svdcli.verbs.outcome import Outcome

HERE = Path(__file__).parents[1]
StopEverywhere = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def stop_everywhere() -> Iterator[StopEverywhere]:
    """(arguments, out, points, kind) -> what killing.py found; it is started once, since importing
    torch takes seconds."""
    with subprocess.Popen(
        [sys.executable, str(HERE / "killing.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as killing:
        assert killing.stdin is not None
        assert killing.stdout is not None
        tasks, answers = killing.stdin, killing.stdout

        def stop(arguments: list[str], out: Path, points: int, kind: int) -> dict[str, Any]:
            patience = threading.Timer(300, killing.kill)
            patience.start()
            try:
                print(
                    json.dumps(
                        {
                            "arguments": arguments,
                            "out": str(out),
                            "points": points,
                            "signal": int(kind),
                        }
                    ),
                    file=tasks,
                )
                tasks.flush()
                line = answers.readline()
            finally:
                patience.cancel()
            assert line, "killing.py has ended"
            found: dict[str, Any] = json.loads(line)
            return found

        yield stop


@pytest.mark.parametrize("left", [(), ("lock",), ("lock", "data")])
@pytest.mark.parametrize("command", ["compress", "expand"])
def test_a_workspace_without_a_journal_says_nothing_of_an_output(
    tmp_path: Path, left: tuple[str, ...], command: str
) -> None:
    """As a kill leaves it that came before the first line of a journal: the output may be
    anybody's."""
    model, out = write_model(tmp_path / "m"), tmp_path / "o"
    svdcli.compress(model, tmp_path / "s", Recipe("rank", 12))
    svdcli.compress(model, out, Recipe("rank", 10))
    before = snapshot(out)
    (tmp_path / "o.partial").mkdir()
    for name in left:
        (tmp_path / "o.partial" / name).touch() if name == "lock" else (
            tmp_path / "o.partial" / name
        ).mkdir()
    arguments = (
        ("compress", model, "--rank", "9") if command == "compress" else ("expand", tmp_path / "s")
    )
    done = cli(*arguments, "-o", out)
    assert (done.code, done.out) == (1, b"")
    assert "exists; use --force" in done.err
    assert snapshot(out) == before
    assert not (tmp_path / "o.partial").exists()


def stop_when_written(phase: str, name: str, done: float, total: float) -> None:
    """An interrupt between the last tensor and the publishing."""
    if phase == "write" and done >= total:
        raise KeyboardInterrupt


def test_other_threads_start_over(tmp_path: Path) -> None:
    """They round sums in another order, and half of an output must not come from each."""
    model, usual = write_model(tmp_path / "m"), torch.get_num_threads()

    def run(threads: int, progress: Progress = silent) -> Outcome:
        return svdcli.compress(
            model,
            tmp_path / "o",
            Recipe("rank", 9),
            compute=Compute(threads=threads),
            progress=progress,
        )

    try:
        for again, starts_over in ((2, False), (4, True)):
            with pytest.raises(KeyboardInterrupt):
                run(1, stop_when_written)
            outcome = run(again)
            assert outcome.started_over is starts_over
            assert outcome.path is not None
            shutil.rmtree(outcome.path)
    finally:
        torch.set_num_threads(usual)


@pytest.mark.parametrize(
    "kind", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda kind: kind.name
)
def test_a_run_stopped_anywhere_continues_to_the_same_bytes(
    tmp_path: Path, kind: signal.Signals, stop_everywhere: StopEverywhere
) -> None:
    model = write_model(tmp_path / "m", shards=2)
    before = snapshot(model)
    arguments = [
        "compress",
        str(model),
        "-o",
        str(tmp_path / "o"),
        "--keep",
        "0.5",
        "--allocate",
        "global",
    ]
    found = stop_everywhere(arguments, tmp_path / "o", 24 if kind == signal.SIGKILL else 8, kind)
    assert found["problems"] == []
    assert found["points"] >= min(8, found["operations"])
    assert snapshot(model) == before


def test_a_file_and_its_replacement_survive_a_kill_anywhere(
    tmp_path: Path, stop_everywhere: StopEverywhere
) -> None:
    model = write_model(tmp_path / "m") / "model.safetensors"
    out = tmp_path / "o.safetensors"
    found = stop_everywhere(
        ["compress", str(model), "-o", str(out), "--rank", "9"], out, 16, signal.SIGKILL
    )
    assert found["problems"] == []


def test_files_that_are_laid_out_once_more_survive_a_kill_anywhere(
    tmp_path: Path, stop_everywhere: StopEverywhere
) -> None:
    """Every layer's tail is below what a Gram matrix knows, and the reasons take more room than the
    record had."""
    model, out = tmp_path / "m.safetensors", tmp_path / "o.safetensors"
    steep = 10.0 ** -torch.linspace(0, 9, 40, dtype=torch.float64)
    tensors = {}
    for i in range(8):
        u, _, v = torch.linalg.svd(weight(48, 40, i).double(), full_matrices=False)
        tensors[f"layers.{i}.fc.weight"] = (u * steep @ v).float()
    save_file(tensors, model)
    arguments = ["compress", str(model), "-o", str(out), "--rank", "20", "--solver"]
    found = stop_everywhere([*arguments, "gram"], out, 8, signal.SIGKILL)
    assert found["problems"] == []
    once = stop_everywhere([*arguments, "svd"], out, 1, signal.SIGKILL)
    assert found["operations"] >= once["operations"] + 16, (
        "both factors of every layer are written twice"
    )


def test_expand_survives_a_kill_anywhere(tmp_path: Path, stop_everywhere: StopEverywhere) -> None:
    model = write_model(tmp_path / "m")
    svdcli.compress(model, tmp_path / "s", Recipe("rank", 9))
    found = stop_everywhere(
        ["expand", str(tmp_path / "s"), "-o", str(tmp_path / "o")],
        tmp_path / "o",
        12,
        signal.SIGKILL,
    )
    assert found["problems"] == []


def test_an_interrupt_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("svdcli.verbs.compress.finish", stop)
    done = cli("compress", write_model(tmp_path / "m"), "-o", tmp_path / "o", "--rank", "9")
    assert (done.code, done.out) == (130, b"")
    assert (
        done.err.splitlines()[-1]
        == "svdcli: interrupted; the same command continues where this one stopped"
    )
    monkeypatch.setattr("svdcli.verbs.verify.verify", stop)
    assert cli("verify", tmp_path / "m").err == "svdcli: interrupted\n"


def test_a_torn_tensor_is_written_again(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    svdcli.compress(model, tmp_path / "whole", Recipe("rank", 9))

    with pytest.raises(KeyboardInterrupt):
        svdcli.compress(model, tmp_path / "o", Recipe("rank", 9), progress=stop_when_written)
    data = tmp_path / "o.partial" / "data" / "model.safetensors"
    assert data.read_bytes()[:8] == bytes(8), "a file without a header is no valid file"
    torn = bytearray(data.read_bytes())
    torn[-2000:] = bytes(2000)
    data.write_bytes(torn)
    svdcli.compress(model, tmp_path / "o", Recipe("rank", 9))
    whole, again = snapshot(tmp_path / "whole"), snapshot(tmp_path / "o")
    assert list((whole or {}).values()) == list((again or {}).values())


def test_work_that_is_done_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from svdcli.engine import job

    model, solved = write_model(tmp_path / "m"), []
    real = job.solve_layer

    def solve(w: torch.Tensor, layer: object, *rest: object) -> object:
        solved.append(layer)
        if len(solved) == 3:
            raise KeyboardInterrupt
        return real(w, layer, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(job, "solve_layer", solve)
    with pytest.raises(KeyboardInterrupt):
        svdcli.compress(model, tmp_path / "o", Recipe("rank", 9))
    svdcli.compress(model, tmp_path / "o", Recipe("rank", 9))
    assert len(solved) == 4, "two of three were in the journal"


def test_other_settings_start_over_and_say_so(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    with pytest.raises(KeyboardInterrupt):
        svdcli.compress(model, tmp_path / "o", Recipe("rank", 9), progress=stop_when_written)
    done = cli("compress", model, "-o", tmp_path / "o", "--rank", "10")
    assert done.code == 0
    assert "started over" in done.err
    assert svdcli.verify(tmp_path / "o", model).ok


def test_a_command_that_is_refused_leaves_the_unfinished_work_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from svdcli.engine import job

    model, out, recipe = write_model(tmp_path / "m"), tmp_path / "o", Recipe("rank", 9)

    def stop(phase: str, *_: object) -> None:
        if phase == "check":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        svdcli.compress(model, out, recipe, progress=stop)
    before = snapshot(tmp_path / "o.partial")
    for refused in (Recipe("rank", 10**6), Recipe("keep", 1.0)):
        with pytest.raises(SvdcliError, match=r"no layer|no fewer"):
            svdcli.compress(model, out, refused)
        assert snapshot(tmp_path / "o.partial") == before

    # all of it is there: no layer is solved again
    monkeypatch.setattr(job, "solve_layer", lambda *_: pytest.fail("solved again"))
    assert not svdcli.compress(model, out, recipe).started_over
    assert {path.name for path in tmp_path.iterdir()} == {"m", "o"}


def test_another_library_is_not_mixed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SciPy may have come or gone, or be another one."""
    model, out, recipe = write_model(tmp_path / "m"), tmp_path / "o", Recipe("rank", 9)

    def has(name: str) -> None:
        monkeypatch.setattr("svdcli.linalg.lapack.library", lambda threads: name)

    for after, starts_over in (("", True), ("SciPy 2", False)):
        has("SciPy 2")
        with pytest.raises(KeyboardInterrupt):
            svdcli.compress(model, out, recipe, progress=stop_when_written)
        has(after)
        assert svdcli.compress(model, out, recipe).started_over is starts_over
        shutil.rmtree(out)


def test_a_changed_source_is_not_mixed_in(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a.weight": weight(90, 70, 1), "b.weight": weight(90, 70, 2)}, path)
    with pytest.raises(KeyboardInterrupt):
        svdcli.compress(path, None, Recipe("rank", 9), progress=stop_when_written)
    save_file({"a.weight": weight(90, 70, 1), "b.weight": weight(90, 70, 3)}, path)
    outcome = svdcli.compress(path, None, Recipe("rank", 9))
    assert outcome.started_over
    assert svdcli.verify(tmp_path / "m.svd.safetensors", path).ok


def test_a_source_that_is_written_to_meanwhile_is_not_mixed_in(tmp_path: Path) -> None:
    """With as many bytes as before: nothing else would tell."""
    model, out = write_model(tmp_path / "m"), tmp_path / "o"
    file = next(model.glob("*.safetensors"))

    def write_to_it(stage: str, *_: object) -> None:
        if stage == "check":
            file.write_bytes(file.read_bytes()[:-8] + bytes(8))

    with pytest.raises(BadCheckpointError, match="changed while it was read; run the same command"):
        svdcli.compress(model, out, Recipe("rank", 9), progress=write_to_it)
    assert not out.exists()
    svdcli.compress(model, out, Recipe("rank", 9))
    assert svdcli.verify(out, model).ok


def test_a_path_that_is_not_utf_8_is_refused_at_once(folder: Path) -> None:
    """The reference reader takes none."""
    model = write_model(folder / os.fsdecode(b"m \xff"))
    assert "is not UTF-8; choose another -o" in complaint(cli("compress", model, "--rank", "9"), 2)
    assert list(folder.iterdir()) == [model]
    assert cli("compress", model, "--rank", "9", "-o", "o").code == 0


def test_the_second_of_two_runs_refuses(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    workspace = Workspace(tmp_path / "o", is_file=False)
    with workspace.locked():
        done = cli("compress", model, "-o", tmp_path / "o", "--rank", "9")
    assert done.code == 1
    assert "another svdcli run is writing" in done.err


def test_force_replaces_and_nothing_else_does(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    svdcli.compress(model, tmp_path / "o", Recipe("rank", 9))
    before = snapshot(tmp_path / "o")
    with pytest.raises(SvdcliError, match="exists"):
        svdcli.compress(model, tmp_path / "o", Recipe("rank", 10))
    assert snapshot(tmp_path / "o") == before
    svdcli.compress(model, tmp_path / "o", Recipe("rank", 10), force=True)
    assert svdcli.verify(tmp_path / "o", model).ok
    assert {path.name for path in tmp_path.iterdir()} == {"m", "o"}


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process may grow beyond 20 kB."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_file_that_may_not_grow_is_one_line(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = write_model(tmp_path / "m")
    before = snapshot(model)
    request.getfixturevalue("small_files")
    done = cli("compress", model, "-o", tmp_path / "o", "--rank", "20")
    assert done.code == 1
    assert done.err.count("\n") == 1
    assert "cannot write" in done.err
    assert not (tmp_path / "o").exists()
    assert snapshot(model) == before


def test_a_full_disk_then_room_again(tmp_path: Path) -> None:
    model, disk = write_model(tmp_path / "m"), tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "svdcli", str(disk)], check=False
        ).returncode
    ):
        pytest.skip("mounting a small disk takes root")
    try:
        done = cli("compress", model, "-o", disk / "o", "--rank", "20")
        assert (done.code, done.err.count("\n")) == (1, 1)
        assert os.strerror(errno.ENOSPC) in done.err or "are free" in done.err
        assert not (disk / "o").exists()
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        assert cli("compress", model, "-o", disk / "o", "--rank", "20").code == 0
        assert svdcli.verify(disk / "o", model).ok
    finally:
        subprocess.run(["umount", str(disk)], check=True)
