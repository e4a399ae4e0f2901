"""Jobs of several ranks: every one is done, whatever happens to those that had taken it. The ranks
are threads here, with a store of their own."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_code

from svdcli import ranks
from svdcli.engine import crew as module
from svdcli.engine import executor
from svdcli.engine.crew import Crew, Follower
from svdcli.engine.executor import Local, attempted
from svdcli.errors import SvdcliError, UsageError
from svdcli.ranks import FollowedError, LostRankError, Place, assembled

CPU = torch.device("cpu")
_tries: dict[Any, int] = {}
_taken = threading.Event()


def tries(item: Any) -> int:
    """How often this was called with the same item."""
    _tries[item] = _tries.get(item, 0) + 1
    return _tries[item]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second is long for threads of one process."""
    _tries.clear()
    _taken.clear()
    monkeypatch.setattr(ranks, "BEAT", 0.05)
    monkeypatch.setattr(ranks, "PATIENCE", 1.0)
    monkeypatch.setattr(module, "PATIENCE", 1.0)
    monkeypatch.setattr(executor, "_PAUSES", (0.01, 0.01, 0.01))


class EndsError(Exception):
    """A rank that is killed: it says nothing any more."""


class Rank:
    """A rank that follows, in a thread; what it gave back, or raised."""

    def __init__(self, place: Place, follow: Callable[[Follower], Any]) -> None:
        self.place = place
        self.follow = follow
        self.answer: Any = None
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            with assembled(self.place) as team:
                self.answer = self.follow(Follower(team, CPU))
        except Exception as error:
            self.error = error


@contextmanager
def crew_of(*follows: Callable[[Follower], Any]) -> Iterator[tuple[Crew, list[Rank]]]:
    """A crew whose other ranks follow as they are told to."""
    others: list[Rank] = []

    def start(port: int) -> None:
        for rank, follow in enumerate(follows, 1):
            others.append(Rank(Place(rank, len(follows) + 1, rank, "127.0.0.1", port), follow))

    with assembled(Place(0, len(follows) + 1, 0, "127.0.0.1", 0), start) as team:
        yield Crew(team, Local(CPU)), others
        for other in others:
            other.thread.join(20)
            assert not other.thread.is_alive()


def square(item: int) -> int:
    return item * item


def slow_square(item: int) -> int:
    time.sleep(0.01)
    return item * item


def where(item: int) -> str:
    time.sleep(0.01)
    return threading.current_thread().name


def test_every_job_is_done_once_and_by_all_ranks() -> None:
    with crew_of(Follower.follow, Follower.follow) as (crew, others):
        noted: list[int] = []
        answers = list(crew.map_unordered(slow_square, range(60), noted.append))
        assert sorted(answers) == sorted(noted) == [item * item for item in range(60)]
        names = set(crew.map_unordered(where, range(60)))
        crew.end("the outcome")
    assert len(names) >= 3  # threads of three pools
    assert [other.answer for other in others] == ["the outcome"] * 2
    assert crew.told == []


def test_an_error_of_a_job_ends_all_ranks_with_the_same_words() -> None:
    with crew_of(Follower.follow) as (crew, others):
        with pytest.raises(SvdcliError, match="no room") as raised, crew.team.sharing_errors():
            list(crew.map_unordered(partial(_fails, SvdcliError("no room", "free some")), range(9)))
        assert str(raised.value) == "no room; free some"
    assert isinstance(others[0].error, FollowedError)
    assert others[0].error.exit_code == 1


def test_jobs_of_a_rank_0_that_has_failed_are_nobodys() -> None:
    def takes_late(follower: Follower) -> None:
        while follower.team.failure_of(0) is None:
            time.sleep(0.001)
        module._Phase(follower.team, 0).take_jobs()

    with crew_of(takes_late) as (crew, others):
        module._Phase(crew.team, 0).begin(square, range(5))
        crew.team.fail(SvdcliError("no room"))
        others[0].thread.join(20)
        assert crew.team.count("phase/0/next", 0) == 0
    assert isinstance(others[0].error, FollowedError)


