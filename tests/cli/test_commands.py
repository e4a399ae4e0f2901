"""The command line: every command, its streams, its formats, its exit codes."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest
from helpers import RANKED, cli, weight, write_model
from safetensors.torch import save_file

import svdcli
from svdcli import Recipe
from svdcli.cli.options import parse_size
from svdcli.cli.panels import PANELS
from svdcli.errors import UsageError
from svdcli.plan import words
from svdcli.render.bars import progress_on


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "m")


@pytest.fixture
def output(model: Path, tmp_path: Path) -> Path:
    svdcli.compress(model, tmp_path / "o", Recipe("rank", 20))
    return tmp_path / "o"


def test_compress_prints_a_table_of_what_it_saved(model: Path, tmp_path: Path) -> None:
    done = cli("compress", model, "--rank", "20")
    assert done.code == 0
    assert (tmp_path / "m-svd").is_dir()
    text = done.out.decode()
    assert "3 of 3 selected layers" in text
    assert re.search(r"layers\.\*\.up ×2 +96×64 +20", text)
    assert "embedding (embed_tokens)" in text
    assert f"wrote {tmp_path / 'm-svd'}" in done.err


def test_json_has_the_total_that_a_pipeline_asks_for(model: Path, tmp_path: Path) -> None:
    done = cli("compress", model, "--keep", "0.5", "--json")
    data = json.loads(done.out)
    assert (data["svdcli_json"], data["kind"]) == (1, "report")
    before = sum(file.stat().st_size for file in model.rglob("*") if file.is_file())
    after = sum(file.stat().st_size for file in (tmp_path / "m-svd").rglob("*") if file.is_file())
    assert data["total"]["saved_bytes"] == before - after
    assert data["selected"]["keep"] <= 0.5


def test_a_dry_run_shows_the_solver_that_would_run_and_nothing_that_did_not_happen(
    model: Path,
) -> None:
    done = cli("compress", model, "--rank", "20", "--dry-run", "--json")
    layers = json.loads(done.out)["layers"]
    assert {layer["solver"] for layer in layers} == {"svd"}
    assert not any(layer["fell_back"] or layer["relative_error"] for layer in layers)
    assert "fell back" not in cli("compress", model, "--rank", "20", "--dry-run").out.decode()


def test_a_keep_that_no_rank_reaches_is_noted(model: Path) -> None:
    notes = {
        d: json.loads(cli("compress", model, "--keep", "0.9", "--dry-run", "--json", *d).out)[
            "notes"
        ]
        for d in ((), ("--dtype", "float64"))
    }
    assert all(
        "may: 3 layers have the largest rank that saves bytes" in note
        for note in notes[("--dtype", "float64")]
    )
    assert "in F64 where the weights are F32" in notes[("--dtype", "float64")][0]
    assert not notes[()]


def test_csv_is_a_line_a_layer(output: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(cli("report", output, "--csv").out.decode())))
    assert {row["name"] for row in rows} == set(RANKED)
    assert all(row["shape"] in ("96x64", "64x96") and int(row["rank"]) == 20 for row in rows)


def test_report_lists_every_layer_and_groups_on_request(output: Path) -> None:
    single, grouped = (
        cli("report", output).out.decode(),
        cli("report", output, "--group").out.decode(),
    )
    assert "layers.1.up" in single
    assert "layers.*.up" in grouped


def test_many_layers_are_grouped_unless_asked(tmp_path: Path) -> None:
    save_file(
        {f"layers.{i}.fc.weight": weight(40, 40, i) for i in range(70)}, tmp_path / "m.safetensors"
    )
    svdcli.compress(tmp_path / "m.safetensors", tmp_path / "o.safetensors", Recipe("rank", 9))
    assert "layers.*.fc ×70" in cli("report", tmp_path / "o.safetensors").out.decode()
    assert (
        "layers.69.fc " in cli("report", tmp_path / "o.safetensors", "--every-layer").out.decode()
    )
    assert "layers.*.fc ×70" in cli("inspect", tmp_path / "m.safetensors").out.decode()
    assert cli("inspect", tmp_path / "m.safetensors", "--csv").out.decode().count("\n") == 71


@pytest.mark.parametrize(
    ("name", "kind"), [("{}.weight", "*"), ("net.{}.weight", "net.*"), ("fc{}.weight", "fc0")]
)
def test_a_number_is_any_whole_part_of_a_name(name: str, kind: str, tmp_path: Path) -> None:
    save_file({name.format(i): weight(40, 40, i) for i in range(3)}, tmp_path / "m.safetensors")
    svdcli.compress(tmp_path / "m.safetensors", tmp_path / "o.safetensors", Recipe("rank", 9))
    grouped = cli("report", tmp_path / "o.safetensors", "--group").out.decode()
    assert (f"{kind} ×3" in grouped) == ("*" in kind)
    assert "×" not in grouped.split("\n")[0]


def test_quiet_says_nothing_but_errors(model: Path, tmp_path: Path) -> None:
    done = cli("compress", model, "--rank", "20", "-q")
    assert (done.code, done.out, done.err) == (0, b"", "")
    again = cli("compress", model, "--rank", "20", "-q")
    assert again.code == 1
    assert again.err.startswith("svdcli: error:")


def test_inspect_and_its_names(model: Path) -> None:
    assert cli("inspect", model, "--names").out.decode().split() == sorted(RANKED)
    data = json.loads(cli("inspect", model, "--json").out)
    even = {
        row["name"]: (row["break_even"], row["pivoted_break_even"])
        for row in data["tensors"]
        if row["selected"]
    }
    assert even["layers.0.up.weight"] == (38, 61)
    assert "Break-even" in cli("inspect", model).out.decode()


def test_names_flow_into_layers_from(model: Path, tmp_path: Path) -> None:
    names = cli("inspect", model, "--names").out
    chosen = b"\n".join(line for line in names.splitlines() if b"down" in line)
    done = cli("compress", model, "--rank", "9", "--layers-from", "-", "--json", input=chosen)
    data = json.loads(done.out)
    assert [row["name"] for row in data["layers"]] == ["layers.0.down.weight"]
    assert {item["reason"] for item in data["skipped"] if item["name"] in RANKED} == {
        "not in the list of layers"
    }


def test_include_and_exclude(model: Path) -> None:
    data = json.loads(
        cli(
            "compress",
            model,
            "--rank",
            "9",
            "--include",
            "layers.*",
            "--exclude",
            r"re:\.1\.",
            "--dry-run",
            "--json",
        ).out
    )
    assert {row["name"] for row in data["layers"]} == {"layers.0.up.weight", "layers.0.down.weight"}


def test_a_full_name_overrides_the_rules_that_go_by_name(model: Path) -> None:
    plain = json.loads(
        cli("compress", model, "--rank", "9", "--include", "*", "--dry-run", "--json").out
    )
    exact = json.loads(
        cli(
            "compress", model, "--rank", "9", "--include", "embed_tokens", "--dry-run", "--json"
        ).out
    )
    assert {row["name"] for row in plain["layers"]} == set(RANKED)
    assert {row["name"] for row in exact["layers"]} == {"embed_tokens.weight"}


def test_spectrum(model: Path) -> None:
    assert "▁" in cli("spectrum", model).out.decode()
    assert len(json.loads(cli("spectrum", model, "--json").out)["layers"]) == 3
    assert cli("spectrum", model, "--csv").out.decode().count("\n") == 4


def test_expand_and_verify(model: Path, output: Path, tmp_path: Path) -> None:
    assert cli("expand", output).code == 0
    assert (tmp_path / "o-dense").is_dir()
    done = cli("verify", output, "--against", model)
    assert done.code == 0
    assert "FAILED" not in done.out.decode()
    (output / "model.safetensors").write_bytes(
        (output / "model.safetensors").read_bytes()[:-1] + b"x"
    )
    bad = cli("verify", output, "--json")
    assert bad.code == 1
    assert json.loads(bad.out)["ok"] is False
    assert "model.safetensors" in bad.err


def test_dry_run_and_plans(model: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    dry = json.loads(
        cli("compress", model, "--keep", "0.5", "--dry-run", "--save-plan", plan, "--json").out
    )
    assert dry["predicted"] is True
    assert not (tmp_path / "m-svd").exists()
    done = json.loads(cli("compress", model, "--plan", plan, "--json").out)
    assert [row["rank"] for row in done["layers"]] == [row["rank"] for row in dry["layers"]]
    record = tmp_path / "m-svd" / "svdcli.json"
    again = json.loads(cli("compress", model, "--plan", record, "-o", tmp_path / "p", "--json").out)
    assert [row["rank"] for row in again["layers"]] == [row["rank"] for row in dry["layers"]]


def test_exit_codes(model: Path, output: Path) -> None:
    assert cli("report", output).code == 0
    assert cli("report", model).code == 1
    assert cli("compress", model).code == 2
    assert cli("compress", model, "--rank", "x").code == 2
    assert cli("compress", model, "--keep", "0.5", "--exclude", "*").code == 3


def test_a_pipe_from_end_to_end(model: Path, tmp_path: Path) -> None:
    """cat m.safetensors | svdcli compress - --rank 20 -o - | svdcli report - --json"""
    svdcli_ = f"{sys.executable} -m svdcli"
    command = (
        f"cat {model}/model.safetensors | {svdcli_} compress - --rank 20 -o - | "
        f"{svdcli_} report - --json"
    )
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["total"]["bytes_before"] == (model / "model.safetensors").stat().st_size
    assert "selected layers" in done.stderr, "the table goes where the data does not"
    assert "\x1b[" not in done.stderr


def test_it_works_without_numpy_and_says_nothing_about_it(model: Path, tmp_path: Path) -> None:
    (tmp_path / "hidden" / "numpy").mkdir(parents=True)
    (tmp_path / "hidden" / "numpy" / "__init__.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'numpy'\")"
    )
    command = [
        sys.executable,
        "-m",
        "svdcli",
        "compress",
        str(model),
        "-o",
        str(tmp_path / "o"),
        "--rank",
        "9",
    ]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "hidden")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, f"svdcli: wrote {tmp_path / 'o'}\n")


def test_a_reader_that_leaves_early_is_no_traceback(output: Path) -> None:
    command = f"{sys.executable} -m svdcli report {output} --json | head -c 10"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("width", [40, 60, 79, 80, 160])
def test_tables_fit_their_terminal(output: Path, model: Path, width: int) -> None:
    for arguments in (["report", output], ["inspect", model], ["spectrum", model]):
        text = cli(*arguments, env={"COLUMNS": str(width)}).out.decode()
        assert max(map(len, text.splitlines())) <= width
        assert "up" in text


@pytest.mark.parametrize("width", [40, 60, 79])
def test_narrow_tables_break_no_word_and_tell_what_they_leave_out(
    output: Path, model: Path, width: int
) -> None:
    for arguments in (["report", output], ["inspect", model], ["spectrum", model]):
        text = cli(*arguments, env={"COLUMNS": str(width)}).out.decode()
        parts = set(re.findall(r"\w+", cli(*arguments, env={"COLUMNS": "160"}).out.decode()))
        table = text.split("\n\n")[0].split("─\n")[-1]
        assert set(re.findall(r"[^\W\d]\w*", table)) <= parts
    assert ("no room for Shape:" in text) is (width == 60)
    left_out = "no room for 95 %, 99 %, Even, Shape: see --csv or --json"
    assert (left_out in " ".join(text.split())) is (width == 40)


def test_no_colour_in_pipes_and_under_no_color(output: Path) -> None:
    assert "\x1b[" not in cli("report", output).out.decode()
    script = f"TERM=xterm-256color NO_COLOR=1 {sys.executable} -m svdcli report {output}"
    done = subprocess.run(
        ["script", "-qec", script, "/dev/null"], capture_output=True, text=True, check=False
    )
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", done.stdout)


def test_progress_shows_on_terminals_only(model: Path, tmp_path: Path) -> None:
    assert (
        cli("compress", model, "-o", tmp_path / "t", "--rank", "20").err
        == f"svdcli: wrote {tmp_path / 't'}\n"
    )
    command = f"{sys.executable} -m svdcli compress {model} -o {tmp_path / 't'} --rank 20"
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"}
    shown = subprocess.run(
        ["script", "-qec", f"{command} --force", "/dev/null"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert "write" in shown.stdout
    assert "%" in shown.stdout


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("350MB", 350_000_000),
        ("1.5GiB", 1_610_612_736),
        ("12", 12),
        ("7kb", 7000),
        (" 2 TB ", 2 * 10**12),
        ("5B", 5),
        ("5M", 5_000_000),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, "--size") == size


@pytest.mark.parametrize("text", ["", "MB", "-5MB", "1e9", "5 elephants", "0x10"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_size(text, "--size")


def test_completion_is_offered() -> None:
    done = cli("--show-completion", env={"SHELL": "/bin/bash"})
    assert done.code in (0, 1)
    assert "--install-completion" in cli("--help").out.decode()


def test_the_list_of_commands_says_whole_sentences() -> None:
    shown = cli("--help", env={"COLUMNS": "80"}).out.decode()
    commands = re.findall(r"^  [a-z]+ +([A-Z].*)$", shown.split("Commands:")[1], re.MULTILINE)
    assert len(commands) >= 11
    assert all(line.endswith(".") and not line.endswith("..") for line in commands)


@pytest.mark.parametrize("width", [60, 80, 100])
def test_help_lists_the_options_panel_by_panel(width: int) -> None:
    shown = cli("compress", "--help", env={"COLUMNS": str(width)}).out.decode()
    panels = [panel for panel in PANELS if panel != "Text"]
    assert re.findall(r"^(\w+):$", shown, re.MULTILINE) == ["Arguments", *panels]
    assert re.search(r"Storage:\n(  .*\n)*  --layout", shown)
    assert max(map(len, shown.splitlines())) <= width
    assert shown.isascii()
    assert "\x1b" not in shown


@pytest.mark.parametrize("command", ["eval", "heal"])
def test_text_that_is_no_calibration_has_its_own_panel(command: str) -> None:
    shown = cli(command, "--help").out.decode()
    panel = shown.split("\nText:\n")[1].split("\n\n")[0]
    assert re.findall(r"^  (--[a-z-]+)", panel, re.MULTILINE) == [
        "--text",
        "--stdlib",
        "--samples",
        "--seq-len",
    ]
    assert "Calibration:" not in shown


DTYPES = get_args(words.Dtype)
CHOICES = [
    ("compress", "--layout", get_args(words.Layout)),
    ("compress", "--allocate", words.ALLOCATIONS),
    ("compress", "--solver", words.SOLVERS),
    ("compress", "--metric", words.METRICS),
    ("compress", "--nonfinite", words.NONFINITE),
    ("compress", "--dtype", DTYPES),
    ("eval", "--dtype", DTYPES),
    ("export", "--dtype", DTYPES[:2]),
    *(
        (command, "--device", get_args(words.Device))
        for command in ("compress", "spectrum", "eval", "calibrate", "heal", "bench")
    ),
]


def completed(line: str, shell: str) -> list[str]:
    """What the completion that typer installs for a shell offers behind `line`; environment as the
    shells' scripts set it."""
    words_ = line.split(" ")
    asked = (
        {"COMP_WORDS": line, "COMP_CWORD": str(len(words_) - 1)}
        if shell == "bash"
        else {"_TYPER_COMPLETE_ARGS": line}
    )
    done = cli(env=asked | {"_SVDCLI_COMPLETE": f"complete_{shell}"})
    assert (done.code, done.err) == (0, "")
    text = done.out.decode()
    return re.findall(r'"(\w+)"', text) if shell == "zsh" else text.split()


