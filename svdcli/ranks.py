"""The processes that torchrun, or another launcher, started together for one command.

Each of them is a rank, with the same arguments. Rank 0 leads: it decides, keeps the journal and
publishes. They meet at a store of small values (`torch.distributed.TCPStore`), which the elastic
agent keeps, and which outlives a restart of the ranks. Nothing here waits in a collective, so that
a rank that dies holds up nobody.
"""

from __future__ import annotations

import itertools
import json
import os
import pickle
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdcli.errors import FAILED, INTERRUPTED, SvdcliError, UsageError

if TYPE_CHECKING:
    from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

# Seconds; by the clock that never jumps.
BEAT = 1.0  # between two signs of life
PATIENCE = 30.0  # without a sign of life, until a rank counts as lost
TO_TELL = 10.0  # for rank 0 to tell an error of another, or for others to hear the end
TO_HEAR = 3.0  # for others to hear why rank 0 ends, where its store ends with it
TO_ASSEMBLE = 300.0  # for all ranks to start, import torch and meet
TO_WONDER = 15.0  # of waiting for that, until it is told
_POLL = 0.02

RUN_AGAIN = "run the same command again: what is whole is not done again"

# Who started this process, before that can be gone
_PARENT = os.getppid()

# How often this process has met others: a program may do several things one after the other
_meetings = itertools.count()
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class LostRankError(SvdcliError):
    """A rank that was waited for shows no sign of life, or the store is gone."""


class OtherRankError(SvdcliError):
    """What ended another rank, on rank 0, which tells it."""


