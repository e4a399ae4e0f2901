"""Jobs done by several processes that see the same files: the ranks of a launch, or processes that
`--jobs` starts here.

Rank 0 leads. It puts the jobs of a phase into the store, longest first; every rank, itself among
them, takes the next one from a counter, does it, and puts its answer there. Nobody waits for
anybody but rank 0 for answers, and it does what a rank had taken that is gone. Rank 0 alone writes
the journal.
"""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from svdcli.engine.compute import Compute
from svdcli.engine.executor import DONE_ALONE, Local, Workers, attempted, threads_each
from svdcli.errors import SvdcliError
from svdcli.files.source import Source
from svdcli.files.workspace import SHARED
from svdcli.linalg.lapack import library
from svdcli.linalg.machine import with_threads
from svdcli.memory import ROOM
from svdcli.ranks import (
    PATIENCE,
    LostRankError,
    Place,
    Team,
    assembled,
    comes_true,
    holds,
    place_here,
)

Item = TypeVar("Item")
Answer = TypeVar("Answer")

_POLL = 0.01  # seconds between two looks into the store
_IDLE_POLL = 0.05  # of a rank that has nothing to do


@dataclass(frozen=True)
class _Answered:
    """What came of a job: its answer, or the error that it raised. trouble is what went wrong
    before it went well; memory says that there was too little of it."""

    answer: Any = None
    error: Exception | None = None
    trouble: str = ""
    memory: bool = False


@contextmanager
def crew_of(compute: Compute, asked: str) -> Iterator[Workers | Follower]:
    """The workers of a run, on the process that leads it; on every other one what has only to
    `follow`. An error of the first ends all of them, and so does a rank that was not `asked` for
    the same, or has other numbers of threads or processes."""
    place = place_here()
    device = compute.start()
    if place is not None and place.size > 1:
        asked = f"{asked} {compute} {library(threads_each(device))}"
        with ROOM.shared_by(place.local_size), assembled(place) as team:
            device = _own_device(device, place)
            # They may have been started again when all was done
            if team.ended_before():
                yield Follower(team, device)
            elif not team.leads:
                team.check_same(asked)
                yield Follower(team, device)
            else:
                with team.sharing_errors():
                    team.check_same(asked)
                    yield Crew(team, Local(device))
    elif (jobs := _processes(compute.jobs, device)) > 1:
        with _local_ranks(jobs, device) as crew, crew.team.sharing_errors():
            if jobs != compute.jobs:
                crew.told.append(f"--jobs {compute.jobs}: {jobs} processes, one for each core")
            yield crew
    else:
        yield Local(device)


def _processes(asked: int | None, device: torch.device) -> int:
    """How many processes share the jobs: as many as were asked for, but where cores compute no more
    than this process may use."""
    wanted = asked or 1
    return min(wanted, _cores()) if device.type == "cpu" else wanted


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not everywhere
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _own_device(device: torch.device, place: Place) -> torch.device:
    """The accelerator of this rank, of those of its machine."""
    if device.type != "cuda":
        return device
    return torch.device("cuda", place.local % torch.cuda.device_count())


# The rank that leads ------------------------------------------------------------------------------


