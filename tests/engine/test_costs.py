"""What a dry run says of the time, and that it reads no weights for it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from helpers import cli, write_model
from safetensors.torch import save_file

import svdcli
from svdcli.engine import job
from svdcli.engine.costs import Costs, Speeds, costs_of, speeds_here
from svdcli.engine.executor import Local
from svdcli.engine.planning import design_of
from svdcli.files.checkpoint import Checkpoint, open_checkpoint
from svdcli.files.header import render_header
from svdcli.plan.tensors import TensorInfo

SPEEDS = Speeds(workers=2, product=1e11, eigen=1e10, values=3e10, digest=1e9)


def sparse_model(folder: Path, layers: int, hidden: int, ffn: int) -> Path:
    """A Llama's headers in shards of a block each, whose data takes no room on disk. A tensor
    begins with its name, as no two tensors begin alike."""
    folder.mkdir()
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden // 8, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
        "input_layernorm": (hidden,),
    }
    weight_map = {}
    for block in range(layers):
        name = f"model-{block + 1:05d}-of-{layers:05d}.safetensors"
        tensors = [
            TensorInfo(f"model.layers.{block}.{part}.weight", "BF16", shape)
            for part, shape in shapes.items()
        ]
        with (folder / name).open("wb") as stream:
            stream.write(render_header(tensors, {"format": "pt"}))
            for tensor in tensors:
                begin = stream.tell()
                stream.write(tensor.name.encode())
                stream.seek(begin + tensor.nbytes)
            stream.truncate()
        weight_map |= {tensor.name: name for tensor in tensors}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# Headers alone ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wanted", [{"keep": 0.6}, {"rank": 64}, {"keep": 0.6, "layout": "pivoted"}]
)
def test_a_large_model_is_planned_from_its_headers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: dict[str, object]
) -> None:
    model = sparse_model(tmp_path / "m", 12, 8192, 28672)
    apparent = sum(path.stat().st_size for path in model.iterdir())
    on_disk = sum(path.stat().st_blocks * 512 for path in model.iterdir())
    assert apparent > 13e9
    if on_disk > 1e8:
        pytest.skip("files have no holes here")
    for reads in ("read_tensor", "chunks"):
        monkeypatch.setattr(Checkpoint, reads, lambda *_: pytest.fail("read a weight"))
    outcome = svdcli.compress(model, None, dry_run=True, **wanted)  # type: ignore[arg-type]
    assert outcome.unchecked.startswith("that all weights are finite")
    assert len(outcome.plan.factored) == 12 * 4
    index = (model / "model.safetensors.index.json").stat().st_size
    assert outcome.report.total.bytes_before == apparent - index
    assert outcome.costs is not None
    estimate = outcome.costs.estimate()
    assert estimate.bytes_written == outcome.report.total.bytes_after
    assert estimate.jobs >= 12 * 5
    assert list(tmp_path.iterdir()) == [model]


def test_a_plan_from_headers_is_that_of_the_run(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    dry = svdcli.compress(model, tmp_path / "o", dry_run=True, keep=0.6)
    done = svdcli.compress(model, tmp_path / "o", keep=0.6)
    assert dry.plan == done.plan
    assert dry.unchecked
    assert (done.unchecked, done.costs) == ("", None)


@pytest.mark.parametrize(
    "wanted",
    [{"error": 0.9}, {"keep": 0.6, "allocate": "global"}, {"rank": 9, "nonfinite": "skip"}],
)
def test_weights_are_read_where_the_plan_goes_by_them(
    tmp_path: Path, wanted: dict[str, object]
) -> None:
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    save_file({"a.weight": weight}, tmp_path / "m.safetensors")
    outcome = svdcli.compress(tmp_path / "m.safetensors", None, dry_run=True, **wanted)  # type: ignore[arg-type]
    assert outcome.unchecked == ""


# Time ---------------------------------------------------------------------------------------------


def costs(model: Path, speeds: Speeds = SPEEDS, **wanted: object) -> Costs:
    """Of a run on that model."""
    plan = svdcli.compress(model, None, dry_run=True, **wanted).plan  # type: ignore[arg-type]
    checkpoint = open_checkpoint(model)
    design = design_of(checkpoint, plan, None)
    return costs_of(design, plan.originals, speeds, spectra=False, calibrated=False)


def test_more_workers_are_quicker_down_to_the_longest_job(tmp_path: Path) -> None:
    found = costs(sparse_model(tmp_path / "m", 3, 4096, 11008), keep=0.6)
    estimates = [found.estimate(workers) for workers in (1, 2, 4, 1000)]
    seconds = [estimate.seconds for estimate in estimates]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] == pytest.approx(math.fsum(map(math.fsum, found.phases.values())))
    longest = estimates[0].longest_job_seconds
    assert longest == max(found.phases["write"])
    assert seconds[-1] == pytest.approx(sum(max(phase) for phase in found.phases.values()))
    assert found.estimate() == found.estimate(2)


def test_bytes_are_those_that_a_run_moves(tmp_path: Path) -> None:
    """Each weight that is factored is read to be checked and to be solved, and what is written is
    read back for its digest."""
    model = write_model(tmp_path / "m")
    found = costs(model, keep=0.5)
    report = svdcli.compress(model, tmp_path / "o", keep=0.5).report
    written = sum(report.files.values())
    tensors = sum(info.nbytes for info in open_checkpoint(model).infos)
    assert found.bytes_written == written
    assert found.bytes_read == tensors + report.selected.bytes_before + written


def test_a_job_of_twice_the_side_takes_eight_times_as_long(tmp_path: Path) -> None:
    small, large = (
        costs(sparse_model(tmp_path / f"m{side}", 1, side, 2 * side), keep=0.6).phases["write"]
        for side in (2048, 4096)
    )
    assert 7 < max(large) / max(small) < 8.1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {"layout": "pivoted"}),
        ({"solver": "randomized"}, {"solver": "gram"}),
        ({"solver": "gram"}, {"solver": "svd"}),
    ],
)
def test_what_is_more_work_takes_longer(
    tmp_path: Path, first: dict[str, object], second: dict[str, object]
) -> None:
    model = sparse_model(tmp_path / "m", 1, 4096, 11008)
    less, more = (costs(model, rank=256, **how).estimate().seconds for how in (first, second))
    assert less < more


def test_speeds_are_measured_once() -> None:
    speeds = speeds_here(Local(torch.device("cpu")))
    assert speeds == speeds_here(Local(torch.device("cpu")))
    assert speeds.workers == (1 if torch.get_num_threads() < 2 else 2)
    assert 1e8 < speeds.eigen < speeds.product < 1e14


def test_the_order_of_jobs_follows_from_shapes_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svdcli.engine.costs.speeds_here", lambda *_: pytest.fail("measured"))
    model = write_model(tmp_path / "m")
    plan = svdcli.compress(model, tmp_path / "o", keep=0.5).plan
    units = design_of(open_checkpoint(model), plan, None).units
    layers = {layer.tensor.name: layer for layer in plan.factored}
    guesses = [job._seconds(unit, layers.get(unit.name)) for unit in units]
    assert guesses == [job._seconds(unit, layers.get(unit.name)) for unit in units]


def test_the_estimate_is_told_and_is_data(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    told = cli("compress", model, "--keep", "0.5", "--dry-run").out.decode()
    assert "a run        about 1 s on " in told
    data = json.loads(cli("compress", model, "--keep", "0.5", "--dry-run", "--json").out)
    assert data["estimate"].keys() == {
        "seconds",
        "workers",
        "jobs",
        "longest_job_seconds",
        "bytes_read",
        "bytes_written",
    }
    done = json.loads(cli("compress", model, "--keep", "0.5", "--json").out)
    assert "estimate" not in done
