"""What was asked for is met, or the run stops: shares, sizes, an output smaller than its source, a
record that is small."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import cli, complaint, diverges, load_all, rebuilt, size_of, tree, weight, write_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import svdcli
from svdcli import Plan, Recipe
from svdcli.engine import job
from svdcli.errors import SvdcliError, UsageError
from svdcli.files.record import read_record

NAN = float("nan")


def with_nan(path: Path, spoiled: int = 1, layers: int = 4) -> Path:
    """A file of equal layers, the first of which hold a NaN."""
    tensors = {f"layers.{i}.fc.weight": weight(96, 64, i) for i in range(layers)}
    for i in range(spoiled):
        tensors[f"layers.{i}.fc.weight"][3, 4] = NAN
    save_file(tensors, path)
    return path


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of layers on which every solver fails."""
    names: set[str] = set()
    real = job.solve_layer

    def solve(w: torch.Tensor, layer: Any, *rest: Any) -> Any:
        if layer.tensor.name in names:
            raise job.LayerFailedError("svd: no convergence")
        return real(w, layer, *rest)

    monkeypatch.setattr(job, "solve_layer", solve)
    return names


# A share of the parameters ------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["factored", "pivoted"])
@pytest.mark.parametrize("allocate", ["uniform", "global"])
def test_the_others_make_up_for_layers_that_stay_dense(
    tmp_path: Path, allocate: str, layout: str
) -> None:
    model = with_nan(tmp_path / "m.safetensors")
    recipe = Recipe("keep", 0.6, allocate=allocate, layout=layout, nonfinite="skip")  # type: ignore[arg-type]
    done = svdcli.compress(model, None, recipe)
    assert 0.58 < done.report.selected.keep <= 0.6
    assert [row.rank is None for row in done.report.layers] == [True, False, False, False]
    assert done.report.notes == ()


def test_a_share_that_dense_layers_put_out_of_reach_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_nan(tmp_path / "m.safetensors", spoiled=3)
    before = tree(tmp_path)
    monkeypatch.setattr(job, "solve_layer", lambda *_: pytest.fail("worked"))
    for dry in ([], ["--dry-run"]):
        line = complaint(cli("compress", model, "--keep", "0.6", "--nonfinite", "skip", *dry), 2)
        assert "3 of 4 selected layers stay dense (holds NaN or infinity" in line
        assert "such as layers.0.fc)" in line
    monkeypatch.undo()
    assert tree(tmp_path) == before
    named = re.search(r"use --keep (0\.\d+) or more", line)
    assert named is not None
    report = svdcli.compress(model, None, Recipe("keep", float(named[1]), nonfinite="skip")).report
    assert report.selected.keep <= float(named[1])


def test_a_size_counts_layers_that_stay_dense_and_names_them(tmp_path: Path) -> None:
    model = with_nan(tmp_path / "m.safetensors")
    size = int(0.6 * model.stat().st_size)
    report = svdcli.compress(model, None, Recipe("size", size, nonfinite="skip")).report
    assert 0.98 * size < report.total.bytes_after <= size
    with pytest.raises(
        UsageError,
        match=r"smallest output has \d+ bytes, since 1 of 4 selected layers stay dense \(holds NaN",
    ):
        svdcli.compress(model, None, Recipe("size", 20_000, nonfinite="skip"), force=True)


@pytest.mark.parametrize("target", [("keep", 0.5), ("size", 60_000)])
def test_a_plan_that_dense_layers_keep_from_its_target_is_refused(
    tmp_path: Path, target: tuple[Any, float]
) -> None:
    sound, spoiled = (
        with_nan(tmp_path / "m.safetensors", 0),
        with_nan(tmp_path / "n.safetensors", 1),
    )
    plan = svdcli.compress(sound, None, Recipe(*target, nonfinite="skip")).plan
    assert svdcli.compress(sound, tmp_path / "again.safetensors", plan=plan).report.notes == ()
    with pytest.raises(
        UsageError,
        match=r"the plan does not meet its target here: .* 1 of 4 selected layers stay dense",
    ):
        svdcli.compress(spoiled, None, plan=plan)
    assert not (tmp_path / "n.svd.safetensors").exists()


