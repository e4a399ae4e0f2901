"""Elastic agents on this machine, as torchrun starts them, and the ranks that they start. Their
rendezvous is at a store of the test's own, so that any of them may be killed. And ranks without an
agent: nobody else ends one when another is gone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from helpers import Forked
from torch.distributed import TCPStore  # type: ignore[attr-defined]

_CONFIG = (
    "is_host=0,join_timeout=60,last_call_timeout=8,keep_alive_interval=1,keep_alive_max_attempt=10"
)
COMMAND = "from svdcli.__main__ import main; main()"


class Agent:
    """One agent with one rank, of a run of at most `nodes`, which is this program of torchrun's."""

    def __init__(self, port: int, program: Sequence[object], nodes: str, log: Path) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", nodes]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
        command += ["--rdzv-id", "run", "--rdzv-conf", _CONFIG, "--max-restarts", "2"]
        self.log = log
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                [*command, *map(str, program)],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    def ranks(self) -> dict[int, int]:
        """The processes of its ranks, by rank."""
        ranks = {}
        for process, environment in _children_of(self.process.pid):
            if b"RANK" in environment:
                ranks[int(environment[b"RANK"])] = process
        return ranks

    def kill(self) -> None:
        """Kill it and its ranks, as a machine that goes down does."""
        for process in [*self.ranks().values(), self.process.pid]:
            os.kill(process, signal.SIGKILL)

    def said(self) -> str:
        """All that was printed there, in one line."""
        return " ".join(self.log.read_text(errors="replace").split())


def _children_of(parent: int) -> Iterator[tuple[int, dict[bytes, bytes]]]:
    """Yield (process, its environment) of every child of a process."""
    for folder in Path("/proc").iterdir():
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            if int(fields[1]) == parent:
                values = (folder / "environ").read_bytes().split(b"\0")
                yield int(folder.name), dict(v.split(b"=", 1) for v in values if b"=" in v)
        except (OSError, IndexError, ValueError):
            continue  # no process, or no more


@contextmanager
def two_agents(program: Sequence[object], logs: Path) -> Iterator[tuple[Agent, Agent]]:
    """Two agents that run the same program; (the one of rank 0, the other), once both have theirs.
    Nothing of them is left afterwards."""
    store = _store()
    agents = [Agent(store.port, program, "1:2", logs / f"agent-{i}.log") for i in (0, 1)]
    try:
        until(lambda: all(agent.ranks() for agent in agents), "both agents have ranks")
        first, second = agents if 0 in agents[0].ranks() else agents[::-1]
        yield first, second
    finally:
        for agent in agents:
            for process in [*agent.ranks().values(), agent.process.pid]:
                if agent.process.poll() is None or process != agent.process.pid:
                    os.kill(process, signal.SIGKILL)
            agent.process.wait()


@contextmanager
def ranks_alone(
    code: str, lines: Sequence[Sequence[object]], folder: Path, *, with_store: bool = False
) -> Iterator[list[Forked]]:
    """A rank for each of these lines of arguments, which runs `code` without an agent; with_store
    keeps a store for them, as an agent does. Nothing of them is left afterwards."""
    store = _store() if with_store else None
    together = {"WORLD_SIZE": str(len(lines)), "MASTER_ADDR": "127.0.0.1"}
    together["MASTER_PORT"] = str(store.port if store else free_port())
    together["TORCHELASTIC_USE_AGENT_STORE"] = str(with_store)
    ranks: list[Forked] = []
    try:
        for rank, line in enumerate(lines):
            place = together | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(Forked(code, map(str, line), folder, place))
        yield ranks
    finally:
        for each in ranks:
            each.end(0)


def _store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), wait_for_workers=False)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def until(holds: Callable[[], bool], what: str, seconds: float = 60) -> None:
    """Wait until it holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.01)