class Crew:
    """The workers of all ranks, on the rank that leads them.

    processes are those that `--jobs` started, by rank: of them it is known at once when one ends.
    all_threads is how many threads this process has while they wait, 0 for as many as always.
    """

    def __init__(
        self,
        team: Team,
        local: Local,
        processes: dict[int, subprocess.Popen[bytes]] | None = None,
        all_threads: int = 0,
    ) -> None:
        self.team = team
        self.local = local
        self.processes = processes or {}
        self._all_threads = all_threads
        self.device = torch.device(local.device.type)  # every rank has a card of its own
        self.threads = local.threads
        self.ranks = team.place.size
        self.told: list[str] = []
        self._phase = 0
        self._asked = 0
        self._met = 0
        self._gone: set[int] = set()
        team.put("threads", str(self.threads).encode())

    def map_unordered(
        self,
        work: Callable[[Item], Answer],
        items: Iterable[Item],
        done: Callable[[Answer], None] | None = None,
    ) -> Iterator[Answer]:
        """Do `work` on every item and yield the answers as they come (`Workers`)."""
        # The jobs go into the store; their number, which begins the phase, comes last
        phase = _Phase(self.team, self._phase)
        self._phase += 1
        count = phase.begin(work, items)
        waiting = set(range(count))
        alone: list[int] = []  # for which memory was too little beside others
        tried_alone: set[int] = set()

        pool, threads = self.local.pool()
        here = [pool.submit(phase.take_jobs) for _ in range(threads)]
        try:
            while waiting:
                idle = all(future.done() for future in here)
                answered = phase.answered(waiting)
                for index, answer in answered:
                    if answer.memory and index not in tried_alone:
                        phase.forget(index)
                        tried_alone.add(index)
                        alone.append(index)
                        continue
                    waiting.remove(index)
                    yield self._passed_on(answer, done)
                if answered:
                    continue
                # When all is taken: what was lost, and then what needs the memory for itself
                if idle:
                    _raise_first(here)
                    left = self._left_over(phase, waiting, alone)
                    here = [] if left is None else [pool.submit(phase.do, left)]
                time.sleep(_POLL)
        finally:
            # What this process has under way ends first, and is noted
            phase.stop()
            pool.shutdown(wait=True, cancel_futures=True)
            with suppress(LostRankError):
                for _, answer in phase.answered(waiting):
                    if done is not None and answer.error is None:
                        done(answer.answer)
        # One that ended with nothing under way is told of, too
        for rank in self.processes:
            self._is_gone(rank)

    def _passed_on(self, answered: _Answered, done: Callable[[Any], None] | None) -> Any:
        """The answer, noted. Raises what the job raised."""
        if answered.trouble:
            self.told.append(answered.trouble)
        if answered.error is not None:
            raise answered.error
        if done is not None:
            done(answered.answer)
        return answered.answer

    def _left_over(self, phase: _Phase, waiting: set[int], alone: list[int]) -> int | None:
        """The next job to be done here again: one that a rank had taken which is gone; when nothing
        else is left, one that had too little memory."""
        for index in sorted(waiting.difference(alone)):
            rank = phase.taker(index)
            nobody = rank is None and phase.taken_long_ago(index)
            if nobody or (rank is not None and rank != 0 and self._is_gone(rank)):
                return index
        if alone and waiting.issubset(alone):
            self.told.append(DONE_ALONE)
            return alone.pop(0)
        return None

    def _is_gone(self, rank: int) -> bool:
        process = self.processes.get(rank)
        if process is None:
            gone = not self.team.alive(rank)
            how = "shows no sign of life"
        else:
            gone = process.poll() is not None
            how = "was killed, by the system if memory was short"
        if gone and rank not in self._gone:
            self._gone.add(rank)
            self.told.append(f"rank {rank} {how}; what it had begun was done again")
        return gone

    def check_shared(self, folder: Path | None, source: Source) -> None:
        """Raise SvdcliError where a rank does not see this folder, or another source."""
        if self.processes:
            return  # on the same machine
        # A file in the folder by which the others see that it is the same one
        self._asked += 1
        token = f"{socket.gethostname()} {uuid.uuid4().hex}"
        if folder is not None:
            (folder / SHARED).write_text(token)
        asked = _Seen(folder, token, source.opener, source.fingerprint())
        self.team.put(f"see/{self._asked}", pickle.dumps(asked))

        # Those that are gone see nothing, and are not waited for
        for rank in range(1, self.team.place.size):
            try:
                why_not = self.team.wait(f"seen/{self._asked}/{rank}", rank).decode()
            except LostRankError:
                self._is_gone(rank)
                continue
            if why_not:
                raise SvdcliError(why_not, "put both on a file system that all machines share")
        if folder is not None:
            (folder / SHARED).unlink(missing_ok=True)

    def meet(self, about: Any) -> Team | None:
        """Have the other ranks of a launch begin what they follow for, too; local processes do
        nothing but jobs (`Workers`)."""
        if self.processes:
            return None
        self.team.put(f"meet/{self._met}", pickle.dumps(about))
        self._met += 1
        return self.team

    def all_threads(self) -> AbstractContextManager[None]:
        """Surround what this process does alone: it has the threads of its local ranks
        meanwhile."""
        return with_threads(self._all_threads)

    def end(self, outcome: Any) -> None:
        """Tell all ranks what came of it, and let them end."""
        if not self.processes:
            self.team.end(outcome)


