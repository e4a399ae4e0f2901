"""From a checkpoint to an output and back: what is promised about bytes, errors, names and
budgets."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    RANKED,
    best_error,
    decaying,
    diverges,
    load_all,
    ranked_tensors,
    rebuilt,
    size_of,
    weight,
    write_model,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import svdcli
from svdcli import Recipe
from svdcli.errors import BadCheckpointError, NothingSelectedError, SvdcliError, UsageError
from svdcli.files.report import report_of
from svdcli.plan import words
from svdcli.plan.ranks import rounding_energy
from svdcli.plan.recipe import WANTED, best_defaults, recipe_for
from svdcli.plan.words import Layout


@pytest.mark.parametrize("layout", ["factored", "pivoted", "dense"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_directory_becomes_the_best_low_rank_directory(
    tmp_path: Path, layout: str, shards: int
) -> None:
    model = write_model(tmp_path / "m", shards=shards)
    outcome = svdcli.compress(model, tmp_path / "o", Recipe("rank", 20, layout=layout))
    before, after = load_all(model), load_all(tmp_path / "o")
    for row in outcome.report.layers:
        dense = before[row.name].double()
        best = float(torch.linalg.svdvals(dense)[20:].square().sum() / dense.square().sum()) ** 0.5
        error = float((dense - rebuilt(after, row.name, layout)).norm() / dense.norm())
        assert error == pytest.approx(best, rel=1e-5)
        assert row.relative_error == pytest.approx(error, rel=1e-5)
    assert torch.equal(after["embed_tokens.weight"], before["embed_tokens.weight"])
    assert (tmp_path / "o" / "1_Pooling" / "config.json").read_text() == '{"pooling": 1}'
    config = json.loads((tmp_path / "o" / "config.json").read_text())
    assert config.get("quantization_config", {}).get("quant_method") == (
        None if layout == "dense" else "svdcli"
    )
    assert svdcli.verify(tmp_path / "o", model).ok
    assert outcome.report.total.bytes_after == size_of(tmp_path / "o")


def test_an_index_maps_every_tensor_to_its_shard(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", shards=3)
    svdcli.compress(model, tmp_path / "o", Recipe("keep", 0.5))
    index = json.loads((tmp_path / "o" / "model.safetensors.index.json").read_text())
    total = 0
    for file in (tmp_path / "o").glob("*.safetensors"):
        with safe_open(file, "pt") as reader:
            for name in reader.keys():  # noqa: SIM118
                assert index["weight_map"].pop(name) == file.name
                total += reader.get_tensor(name).nbytes
    assert not index["weight_map"]
    assert index["metadata"]["total_size"] == total


def test_a_loader_without_svdcli_meets_a_tensor_that_cannot_fit(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    svdcli.compress(model, tmp_path / "o", Recipe("keep", 0.5))
    traps = [name for name, tensor in load_all(tmp_path / "o").items() if tensor.numel() == 0]
    assert traps == ["layers.0.up.weight"] or traps[0] in RANKED
    assert len(traps) == 1
    bare = write_model(tmp_path / "bare", config=None)
    svdcli.compress(bare, tmp_path / "p", Recipe("keep", 0.5))
    assert all(tensor.numel() for tensor in load_all(tmp_path / "p").values())


@pytest.mark.parametrize("limit", [10_000, 30_000, 10**9])
def test_max_shard_size(tmp_path: Path, limit: int) -> None:
    model = write_model(tmp_path / "m", shards=3)
    svdcli.compress(model, tmp_path / "o", Recipe("keep", 0.5, max_shard_size=limit))
    files = sorted((tmp_path / "o").glob("*.safetensors"))
    for file in files:
        data = sum(tensor.nbytes for tensor in load_file(file).values())
        groups = {name.split(".svd_")[0].removesuffix(".weight") for name in load_file(file)}
        assert data <= limit or len(groups) == 1
    assert (len(files) == 1) == (limit == 10**9)
    assert svdcli.verify(tmp_path / "o", model).ok


RECIPES = [
    Recipe("rank", 17),
    Recipe("keep", 0.4, layout="pivoted"),
    Recipe("keep", 0.6, allocate="global"),
    Recipe("keep", 0.6, dtype="F32"),
    Recipe("size", 44_000),
    Recipe("energy", 0.9),
    Recipe("error", 0.2, multiple_of=4),
    Recipe("rank", 12, layout="dense"),
]


@pytest.mark.parametrize(
    "recipe", RECIPES, ids=lambda recipe: f"{recipe.target}-{recipe.layout}-{recipe.allocate}"
)
@pytest.mark.parametrize("single", [True, False], ids=["file", "directory"])
def test_prediction_is_the_file_to_the_byte(tmp_path: Path, recipe: Recipe, single: bool) -> None:
    model = write_model(
        tmp_path / "m", tensors=ranked_tensors(torch.bfloat16), shards=1 if single else 2
    )
    source, out = (
        (model / "model.safetensors", tmp_path / "o.safetensors")
        if single
        else (model, tmp_path / "o")
    )
    dry = svdcli.compress(source, out, recipe, dry_run=True)
    assert not out.exists()
    done = svdcli.compress(source, out, recipe, allow_larger=recipe.dtype is not None)
    assert dry.report.total.bytes_after == size_of(out) == done.report.total.bytes_after
    assert dry.report.files == done.report.files
    assert [row.rank for row in dry.report.layers] == [row.rank for row in done.report.layers]


@pytest.mark.parametrize("share", [0.45, 0.6, 0.75, 0.9])
@pytest.mark.parametrize("allocate", ["uniform", "global"])
def test_size_is_met_from_below(tmp_path: Path, share: float, allocate: str) -> None:
    tensors = {f"layers.{i}.fc.weight": weight(200 + 40 * i, 180, i) for i in range(4)}
    save_file(tensors, tmp_path / "m.safetensors")
    size = int(share * (tmp_path / "m.safetensors").stat().st_size)
    svdcli.compress(
        tmp_path / "m.safetensors",
        tmp_path / "o.safetensors",
        Recipe("size", size, allocate=allocate),
    )
    found = (tmp_path / "o.safetensors").stat().st_size
    assert 0.99 * size <= found <= size


def test_the_smallest_size_is_named_and_reachable(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    with pytest.raises(UsageError, match="smallest output has") as caught:
        svdcli.compress(model, tmp_path / "o", Recipe("size", 1000))
    smallest = int(str(caught.value).split("smallest output has ")[1].split()[0])
    assert (
        svdcli.compress(model, tmp_path / "o", Recipe("size", smallest)).report.total.bytes_after
        == smallest
    )


@pytest.mark.parametrize("layout", ["factored", "pivoted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bound", [0.3, 0.1, 0.03])
def test_error_holds_for_what_is_stored(
    tmp_path: Path, layout: str, dtype: torch.dtype, bound: float
) -> None:
    save_file({"a.weight": weight(150, 120, 1, dtype)}, tmp_path / "m.safetensors")
    report = svdcli.compress(
        tmp_path / "m.safetensors", None, Recipe("error", bound, layout=layout)
    ).report
    assert report.layers[0].relative_error is not None
    assert report.layers[0].relative_error <= bound
    assert report.layers[0].rank is not None
    smaller = report.layers[0].rank - 1
    tail = float(torch.linalg.svdvals(weight(150, 120, 1, dtype).double())[smaller:].norm())
    left = bound**2 - rounding_energy(report.layers[0].stored_dtype, layout)
    assert tail / float(weight(150, 120, 1, dtype).double().norm()) > math.sqrt(left) * 0.99


@pytest.mark.parametrize("share", [0.8, 0.95])
def test_energy_is_kept_by_the_smallest_rank(tmp_path: Path, share: float) -> None:
    w = weight(150, 120, 1)
    save_file({"a.weight": w}, tmp_path / "m.safetensors")
    row = svdcli.compress(tmp_path / "m.safetensors", None, Recipe("energy", share)).report.layers[
        0
    ]
    energies = torch.linalg.svdvals(w.double()).square()
    kept = energies.cumsum(0) / energies.sum()
    assert row.rank == int((kept < share).sum()) + 1


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("layout", ["factored", "pivoted"])
@pytest.mark.parametrize("allocate", ["uniform", "global"])
def test_keep_is_never_exceeded(tmp_path: Path, keep: float, layout: str, allocate: str) -> None:
    model = write_model(tmp_path / "m")
    report = svdcli.compress(
        model, tmp_path / "o", Recipe("keep", keep, layout=layout, allocate=allocate)
    ).report
    assert report.selected.keep <= keep
    assert report.selected.keep > keep - 0.05


def test_global_loses_less_than_uniform_at_the_same_budget(tmp_path: Path) -> None:
    flat = torch.linalg.qr(torch.randn(100, 100, generator=torch.Generator().manual_seed(0))).Q
    save_file(
        {"a.weight": weight(100, 100, 1), "b.weight": flat.contiguous()}, tmp_path / "m.safetensors"
    )
    losses = {}
    for allocate in ("uniform", "global"):
        recipe = Recipe("keep", 0.5, allocate=allocate)
        report = svdcli.compress(
            tmp_path / "m.safetensors", tmp_path / f"{allocate}.safetensors", recipe
        ).report
        losses[allocate] = sum((row.relative_error or 0.0) ** 2 for row in report.layers)
        assert report.selected.keep <= 0.5
    assert losses["global"] < losses["uniform"] * 0.999


def test_expand_restores_names_shapes_dtypes_and_files(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", tensors=ranked_tensors(torch.bfloat16), shards=2)
    svdcli.compress(
        model, tmp_path / "o", Recipe("keep", 0.5, layout="pivoted", dtype="F32"), allow_larger=True
    )
    svdcli.expand(tmp_path / "o", tmp_path / "d")
    before, after, low = load_all(model), load_all(tmp_path / "d"), load_all(tmp_path / "o")
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {
        n: (t.shape, t.dtype) for n, t in after.items()
    }
    for name in RANKED:
        torch.testing.assert_close(
            after[name].double(), rebuilt(low, name, "pivoted"), rtol=2**-8, atol=1e-7
        )
    assert json.loads((tmp_path / "d" / "config.json").read_text()) == json.loads(
        (model / "config.json").read_text()
    )
    assert {p.name for p in (tmp_path / "d").iterdir()} == {p.name for p in model.iterdir()}


def test_expand_of_the_dense_layout_is_itself(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    svdcli.compress(
        model / "model.safetensors", tmp_path / "o.safetensors", Recipe("rank", 9, layout="dense")
    )
    svdcli.expand(tmp_path / "o.safetensors", tmp_path / "d.safetensors")
    for name, tensor in load_file(tmp_path / "d.safetensors").items():
        assert torch.equal(tensor, load_file(tmp_path / "o.safetensors")[name])


def test_a_plan_runs_again_to_the_same_bytes(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    first = svdcli.compress(model, tmp_path / "a", Recipe("keep", 0.5, allocate="global"))
    plan = svdcli.Plan.from_json(json.loads(json.dumps(first.plan.to_json())))
    svdcli.compress(model, tmp_path / "b", plan=plan)
    for file in sorted((tmp_path / "a").rglob("*.*")):
        if file.is_file():
            assert (
                file.read_bytes()
                == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()
            ), file.name


def test_the_same_command_gives_the_same_bytes(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    for name in ("a", "b"):
        svdcli.compress(model, tmp_path / name, Recipe("rank", 9, solver="randomized", seed=3))
    assert load_all(tmp_path / "a").keys() == load_all(tmp_path / "b").keys()
    for file in ("model.safetensors", "svdcli.json", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_rank_that_does_not_save_is_told(tmp_path: Path) -> None:
    save_file(
        {"big.weight": weight(200, 200), "small.weight": weight(50, 50)}, tmp_path / "m.safetensors"
    )
    report = svdcli.compress(tmp_path / "m.safetensors", None, Recipe("rank", 30)).report
    big, small = report.layers
    assert (big.rank, small.rank) == (30, None)
    assert "would not save" in small.reason
    assert small.saved_bytes == 0


def test_nothing_to_do_writes_nothing(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    for recipe in (
        Recipe("rank", 60),
        Recipe("keep", 1.0),
        Recipe("keep", 0.5, exclude=("*layers*",)),
    ):
        with pytest.raises(NothingSelectedError):
            svdcli.compress(model, tmp_path / "o", recipe)
    assert {path.name for path in tmp_path.iterdir()} == {"m"}


def test_conv1d_and_fused_projections_are_plain_matrices(tmp_path: Path) -> None:
    tensors = {
        "h.0.attn.c_attn.weight": weight(64, 192, 1),
        "h.0.attn.c_attn.bias": torch.ones(192),
        "wte.weight": weight(90, 64),
    }
    save_file(tensors, tmp_path / "m.safetensors")
    svdcli.compress(tmp_path / "m.safetensors", tmp_path / "o.safetensors", Recipe("rank", 30))
    after = load_file(tmp_path / "o.safetensors")
    assert after["h.0.attn.c_attn.svd_up.weight"].shape == (64, 30)
    assert after["h.0.attn.c_attn.svd_down.weight"].shape == (30, 192)
    assert torch.equal(after["h.0.attn.c_attn.bias"], torch.ones(192))


def test_a_pickled_directory_becomes_safetensors(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(tensors, model / "pytorch_model.bin")
    report = svdcli.compress(model, tmp_path / "o", Recipe("keep", 0.5)).report
    assert (tmp_path / "o" / "model.safetensors").is_file()
    assert not (tmp_path / "o" / "pytorch_model.bin").exists()
    assert report.total.bytes_after == size_of(tmp_path / "o")
    assert svdcli.verify(tmp_path / "o", model).ok


def test_weights_in_other_formats_are_left_out_and_told(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    (model / "model.gguf").write_bytes(b"x")
    report = svdcli.compress(model, tmp_path / "o", Recipe("keep", 0.5)).report
    assert "model.gguf" in report.left_out
    assert not (tmp_path / "o" / "model.gguf").exists()


# Solvers that fail --------------------------------------------------------------------------------


def makes_noise(real: Callable[..., Any]) -> Callable[..., Any]:
    def solver(*args: Any, **kwargs: Any) -> Any:
        values, vectors = real(*args, **kwargs)
        return values, vectors.roll(1, dims=1)

    return solver


def test_a_solver_that_does_not_converge_gives_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "m")
    monkeypatch.setattr(torch.linalg, "eigh", diverges)
    report = svdcli.compress(model, tmp_path / "o", Recipe("rank", 9, solver="gram")).report
    assert {row.solver for row in report.layers} == {"svd"}
    assert {row.fell_back for row in report.layers} == {("gram: no convergence",)}
    assert svdcli.verify(tmp_path / "o", model).ok


def test_a_solver_that_misses_its_spectrum_gives_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "m")
    monkeypatch.setattr(torch.linalg, "eigh", makes_noise(torch.linalg.eigh))
    report = svdcli.compress(model, tmp_path / "o", Recipe("rank", 9, solver="gram")).report
    assert {row.fell_back for row in report.layers} == {("gram: missed its spectrum",)}


def test_a_tail_below_the_gram_matrix_goes_to_svd(tmp_path: Path) -> None:
    left, right = weight(120, 100, 1).double(), weight(100, 120, 2).double()
    steep = torch.linalg.svd(left @ right).U[:, :100] * 10.0 ** -torch.linspace(
        0, 9, 100, dtype=torch.float64
    )
    w = (steep @ torch.linalg.svd(right).Vh[:100]).float()
    save_file({"a.weight": w}, tmp_path / "m.safetensors")
    row = svdcli.compress(
        tmp_path / "m.safetensors", None, Recipe("rank", 40, solver="gram")
    ).report.layers[0]
    assert row.fell_back == ("gram: tail below its precision",)
    best = float(torch.linalg.svdvals(w.double())[40:].norm() / w.double().norm())
    assert row.relative_error == pytest.approx(best, rel=1e-2)


def test_numbers_whose_squares_vanish_go_to_svd(tmp_path: Path) -> None:
    w = (decaying(120, 100, 1.0) * 1e-21).float()
    save_file({"a.weight": w}, tmp_path / "m.safetensors")
    recipe = Recipe("rank", 20, solver="gram")
    row = svdcli.compress(tmp_path / "m.safetensors", None, recipe).report.layers[0]
    assert row.fell_back == ("gram: squares below its range",)
    best = (best_error(w.double(), 20) / float(w.double().square().sum())) ** 0.5
    assert row.relative_error == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["factored", "pivoted"])
def test_a_constant_weight_is_of_rank_one(
    tmp_path: Path, layout: Layout, dtype: torch.dtype
) -> None:
    """The errors of LAPACK all go the same way there."""
    save_file({"a.weight": torch.full((400, 300), 0.37, dtype=dtype)}, tmp_path / "m.safetensors")
    recipe = Recipe("rank", 100, layout=layout)
    row = svdcli.compress(tmp_path / "m.safetensors", None, recipe).report.layers[0]
    assert row.rank == 100
    assert row.relative_error < 1000 * torch.finfo(dtype).eps


def test_where_every_solver_fails_the_layer_stays_dense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "m", shards=2)
    real = torch.linalg.svd

    def fails_on_one_shape(w: torch.Tensor, **options: Any) -> Any:
        return diverges() if 64 in w.shape and w.shape[0] == 96 else real(w, **options)

    monkeypatch.setattr(torch.linalg, "svd", fails_on_one_shape)
    monkeypatch.setattr(torch.linalg, "qr", lambda w: (torch.eye(w.shape[0], dtype=w.dtype), w))
    report = svdcli.compress(model, tmp_path / "o", Recipe("rank", 9, solver="svd")).report
    monkeypatch.undo()
    assert sorted(report.failed) == sorted(RANKED)
    assert all("every solver failed" in row.reason for row in report.layers if row.rank is None)


def test_one_failed_layer_keeps_the_work_on_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from svdcli.engine import job

    model, calls = write_model(tmp_path / "m", shards=2), []
    real = job.solve_layer

    def fails_once(w: torch.Tensor, layer: Any, *rest: Any) -> Any:
        calls.append(layer.tensor.name)
        if layer.tensor.name == "layers.0.down.weight":
            raise job.LayerFailedError("gram: no convergence, svd: no convergence")
        return real(w, layer, *rest)

    monkeypatch.setattr(job, "solve_layer", fails_once)
    report = svdcli.compress(model, tmp_path / "o", Recipe("rank", 9)).report
    assert report.failed == ("layers.0.down.weight",)
    assert sorted(calls) == sorted(RANKED)
    assert report.total.bytes_after == size_of(tmp_path / "o")
    assert svdcli.verify(tmp_path / "o", model).ok


# Reports ------------------------------------------------------------------------------------------


def test_report_finds_the_newest_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    model = write_model(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SvdcliError, match="no output"):
        svdcli.report()
    svdcli.compress(model, "first", Recipe("rank", 9))
    svdcli.compress(model / "model.safetensors", "second.safetensors", Recipe("rank", 9))
    os.utime("first", (1, 1))
    assert svdcli.report().path == "second.safetensors"
    os.utime("second.safetensors", (0, 0))
    assert svdcli.report().path == "first"


def test_an_output_that_lost_a_file_is_reported_with_a_note_and_without_weights_as_damaged(
    tmp_path: Path,
) -> None:
    model = write_model(tmp_path / "m")
    before = svdcli.compress(model, tmp_path / "o", Recipe("rank", 9)).report
    (tmp_path / "o" / "tokenizer.json").unlink()
    report = svdcli.report(tmp_path / "o")
    assert report.notes == ("tokenizer.json was written too, and is gone",)
    assert before.files.items() - report.files.items() == {
        ("tokenizer.json", before.files["tokenizer.json"])
    }
    (tmp_path / "o" / "model.safetensors").unlink()
    with pytest.raises(SvdcliError, match=r"lacks 'model.safetensors'"):
        svdcli.report(tmp_path / "o")


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    svdcli.compress(model, tmp_path / "o", Recipe("rank", 9))
    record = json.loads((tmp_path / "o" / "svdcli.json").read_text()) | {"format": 2}
    (tmp_path / "o" / "svdcli.json").write_text(json.dumps(record))
    for verb in (svdcli.report, svdcli.verify, lambda path: svdcli.expand(path, tmp_path / "d")):
        with pytest.raises(SvdcliError, match="format 2"):
            verb(tmp_path / "o")


def test_spectrum_against_svdvals(tmp_path: Path) -> None:
    w = weight(90, 70, 5)
    save_file({"a.weight": w}, tmp_path / "m.safetensors")
    row = svdcli.spectrum(tmp_path / "m.safetensors").layers[0]
    sigma = torch.linalg.svdvals(w.double())
    shares = sigma / sigma.sum()
    assert row.effective_rank == pytest.approx(
        float(torch.exp(-(shares * shares.log()).sum())), rel=1e-4
    )
    assert row.stable_rank == pytest.approx(float(sigma.square().sum() / sigma[0] ** 2), rel=1e-6)
    kept = sigma.square().cumsum(0) / sigma.square().sum()
    assert [row.rank_90, row.rank_95, row.rank_99] == [
        int((kept < share).sum()) + 1 for share in (0.9, 0.95, 0.99)
    ]
    assert row.curve[0] == 1.0
    assert row.sigma_max == pytest.approx(float(sigma[0]), rel=1e-6)


def test_stock_transformers_opens_what_expand_wrote(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "m")
    svdcli.compress(tmp_path / "m", tmp_path / "o", Recipe("rank", 16, layout="pivoted"))
    svdcli.compress(tmp_path / "m", tmp_path / "direct", Recipe("rank", 16, layout="dense"))
    svdcli.expand(tmp_path / "o", tmp_path / "d")
    ids = torch.arange(12)[None]
    outputs = []
    for folder in ("d", "direct"):
        loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / folder, output_loading_info=True
        )
        assert not any(info.values())
        outputs.append(loaded.eval()(ids).logits)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-3, atol=1e-4)
    assert (outputs[0] - model(ids).logits).abs().max() > 1e-3
    shutil.rmtree(tmp_path / "d")


@pytest.mark.parametrize("bound", [0.02, 0.05, 0.1])
def test_error_holds_in_the_pivoted_layout_of_a_trained_model(tmp_path: Path, bound: float) -> None:
    """Its coefficients combine rows that cancel, and round worse than factors."""
    sample = Path(__file__).parents[2] / "sample_models" / "tiny-llama"
    report = svdcli.compress(
        sample, tmp_path / "o", Recipe("error", bound, layout="pivoted"), allow_larger=True
    ).report
    errors = [row.relative_error for row in report.layers if row.relative_error is not None]
    assert len(errors) > 10
    assert max(errors) <= bound
    assert report.notes == ()


def test_a_bound_that_is_exceeded_is_noted(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    svdcli.compress(model, tmp_path / "o", Recipe("error", 0.1))
    record = json.loads((tmp_path / "o" / "svdcli.json").read_text())
    assert report_of(record, {}, "o").notes == ()
    record["layers"]["layers.1.up.weight"]["relative_error"] = 0.12
    assert report_of(record, {}, "o").notes == (
        "1 of 3 layers have a larger error than --error 0.1, once rounded: the largest is 0.12 "
        "(layers.1.up.weight)",
    )


@pytest.mark.parametrize("row", [100_000, -1, 0])
def test_an_order_of_rows_that_is_none_is_found(tmp_path: Path, row: int) -> None:
    model, out = write_model(tmp_path / "m") / "model.safetensors", tmp_path / "o.safetensors"
    svdcli.compress(model, out, Recipe("keep", 0.5, layout="pivoted"))
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(out)
    rows = tensors["layers.0.up.svd_rows"]
    rows[:2] = torch.tensor([row, row])
    save_file(tensors, out, metadata)
    with pytest.raises(BadCheckpointError, match=r"svd_rows of layers\.0\.up\.weight are no order"):
        svdcli.expand(out)
    failed = [check for check in svdcli.verify(out, model).checks if not check.ok]
    assert [(check.check, check.subject) for check in failed] == [
        ("row order", "layers.0.up.weight"),
        ("relative error", "layers.0.up.weight"),
    ]


@pytest.mark.parametrize("layout", ["factored", "pivoted", "dense"])
@pytest.mark.parametrize("scale", [1e-5, 1e-6, 3e-7])
def test_half_precision_numbers_below_the_normal_ones(
    tmp_path: Path, layout: str, scale: float
) -> None:
    """Rounding is absolute there, and no solver is to blame for it."""
    save_file({"a.weight": (weight(200, 150) * scale).half()}, tmp_path / "m.safetensors")
    report = svdcli.compress(
        tmp_path / "m.safetensors", None, Recipe("keep", 0.6, layout=layout)
    ).report
    assert report.failed == ()
    assert report.layers[0].relative_error is not None
    assert report.layers[0].relative_error < 1


@pytest.mark.parametrize("allocate", ["uniform", "global"])
def test_a_budget_that_the_least_ranks_exceed_is_an_error(tmp_path: Path, allocate: str) -> None:
    model = write_model(tmp_path / "m")
    line = (
        r"--keep 0\.001 is not reachable: with the least rank in every layer 0\.026 of "
        r"the selected .*; use --keep 0\.0261 or"
    )
    with pytest.raises(UsageError, match=line):
        svdcli.compress(model, None, Recipe("keep", 0.001, allocate=allocate), dry_run=True)
    done = svdcli.compress(model, None, Recipe("keep", 0.0261, allocate=allocate), dry_run=True)
    assert {row.rank for row in done.report.layers} == {1}


def test_a_lone_shard_in_a_folder_keeps_its_index(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    (model / "sub").mkdir()
    (model / "model.safetensors").rename(model / "sub" / "weights.safetensors")
    names = load_file(model / "sub" / "weights.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "sub/weights.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"other": torch.ones(3)}, model / "model-1.safetensors")
    svdcli.compress(model, tmp_path / "o", Recipe("rank", 9))
    assert svdcli.verify(tmp_path / "o", model).ok
    mapped = json.loads((tmp_path / "o" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(mapped.values()) == {"sub/weights.safetensors"}
    svdcli.expand(tmp_path / "o")
    assert set(load_file(tmp_path / "o-dense" / "sub" / "weights.safetensors")) == set(names)


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_float64_weights_whose_squares_are_lost_stay_dense(tmp_path: Path, scale: float) -> None:
    tensors = {"a.weight": weight(60, 50).double(), "b.weight": weight(60, 50).double() * scale}
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(SvdcliError, match=r"squares leave its range in b\.weight"):
        svdcli.compress(tmp_path / "m.safetensors", None, Recipe("rank", 9))
    done = svdcli.compress(tmp_path / "m.safetensors", None, Recipe("rank", 9, nonfinite="skip"))
    assert [row.rank for row in done.report.layers] == [9, None]
    with pytest.raises(SvdcliError, match=r"squares leave its range in b\.weight"):
        svdcli.spectrum(tmp_path / "m.safetensors")


# What is asked in keyword arguments ---------------------------------------------------------------


def test_keyword_arguments_do_what_a_recipe_does(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    recipe = Recipe("keep", 0.5, allocate="global", include=("layers.*",), dtype="BF16")
    svdcli.compress(model, tmp_path / "a", recipe)
    svdcli.compress(
        model, tmp_path / "b", keep=0.5, allocate="global", include=["layers.*"], dtype="bfloat16"
    )
    for name in ("model.safetensors", "svdcli.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(("target", "value"), [("rank", 20), ("keep", 0.5), ("energy", 0.9)])
@pytest.mark.parametrize("calibrated", [False, True])
def test_keyword_arguments_have_the_defaults_of_the_command(
    target: str, value: float, calibrated: bool
) -> None:
    found = recipe_for({target: value, "layout": None}, calibrated=calibrated)
    best = best_defaults(found.target, calibrated=calibrated)
    assert found == Recipe(found.target, value, **best)
    assert recipe_for({target: value, "layout": "dense"}, calibrated=calibrated).layout == "dense"


def test_a_target_is_given_once_and_in_one_way(tmp_path: Path) -> None:
    model, recipe = write_model(tmp_path / "m"), Recipe("keep", 0.5)
    plan = svdcli.compress(model, None, recipe, dry_run=True).plan
    one = "give exactly one target"
    for how, says in (
        ({}, f"{one}, not 0"),
        ({"layout": "dense"}, f"{one}, not 0"),
        ({"keep": None}, f"{one}, not 0"),
        ({"keep": 0.5, "rank": 3}, f"{one}, not 2"),
        ({"recipe": recipe, "keep": 0.5}, "exactly one of a recipe, a plan and keyword"),
        ({"recipe": recipe, "plan": plan}, "exactly one of a recipe, a plan and keyword"),
        ({"plan": plan, "layout": "dense"}, "exactly one of a recipe, a plan and keyword"),
        ({"keep": 0.5, "layout": "pivotd"}, "--layout 'pivotd' is unknown"),
        ({"keep": 0.5, "floor": 0.5}, "--floor is for --allocate global"),
    ):
        with pytest.raises(UsageError, match=says):
            svdcli.compress(model, tmp_path / "o", **how)
    with pytest.raises(TypeError, match="unexpected keyword argument 'kep'"):
        svdcli.compress(model, tmp_path / "o", kep=0.5)
    assert not (tmp_path / "o").exists()


def test_all_of_a_recipe_can_be_wanted() -> None:
    names = {field.name for field in dataclasses.fields(Recipe)} - {"target", "value"}
    assert names - {"calibration"} | set(words.TARGETS) == WANTED