class FollowedError(SvdcliError):
    """What ended rank 0, on another rank. Rank 0 has told it already."""

    def __init__(self, message: str, exit_code: int = FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Place:
    """Which rank this process is: `rank` of `size`, the `local`-th of `local_size` on its
    machine. address and port are the store's, which an elastic agent keeps, or else rank 0. parent
    is the process that started this one and outlives it, an agent or the one that leads; 0 where
    that may end before, as a shell does."""

    rank: int
    size: int
    local: int
    address: str
    port: int
    agents_store: bool = False
    local_size: int = 1
    parent: int = 0

    @property
    def leads(self) -> bool:
        """Does this rank decide and publish."""
        return self.rank == 0


def place_here() -> Place | None:
    """The place that a launcher gave to this process; None where it was started alone. Raises
    UsageError for one that there cannot be."""
    environment = os.environ
    missing = [name for name in _NEEDED if not environment.get(name)]
    if missing and ("RANK" in missing or environment.get("WORLD_SIZE", "") in ("", "1")):
        return None
    hint = f"start ranks with torchrun, or set {', '.join(_NEEDED)}; unset RANK for one process"
    if missing:
        raise UsageError(f"RANK is set, and {' and '.join(missing)} not", hint)
    place = Place(
        rank=_number("RANK"),
        size=_number("WORLD_SIZE"),
        local=_number("LOCAL_RANK", "0"),
        address=environment["MASTER_ADDR"],
        port=_number("MASTER_PORT"),
        agents_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        local_size=_number("LOCAL_WORLD_SIZE", "1"),
        parent=_PARENT if "TORCHELASTIC_RUN_ID" in environment else 0,
    )
    if not 0 <= place.rank < place.size:
        raise UsageError(f"there is no RANK {place.rank} with WORLD_SIZE {place.size}", hint)
    if not 0 < place.port < 65536:
        raise UsageError(f"MASTER_PORT {place.port} is no port", hint)
    return place


def _number(name: str, default: str = "") -> int:
    """A number that the launcher set."""
    value = os.environ.get(name, default)
    try:
        return int(value)
    except ValueError:
        hint = "the launcher sets it; unset RANK for one process"
        raise UsageError(f"{name} is {value!r}, not a number", hint) from None


def leads_here() -> bool:
    """Does this process speak for all: it was started alone, or is rank 0, or has no place that
    there can be."""
    try:
        place = place_here()
    except UsageError:
        return True
    return place is None or place.leads


class Team:
    """The ranks of one round, between two restarts; what they put into the store is of this round.
    number counts what this process did with others before.

    store is torch's own, for what wants one. Raises LostRankError where it is gone.
    """

    def __init__(self, place: Place, store: Store, round_: int, number: int = 0) -> None:
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]

        self.place = place
        self.round = round_
        self.store = PrefixStore(f"svdcli/round/{round_}", store)
        self._all_rounds = store
        # The same for what the ranks do first, second, … after a restart as before it
        self._kept = f"svdcli/outcome/{number}"
        self._seen: dict[int, tuple[int, float]] = {}
        self._silent = threading.Event()

    @property
    def leads(self) -> bool:
        """Is this rank 0."""
        return self.place.leads

    # Small values

    def put(self, key: str, value: bytes) -> None:
        """Put a value where every rank can peek at it."""
        with _one_line():
            self.store.set(key, value)  # type: ignore[arg-type]  # bytes as they are

    def peek(self, key: str) -> bytes | None:
        """The value under this key, None where nobody has put one yet. Never waits."""
        with _one_line():
            return bytes(self.store.get(key)) if self.store.check([key]) else None

    def count(self, key: str, step: int = 1) -> int:
        """Add to a number that starts from 0, and return it: no two ranks get the same."""
        with _one_line():
            return int(self.store.add(key, step))

    def remove(self, key: str) -> None:
        """Remove a value, if it is there."""
        with _one_line():
            self.store.delete_key(key)

    def wait(self, key: str, rank: int) -> bytes:
        """The value that this rank will put. Raises LostRankError where that rank is lost."""
        while True:
            value = self.peek(key)
            if value is not None:
                return value
            self.check_alive(rank)
            time.sleep(_POLL)

    def check_same(self, asked: str) -> None:
        """Wait until rank 0 has seen that every rank was asked for the same; those that are lost
        cannot tell. Raises UsageError there for the first that was not, FollowedError elsewhere."""
        self.put(f"asked/{self.place.rank}", asked.encode())
        if not self.leads:
            while self.peek("asked for the same") is None:
                self.check_leader()
                time.sleep(_POLL)
            return
        for rank in range(1, self.place.size):
            with suppress(LostRankError):
                if self.wait(f"asked/{rank}", rank).decode() != asked:
                    raise UsageError(
                        f"rank {rank} was asked for something else than rank 0, sees another model "
                        "or text, or has another SciPy",
                        "start all ranks with the same command, on a file system that they share",
                    )
        self.put("asked for the same", b"1")

    # Signs of life

    def check_alive(self, rank: int) -> None:
        """Raise LostRankError where that rank has shown no sign of life for `PATIENCE` seconds."""
        if not self.alive(rank):
            raise LostRankError(f"rank {rank} is gone", RUN_AGAIN)

    def alive(self, rank: int) -> bool:
        """Has that rank shown a sign of life in the last `PATIENCE` seconds that this one watched
        it."""
        beats, now = self.count(f"beats/{rank}", 0), time.monotonic()
        before, since = self._seen.get(rank, (-1, now))
        if beats != before:
            before, since = beats, now
        self._seen[rank] = (before, since)
        return now - since < PATIENCE

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Show signs of life from a thread of its own."""
        thread = threading.Thread(target=self._beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._silent.set()
            thread.join()

    def _beat(self) -> None:
        while not self._silent.wait(BEAT):
            try:
                self.count(f"beats/{self.place.rank}")
            except SvdcliError:
                return  # the thread that works will meet it, too

    # How it ends

    @contextmanager
    def sharing_errors(self) -> Iterator[None]:
        """Have an error here end all ranks: rank 0 raises it; every other one tells it to rank 0,
        and raises FollowedError."""
        try:
            yield
        except (LostRankError, FollowedError, OtherRankError):
            raise
        except BaseException as error:
            self.fail(error)
            if self.leads and isinstance(error, Exception):
                self._await_hearers(TO_HEAR)
            if self.leads or not isinstance(error, Exception):
                raise
            # Rank 0 gets a while, before this process ends and the launcher ends them all
            self._await_for("told", TO_TELL)
            raise FollowedError(str(error), _code_of(error)) from error

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks why this one ends, as far as the store is still there."""
        message = str(error)
        if not isinstance(error, Exception):
            message = f"interrupted; {RUN_AGAIN}"
        elif not isinstance(error, SvdcliError):
            message = f"{type(error).__name__}: {error}".removesuffix(": ")
        told = [message, _code_of(error)]
        with suppress(LostRankError):
            self.put(f"failed/{self.place.rank}", json.dumps(told).encode())

    def failure_of(self, rank: int) -> SvdcliError | None:
        """Why that rank has ended, as far as it could tell, None for one that has not: a
        FollowedError where rank 0 tells people."""
        value = self.peek(f"failed/{rank}")
        if value is None:
            return None
        message, code = json.loads(value)
        message = f"rank {rank}: {message}"
        if not self.leads:
            if rank == 0:
                self.count("heard")
            return FollowedError(message, code)
        self.put("told", b"1")
        error = OtherRankError(message)
        error.exit_code = code
        return error

    def check_others(self) -> None:
        """Raise why another rank has ended, where one has."""
        for rank in range(self.place.size):
            failure = None if rank == self.place.rank else self.failure_of(rank)
            if failure is not None:
                raise failure

    def check_leader(self) -> None:
        """Raise FollowedError where rank 0 has ended with an error, LostRankError where it is lost;
        nothing on rank 0 itself."""
        if self.leads:
            return
        failure = self.failure_of(0)
        if failure is not None:
            raise failure
        self.check_alive(0)

    def end(self, outcome: Any) -> None:
        """Tell all ranks, from rank 0, what came of it: any value that pickles. Those that start
        once more find it, too."""
        value = pickle.dumps(outcome)
        # Where the store is gone, nobody can be told, and the work is done all the same
        with suppress(LostRankError):
            self.put("outcome", value)
            with _one_line():
                self._all_rounds.set(self._kept, value)  # type: ignore[arg-type]
            self._await_count("have it", TO_TELL)

    def ended(self) -> tuple[Any] | None:
        """What came of it, alone in a tuple, once rank 0 has said so."""
        value = self.peek("outcome")
        if value is None:
            return None
        self.count("have it")
        return (pickle.loads(value),)

    def outcome(self) -> Any:
        """What rank 0 says came of it. Raises FollowedError where that is an error of any rank,
        LostRankError where rank 0 or the store is lost."""
        try:
            while (ended := self.ended()) is None:
                self.check_others()
                self.check_alive(0)
                time.sleep(_POLL)
        except LostRankError as error:
            # It may have written all, and could not say so
            hint = f"see whether the output is there; if not, {RUN_AGAIN}"
            raise LostRankError(error.message, hint) from error
        return ended[0]

    def ended_before(self) -> bool:
        """Has an earlier round come to its end, so that nothing is left to be done: its outcome is
        told again."""
        with _one_line():
            if not self._all_rounds.check([self._kept]):
                return False
            if self.leads:
                self.put("outcome", bytes(self._all_rounds.get(self._kept)))
        return True

    def _await_hearers(self, seconds: float) -> None:
        """Let the others hear why this rank ends. Processes that it started itself, to which it
        gives a port that it finds, need not: it ends them."""
        if self.place.port:
            with suppress(LostRankError):
                self._await_count("heard", seconds)

    def _await_count(self, key: str, seconds: float) -> None:
        """Wait a while until every other rank has counted: a store of this process ends with it."""
        deadline = time.monotonic() + (0 if self.place.agents_store else seconds)
        while self.count(key, 0) < self.place.size - 1 and time.monotonic() < deadline:
            time.sleep(_POLL)

    def _await_for(self, key: str, seconds: float) -> None:
        """Wait a while until a key has a value."""
        deadline = time.monotonic() + seconds
        with suppress(LostRankError):
            while self.peek(key) is None and time.monotonic() < deadline:
                time.sleep(_POLL)


