"""Stop a run at any file operation, then run it again. Used by test_nothing_lost.py in a process of
its own.

A task a line comes on standard input, as JSON with arguments, out, points and signal; the answer
goes to standard output: the operations of an unbroken run, how many of them were tried, and what
went wrong. The parent imports everything once and never computes, so that forked children start
instantly and may use threads. An audit hook counts every file operation on the output's side; at
the chosen one the child gets a signal.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

# imported before the fork
import svdcli.engine.job
import svdcli.render.bars
import svdcli.render.tables
import svdcli.verbs.compress
import svdcli.verbs.expand  # noqa: F401
from svdcli.cli import commands

_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "os.truncate"}


def run(
    arguments: list[str],
    out: Path,
    *,
    stop_at: int | None = None,
    kind: int = signal.SIGKILL,
    counter: int = -1,
) -> int:
    """Fork, run the command line, and return the exit code (negative signal number where a signal
    ended it).

    counter is a pipe's end that gets one byte for every file operation.
    """
    child = os.fork()
    if child == 0:
        _become(arguments, out, stop_at, kind, counter)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def _become(arguments: list[str], out: Path, stop_at: int | None, kind: int, counter: int) -> None:
    seen, near = 0, str(out.parent / out.name)

    def hook(event: str, values: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in _EVENTS or not any(
            str(value).startswith(near) for value in values if isinstance(value, (str, os.PathLike))
        ):
            return
        seen += 1
        if counter >= 0:
            os.write(counter, b".")
        if seen == stop_at:
            os.kill(os.getpid(), kind)

    sys.addaudithook(hook)
    sys.argv = ["svdcli", *arguments]
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        commands.main()
    except SystemExit as end:
        os._exit(int(end.code or 0))
    finally:
        os._exit(99)


def count(arguments: list[str], out: Path) -> int:
    """File operations of an unbroken run."""
    reader, writer = os.pipe()
    run(arguments, out, counter=writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        return len(stream.read())


def snapshot(path: Path) -> dict[str, bytes] | None:
    if not path.exists():
        return None
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path.parent)): file.read_bytes() for file in files}


def differing(expected: dict[str, bytes] | None, actual: dict[str, bytes] | None) -> str:
    """Which files, and which tensors and metadata in them, are not the same."""
    if expected is None or actual is None:
        return f"expected {expected and sorted(expected)}, there is {actual and sorted(actual)}"
    differences = []
    for name in sorted(expected.keys() | actual.keys()):
        one, other = expected.get(name), actual.get(name)
        if one == other:
            continue
        if one is None or other is None:
            differences.append(f"{name} is in one of them only")
        elif not name.endswith(".safetensors"):
            differences.append(f"{name} differs")
        else:
            first, second = _entries(one), _entries(other)
            for key in sorted(first.keys() | second.keys()):
                if first.get(key) != second.get(key):
                    differences.append(f"{name}: {key}: {_apart(first.get(key), second.get(key))}")
    return "; ".join(differences)


def _entries(file: bytes) -> dict[str, tuple[str, bytes]]:
    """(what its header says, the bytes) of each tensor of a safetensors file, by name."""
    length = int.from_bytes(file[:8], "little")
    if not length:
        return {"header": ("", b"")}
    header = json.loads(file[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    entries = {f"metadata {key}": ("", value.encode()) for key, value in metadata.items()}
    for name, info in header.items():
        start, end = (8 + length + offset for offset in info["data_offsets"])
        entries[name] = (json.dumps(info), file[start:end])
    return entries


def _apart(one: tuple[str, bytes] | None, other: tuple[str, bytes] | None) -> str:
    """In what two entries of the same name differ."""
    if one is None or other is None:
        return "in one of them only"
    if one[0] != other[0]:
        return f"{one[0]} and {other[0]}"
    places = [i for i, (a, b) in enumerate(zip(one[1], other[1], strict=False)) if a != b]
    return f"{len(places)} of {len(one[1])} bytes, the first at {places[:6]}"


def try_point(
    arguments: list[str], out: Path, stop_at: int, kind: int, reference: dict[str, bytes] | None
) -> str:
    """What went wrong when the run was stopped there and started again; empty where nothing did."""
    code = run(arguments, out, stop_at=stop_at, kind=kind)
    after = snapshot(out)
    if after is not None and after != reference:
        what = differing(reference, after)
        return f"stopped at {stop_at} with code {code}: an output that is not whole: {what}"
    unfinished = (out.with_name(f"{out.name}.partial") / "journal.jsonl").exists()
    again = run(arguments, out)
    if again != 0 and (after is None or unfinished):
        return f"stopped at {stop_at} with code {code}: the second run ended with {again}"
    finished = snapshot(out)
    if finished != reference:
        what = differing(reference, finished)
        return f"stopped at {stop_at} with code {code}: other bytes than an unbroken run: {what}"
    left = [
        path.name for path in out.parent.iterdir() if path.name.startswith(out.name) and path != out
    ]
    return f"stopped at {stop_at}: left {left}" if left else ""


def clean(out: Path) -> None:
    import shutil

    for path in list(out.parent.iterdir()):
        if path.name.startswith(out.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def answer(arguments: list[str], out: Path, points: int, kind: int) -> dict[str, Any]:
    """Stop at that many operations, spread evenly over all of them."""
    operations = count(arguments, out)
    reference = snapshot(out)
    clean(out)
    tried = sorted({1 + i * (operations - 1) // max(1, points - 1) for i in range(points)})
    problems = []
    for point in tried:
        problem = try_point(arguments, out, point, kind, reference)
        problems += [problem] if problem else []
        clean(out)
    return {"operations": operations, "points": len(tried), "problems": problems}


def main() -> None:
    for line in sys.stdin:
        task = json.loads(line)
        found = answer(task["arguments"], Path(task["out"]), task["points"], task["signal"])
        print(
            json.dumps(found), flush=True
        )  # nothing may be left in the buffer that the next child inherits


if __name__ == "__main__":
    main()
