"""`OUT.partial`: the folder in which an output is written until it is complete, with a lock and a
journal. One rename publishes it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from svdcli.errors import SvdcliError
from svdcli.files.modes import set_modes
from svdcli.files.writer import sync

SUFFIX = ".partial"
MOMENTS = "moments.safetensors"
BLOCKS = "blocks"
_POLL = 0.1  # seconds between two tries to take the lock
SHARED = "shared"  # a file by which ranks see that they share the folder
# What may be in the folder of a workspace.
_OWN = frozenset(
    {"lock", "journal.jsonl", "data", "before", "replaced", "other", MOMENTS, BLOCKS, SHARED}
)


class Workspace:
    """The folder beside OUT in which a run works; holds `data/` (the files to be), `journal.jsonl`
    and `lock`.

    measured, done and healed are what earlier runs of the same command left in the journal.
    `*.moments.safetensors` is a calibration made on the way, `blocks/` holds factors that were
    healed, `other/` the unfinished work of another command until it is certain that this one is
    not refused.
    """

    def __init__(self, out: Path, *, is_file: bool) -> None:
        self.out = out
        self.is_file = is_file
        self.folder = out.with_name(out.name + SUFFIX)
        self.data = self.folder / "data"
        self.measured: dict[str, dict[str, Any]] = {}
        self.done: dict[str, dict[str, Any]] = {}
        self.healed: dict[str, dict[str, Any]] = {}
        self.ranks: list[int] = []  # with how many each run on this output was started
        self.started_over = False  # the journal was another command's
        self.before = self.folder / "before"
        self._other = self.folder / "other"
        self._noting = threading.Lock()
        self._was_there = self.folder.exists()
        self._journal = self.folder / "journal.jsonl"
        self._had_journal = self._journal.exists()

    @contextmanager
    def locked(self, patience: float = 0.0) -> Iterator[None]:
        """Hold the lock of this output. Raises SvdcliError where another run has it, and still has
        it so many seconds later. SIGKILL frees it too."""
        deadline = time.monotonic() + patience
        while (descriptor := self._lock()) is None:
            if time.monotonic() >= deadline:
                raise SvdcliError(
                    f"another svdcli run is writing {self.out}", "wait for it, or choose another -o"
                )
            time.sleep(_POLL)
        try:
            yield
        finally:
            os.close(descriptor)

    def _lock(self) -> int | None:
        """Make the folder where it is not there, and take its lock: an open descriptor, None where
        another run has it. Raises SvdcliError where the folder is not svdcli's."""
        path = self.folder / "lock"
        while True:
            self.folder.mkdir(mode=0o700, exist_ok=True)  # what is written here may be private
            self._check_folder()

            # The kernel holds the lock: it ends with the process, however that ends.
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:
                continue  # the other run has just published and removed the folder
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return None

            # Between the two the other run may have removed this file, and a third made it anew.
            if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
            os.close(descriptor)

    def _check_folder(self) -> None:
        """Raises SvdcliError where the folder holds anything that is not a workspace's."""
        for path in self.folder.iterdir():
            if path.name not in _OWN and MOMENTS not in path.name:
                raise SvdcliError(
                    f"{self.folder} holds {path.name!r}, not svdcli's",
                    "move it, or choose another -o",
                )

    @contextmanager
    def beginning(self) -> Iterator[None]:
        """Surround what comes before `resume`: the journal says that work has begun, before it is
        known what exactly it will be. An SvdcliError removes the folder, unless it was there or a
        calibration has begun in it."""
        if not self._had_journal:
            self.note({"begun": True})
        try:
            yield
        except SvdcliError:
            if not self._was_there and not self._has_calibration():
                self.remove()
            raise

    def resume(self, identity: str, *, force: bool) -> bool:
        """Read the journal of an earlier run, or start afresh where there is none or it was another
        command's.

        Returns False where an earlier run of the same command had published its output already and
        was stopped while it cleaned up; raises SvdcliError where OUT exists for any other reason,
        unless force.
        """
        # The same command may have published, and been stopped before it removed its workspace.
        lines = self._read_journal()
        same = bool(lines) and lines[0].get("identity") == identity
        if same and "publishing" in lines[-1] and self.out.exists() and not self.target.exists():
            self.remove()
            return False

        # Any other output is not to be replaced unasked.
        if self.out.exists() and not force:
            if not lines:  # nothing is lost with what is left of a workspace without a journal
                self.remove()
            raise SvdcliError(
                f"{self.out} exists", "use --force to replace it, or choose another -o"
            )

        # Go on from the same command's journal, or start over.
        if same:
            self.measured = {line["measured"]: line for line in lines if "measured" in line}
            self.done = {line["unit"]: line for line in lines if "unit" in line}
            self.healed = {line["block"]: line for line in lines if "block" in line}
            self.ranks = [line["ranks"] for line in lines if "ranks" in line]
            return True
        self.started_over = any("identity" in line for line in lines)
        if self.started_over:
            self._displace()
        for path in (self.data, self.folder / BLOCKS):
            shutil.rmtree(path, ignore_errors=True)
        self._journal.unlink(missing_ok=True)
        self.note({"identity": identity})
        return True

    def _displace(self) -> None:
        """Keep the work of another command, for `put_back`."""
        shutil.rmtree(self._other, ignore_errors=True)
        self._other.mkdir()
        for path in (self._journal, self.data, self.folder / BLOCKS):
            if path.exists():
                path.rename(self._other / path.name)

    def put_back(self) -> bool:
        """Put the other command's work in its place again, where there was any."""
        if not self._other.is_dir():
            return False
        self._clear_own()
        # the journal last: what it lists is there then
        for name in (self.data.name, BLOCKS, self._journal.name):
            if (self._other / name).exists():
                (self._other / name).rename(self.folder / name)
        shutil.rmtree(self._other)
        return True

    def drop_other(self) -> None:
        """Forget the other command's work: this one is not refused any more."""
        shutil.rmtree(self._other, ignore_errors=True)

    def started_by(self, ranks: int) -> None:
        """Note that a run begins or goes on with so many ranks."""
        self.ranks.append(ranks)
        self.note({"ranks": ranks})

    def restarts(self) -> list[str]:
        """Tell, in a line, how often ranks were started on the same output; nothing for once."""
        if len(self.ranks) < 2 or max(self.ranks) < 2:
            return []
        shown = ", then ".join(map(str, self.ranks))
        return [f"ranks were started {len(self.ranks)} times: {shown}; each went on from before"]

    def set_aside(self) -> None:
        """Keep what was written under an older layout, for `salvage`."""
        shutil.rmtree(self.before, ignore_errors=True)
        self.data.rename(self.before)

    def drop_before(self) -> None:
        """Remove what `set_aside` kept."""
        shutil.rmtree(self.before, ignore_errors=True)

    def _read_journal(self) -> list[dict[str, Any]]:
        """The journal's lines, up to the first that is not JSON."""
        try:
            raw = self._journal.read_bytes()
        except FileNotFoundError:
            return []
        # A line that a kill cut short is dropped before the next one is appended.
        if not raw.endswith(b"\n"):
            raw = raw[: raw.rfind(b"\n") + 1]
            self._journal.write_bytes(raw)
        lines = []
        for line in raw.splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
        return lines

    def note(self, line: dict[str, Any]) -> None:
        """Append one line to the journal."""
        data = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        with self._noting, self._journal.open("ab", buffering=0) as stream:
            stream.write(data)

    @property
    def target(self) -> Path:
        """What the final rename moves: the folder of a directory output, the only file of a file
        output."""
        return self.data / self.out.name if self.is_file else self.data

    def publish(self, modes: Mapping[str, int]) -> None:
        """Move the finished output to its place in one rename, replacing what was there, and remove
        the workspace.

        modes are the permissions of its files and folders, by their names in it; "" is the output
        itself.
        """
        set_modes(self.target, modes)
        self.note({"publishing": True})
        # A rename replaces a file, but no folder that is not empty.
        replaced = self.folder / "replaced"
        if self.out.is_dir():
            shutil.rmtree(replaced, ignore_errors=True)
            self.out.rename(replaced)
        os.replace(self.target, self.out)
        if self.out.is_dir() and "" in modes:
            self.out.chmod(modes[""])
        _sync_folder(self.out.parent)
        self.remove()

    def remove(self) -> None:
        """Remove the folder, the journal last: after a kill on the way it is there to be read."""
        self._clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def give_up(self) -> bool:
        """Remove the folder, or all in it but a calibration, which takes long to make again, and
        the unfinished work of another command. True where a calibration stays."""
        other = self.put_back()
        if not self._has_calibration():
            if not other:
                self.remove()
            return False
        if not other:
            self._clear()
        return True

    def _has_calibration(self) -> bool:
        """Is there a calibration, or parts of one (`calibration.together`)."""
        names = [path.name for path in self.folder.iterdir()]
        return any(name.endswith(f".{MOMENTS}") or f".{MOMENTS}.parts-" in name for name in names)

    def _clear(self) -> None:
        self.drop_other()
        self._clear_own()

    def _clear_own(self) -> None:
        for path in (self.data, self.before, self.folder / "replaced", self.folder / BLOCKS):
            shutil.rmtree(path, ignore_errors=True)
        self._journal.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)