def test_a_file_is_not_waited_for_when_nobody_needs_it_any_more() -> None:
    def over() -> None:
        raise FollowedError("rank 0: no room")

    with pytest.raises(FollowedError):
        attempted(_read, "nowhere", late=60.0, check=over)


def test_a_full_disk_on_another_rank_is_a_full_disk_here() -> None:
    with crew_of(Follower.follow) as (crew, _):
        error = OSError(errno.ENOSPC, "no space", "out")
        with pytest.raises(OSError, match="space") as raised, crew.team.sharing_errors():
            list(crew.map_unordered(partial(_fails, error), range(3)))
        assert raised.value.errno == errno.ENOSPC


def _fails(error: Exception, item: int) -> None:
    raise error


def test_what_a_lost_rank_had_taken_is_done_again() -> None:
    def takes_and_ends(follower: Follower) -> None:
        phase = module._Phase(follower.team, 0)
        while not phase.count():
            time.sleep(0.001)
        index = follower.team.count("phase/0/next") - 1
        follower.team.put(f"phase/0/taker/{index}", b"1")
        _taken.set()
        raise EndsError

    with crew_of(takes_and_ends) as (crew, _):
        answers = sorted(crew.map_unordered(_after, range(5)))
        assert answers == [0, 1, 4, 9, 16]
        assert any("rank 1" in line and "done again" in line for line in crew.told)


def test_a_rank_that_is_lost_before_it_says_what_it_took() -> None:
    def takes_and_ends(follower: Follower) -> None:
        while not module._Phase(follower.team, 0).count():
            time.sleep(0.001)
        follower.team.count("phase/0/next")
        _taken.set()
        raise EndsError

    with crew_of(takes_and_ends) as (crew, _):
        assert sorted(crew.map_unordered(_after, range(5))) == [0, 1, 4, 9, 16]


def _after(item: int) -> int:
    _taken.wait(10)
    return item * item


def test_a_job_that_ran_out_of_memory_is_done_again_alone() -> None:
    with crew_of(Follower.follow) as (crew, _):
        assert sorted(crew.map_unordered(_needs_memory, range(6))) == list(range(6))
        assert any("memory" in line for line in crew.told)
        crew.end(None)


def test_a_job_for_which_memory_never_suffices_is_an_error() -> None:
    with (
        crew_of(Follower.follow) as (crew, _),
        pytest.raises(MemoryError),
        crew.team.sharing_errors(),
    ):
        list(crew.map_unordered(partial(_fails, MemoryError()), range(2)))


def _needs_memory(item: int) -> int:
    if item in (1, 4) and tries(item) == 1:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")
    return item


def test_an_error_of_the_disk_that_comes_once_is_told_and_passes() -> None:
    answer, trouble = attempted(_fails_once, 7)
    assert answer == 7
    assert "model.safetensors" in trouble
    with crew_of(Follower.follow) as (crew, _):
        assert sorted(crew.map_unordered(_fails_once, range(4))) == [0, 1, 2, 3]
        assert any("once" in line for line in crew.told)
        crew.end(None)
    local = Local(CPU)
    assert list(local.map_unordered(_fails_once, [99])) == [99]
    assert len(local.told) == 1


def test_an_error_of_the_disk_that_stays_is_raised() -> None:
    with pytest.raises(OSError, match="broken"):
        attempted(partial(_fails, OSError(errno.EIO, "broken")), 0)
    with pytest.raises(FileNotFoundError):
        attempted(_read, "nowhere")


def _fails_once(item: int) -> int:
    if tries(item) == 1:
        raise OSError(errno.EIO, "Input/output error", "model.safetensors")
    return item


def _read(path: str) -> str:
    return Path(path).read_text()