def holds(path: Path, text: str) -> bool:
    """Does a file that another rank has written hold this text."""
    try:
        return path.read_text() == text
    except OSError:
        return False


def comes_true(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait for it, so long at most: file systems on a network show late what others write."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL)
    return True


@contextmanager
def assembled(
    place: Place,
    started: Callable[[int], None] = lambda port: None,
    comes: Callable[[int], bool] = lambda rank: True,
) -> Iterator[Team]:
    """All ranks of a round, once each has met rank 0.

    started is told the port of the store, which is found where the place has 0; comes tells whether
    a rank may still come: rank 0 begins without one that does not. Raises LostRankError where one
    that may does not.
    """
    with _one_line(), _ending_with(place.parent), _told_after(TO_WONDER, place):
        store = _store_of(place)
        started(store.port)
        number = next(_meetings)
        leads = place.leads
        team = _lead(place, store, number, comes) if leads else _follow(place, store, number)
    with team.beating():
        yield team


@contextmanager
def _ending_with(parent: int) -> Iterator[None]:
    """End this process when its parent does: nobody would come to a meeting that it called, and
    torch goes on looking for its store for minutes."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(BEAT):
            if os.getppid() != parent:
                os.write(2, b"svdcli: error: the process that started this rank is gone\n")
                os._exit(FAILED)

    if parent:
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()


@contextmanager
def _told_after(seconds: float, place: Place) -> Iterator[None]:
    """Tell that this process waits for others, where it does so for long."""
    others = f"the other {place.size - 1}" if place.leads else "rank 0"
    line = f"rank {place.rank} waits for {others} at {place.address}:{place.port}"
    waiting = threading.Timer(seconds, os.write, (2, f"svdcli: {line}\n".encode()))
    waiting.daemon = True
    waiting.start()
    try:
        yield
    finally:
        waiting.cancel()


def _store_of(place: Place) -> TCPStore:
    from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

    # Where no agent keeps a store, rank 0 does
    keeps_it = place.leads and not place.agents_store
    patience = timedelta(seconds=TO_ASSEMBLE)
    try:
        return TCPStore(place.address, place.port, None, keeps_it, patience, wait_for_workers=False)
    except DistError as error:
        where = f"{place.address}:{place.port}"
        if keeps_it:
            raise LostRankError(
                f"rank 0 cannot keep the store of ranks at {where}: another process has the port, "
                "or it is no address of this machine",
                "set another MASTER_PORT, or MASTER_ADDR, for all ranks",
            ) from error
        raise LostRankError(
            f"there is no store of ranks at {where}",
            "see what the process says that keeps it: rank 0, or the agent",
        ) from error


def _lead(place: Place, store: Store, number: int, comes: Callable[[int], bool]) -> Team:
    """Begin a round and welcome every other rank to it."""
    team = Team(place, store, int(store.add("svdcli/rounds", 1)), number)
    missing = set(range(1, place.size))
    deadline = time.monotonic() + TO_ASSEMBLE
    while missing:
        for rank in sorted(missing):
            token = team.peek(f"here/{rank}")
            if token is not None:
                team.put(f"welcome/{rank}", token)
            if token is not None or not comes(rank):
                missing.remove(rank)
        if missing and time.monotonic() > deadline:
            shown = ", ".join(map(str, sorted(missing)[:3]))
            raise LostRankError(f"rank {shown} did not come", "see what its own process says")
        time.sleep(_POLL)
    return team


def _follow(place: Place, store: Store, number: int) -> Team:
    """Wait for a round whose rank 0 answers: the newest may be one that is over."""
    token = f"{socket.gethostname()} {uuid.uuid4().hex}".encode()
    deadline = time.monotonic() + TO_ASSEMBLE
    team: Team | None = None
    while time.monotonic() < deadline:
        newest = int(store.add("svdcli/rounds", 0))
        if newest and (team is None or newest > team.round):
            team = Team(place, store, newest, number)
            team.put(f"here/{place.rank}", token)
        if team is not None and team.peek(f"welcome/{place.rank}") == token:
            return team
        time.sleep(_POLL)
    raise LostRankError("rank 0 did not come", "see what its own process says")


def _code_of(error: BaseException) -> int:
    code = FAILED if isinstance(error, Exception) else INTERRUPTED
    return int(getattr(error, "exit_code", code))


@contextmanager
def _one_line() -> Iterator[None]:
    """What torch says of a store that is gone, in one line."""
    from torch.distributed import DistError

    try:
        yield
    except DistError as error:
        raise LostRankError(
            "the store at which the ranks meet is gone, with the agent that kept it",
            RUN_AGAIN,
        ) from error
