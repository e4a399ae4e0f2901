"""How fast a compressed model is beside another: tokens a second, time to load, memory. Each in a
process of its own.

The two take turns in one run, so that whatever else the machine does meets both. This side imports
no torch.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from svdcli.engine.compute import Compute
from svdcli.errors import USAGE, SvdcliError, UsageError, printable
from svdcli.files.checkpoint import (
    CHUNK,
    STANDARD,
    Checkpoint,
    check_names_model,
    open_checkpoint,
)
from svdcli.files.report import JSON_VERSION
from svdcli.progress import Progress, silent

# `-m` would put the current folder, with whatever modules lie there, before everything else.
_START = "import sys; sys.path[:] = {path!r}; from svdcli.models.bench_worker import main; main()"
# UTF-8 on the pipes; no warnings and bars on standard error, whose last line is told where a
# process dies.
_QUIET = {
    "PYTHONUTF8": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


@dataclass(frozen=True)
class Quantiles:
    """One number a round: the median, the lowest and the highest of them."""

    median: float
    lowest: float
    highest: float
    rounds: tuple[float, ...]


@dataclass(frozen=True)
class ModelSpeed:
    """One of the two models. prefill and decode are tokens a second; decode is None for a model
    that keeps no cache. compiled is decode through torch.compile with a cache of fixed size; None
    where that was not asked for, or the model is no decoder.

    load_seconds is once, with the files in the page cache. Memory is that of the process above what
    its imports take, or the accelerator's where the model is on a CUDA device: at rest after the
    last round, and at its highest, loading included.
    """

    path: str
    process: int
    model_class: str
    dtype: str
    parameters: int
    file_bytes: int
    load_seconds: float
    memory_bytes: int
    peak_bytes: int
    prefill: Quantiles
    decode: Quantiles | None
    compiled: Quantiles | None = None


@dataclass(frozen=True)
class Ratios:
    """Compressed over original. Speeds: above 1 is faster, paired by round; the others: below 1 is
    less."""

    prefill: Quantiles
    decode: Quantiles | None
    load_seconds: float | None
    memory_bytes: float | None
    peak_bytes: float | None
    file_bytes: float | None
    compiled: Quantiles | None = None


@dataclass(frozen=True)
class Comparison:
    """One line of the comparison. lowest and highest are those of the ratio, where there is one a
    round."""

    measure: str
    unit: str
    original: float
    compressed: float
    ratio: float | None
    lowest: float | None = None
    highest: float | None = None


@dataclass(frozen=True)
class Bench:
    """Both models under the same load: `batch` prompts of prompt_tokens, then new_tokens one by
    one."""

    path: str
    against: str
    device: str
    threads: int
    prompt_tokens: int
    new_tokens: int
    batch: int
    rounds: int
    compressed: ModelSpeed
    original: ModelSpeed
    ratios: Ratios

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """The comparison line by line; no decode where there is none."""
        before, after, ratios = self.original, self.compressed, self.ratios
        speeds = []
        for measure, name in _SPEEDS.items():
            pair = (getattr(side, name) for side in (before, after, ratios))
            speeds += _speeds(measure, *pair)
        return (
            *speeds,
            Comparison("load", "s", before.load_seconds, after.load_seconds, ratios.load_seconds),
            Comparison("peak memory", "B", before.peak_bytes, after.peak_bytes, ratios.peak_bytes),
            Comparison("memory", "B", before.memory_bytes, after.memory_bytes, ratios.memory_bytes),
            Comparison("files", "B", before.file_bytes, after.file_bytes, ratios.file_bytes),
        )

    def to_json(self) -> dict[str, Any]:
        return {"svdcli_json": JSON_VERSION, "kind": "bench"} | asdict(self)


# What is measured in tokens a second, and what it is called here.
_SPEEDS = {"decode": "decode", "compiled decode": "compiled", "prefill": "prefill"}


def _speeds(
    measure: str, before: Quantiles | None, after: Quantiles | None, ratio: Quantiles | None
) -> list[Comparison]:
    """One line, none where it was not measured."""
    if before is None or after is None or ratio is None:
        return []
    medians = (before.median, after.median, ratio.median)
    return [Comparison(measure, "tokens/s", *medians, ratio.lowest, ratio.highest)]


def bench(
    output: str | Path,
    against: str | Path,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    batch: int = 1,
    rounds: int = 5,
    compile: bool = False,  # noqa: A002
    compute: Compute | None = None,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Bench:
    """Measure both models by turns, `rounds` times after one round to warm up.

    A round reads a prompt of random tokens in one pass (prefill), then writes new_tokens greedily
    with the cache (decode). compile has both models decode through torch.compile as well, after
    everything else, with a cache of fixed size. trust_remote_code runs Python that the models'
    folders bring along.
    Raises SvdcliError where a model does not open, does not read text, or its process dies.
    """
    # All that can be refused before a process starts
    _check_counts(
        {
            "prompt-tokens": prompt_tokens,
            "new-tokens": new_tokens,
            "batch": batch,
            "rounds": rounds,
        }
    )
    checkpoints = [_open(against), _open(output)]
    compute = compute or Compute()
    task = {
        "device": compute.device,
        "threads": compute.threads,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "batch": batch,
        "trust_remote_code": trust_remote_code,
    }
    pair, turns = _measure(checkpoints, task, rounds, compile, progress)

    # The original was named first, and each speed counts all prompts of a batch
    original, compressed = (
        _speed_of(child, checkpoint, prompt_tokens * batch, new_tokens * batch, turns[child])
        for checkpoint, child in zip(checkpoints, pair, strict=True)
    )
    return Bench(
        path=str(output),
        against=str(against),
        device=pair[0].about["device"],
        threads=pair[0].about["threads"],
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch=batch,
        rounds=rounds,
        compressed=compressed,
        original=original,
        ratios=_ratios(compressed, original),
    )


def _measure(
    checkpoints: Sequence[Checkpoint],
    task: Mapping[str, Any],
    rounds: int,
    compiles: bool,
    progress: Progress,
) -> tuple[list[_Child], _Turns]:
    """Start a process for each model and measure it there: (the processes, which have ended and
    keep what they have told; the seconds of every round)."""
    with ExitStack() as stack:
        # Both processes start at once; each answers when its imports are done
        pair = [stack.enter_context(_Child(checkpoint.path, task)) for checkpoint in checkpoints]
        for done, child in enumerate(pair):
            progress("load", child.path, done, len(pair))
            child.about = child.answer()

        # Loading is timed while the other process waits
        for checkpoint, child in zip(checkpoints, pair, strict=True):
            _into_page_cache(checkpoint)
            child.about |= child.ask("load")

        turns = _turns(pair, ("prefill", "decode"), rounds, progress)
        for child in pair:
            child.about |= child.ask("memory")

        # Last, since the compiler takes memory of its own
        if compiles:
            for child, seconds in _turns(pair, ("compiled",), rounds, progress).items():
                turns[child] |= seconds
    return pair, turns


def _check_counts(counts: Mapping[str, int]) -> None:
    for option, value in counts.items():
        if value < 1:
            raise UsageError(f"--{option} {value} is not a whole number above 0", "give at least 1")


def _open(path: str | Path) -> Checkpoint:
    """Open the headers alone. Raises SvdcliError or UsageError for what cannot be measured, before
    any process starts."""
    if str(path) == STANDARD:
        raise UsageError("bench does not read standard input", "name a directory")
    checkpoint = open_checkpoint(path)
    check_names_model(checkpoint, "bench opens Hugging Face directories")
    return checkpoint


def _into_page_cache(checkpoint: Checkpoint) -> None:
    """Read the weights once, so that both models load from memory and not one of them from a slow
    disk."""
    for name in checkpoint.files:
        with checkpoint.file_path(name).open("rb", buffering=0) as stream:
            while stream.read(CHUNK):
                pass


# Turns --------------------------------------------------------------------------------------------

_Turns = dict["_Child", dict[str, list[float]]]


def _turns(
    pair: Sequence[_Child], phases: Sequence[str], rounds: int, progress: Progress
) -> _Turns:
    """{child: {phase: seconds of every round}}, without the first round, which warms up.

    The model that begins changes with the round, so that a drift of the machine favours neither.
    """
    turns: _Turns = {child: {phase: [] for phase in phases} for child in pair}
    for number in range(rounds + 1):
        order = pair if number % 2 == 0 else pair[::-1]
        for phase in phases:
            for child in order:
                seconds = child.ask(phase)["seconds"]
                if number > 0 and seconds is not None:
                    turns[child][phase].append(seconds)
        progress("bench", f"round {number} of {rounds}", number + 1, rounds + 1)
    return turns


def _quantiles(values: Sequence[float]) -> Quantiles | None:
    if not values:
        return None
    return Quantiles(statistics.median(values), min(values), max(values), tuple(values))


def _speed_of(
    child: _Child,
    checkpoint: Checkpoint,
    prompt_tokens: int,
    new_tokens: int,
    turns: Mapping[str, Sequence[float]],
) -> ModelSpeed:
    """What one process has told, with tokens a second from the tokens of a round and its
    seconds."""
    about = child.about
    prefill = _quantiles([prompt_tokens / seconds for seconds in turns["prefill"]])
    assert prefill is not None
    return ModelSpeed(
        path=child.path,
        process=child.process.pid,
        model_class=about["model_class"],
        dtype=about["dtype"],
        parameters=about["parameters"],
        file_bytes=sum(checkpoint.files.values()),
        load_seconds=about["seconds"],
        memory_bytes=about["memory_bytes"],
        peak_bytes=about["peak_bytes"],
        prefill=prefill,
        decode=_quantiles([new_tokens / seconds for seconds in turns["decode"]]),
        compiled=_quantiles([new_tokens / seconds for seconds in turns.get("compiled", ())]),
    )


def _ratios(ours: ModelSpeed, theirs: ModelSpeed) -> Ratios:
    """Compressed (ours) over original (theirs). Speeds are compared round by round: what slows the
    machine down for a while then meets both."""

    def paired(mine: Quantiles | None, yours: Quantiles | None) -> Quantiles | None:
        if mine is None or yours is None:
            return None
        return _quantiles([a / b for a, b in zip(mine.rounds, yours.rounds, strict=True)])

    def once(pick: Callable[[ModelSpeed], float]) -> float | None:
        return pick(ours) / pick(theirs) if pick(theirs) > 0 else None

    prefill = paired(ours.prefill, theirs.prefill)
    assert prefill is not None
    return Ratios(
        prefill=prefill,
        decode=paired(ours.decode, theirs.decode),
        compiled=paired(ours.compiled, theirs.compiled),
        load_seconds=once(lambda speed: speed.load_seconds),
        memory_bytes=once(lambda speed: speed.memory_bytes),
        peak_bytes=once(lambda speed: speed.peak_bytes),
        file_bytes=once(lambda speed: speed.file_bytes),
    )


# One process a model ------------------------------------------------------------------------------


class _Child:
    """A process that holds one model and waits on its pipe: a command a line in, JSON a line out.

    It has a session of its own, so that an interrupt from the terminal reaches this side alone,
    which ends it.
    """

    def __init__(self, path: Path, task: Mapping[str, Any]) -> None:
        self.path = str(path)
        self.about: dict[str, Any] = {}
        # A file, not a pipe: nobody reads it while the process works, and a full pipe would stop it
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115  closed with the process
        start = _START.format(path=sys.path)
        load = json.dumps({"path": str(path.absolute()), **task})
        self.process = subprocess.Popen(
            [sys.executable, "-c", start, load],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            start_new_session=True,
            env=os.environ | _QUIET,
            encoding="utf-8",
        )

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.stderr):
            with suppress(OSError):  # what could not be written to a dead process
                stream.close()  # type: ignore[union-attr]

    def ask(self, command: str) -> dict[str, Any]:
        """Send one command and wait for its answer."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # the answer, which does not come, tells more
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Raises SvdcliError for what went wrong on the other side, and where it has died."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.endswith("\n"):
            raise self._death()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            error = UsageError if answer["exit_code"] == USAGE else SvdcliError
            raise error(answer["error"], answer["hint"])
        return answer

    def _death(self) -> SvdcliError:
        """The error that tells how the process ended, with the last line that it wrote."""
        code = self.process.wait()
        # SIGKILL is what Linux sends where memory has run out
        if code == -signal.SIGKILL:
            return SvdcliError(
                f"the process that held {self.path} was killed",
                "memory may be too small for both models at once",
            )
        self.stderr.seek(0)
        written = self.stderr.read().decode(errors="replace").strip()
        why = f"signal {-code}" if code < 0 else f"exit code {code}"
        last = ""
        if written:
            last = f": {printable(written.splitlines()[-1].strip())[:200]}"
        return SvdcliError(
            f"the process that held {self.path} ended with {why}{last}", "try `svdcli verify`"
        )