def test_a_plan_with_ranks_of_ones_own_is_noted_where_it_misses_the_target_it_names(
    tmp_path: Path,
) -> None:
    model = with_nan(tmp_path / "m.safetensors", 0)
    data = svdcli.compress(model, None, Recipe("keep", 0.5)).plan.to_json()
    data["layers"]["layers.0.fc.weight"]["rank"] = 38
    report = svdcli.compress(model, None, plan=Plan.from_json(data), force=True).report
    assert report.notes == (
        "the target is missed: 0.618 of the selected parameters remain where --keep 0.5 "
        "allows less",
    )
    again = svdcli.compress(
        model, None, plan=Plan.from_json(data | {"notes": list(report.notes)}), force=True
    ).report
    assert again.notes == report.notes


@pytest.mark.parametrize(
    ("target", "missed"),
    [
        (
            ["--keep", "0.5"],
            "and the target is missed: 0.621 of the selected parameters remain where --keep 0.5 "
            "allows less",
        ),
        (["--size", "60000"], "and the target is missed: the output is larger than --size 60000"),
        (["--rank", "20"], ""),
        (["--error", "0.3"], ""),
    ],
)
def test_a_solver_that_fails_tells_which_target_that_misses(
    tmp_path: Path, failing: set[str], target: list[str], missed: str
) -> None:
    model = with_nan(tmp_path / "m.safetensors", 0)
    failing.add("layers.2.fc.weight")
    done = cli("compress", model, *target, "--json")
    assert done.code == 1
    error = done.err.splitlines()[-1]
    assert "every solver failed on layers.2.fc.weight; what failed stayed dense" in error
    assert missed in error
    assert ("target is missed" in error) is bool(missed)
    assert any("target is missed" in note for note in json.loads(done.out)["notes"]) is bool(missed)
    assert svdcli.verify(tmp_path / "m.svd.safetensors", model).ok


# An output that is not smaller --------------------------------------------------------------------


def hardly_shrinks(path: Path) -> Path:
    """Many small tensors whose record takes more than the one layer saves."""
    tensors = {f"norms.{i}.weight": torch.ones(8) for i in range(200)}
    save_file({**tensors, "a.weight": weight(48, 40)}, path)
    return path


