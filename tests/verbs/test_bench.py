"""bench: what it reports, that its processes are separate and never outlive it, and what it
refuses. Nothing is timed here."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from conftest import Compressed
from helpers import cli, complaint

from svdcli.engine.compute import Compute
from svdcli.errors import SvdcliError, UsageError
from svdcli.models.bench_worker import Worker
from svdcli.verbs import bench as speed
from svdcli.verbs.bench import Bench, bench

Written = Callable[[str], Path]
SMALL = {"prompt_tokens": 6, "new_tokens": 3, "rounds": 2, "compute": Compute(threads=1)}
TINY = ("--prompt-tokens", "6", "--new-tokens", "3", "--threads", "1")
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


@pytest.fixture(scope="module")
def found(written: Written, compressed: Compressed) -> Bench:
    """What one run of the command measured."""
    kept: list[Bench] = []

    def keep(*args: Any, **how: Any) -> Bench:
        kept.append(bench(*args, **how))
        return kept[0]

    with mock.patch.object(speed, "bench", keep):
        done = cli(
            "bench",
            compressed("llama"),
            "--against",
            written("llama"),
            *TINY,
            "--rounds",
            "2",
            "--batch",
            "2",
            "--json",
        )
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out) == json.loads(json.dumps(kept[0].to_json()))
    return kept[0]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The processes that bench starts."""
    pids: list[int] = []

    class Noted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args: object, **how: object) -> None:
            super().__init__(*args, **how)  # type: ignore[call-overload]
            pids.append(self.pid)

    monkeypatch.setattr(speed.subprocess, "Popen", Noted)
    return pids


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def end_soon(pids: list[int]) -> bool:
    until = time.monotonic() + 10
    while any(map(is_running, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(map(is_running, pids))


def children_of(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        found += [int(stat.parent.name)] if int(fields[1]) == pid else []
    return found


# What it reports ----------------------------------------------------------------------------------


def test_both_models_are_measured_in_processes_of_their_own(found: Bench) -> None:
    assert len({found.original.process, found.compressed.process, os.getpid()}) == 3
    assert not is_running(found.original.process)
    assert not is_running(found.compressed.process)


def test_every_round_counts_but_the_first(found: Bench) -> None:
    for part in (found.original, found.compressed, found.ratios):
        for speeds in (part.prefill, part.decode):
            assert speeds is not None
            assert len(speeds.rounds) == found.rounds == 2
            assert 0 < speeds.lowest <= speeds.median <= speeds.highest
            assert (speeds.lowest, speeds.highest) == (min(speeds.rounds), max(speeds.rounds))


def test_ratios_are_compressed_over_original(found: Bench) -> None:
    ratios, ours, theirs = found.ratios, found.compressed, found.original
    assert ratios.prefill.rounds == tuple(
        a / b for a, b in zip(ours.prefill.rounds, theirs.prefill.rounds, strict=True)
    )
    assert ratios.file_bytes == ours.file_bytes / theirs.file_bytes
    assert ratios.load_seconds == ours.load_seconds / theirs.load_seconds
    assert ratios.file_bytes < 1


def test_a_side_knows_its_model(found: Bench, written: Written) -> None:
    side = found.original
    assert (side.model_class, side.dtype, side.path) == (
        "LlamaForCausalLM",
        "float32",
        str(written("llama")),
    )
    assert side.file_bytes == (written("llama") / "model.safetensors").stat().st_size
    assert found.compressed.parameters < side.parameters
    assert side.peak_bytes >= 0
    assert (found.device, found.threads) == ("cpu", 1)


def test_json_keeps_everything(found: Bench) -> None:
    data = json.loads(json.dumps(found.to_json()))
    assert (data["svdcli_json"], data["kind"]) == (1, "bench")
    assert data["ratios"]["decode"]["rounds"] == list(found.ratios.decode.rounds)  # type: ignore[union-attr]
    assert data["compressed"]["prefill"]["median"] == found.compressed.prefill.median
    assert (data["batch"], data["prompt_tokens"], data["new_tokens"]) == (2, 6, 3)


def test_translators_decode_and_encoders_do_not(written: Written, compressed: Compressed) -> None:
    found = bench(compressed("t5", "pivoted"), written("bert"), **SMALL)
    assert found.compressed.decode is not None
    assert found.ratios.decode is found.original.decode is None
    assert found.ratios.prefill.median > 0
    assert [row.measure for row in found.comparisons] == [
        "prefill",
        "load",
        "peak memory",
        "memory",
        "files",
    ]


# The command --------------------------------------------------------------------------------------


def printed(found: Bench, *options: str, columns: int = 160) -> str:
    with mock.patch.object(speed, "bench", return_value=found):
        done = cli("bench", "o", "--against", "m", *options, env={"COLUMNS": str(columns)})
    assert (done.code, done.err) == (0, "")
    return done.out.decode()


def test_compiled_decoding_is_measured_where_it_is_asked_for(
    found: Bench, written: Written, compressed: Compressed, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert found.original.compiled is None
    assert found.ratios.compiled is None
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # as slow as it is elsewhere, and the same way
    done = bench(compressed("llama"), written("llama"), compile=True, **SMALL)
    for side in (done.original, done.compressed, done.ratios):
        assert side.compiled is not None
        assert len(side.compiled.rounds) == 2
    assert "compiled decode" in [line.measure for line in done.comparisons]


@pytest.mark.parametrize("columns", [80, 160])
def test_the_table_has_a_line_for_every_measure(found: Bench, columns: int) -> None:
    text = printed(found, columns=columns)
    table = text[: text.index("\noriginal ")]
    assert max(map(len, table.splitlines())) <= 80
    for line in (
        "decode, tokens/s",
        "prefill, tokens/s",
        "time to load",
        "peak memory",
        "memory at rest",
        "weights on disk",
    ):
        assert f"\n{line} " in table
    assert f"{found.ratios.prefill.lowest:.2f} to {found.ratios.prefill.highest:.2f}" in table
    assert "prompts of 2 × 6 tokens, 3 new ones" in text


def test_machines_get_every_measure(found: Bench) -> None:
    rows = list(csv.DictReader(io.StringIO(printed(found, "--csv"))))
    assert [row["measure"] for row in rows] == [
        "decode",
        "prefill",
        "load",
        "peak memory",
        "memory",
        "files",
    ]
    assert float(rows[0]["ratio"]) == found.ratios.decode.median  # type: ignore[union-attr]
    assert printed(found, "-q") == ""


# What it refuses ----------------------------------------------------------------------------------


def test_a_missing_directory_is_told_before_anything_starts(
    written: Written, tmp_path: Path, started: list[int]
) -> None:
    for out, against in ((tmp_path / "no", written("llama")), (written("llama"), tmp_path / "no")):
        with pytest.raises(SvdcliError, match="does not exist"):
            bench(out, against)
    assert started == []


def test_a_file_without_a_config_is_told_before_anything_starts(
    written: Written, started: list[int]
) -> None:
    weights = written("llama") / "model.safetensors"
    assert "has no config.json that names a model" in complaint(
        cli("bench", weights, "--against", written("llama"))
    )
    assert started == []


@pytest.mark.parametrize(
    "option", ["--rounds", "--batch", "--new-tokens", "--prompt-tokens", "--threads"]
)
def test_counts_are_above_zero(option: str, written: Written, started: list[int]) -> None:
    done = cli("bench", written("llama"), "--against", written("llama"), option, "0")
    assert option in complaint(done, code=2)
    assert started == []


def test_a_model_that_does_not_read_text_is_refused(written: Written) -> None:
    worker = Worker(
        {
            "path": str(written("vit")),
            "device": "cpu",
            "threads": 1,
            "batch": 1,
            "prompt_tokens": 6,
            "new_tokens": 3,
        }
    )
    with pytest.raises(SvdcliError, match=r"does not read text \(ViTForImageClassification\)"):
        worker.load()


def test_more_tokens_than_the_model_takes(written: Written) -> None:
    task = {
        "path": str(written("llama")),
        "device": "cpu",
        "threads": 1,
        "batch": 1,
        "prompt_tokens": 63,
        "new_tokens": 3,
    }
    with pytest.raises(UsageError, match="takes 64 tokens, not 66"):
        Worker(task).load()


def test_a_device_that_is_not_here(written: Written) -> None:
    with pytest.raises(UsageError, match="--device tpu is not available here; use cpu"):
        Worker({"path": str(written("llama")), "device": "tpu", "threads": None})


@pytest.mark.parametrize(
    ("program", "kind", "words"),
    [
        ("os.kill(os.getpid(), 9)", SvdcliError, "was killed; memory may be too small"),
        ("os.kill(os.getpid(), 11)", SvdcliError, "ended with signal 11"),
        (
            "print('no\\nroom\\n', file=sys.stderr); sys.exit(3)",
            SvdcliError,
            "ended with exit code 3: room",
        ),
        ("sys.stdout.write('{')", SvdcliError, "ended with exit code 0"),
        (
            "print(json.dumps({'error': 'odd', 'hint': 'even', 'exit_code': 2}), flush=True); "
            "time.sleep(99)",
            UsageError,
            "odd; even",
        ),
        (
            "print(json.dumps({}), flush=True); input(); sys.exit('late')",
            SvdcliError,
            "ended with exit code 1: late",
        ),
    ],
)
def test_what_goes_wrong_in_a_process_is_one_clear_error(
    program: str,
    kind: type,
    words: str,
    written: Written,
    started: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        speed,
        "_START",
        f"import json, os, sys, time; {program}".replace("{", "{{").replace("}", "}}"),
    )
    with pytest.raises(SvdcliError, match=words) as caught:
        bench(written("llama"), written("llama"), **SMALL)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert len(started) == 2
    assert not any(map(is_running, started))


@needs_proc
def test_an_interrupt_ends_the_processes_too(written: Written, compressed: Compressed) -> None:
    command = [
        sys.executable,
        "-m",
        "svdcli",
        "bench",
        str(compressed("llama")),
        "--against",
        str(written("llama")),
        *TINY,
    ]
    running = subprocess.Popen([*command, "--rounds", "1000000"], stdout=subprocess.PIPE)
    try:
        until = time.monotonic() + 60
        while len(children := children_of(running.pid)) < 2 and time.monotonic() < until:
            time.sleep(0.1)
        assert len(children) == 2
        running.send_signal(signal.SIGINT)
        said, _ = running.communicate(timeout=30)
    finally:
        running.kill()
    assert (running.returncode, said) == (130, b"")
    assert end_soon(children)


@needs_proc
def test_processes_end_when_the_one_that_asked_is_gone(written: Written) -> None:
    command = [
        sys.executable,
        "-m",
        "svdcli",
        "bench",
        str(written("llama")),
        "--against",
        str(written("llama")),
        *TINY,
    ]
    running = subprocess.Popen([*command, "--rounds", "1000000"], stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while len(children := children_of(running.pid)) < 2 and time.monotonic() < until:
            time.sleep(0.1)
        assert len(children) == 2
    finally:
        running.kill()
        running.wait()
    assert end_soon(children)