def _raise_first(futures: Sequence[Future[None]]) -> None:
    """Raise what stopped a thread that takes jobs: their own errors are answers."""
    for future in futures:
        if future.done() and future.exception() is not None:
            future.result()


# One phase ----------------------------------------------------------------------------------------


class _Phase:
    """The jobs of one phase in the store, as every rank sees them."""

    def __init__(self, team: Team, number: int) -> None:
        self.team = team
        self.name = f"phase/{number}"
        self._stopped = threading.Event()
        self._taken_since: dict[int, float] = {}

    def begin(self, work: Callable[[Item], Answer], items: Iterable[Item]) -> int:
        """Put all jobs there and return how many there are."""
        count = 0
        for item in items:
            self.team.put(f"{self.name}/job/{count}", pickle.dumps((work, item)))
            count += 1
        self.team.put(f"{self.name}/count", str(count).encode())
        return count

    def count(self) -> int | None:
        """How many jobs there are; None where the phase has not begun."""
        value = self.team.peek(f"{self.name}/count")
        return None if value is None else int(value)

    def take_jobs(self) -> None:
        """Take the next job, and do it, until there is none. Raises FollowedError where rank 0 has
        ended with an error, LostRankError where it is lost: its jobs are nobody's then."""
        count = self.count() or 0
        while not self._stopped.is_set():
            self.team.check_leader()
            index = self.team.count(f"{self.name}/next") - 1
            if index >= count:
                return
            self.team.put(f"{self.name}/taker/{index}", str(self.team.place.rank).encode())
            self.do(index)

    def do(self, index: int) -> None:
        """Do one job and put its answer there."""
        work, item = pickle.loads(self.team.peek(f"{self.name}/job/{index}") or b"")
        # What rank 0 made may show late on another machine
        late = 0.0 if self.team.leads else PATIENCE
        answer = _answer_of(work, item, late, self.team.check_leader)
        try:
            value = pickle.dumps(answer)
        except Exception:
            message = f"{type(answer.error).__name__}: {answer.error}"
            value = pickle.dumps(_Answered(error=SvdcliError(message)))
        self.team.put(f"{self.name}/answer/{index}", value)

    def answered(self, waiting: set[int]) -> list[tuple[int, _Answered]]:
        """Of those that are waited for: what has been answered."""
        found = []
        taken = self.team.count(f"{self.name}/next", 0)
        for index in sorted(waiting):
            if index >= taken:
                break
            value = self.team.peek(f"{self.name}/answer/{index}")
            if value is not None:
                found.append((index, pickle.loads(value)))
        return found

    def forget(self, index: int) -> None:
        """Remove an answer, for a job that will be done again."""
        self.team.remove(f"{self.name}/answer/{index}")

    def taker(self, index: int) -> int | None:
        """The rank that took a job; None where it did not come to say so."""
        value = self.team.peek(f"{self.name}/taker/{index}")
        return None if value is None else int(value)

    def taken_long_ago(self, index: int) -> bool:
        """Is it longer than `PATIENCE` that this was first asked."""
        now = time.monotonic()
        return now - self._taken_since.setdefault(index, now) > PATIENCE

    def stop(self) -> None:
        """Have the threads of this process take no more."""
        self._stopped.set()


def _answer_of(
    work: Callable[[Any], Any], item: Any, late: float, check: Callable[[], None]
) -> _Answered:
    try:
        answer, trouble = attempted(work, item, late=late, check=check)
    except Exception as error:
        return _Answered(error=error, memory=isinstance(error, MemoryError))
    return _Answered(answer=answer, trouble=trouble)