@pytest.mark.parametrize("shell", ["bash", "zsh"])
@pytest.mark.parametrize(
    ("command", "option", "choices"),
    CHOICES,
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_with_choices_complete_them_and_help_shows_them(
    command: str, option: str, choices: tuple[str, ...], shell: str
) -> None:
    assert completed(f"svdcli {command} m {option} ", shell) == list(choices)
    first = choices[-1]
    assert completed(f"svdcli {command} m {option} {first[:3]}", shell) == [
        c for c in choices if c.startswith(first[:3])
    ]
    shown = " ".join(cli(command, "--help").out.decode().split())
    assert "|".join(choices) in shown


@pytest.mark.parametrize(
    ("arguments", "closed", "code", "says"),
    [
        ("inspect {model}", ">&-", 0, ""),
        ("compress {model}/model.safetensors --rank 9 -o -", ">&-", 2, "standard output is closed"),
        ("compress - --rank 9 -o {out}.safetensors", "<&-", 1, "standard input is empty"),
        ("compress {model} --rank 9 -o {out}", "2>&-", 0, ""),
    ],
)
def test_streams_that_the_shell_closed(
    model: Path, tmp_path: Path, arguments: str, closed: str, code: int, says: str
) -> None:
    command = (
        f"{sys.executable} -m svdcli {arguments.format(model=model, out=tmp_path / 'o')} {closed}"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == code, done
    assert says in done.stderr
    assert done.stderr.count("\n") <= (1 if code else 0)
    assert (tmp_path / "o").exists() is (closed == "2>&-")


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGHUP])
def test_being_told_to_stop_cleans_up_as_an_interrupt_does(
    model: Path, tmp_path: Path, kind: signal.Signals
) -> None:
    """Standard input is kept in a temporary folder until it is read."""
    environment = os.environ | {"TMPDIR": str(tmp_path / "t")}
    (tmp_path / "t").mkdir()
    command = [
        sys.executable,
        "-m",
        "svdcli",
        "compress",
        "-",
        "--rank",
        "9",
        "-o",
        str(tmp_path / "o.safetensors"),
    ]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdin is not None
        process.stdin.write((model / "model.safetensors").read_bytes()[:2000])
        process.stdin.flush()
        while not any(
            (tmp_path / "t").glob("svdcli-*")
        ):  # tempfile tries the folder with a file of its own
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(kind)
        assert process.wait(60) == 130
    assert list((tmp_path / "t").iterdir()) == []


