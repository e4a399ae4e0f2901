"""What the ranks of a calibration tell each other, each rank a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from agents import free_port

from svdcli.calibration import together as module
from svdcli.calibration.together import Together
from svdcli.errors import SvdcliError
from svdcli.ranks import LostRankError, Place, assembled


@pytest.fixture(autouse=True)
def _short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TO_SEE_A_FILE", 0.3)
    monkeypatch.setattr("svdcli.ranks.PATIENCE", 1.0)
    monkeypatch.setattr("svdcli.ranks.BEAT", 0.1)


def on_ranks(*works: Callable[[Together], Any], out: Path) -> list[Any]:
    """What each rank returns, or the error that ended it."""
    port, found = free_port(), [None] * len(works)

    def body(rank: int) -> None:
        place = Place(rank, len(works), rank, "127.0.0.1", port)
        try:
            with assembled(place) as team:
                together = Together(team, out)
                with team.sharing_errors():
                    found[rank] = works[rank](together)
        except BaseException as error:
            found[rank] = error

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return found


def test_rank_0_decides_for_all(tmp_path: Path) -> None:
    def work(together: Together) -> str:
        value = together.agree("number", lambda: f"of rank {together.team.place.rank}")
        if together.team.leads:
            together.team.end("done")
            return value
        return f"{value}, {together.team.outcome()}"

    found = on_ranks(work, work, work, out=tmp_path / "c.safetensors")
    assert found == ["of rank 0", "of rank 0, done", "of rank 0, done"]


@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_an_error_on_one_rank_is_raised_on_all(culprit: int, tmp_path: Path) -> None:
    def work(together: Together) -> None:
        rank = together.team.place.rank
        if rank == culprit:
            raise SvdcliError("the text is bad", "give another")
        if together.team.leads:
            together.hear(f"part/{culprit}", culprit)
        together.team.outcome()

    found = on_ranks(work, work, work, out=tmp_path / "c.safetensors")
    assert all(isinstance(error, SvdcliError) for error in found)
    own = "the text is bad; give another"
    assert [str(error) for error in found] == [
        own if rank == culprit else f"rank {culprit}: {own}" for rank in range(3)
    ]


def test_work_under_way_notices_errors_of_others(tmp_path: Path) -> None:
    told: list[float] = []

    def leads(together: Together) -> None:
        progress = together.checking(lambda phase, name, done, total: told.append(done))
        progress("calibrate", "a", 0.5, 1)
        together.tell("go", "")
        while True:
            progress("calibrate", "b", 1, 1)

    def fails(together: Together) -> None:
        progress = together.checking(lambda phase, name, done, total: told.append(-1))
        progress("calibrate", "a", 0.5, 1)
        together.hear("go", 0)
        raise ValueError("not foreseen")

    found = on_ranks(leads, fails, out=tmp_path / "c.safetensors")
    assert str(found[0]) == "rank 1: ValueError: not foreseen"
    assert 0.5 in told
    assert -1 not in told


def test_a_folder_that_a_rank_does_not_see_is_an_error(tmp_path: Path) -> None:
    """As on a machine with a disk of its own, even where a folder of that name is there."""
    (tmp_path / "elsewhere").mkdir()

    def work(together: Together) -> None:
        if not together.team.leads:
            together.out = tmp_path / "elsewhere" / "c.safetensors"
            (tmp_path / "elsewhere" / ".c.safetensors.parts-abc").mkdir()
            (tmp_path / "elsewhere" / ".c.safetensors.parts-abc" / "token").write_text("old")
        together.folder("abc")
        together.team.outcome()

    for error in on_ranks(work, work, out=tmp_path / "c.safetensors"):
        assert "this machine does not see" in str(error)
        assert "write to a file system that all machines share" in str(error)


def test_a_file_that_does_not_appear_is_an_error(tmp_path: Path) -> None:
    def work(together: Together) -> None:
        if together.team.leads:
            together.wait_for(tmp_path / "1.safetensors", "part/1", 1)
        together.tell("part/1", "")
        together.team.outcome()

    found = on_ranks(work, work, out=tmp_path / "c.safetensors")
    assert "rank 1 wrote" in str(found[0])


def test_a_rank_that_is_gone_is_an_error(tmp_path: Path) -> None:
    def leads(together: Together) -> None:
        together.hear("part/1", 1)

    found = on_ranks(leads, lambda together: "gone", out=tmp_path / "c.safetensors")
    assert isinstance(found[0], LostRankError)


def test_what_other_commands_left_is_removed_at_the_end(tmp_path: Path) -> None:
    for name in (".c.safetensors.parts-old", ".other.safetensors.parts-new", "c.safetensors.parts"):
        (tmp_path / name).mkdir()

    def work(together: Together) -> list[str]:
        folder = together.folder("abc")
        names = sorted(path.name for path in tmp_path.iterdir())
        assert (folder / "token").exists()
        together.clean_up()
        return names

    (names,) = on_ranks(work, out=tmp_path / "c.safetensors")
    assert len(names) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".other.safetensors.parts-new",
        "c.safetensors.parts",
    ]


@pytest.mark.parametrize("whole", [False, True])
def test_after_an_error_a_folder_stays_where_there_is_a_part_to_continue_with(
    whole: bool, tmp_path: Path
) -> None:
    def work(together: Together) -> None:
        with together.clean_where_nothing_is_whole():
            folder = together.folder("0123")
            if whole:
                (folder / "1.safetensors").touch()
            raise SvdcliError("no more", "sorry")

    on_ranks(work, out=tmp_path / "c.safetensors")
    assert len(list(tmp_path.iterdir())) == whole
