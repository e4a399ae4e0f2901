"""Bad checkpoints, and odd ones that are sound: one line that says what and why, an exit code, and
nothing on the disk that was not there before."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    OUT,
    UP,
    cli,
    complaint,
    compress_refused,
    contents,
    entry,
    framed,
    refused,
    run,
    small_tensors,
    tree,
    weight,
    works,
    write_model,
    write_sharded,
)
from safetensors import safe_open
from safetensors.torch import save_file

from svdcli.files.header import LARGEST_HEADER

COMMANDS: list[list[str]] = [
    ["inspect"],
    ["report"],
    ["spectrum"],
    ["verify"],
    ["expand", "-o", OUT],
    ["compress", "--rank", "4", "-o", OUT],
]


# Headers that lie ---------------------------------------------------------------------------------

GOOD = framed({"a.weight": entry("F32", [48, 40], [0, 7680])}, bytes(7680))
HOSTILE = {
    "zero bytes": b"",
    "five bytes": b"12345",
    "text": b"#!/bin/sh\necho hello\n" * 5,
    "header beyond the limit": framed({}, length=LARGEST_HEADER + 1),
    "header of exabytes": framed({}, bytes(100), length=2**63),
    "header longer than the file": framed({}, bytes(10), length=5000),
    "duplicate keys": framed(
        '{"a":' + json.dumps(entry()) + ',"a":' + json.dumps(entry()) + "}", b"1234"
    ),
    "overlap": framed({"a": entry(), "b": entry(offsets=[2, 6])}, b"123456"),
    "hole": framed({"a": entry(), "b": entry(offsets=[6, 10])}, bytes(10)),
    "out of range": framed({"a": entry(offsets=[2**40, 2**40 + 4])}, b"1234"),
    "exabytes of weights": framed({"a.weight": entry("F32", [2**30, 2**30], [0, 2**62])}),
    "truncated": GOOD[:-1],
    "cut in the header": GOOD[:30],
    "trailing byte": GOOD + b"x",
    "unknown dtype": framed({"a": entry("F31")}, b"1234"),
    "deeply nested": framed('{"a":' + "[" * 50_000),
    "escape sequences": framed({"\x1b[31mred": entry("\x1b[32mgreen")}, b"1234"),
}


@pytest.mark.parametrize("raw", HOSTILE.values(), ids=HOSTILE)
def test_hostile_files(folder: Path, raw: bytes) -> None:
    Path("bad.safetensors").write_bytes(raw)
    for name, *rest in COMMANDS:
        assert "bad.safetensors" in refused(name, "bad.safetensors", *rest)


@pytest.mark.parametrize("raw", HOSTILE.values(), ids=HOSTILE)
def test_hostile_standard_input(folder: Path, raw: bytes) -> None:
    for name, *rest in COMMANDS:
        assert "standard input" in refused(name, "-", *rest, input=raw)
    assert "standard input" in refused("compress", "-", "--rank", "4", "-o", "-", input=raw)


@pytest.mark.parametrize("raw", [HOSTILE["hole"], HOSTILE["truncated"]], ids=["hole", "truncated"])
def test_hostile_files_in_a_directory(folder: Path, raw: bytes) -> None:
    write_model(folder / "model")
    Path("model/model.safetensors").write_bytes(raw)
    for name, *rest in COMMANDS:
        refused(name, "model", *rest)


def test_a_hostile_file_meets_the_real_command(folder: Path) -> None:
    Path("bad.safetensors").write_bytes(HOSTILE["overlap"])
    assert "'b' overlaps" in complaint(run("inspect", "bad.safetensors"))


def test_a_truncated_pipe_meets_the_real_command(folder: Path) -> None:
    assert "cut short" in complaint(run("compress", "-", "--rank", "4", "-o", "-", input=GOOD[:-1]))
    assert tree(folder) == {}


def test_the_temporary_copy_of_a_pipe_is_removed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    refused("inspect", "-", input=GOOD[:-1])
    refused("compress", "-", "--rank", "0", "-o", "-", input=GOOD, code=2)
    refused("compress", "-", "--rank", "30", "-o", "-", input=GOOD, code=3)


def test_debug_shows_the_traceback(folder: Path) -> None:
    done = run("inspect", "nothing.safetensors", env={"SVDCLI_DEBUG": "1"})
    assert done.code != 0
    assert "Traceback" in done.err
    assert "BadCheckpointError" in done.err


# Weights that cannot be factored ------------------------------------------------------------------


def spoil(value: float, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    bad = weight(48, 40, dtype=dtype)
    bad[17, 3] = value
    return {
        "good.weight": weight(40, 48, 1, dtype),
        "bad.weight": bad,
        "norm": torch.tensor([float("nan")]),
    }


@pytest.mark.parametrize(
    "target", [["--rank", "8"], ["--keep", "0.7", "--allocate", "global"], ["--error", "0.3"]]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity(
    folder: Path, value: float, dtype: torch.dtype, target: list[str]
) -> None:
    save_file(spoil(value, dtype), "m.safetensors")
    line = compress_refused(*target, "-o", OUT, code=1)
    assert "bad.weight" in line
    assert "good.weight" not in line
    assert "--nonfinite skip" in line

    done = cli("compress", "m.safetensors", *target, "-o", OUT, "--nonfinite", "skip", "--json")
    assert done.code == 0, done.err
    layers = {row["name"]: row for row in json.loads(done.out)["layers"]}
    assert layers["bad.weight"]["rank"] is None
    assert "NaN or infinity" in layers["bad.weight"]["reason"]
    assert layers["good.weight"]["rank"]
    assert contents(Path(OUT))["bad.weight"] == contents(Path("m.safetensors"))["bad.weight"]


def test_nan_outside_the_selection_is_nobodys_business(folder: Path) -> None:
    save_file(spoil(float("nan"), torch.float32), "m.safetensors")
    works("compress", "m.safetensors", "--rank", "8", "--exclude", "bad", "-o", OUT)


def test_nan_is_named_by_spectrum_and_by_a_dry_run_that_reads_weights(folder: Path) -> None:
    save_file(spoil(float("nan"), torch.float32), "m.safetensors")
    assert "bad.weight" in refused("spectrum", "m.safetensors")
    assert "bad.weight" in compress_refused("--error", "0.3", "--dry-run", code=1)
    skipping = cli("compress", "m.safetensors", "--rank", "8", "--dry-run", "--nonfinite", "skip")
    assert "holds NaN or infinity" in skipping.out.decode()


def test_a_dry_run_that_reads_no_weights_says_so(folder: Path) -> None:
    save_file(spoil(float("nan"), torch.float32), "m.safetensors")
    told = cli("compress", "m.safetensors", "--rank", "8", "--dry-run").out.decode()
    assert "not checked  that all weights are finite" in told
    data = json.loads(cli("compress", "m.safetensors", "--rank", "8", "--dry-run", "--json").out)
    assert "a run stops" in data["unchecked"]
    read = cli(
        "compress", "m.safetensors", "--error", "0.3", "--exclude", "bad", "--dry-run", "--json"
    )
    assert json.loads(read.out)["unchecked"] == ""


def test_nothing_but_nan(folder: Path) -> None:
    save_file({"bad.weight": torch.full((48, 40), float("nan"))}, "m.safetensors")
    assert "bad.weight" in compress_refused("--rank", "8", "--nonfinite", "skip", code=3)


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_but_finite_weights(folder: Path, value: float, dtype: torch.dtype) -> None:
    """The square of 1e30 is no float32, and a matrix of zeros has no directions."""
    save_file({"a.weight": torch.full((48, 40), value, dtype=dtype)}, "m.safetensors")
    works("spectrum", "m.safetensors")
    for number, target in enumerate(
        (["--rank", "4"], ["--energy", "0.9"], ["--rank", "4", "--layout", "pivoted"])
    ):
        works("compress", "m.safetensors", *target, "-o", f"{number}.safetensors")
        works("verify", f"{number}.safetensors", "--against", "m.safetensors")


def test_a_plan_saved_after_a_fallback_runs_again(folder: Path) -> None:
    save_file({"a.weight": torch.full((48, 40), 3e38)}, "m.safetensors")
    works("compress", "m.safetensors", "--rank", "4", "-o", OUT, "--save-plan", "plan.json")
    works("compress", "m.safetensors", "--plan", "plan.json", "-o", "again.safetensors")
    assert contents(Path("again.safetensors")) == contents(Path(OUT))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scale_of_a_weight_does_not_change_what_is_decided(
    folder: Path, dtype: torch.dtype
) -> None:
    decided = []
    for power in (0, -80, 80):
        save_file({"a.weight": weight(48, 40, dtype=dtype) * 2.0**power}, "m.safetensors")
        done = cli("compress", "m.safetensors", "--error", "0.3", "-o", OUT, "--force", "--json")
        assert done.code == 0, done.err
        (row,) = json.loads(done.out)["layers"]
        assert row["relative_error"] <= 0.3
        decided.append(row["rank"])
    assert len(set(decided)) == 1


# Inputs of the wrong kind -------------------------------------------------------------------------


def test_what_svdcli_wrote_is_not_compressed_again(small: Path, folder: Path) -> None:
    works("compress", small, "--rank", "4", "-o", "svd.safetensors")
    write_model(folder / "model")
    works("compress", "model", "--rank", "4")
    for model in ("svd.safetensors", "model-svd", "model-svd/model.safetensors"):
        assert "already" in compress_refused(
            "--rank", "2", "-o", "twice.safetensors", code=1, model=model
        )


def test_what_svdcli_did_not_write_is_not_reported(small: Path, folder: Path) -> None:
    write_model(folder / "model")
    for model in ("m.safetensors", "model"):
        for name in ("report", "verify", "expand"):
            refused(name, model)
    assert "no output of svdcli" in refused("report")


@pytest.mark.parametrize("config", [{"quant_method": "gptq", "bits": 4}, "anything", [1]])
def test_a_quantised_model(folder: Path, config: Any) -> None:
    write_model(folder / "model", {"model_type": "llama", "quantization_config": config})
    line = compress_refused("--rank", "4", code=1, model="model")
    assert "quantised" in line
    assert "gptq" in line or not isinstance(config, dict)


@pytest.mark.parametrize("raw", [b"", b"[" * 50_000, b"\xff", b"3"])
def test_a_config_that_is_no_json(folder: Path, raw: bytes) -> None:
    write_model(folder / "model")
    Path("model/config.json").write_bytes(raw)
    assert "config.json" in compress_refused("--rank", "4", code=1, model="model")


# Outputs that were damaged ------------------------------------------------------------------------


def damaged_output(change: Any) -> None:
    """An output whose record is not what svdcli wrote."""
    works("compress", "m.safetensors", "--rank", "4", "-o", "svd.safetensors")
    with safe_open("svd.safetensors", framework="pt") as file:
        record = json.loads(file.metadata()["svdcli"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(record)
    save_file(tensors, "bad.safetensors", metadata={"svdcli": json.dumps(record)})


def set_in(*path: str, value: Any) -> Any:
    def change(record: dict[str, Any]) -> None:
        for key in path[:-1]:
            record = record[key]
        if value is None:
            del record[path[-1]]
        else:
            record[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("names", "change"),
    [
        (["report", "verify", "expand", "inspect"], set_in("layers", value=None)),
        (["report", "verify", "expand", "inspect"], set_in("layers", value=[])),
        (["report", "verify", "expand", "inspect"], set_in("format", value="x")),
        (["report", "verify", "expand", "inspect"], set_in("format", value=99)),
        (["report", "verify", "expand"], set_in("layers", UP, value=3)),
        (["report", "verify", "expand"], set_in("layers", UP, "shape", value=None)),
        (["report", "verify", "expand"], set_in("layers", UP, "dtype", value="magic")),
        (["verify", "expand"], set_in("layers", UP, "rank", value=5)),
        (["verify", "expand"], set_in("layers", UP, "rank", value=0)),
        (["verify", "expand"], set_in("layers", UP, "layout", value="pivoted")),
        (["verify", "expand"], set_in("layers", UP, "stored_dtype", value="F16")),
        (["report", "verify"], set_in("source", value=None)),
        (["report", "verify"], set_in("skipped", "norm.weight", "reason", value=None)),
        (["report", "verify"], set_in("skipped", "norm.weight", "shape", value=None)),
        (["report", "verify"], set_in("dense", value=[])),
        (["report", "verify"], set_in("notes", value=3)),
        (["report", "verify"], set_in("left_out", value=[])),
    ],
)
def test_a_damaged_record(small: Path, names: list[str], change: Any) -> None:
    damaged_output(change)
    for name in names:
        refused(name, "bad.safetensors")


@pytest.mark.parametrize("text", ["", "{", "null", "3", "{}", "[" * 50_000])
def test_a_record_that_is_none(folder: Path, text: str) -> None:
    save_file({"a.weight": weight(48, 40)}, "bad.safetensors", metadata={"svdcli": text})
    for name, *rest in COMMANDS:
        assert "bad.safetensors" in refused(name, "bad.safetensors", *rest)


# Odd, but sound -----------------------------------------------------------------------------------


def survives(tensors: dict[str, torch.Tensor], *args: str) -> str:
    """Compress, look at, verify and expand; what comes back has the old names, shapes and dtypes.
    Returns all it printed."""
    save_file(tensors, "odd.safetensors")
    before = Path("odd.safetensors").read_bytes()
    said = ""
    for command in (
        ["compress", "odd.safetensors", "--rank", "4", "-o", OUT, *args],
        ["inspect", "odd.safetensors"],
        ["spectrum", "odd.safetensors"],
        ["report", OUT],
        ["verify", OUT, "--against", "odd.safetensors"],
        ["expand", OUT, "-o", "back.safetensors"],
    ):
        done = cli(*command)
        assert done.code == 0, (command, done.err)
        said += done.out.decode() + done.err
    old, new = contents(Path("odd.safetensors")), contents(Path("back.safetensors"))
    assert {name: item[:2] for name, item in old.items()} == {
        name: item[:2] for name, item in new.items()
    }
    assert Path("odd.safetensors").read_bytes() == before
    json.loads(cli("report", OUT, "--json").out)
    return said


@pytest.mark.parametrize(
    "name",
    [
        "a\nb",
        "a\r\tb",
        "层.0.权",
        "émoji😀",
        "\u202eltr",
        "\0",
        " ",
        "",
        'q"\\',
        "a/../b",
        "x" * 2000,
        "weight",
        "svd_up",
    ],
)
def test_odd_names(folder: Path, name: str) -> None:
    survives({f"{name}.weight": weight(48, 40), "other": torch.ones(2)})


def test_a_tensor_called_weight(folder: Path) -> None:
    survives({"weight": weight(48, 40)})
    assert set(contents(Path(OUT))) == {"svd_up.weight", "svd_down.weight"}


def test_markup_in_names_is_shown_as_it_is(folder: Path) -> None:
    said = survives(
        {
            "[bold]x[/bold].weight": weight(48, 40),
            "[/].weight": weight(40, 48),
            ":smile:.weight": weight(40, 40),
        }
    )
    assert all(name in said for name in ("[bold]x[/bold]", "[/]", ":smile:"))


def test_escape_sequences_in_names_never_reach_the_terminal(folder: Path) -> None:
    said = survives({"\x1b[31mred.weight": weight(48, 40), "\x9b32m\x07bell": torch.ones(2)})
    save_file({"\x1b[31mred.weight": torch.full((48, 40), float("nan"))}, "nan.safetensors")
    said += compress_refused("--rank", "4", "-o", "n.safetensors", code=1, model="nan.safetensors")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", said)


def test_a_name_that_is_a_pattern_matches_itself(folder: Path) -> None:
    save_file({"a[0].weight": weight(48, 40), "a0.weight": weight(48, 40)}, "m.safetensors")
    done = cli("inspect", "m.safetensors", "--names", "--include", "a[0]")
    assert "a[0].weight" in done.out.decode().splitlines(), done.err


def test_empty_and_single_tensors(folder: Path) -> None:
    survives(
        {
            **small_tensors(),
            "e.weight": torch.empty(0, 64),
            "f.weight": torch.empty(64, 0),
            "s": torch.tensor(1.0),
        }
    )


@pytest.mark.parametrize("metadata", [None, {"only": "metadata"}])
def test_a_file_without_tensors(folder: Path, metadata: dict[str, str] | None) -> None:
    save_file({}, "m.safetensors", metadata=metadata)
    assert "no tensors" in compress_refused("--rank", "4", code=3)
    refused("spectrum", "m.safetensors", code=3)
    works("inspect", "m.safetensors")


@pytest.mark.parametrize(
    ("taken", "layout"),
    [("p.svd_up.weight", "factored"), ("p.svd_down.weight", "pivoted"), ("p.svd_rows", "pivoted")],
)
def test_a_name_that_a_factor_needs(folder: Path, taken: str, layout: str) -> None:
    save_file({"p.weight": weight(48, 40), taken: torch.ones(3)}, "m.safetensors")
    for extra in ([], ["--dry-run"]):
        assert taken in compress_refused(
            "--rank", "4", "--layout", layout, "-o", OUT, *extra, code=1
        )


def test_factors_of_factors_do_not_collide(folder: Path) -> None:
    survives(
        {
            "p.weight": weight(48, 40),
            "p.svd_up.weight": weight(48, 40, 2),
            "p.svd_up.x.weight": weight(40, 48),
        }
    )


def test_many_tensors(folder: Path) -> None:
    many = {f"t.{number}.weight": torch.ones(1, 2) for number in range(1200)}
    survives({**many, "a.weight": weight(48, 40)}, "--allow-larger")


def test_a_symlinked_source(small: Path) -> None:
    Path("link.safetensors").symlink_to(small)
    before = small.read_bytes()
    works("compress", "link.safetensors", "--rank", "4")
    assert small.read_bytes() == before
    assert Path("link.safetensors").is_symlink()
    assert Path("link.svd.safetensors").is_file()


@pytest.mark.parametrize(
    "shards",
    [
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ["model-00001-of-000002.safetensors", "model-00002-of-000002.safetensors"],
        ["part-a.safetensors", "part-b.safetensors"],
        ["weights/1.safetensors", "weights/2.safetensors"],
        ["./1.safetensors", "./2.safetensors"],
    ],
    ids=lambda names: names[0],
)
def test_shards_by_any_name_stay_a_model(folder: Path, shards: list[str]) -> None:
    """What stock loaders look for is `model.safetensors.index.json`, with every shard where it
    says."""
    tensors = sorted(small_tensors().items())
    write_sharded(folder / "model", {shards[0]: dict(tensors[::2]), shards[1]: dict(tensors[1::2])})
    Path("model/config.json").write_text('{"model_type": "llama"}')
    works("compress", "model", "--rank", "4")
    works("verify", "model-svd", "--against", "model")
    works("expand", "model-svd", "-o", "back")
    for output in (Path("model-svd"), Path("back")):
        weight_map = json.loads((output / "model.safetensors.index.json").read_text())["weight_map"]
        found = {
            name: shard for shard in set(weight_map.values()) for name in contents(output / shard)
        }
        assert found == weight_map
    assert set(weight_map) == set(small_tensors())


@pytest.mark.parametrize(
    "prepare",
    [
        lambda: Path("model/config.json").write_text('{"model_type":"llama","odd":"\\ud800"}'),
        lambda: (Path("model") / os.fsdecode(b"\xff.txt")).write_text("x"),
        lambda: Path("model").rename(os.fsdecode(b"model\xff")),
    ],
    ids=["surrogate in config", "file name", "folder name"],
)
def test_text_that_is_no_unicode_works_or_is_refused(folder: Path, prepare: Any) -> None:
    write_model(folder / "model")
    prepare()
    (model,) = (path for path in folder.iterdir() if path.is_dir())
    before = tree(folder)
    done = cli("compress", model, "--rank", "4", "-o", "out")
    if done.code:
        complaint(done, done.code)
        assert tree(folder) == before
    else:
        works("verify", "out", "--against", model)
        works("inspect", model, "--json")


def test_output_in_a_narrow_encoding(small: Path) -> None:
    """A terminal that knows only ASCII gets question marks, not a failure after the work is
    done."""
    works("compress", small, "--rank", "4", "-o", OUT)
    done = run("report", OUT, env={"PYTHONIOENCODING": "ascii"})
    assert done.code == 0, done.err
    assert done.out
