"""What the benchmarks share: child processes and what they cost, a folder to build in, one Markdown
table.

Nothing here imports torch: the kernel counts a child's peak memory from its parent's on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MAX_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


@dataclass(frozen=True)
class Run:
    """One child process: wall clock, peak resident memory, what it printed, and how many cores
    others kept busy meanwhile."""

    seconds: float
    peak: int
    output: str
    others: float

    @property
    def json(self) -> Any:
        return json.loads(self.output)


def run(command: Sequence[object]) -> Run:
    """Run a command to its end; its own wall clock and peak memory, as the kernel counted it."""
    with tempfile.TemporaryFile() as printed:
        begin, busy = time.perf_counter(), busy_seconds()
        process = subprocess.Popen(
            [str(part) for part in command], stdout=printed, stdin=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        others = max(0.0, busy_seconds() - busy - usage.ru_utime - usage.ru_stime) / seconds
        process.returncode = os.waitstatus_to_exitcode(status)
        printed.seek(0)
        output = printed.read().decode()
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))} ended with {process.returncode}")
    return Run(seconds, usage.ru_maxrss * MAX_RSS_UNIT, output, others)


def busy_seconds() -> float:
    """CPU time that all processes of this machine have used, where Linux counts it; else 0."""
    with suppress(OSError), Path("/proc/stat").open() as stat:
        ticks = [int(value) for value in stat.readline().split()[1:]]
        return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf(
            "SC_CLK_TCK"
        )  # all but idle and waiting for the disk
    return 0.0


def python(*arguments: object) -> Run:
    return run([sys.executable, *arguments])


def svdcli(*arguments: object) -> Run:
    """The installed command of this environment."""
    command = Path(sys.executable).with_name("svdcli")
    return run([command, *arguments]) if command.exists() else python("-m", "svdcli", *arguments)


def say(text: str) -> None:
    print(f"... {text}", file=sys.stderr, flush=True)


@contextmanager
def building_in(folder: Path | None) -> Iterator[Path]:
    """That folder, which stays; without one a temporary folder, which goes."""
    place = folder or Path(tempfile.mkdtemp(prefix="svdcli-benchmark-"))
    place.mkdir(parents=True, exist_ok=True)
    try:
        yield place
    finally:
        if folder is None:
            shutil.rmtree(place, ignore_errors=True)


def built(folder: Path, shape: str) -> Path:
    """The model of that shape (llama.py) in that folder, built where it is not there yet."""
    path = folder / shape
    if not path.is_dir():
        say(f"building {shape}")
        python(HERE / "llama.py", path, shape)
    return path


def compressed(model: Path, out: Path, *how: object) -> Path:
    """What `svdcli compress` makes of a model, where it is not there yet."""
    if not out.is_dir():
        say(f"svdcli compress {model.name} {' '.join(map(str, how))}")
        svdcli("compress", model, "-o", out, *how, "-q")
    return out


def mega(count: float) -> str:
    return f"{count / 1e6:.0f} MB"


def verdict(holds: bool | None) -> str:
    """The last cell of a line: whether the measured value keeps its bound; None where there is
    none."""
    return {True: "yes", False: "NO", None: ""}[holds]


def table(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table with its columns lined up; the first line is the head."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [
        " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    ]
    return "\n".join(
        f"| {line} |"
        for line in (padded[0], " | ".join("-" * width for width in widths), *padded[1:])
    )


def machine() -> dict[str, Any]:
    """What the figures depend on, besides the code."""
    about: dict[str, Any] = {
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
    }
    for name in ("torch", "transformers", "safetensors", "svdcli"):
        with suppress(PackageNotFoundError):
            about[name] = version(name)
    return about


def processor() -> str:
    """The name of the processor, where Linux tells it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def circumstances(others: float) -> str:
    """The words before a table: where it was measured, and what else ran there."""
    about = machine()
    libraries = ", ".join(
        f"{name} {about[name]}" for name in ("torch", "transformers") if name in about
    )
    return (
        f"{about['cores']} cores, {libraries}; other processes kept up to {others:.1f} "
        f"cores busy meanwhile"
    )


def parser(description: str | None) -> argparse.ArgumentParser:
    """With the options that every benchmark has."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--folder",
        type=Path,
        help="build here, or use what is here already, and leave it; else in a temporary one",
    )
    made.add_argument("--json", type=Path, help="write what was measured to this file")
    return made


def write_json(path: Path | None, found: Any) -> None:
    if path is not None:
        path.write_text(json.dumps(found, indent=2) + "\n")
