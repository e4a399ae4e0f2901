"""Interrupt the command at any import of its start-up. Used by test_streams.py in a process of its
own.

Usage: interrupting.py POINTS IGNORED ARGUMENT...; prints, as JSON, the imports of an unbroken run,
and a list of [point, exit code, standard error] of runs that got SIGINT there. IGNORED is 1 where
the parent ignores that signal. The parent has imported nothing but `svdcli.__main__`, so that
forked children start as the command does.
"""

import json
import os
import signal
import sys
import tempfile

from svdcli.__main__ import main


def run(arguments: list[str], stop_at: int, *, ignored: bool) -> tuple[int, str, int]:
    """Fork and run the command line: (exit code, standard error, imports that there were)."""
    with tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as count:
        child = os.fork()
        if child == 0:
            _become(arguments, stop_at, ignored, err.fileno(), count.fileno())
        _, status = os.waitpid(child, 0)
        err.seek(0)
        return (
            os.waitstatus_to_exitcode(status),
            err.read().decode(),
            os.fstat(count.fileno()).st_size,
        )


def _become(arguments: list[str], stop_at: int, ignored: bool, err: int, count: int) -> None:
    seen = 0

    def hook(event: str, values: tuple[object, ...]) -> None:
        nonlocal seen
        if event == "import" and (
            seen or values[0] == "svdcli.cli.commands"
        ):  # the first import that main() makes
            seen += 1
            os.write(count, b".")
            if seen == stop_at:
                os.kill(os.getpid(), signal.SIGINT)

    os.dup2(err, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    signal.signal(
        signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler
    )  # tests may run in the background
    sys.addaudithook(hook)
    sys.argv = ["svdcli", *arguments]
    code = 99
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


def answer(points: int, ignored: bool, arguments: list[str]) -> dict[str, object]:
    code, err, imports = run(arguments, 0, ignored=ignored)
    assert (code, err) == (0, ""), err
    tried = sorted({1 + i * (imports - 1) // max(1, points - 1) for i in range(points)})
    return {
        "imports": imports,
        "ends": [(point, *run(arguments, point, ignored=ignored)[:2]) for point in tried],
    }


if __name__ == "__main__":
    print(json.dumps(answer(int(sys.argv[1]), sys.argv[2] == "1", sys.argv[3:])))