def test_a_file_that_another_machine_made_may_appear_late(tmp_path: Path) -> None:
    path = tmp_path / "late"
    threading.Timer(0.3, path.write_text, ["here"]).start()
    assert attempted(_read, str(path), late=5.0) == ("here", "")


class Folder:
    """A source of nothing, with a fingerprint."""

    def __init__(self, fingerprint: str) -> None:
        self._fingerprint = fingerprint

    def fingerprint(self) -> str:
        return self._fingerprint

    @property
    def opener(self) -> Callable[[], Folder]:
        return partial(Folder, self._fingerprint)


def test_ranks_that_see_the_same_files_begin(tmp_path: Path) -> None:
    source: Any = Folder("a")
    with crew_of(Follower.follow) as (crew, _):
        crew.check_shared(tmp_path, source)
        crew.check_shared(None, source)
        crew.end(None)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_another_rank_does_not_see_is_found_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module._Seen, "_sees_token", lambda *_: False)
    source: Any = Folder("a")
    with (
        crew_of(Follower.follow) as (crew, _),
        pytest.raises(SvdcliError, match=r"does not see .* share"),
        crew.team.sharing_errors(),
    ):
        crew.check_shared(tmp_path, source)


def test_a_rank_that_reads_another_model_is_found_before_work(tmp_path: Path) -> None:
    other: Any = Folder("b")
    seen = module._Seen(None, "", other.opener, "a")
    assert "another model" in seen.why_not()


def test_a_rank_whose_leader_is_gone_ends_with_one_line() -> None:
    port: list[int] = []
    other: list[Rank] = []

    def start(found: int) -> None:
        port.append(found)
        other.append(Rank(Place(1, 2, 1, "127.0.0.1", found), Follower.follow))

    with assembled(Place(0, 2, 0, "127.0.0.1", 0), start) as team:
        team._silent.set()  # no sign of life any more
        other[0].thread.join(20)
    assert isinstance(other[0].error, LostRankError)
    assert "rank 0 is gone" in str(other[0].error)


def test_a_round_begins_anew_and_keeps_what_all_rounds_share() -> None:
    with assembled(Place(0, 1, 0, "127.0.0.1", 0)) as first:
        first.put("key", b"1")
        first.end("the outcome")
        number = int(first._kept.rsplit("/", 1)[1])
        other = ranks._lead(first.place, first._all_rounds, number + 1, lambda rank: True)
        assert not other.ended_before()
        second = ranks._lead(first.place, first._all_rounds, number, lambda rank: True)
        assert second.peek("key") is None
        assert second.round == first.round + 2
        assert second.ended() is None
        assert second.ended_before()
        assert second.outcome() == "the outcome"


def test_what_is_done_is_done_where_nobody_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with assembled(Place(0, 1, 0, "127.0.0.1", 0)) as team:

        def gone(*_: Any) -> None:
            raise LostRankError("the store is gone")

        monkeypatch.setattr(team, "put", gone)
        team.end("the outcome")