@pytest.mark.parametrize("width", [40, 63, 80, 120])
def test_progress_fits_the_terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", str(width))
    stream = Terminal()
    with progress_on(stream, quiet=False) as progress:
        progress("measure", "model.layers.11.self_attn.q_proj.weight", 3, 4)
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue()).replace("\r", "\n").split("\n")
    shown = [line.rstrip() for line in lines if "measure" in line][-1]
    assert re.match(r"measure .* 75 % .*left -:--:--", shown)
    assert len(shown) <= width
    assert "…" not in shown
    assert ("q_proj" in shown) is (width >= 80)


MISSED = """
import os, signal, sys, threading, time
from svdcli.__main__ import main

def told() -> None:  # in another thread, so that the read that waits is not interrupted by it
    while not os.listdir(os.environ["TMPDIR"]):
        time.sleep(0.02)
    time.sleep(0.5)
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

threading.Thread(target=told).start()
sys.argv = ["svdcli", "compress", "-", "--rank", "9", "-o", "o.safetensors"]
main()
"""


def test_a_signal_that_interrupts_no_read_is_heard_all_the_same(folder: Path) -> None:
    """As one does that comes just before the read begins."""
    (folder / "t").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", MISSED],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"TMPDIR": str(folder / "t")},
    ) as process:
        assert process.stdin is not None
        process.stdin.write(struct.pack("<Q", 100))
        process.stdin.flush()
        assert process.wait(60) == 130
    assert list((folder / "t").iterdir()) == []