# The other ranks ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """What every rank must see: a folder with a file that holds this token, and the source."""

    folder: Path | None
    token: str
    opener: Callable[[], Source]
    fingerprint: str

    def why_not(self) -> str:
        """What this process does not see of it; empty where it sees all."""
        host = socket.gethostname()
        if self.folder is not None and not self._sees_token(self.folder):
            return f"{host} does not see {self.folder}, which another rank has just made"
        try:
            if self.opener().fingerprint() == self.fingerprint:
                return ""
        except (OSError, SvdcliError) as error:
            return f"{host} cannot read the source ({error})"
        return f"{host} reads another model than rank 0 under the same path"

    def _sees_token(self, folder: Path) -> bool:
        return comes_true(lambda: holds(folder / SHARED, self.token), PATIENCE)


class Follower:
    """This process, where it does not lead."""

    def __init__(self, team: Team, device: torch.device) -> None:
        self.team = team
        self.device = device

    def follow(self, meeting: Callable[[Team, Any], object] = lambda team, about: None) -> Any:
        """Do jobs until the rank that leads has ended; return what came of it. meeting is what all
        ranks do at once whenever the one that leads begins it. Raises FollowedError where that was
        an error, LostRankError where it is gone."""
        local: Local | None = None
        number, asked, met = 0, 1, 0
        while True:
            # It has ended
            ended = self.team.ended()
            if ended is not None:
                return ended[0]
            self.team.check_leader()

            # Do all machines see the same files
            see = self.team.peek(f"see/{asked}")
            if see is not None:
                why_not = pickle.loads(see).why_not()
                self.team.put(f"seen/{asked}/{self.team.place.rank}", why_not.encode())
                asked += 1

            # What all ranks do at once
            about = self.team.peek(f"meet/{met}")
            if about is not None:
                with self.team.sharing_errors():
                    meeting(self.team, pickle.loads(about))
                met += 1

            # The jobs of the next phase, if it has begun
            phase = _Phase(self.team, number)
            if phase.count() is not None:
                local = local or Local(self.device, int(self.team.wait("threads", 0)))
                _work(phase, local)
                number += 1
            else:
                time.sleep(_IDLE_POLL)


def _work(phase: _Phase, local: Local) -> None:
    """Take jobs with all threads until none is left."""
    pool, threads = local.pool()
    try:
        for future in [pool.submit(phase.take_jobs) for _ in range(threads)]:
            future.result()
    finally:
        phase.stop()
        pool.shutdown(wait=True, cancel_futures=True)


# Processes on this machine ------------------------------------------------------------------------


@contextmanager
def _local_ranks(count: int, device: torch.device) -> Iterator[Crew]:
    """Start the other processes of `--jobs`, each with its share of the threads."""
    all_threads = torch.get_num_threads()
    threads = max(1, all_threads // count)
    place = Place(rank=0, size=count, local=0, address="127.0.0.1", port=0)
    processes: dict[int, subprocess.Popen[bytes]] = {}
    stderr = None if os.environ.get("SVDCLI_DEBUG") == "1" else subprocess.DEVNULL

    def start(port: int) -> None:
        for rank in range(1, count):
            other = replace(place, rank=rank, local=rank, port=port)
            asked = json.dumps([other.rank, count, port, threads, str(device), os.getpid()])
            begin = f"from {__name__} import serve; serve({asked!r})"
            # of a session of its own: an interrupt of the terminal is for the one that leads
            processes[rank] = subprocess.Popen(
                [sys.executable, "-c", begin],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )

    def comes(rank: int) -> bool:
        return processes[rank].poll() is None

    try:
        with (
            with_threads(threads if device.type == "cpu" else 0),
            ROOM.shared_by(count),
            assembled(place, start, comes) as team,
        ):
            yield Crew(team, Local(device), processes, all_threads)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


def serve(asked: str) -> None:
    """Be one of those processes."""
    rank, size, port, threads, name, parent = json.loads(asked)
    device = torch.device(name)
    torch.set_num_threads(threads)
    place = Place(rank=rank, size=size, local=rank, address="127.0.0.1", port=port, parent=parent)
    try:
        with ROOM.shared_by(size), assembled(place) as team:
            Follower(team, _own_device(device, place)).follow()
    except SvdcliError:
        os._exit(1)  # the process that started this one tells why