def test_a_place_is_what_the_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranks.place_here() is None
    assert ranks.leads_here()
    values = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "5"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert ranks.place_here() == Place(3, 4, 0, "a", 5)
    assert not ranks.leads_here()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    assert ranks.place_here() == Place(3, 4, 0, "a", 5, parent=os.getppid())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"RANK": "abc"}, "RANK is 'abc', not a number"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x', not a number"),
        ({"RANK": "4"}, "there is no RANK 4 with WORLD_SIZE 4"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT 99999 is no port"),
        ({"MASTER_ADDR": ""}, "RANK is set, and MASTER_ADDR not"),
        (
            {"MASTER_ADDR": "", "MASTER_PORT": ""},
            "RANK is set, and MASTER_ADDR and MASTER_PORT not",
        ),
        ({"RANK": ""}, ""),
        ({"WORLD_SIZE": ""}, ""),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": ""}, ""),
    ],
)
def test_a_place_that_there_cannot_be(
    changes: dict[str, str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it keep anybody from the help."""
    values = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "5"}
    for name, value in (values | changes).items():
        monkeypatch.setenv(name, value)
    if told:
        with pytest.raises(UsageError) as raised:
            ranks.place_here()
        assert raised.value.message == told
    else:
        assert ranks.place_here() is None
    assert ranks.leads_here()


def test_a_port_that_another_process_has_is_named() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(LostRankError, match=f"127.0.0.1:{port}: another process has the port"):
            ranks._store_of(Place(0, 2, 0, "127.0.0.1", port))


def test_to_wait_long_for_others_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    with ranks._told_after(60.0, Place(0, 3, 0, "a", 5)):
        pass
    said, deadline = "", time.monotonic() + 10
    with ranks._told_after(0.0, Place(0, 3, 0, "a", 5)):
        while not said and time.monotonic() < deadline:
            said = capfd.readouterr().err
    assert said == "svdcli: rank 0 waits for the other 2 at a:5\n"


@pytest.mark.parametrize("fails", [False, True])
def test_what_all_ranks_do_at_once_is_begun_by_the_one_that_leads(fails: bool) -> None:
    met: list[Any] = []

    def meeting(team: ranks.Team, about: Any) -> None:
        met.append((team.place.rank, about))
        if fails and about == "first" and team.place.rank == 1:
            raise SvdcliError("no such text")
        team.put(f"{about}/{team.place.rank}", b"")
        while team.peek(f"{about}/over") is None:
            team.check_others()

    def follow(follower: Follower) -> Any:
        return follower.follow(meeting)

    with crew_of(follow, follow) as (crew, others), ExitStack() as stack:
        if fails:
            stack.enter_context(pytest.raises(SvdcliError, match="rank 1: no such text"))
        with crew.team.sharing_errors():
            for about in ("first", "second"):
                assert crew.meet(about) is crew.team
                while not all(crew.team.peek(f"{about}/{rank}") is not None for rank in (1, 2)):
                    crew.team.check_others()
                crew.team.put(f"{about}/over", b"")
                assert sorted(crew.map_unordered(square, range(5))) == [0, 1, 4, 9, 16]
            crew.end("done")
    answers = [other.answer for other in others]
    if fails:
        assert answers == [None, None]
        assert all(isinstance(other.error, FollowedError) for other in others)
    else:
        assert answers == ["done", "done"]
        assert sorted(met) == [(r, about) for r in (1, 2) for about in ("first", "second")]


@pytest.mark.parametrize("asked", ["the same", "something else"])
def test_ranks_that_were_asked_for_something_else_are_told_of(asked: str) -> None:
    def follow(follower: Follower) -> Any:
        follower.team.check_same(asked)
        return follower.follow()

    with crew_of(follow) as (crew, others), ExitStack() as stack:
        if asked == "something else":
            stack.enter_context(pytest.raises(UsageError, match="rank 1 was asked for something"))
        with crew.team.sharing_errors():
            crew.team.check_same("the same")
            crew.end("done")
    others[0].thread.join(20)
    if asked == "the same":
        assert others[0].answer == "done"
    else:
        assert isinstance(others[0].error, FollowedError)


def test_a_rank_ends_with_the_process_that_started_it_while_ranks_meet(tmp_path: Path) -> None:
    code = "import os, time; from svdcli import ranks\n"
    code += "with ranks._ending_with(os.getppid() + {}):\n    time.sleep({})"
    done = run_code(code.format(0, 1.5), folder=tmp_path)
    assert (done.code, done.err) == (0, "")
    done = run_code(code.format(1, 60), folder=tmp_path)
    assert (done.code, done.err) == (
        1,
        "svdcli: error: the process that started this rank is gone\n",
    )


def test_there_are_no_more_processes_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_cores", lambda: 4)
    assert [module._processes(jobs, CPU) for jobs in (None, 1, 3, 4, 99)] == [1, 1, 3, 4, 4]
    assert module._processes(8, torch.device("cuda")) == 8