def test_an_output_that_is_not_smaller_is_an_error_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = hardly_shrinks(tmp_path / "m.safetensors")
    before = tree(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(job, "solve_layer", lambda *_: pytest.fail("worked"))
        line = complaint(cli("compress", model, "--rank", "20"), 1)
    assert tree(tmp_path) == before
    assert f"no fewer than the {model.stat().st_size} of its source" in line
    assert "--allow-larger" in line
    done = cli("compress", model, "--rank", "20", "--allow-larger", "--json")
    assert done.code == 0
    total = json.loads(done.out)["total"]
    assert total["saved_bytes"] < 0
    assert f"would have {total['bytes_after']} bytes" in line
    assert svdcli.verify(tmp_path / "m.svd.safetensors", model).ok


def test_a_dry_run_shows_the_plan_and_tells_that_a_run_would_stop(tmp_path: Path) -> None:
    model = hardly_shrinks(tmp_path / "m.safetensors")
    done = cli("compress", model, "--rank", "20", "--dry-run", "--json")
    assert done.code == 0
    assert json.loads(done.out)["total"]["saved_bytes"] < 0
    assert done.err.startswith("svdcli: a run would stop: the output would have ")
    assert cli("compress", model, "--rank", "20", "--dry-run", "--allow-larger").err == ""
    assert svdcli.compress(model, None, Recipe("rank", 20), dry_run=True).refused
    with pytest.raises(SvdcliError, match="no fewer than"):
        svdcli.compress(model, None, Recipe("rank", 20))


def test_the_dense_layout_never_saves_and_is_written_all_the_same(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    report = svdcli.compress(model, tmp_path / "o", Recipe("rank", 9, layout="dense")).report
    assert report.total.saved_bytes < 0


# A small record -----------------------------------------------------------------------------------


def tiny_layers(path: Path, count: int = 40) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"layers.{i}.fc.weight": torch.randn(32, 32, generator=generator).half()
        for i in range(count)
    }
    save_file(tensors, path, metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("layout", ["factored", "pivoted"])
def test_tiny_layers_become_smaller(tmp_path: Path, layout: str) -> None:
    """14 of 32 singular values: a layer's factors save 256 bytes, and its names and record must
    take less."""
    model, out = tiny_layers(tmp_path / "m.safetensors"), tmp_path / "o.safetensors"
    dry = svdcli.compress(model, out, Recipe("rank", 14, layout=layout), dry_run=True)  # type: ignore[arg-type]
    done = svdcli.compress(model, out, Recipe("rank", 14, layout=layout))  # type: ignore[arg-type]
    assert (
        out.stat().st_size
        == dry.report.total.bytes_after
        == done.report.total.bytes_after
        < model.stat().st_size
    )
    assert svdcli.verify(out, model).ok
    assert [row.rank for row in svdcli.report(out).layers] == [14] * 40
    stored = load_file(out)
    for row in done.report.layers:
        dense = load_file(model)[row.name].double()
        error = float((dense - rebuilt(stored, row.name, layout)).norm() / dense.norm())
        assert row.relative_error == pytest.approx(error, rel=1e-5)
    svdcli.expand(out, tmp_path / "d.safetensors")
    assert {n: t.shape for n, t in load_file(tmp_path / "d.safetensors").items()} == dict.fromkeys(
        load_file(model), (32, 32)
    )


def test_a_condensed_record_reads_as_any_other(tmp_path: Path) -> None:
    """What layers share is said once where it must be, and older readers are told to upgrade;
    nothing else changes."""
    model, out = tiny_layers(tmp_path / "m.safetensors"), tmp_path / "o.safetensors"
    done = svdcli.compress(model, out, Recipe("rank", 14))
    with safe_open(out, "pt") as file:
        raw = json.loads(file.metadata()["svdcli"])
    assert (raw["format"], raw["every_layer"]["rank"]) == (2, 14)
    assert set(raw["layers"]["layers.7.fc.weight"]) == {"relative_error"}
    record = read_record(out)
    assert record is not None
    assert record["format"] == 1
    assert Plan.from_json(record) == done.plan
    whole = svdcli.compress(model, tmp_path / "p.safetensors", Recipe("rank", 13)).path
    assert whole is not None
    with safe_open(whole, "pt") as file:
        raw = json.loads(file.metadata()["svdcli"])
    assert raw["format"] == (2 if "every_layer" in raw else 1)


def test_the_record_of_a_folder_is_condensed_too(tmp_path: Path) -> None:
    folder, out = tmp_path / "m", tmp_path / "o"
    folder.mkdir()
    tiny_layers(folder / "model.safetensors")
    done = svdcli.compress(folder, out, Recipe("rank", 13))
    raw = json.loads((out / "svdcli.json").read_text())
    assert (raw["format"], raw["every_layer"]["rank"]) == (2, 13)
    record = read_record(out)
    assert record is not None
    assert Plan.from_json(record) == done.plan
    assert svdcli.verify(out, folder).ok
    assert sum(file.stat().st_size for file in out.iterdir()) == done.report.total.bytes_after
    with pytest.raises(SvdcliError, match="no fewer than"):
        svdcli.compress(folder, tmp_path / "p", Recipe("rank", 14))


def test_a_usual_record_has_every_field_of_every_layer(tmp_path: Path) -> None:
    model, out = write_model(tmp_path / "m"), tmp_path / "o.safetensors"
    svdcli.compress(model / "model.safetensors", out, Recipe("rank", 9))
    with safe_open(out, "pt") as file:
        raw = json.loads(file.metadata()["svdcli"])
    assert raw["format"] == 1
    fields = {"shape", "dtype", "rank", "layout", "stored_dtype", "solver", "relative_error"}
    assert all(set(item) == fields for item in raw["layers"].values())


@pytest.mark.parametrize(
    "change",
    [{"every_layer": 3}, {"every_layer": None}, {"layers": {"a.weight": 3}}, {"every_layer": {}}],
)
def test_a_condensed_record_that_is_damaged_is_refused(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    model, out = tiny_layers(tmp_path / "m.safetensors"), tmp_path / "o.safetensors"
    svdcli.compress(model, out, Recipe("rank", 14))
    with safe_open(out, "pt") as file:
        raw = json.loads(file.metadata()["svdcli"])
    save_file(load_file(out), out, {"svdcli": json.dumps(raw | change)})
    for command in ("report", "verify", "expand"):
        complaint(cli(command, out), 1)


@pytest.fixture
def falling_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.linalg, "eigh", diverges)


@pytest.mark.parametrize("kind", ["file", "directory", "shards"])
@pytest.mark.parametrize("count", [2, 40])
@pytest.mark.usefixtures("falling_back")
def test_fall_backs_find_room_however_many(tmp_path: Path, kind: str, count: int) -> None:
    """Their reasons are wider than what the record had room for, and the files are laid out once
    more."""
    tensors = {f"layers.{i}.fc.weight": weight(40, 40, i) for i in range(count)}
    source, out = tmp_path / "m", tmp_path / "o"
    source.mkdir()
    if kind == "shards":
        halves = {
            f"model-0000{i}-of-00002.safetensors": dict(list(tensors.items())[i::2]) for i in (0, 1)
        }
        for name, part in halves.items():
            save_file(part, source / name)
        index = {
            "metadata": {},
            "weight_map": {tensor: name for name in halves for tensor in halves[name]},
        }
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(tensors, source / "model.safetensors")
    if kind == "file":
        source, out = source / "model.safetensors", tmp_path / "o.safetensors"
    done = svdcli.compress(source, out, Recipe("rank", 6, solver="gram"))
    assert {row.fell_back for row in done.report.layers} == {("gram: no convergence",)}
    assert done.report.total.bytes_after == size_of(out)
    assert svdcli.verify(out, source).ok
    stored = load_file(out) if kind == "file" else load_all(out)
    for name, dense in tensors.items():
        best = torch.linalg.svdvals(dense.double())[6:].norm()
        assert float((dense - rebuilt(stored, name, "factored")).norm()) == pytest.approx(
            float(best), rel=1e-4
        )
    assert {path.name for path in tmp_path.iterdir()} == {"m", out.name}


@pytest.mark.usefixtures("falling_back")
def test_fall_backs_never_take_an_output_above_its_size(tmp_path: Path) -> None:
    model, out = tiny_layers(tmp_path / "m.safetensors"), tmp_path / "o.safetensors"
    report = svdcli.compress(model, out, Recipe("size", 60_000, solver="gram")).report
    assert all(row.fell_back for row in report.layers if row.rank is not None)
    assert out.stat().st_size <= 60_000


@pytest.mark.usefixtures("falling_back")
def test_fall_backs_may_not_make_an_output_larger_than_its_source_in_silence(
    tmp_path: Path,
) -> None:
    model, out = tiny_layers(tmp_path / "m.safetensors"), tmp_path / "o.safetensors"
    before = tree(tmp_path)
    with pytest.raises(SvdcliError, match="no fewer than"):
        svdcli.compress(model, out, Recipe("rank", 14, solver="gram"))
    assert tree(tmp_path) == before
    report = svdcli.compress(
        model, out, Recipe("rank", 14, solver="gram"), allow_larger=True
    ).report
    assert report.total.bytes_after == out.stat().st_size >= model.stat().st_size


def test_work_is_not_done_again_where_fall_backs_take_more_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, solved = tmp_path / "m.safetensors", []
    save_file({f"layers.{i}.fc.weight": weight(40, 40, i) for i in range(30)}, model)
    real = job.solve_layer

    def solve(w: torch.Tensor, layer: Any, *rest: Any) -> Any:
        solved.append(layer.tensor.name)
        return real(w, layer, *rest)

    monkeypatch.setattr(torch.linalg, "eigh", diverges)
    monkeypatch.setattr(job, "solve_layer", solve)
    svdcli.compress(model, None, Recipe("rank", 6, solver="gram"))
    assert len(solved) == len(set(solved)) == 30


def test_the_plugin_reads_a_condensed_record(tmp_path: Path) -> None:
    """Where such a file was put into a model's folder."""
    hf = pytest.importorskip("svdcli.models.hf")
    out = tmp_path / "o.safetensors"
    svdcli.compress(tiny_layers(tmp_path / "m.safetensors"), out, Recipe("rank", 14))
    assert hf.read_stored([str(out)])[1] == {
        f"layers.{i}.fc": hf.Stored((32, 32), 14, "factored") for i in range(40)
    }
