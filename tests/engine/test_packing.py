"""Layers in fewer bits, from a checkpoint to a file and back."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import cli, tree, weight, write_model
from safetensors.torch import load_file as read_tensors
from safetensors.torch import save_file

import svdcli
from svdcli.calibration.moments import metric_of, open_moments
from svdcli.engine.packing import parts_of
from svdcli.errors import NothingSelectedError, SvdcliError, UsageError
from svdcli.files.checkpoint import open_checkpoint
from svdcli.files.record import (
    check_record,
    condensed,
    record_of,
    shared_fields,
    stored_layers,
)
from svdcli.linalg.whitening import Metric, weighted, weighted_error
from svdcli.plan.packing import PLAIN, Packing

INT8, INT4 = Packing(8), Packing(4, 32)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tensors = {f"{i}.weight": weight(160, 128, i).to(torch.bfloat16) for i in range(3)}
    tensors["0.bias"] = torch.ones(160, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def dense_of(path: Path) -> dict[str, torch.Tensor]:
    """What the packed layers of an output stand for, in float64."""
    with open_checkpoint(path) as checkpoint:
        record = record_of(checkpoint)
        assert record is not None
        weights = {}
        for layer in stored_layers(checkpoint, record):
            stored = [checkpoint.read_tensor(tensor.name) for tensor in layer.stored()]
            up, *down = (part.double() for part in parts_of(layer, stored))
            weights[layer.tensor.name] = up @ down[0] if down else up
        return weights


@pytest.mark.parametrize("bits", [8, 4])
def test_the_report_and_expand_tell_what_is_stored(bits: int, model: Path, tmp_path: Path) -> None:
    out, dense = tmp_path / "o.safetensors", tmp_path / "d.safetensors"
    groups = {"group_size": 32} if bits == 4 else {}
    outcome = svdcli.compress(model, out, rank=32, bits=bits, **groups)
    stored, original = dense_of(out), read_tensors(model)
    for row in outcome.report.layers:
        w = original[row.name].double()
        error = float((w - stored[row.name]).norm() / w.norm())
        assert row.relative_error == pytest.approx(error, rel=1e-5)
        best = weighted(w, 32, Metric(torch.zeros(128, 128))).tail
        share = 1 - best / float((w - stored[row.name]).square().sum())
        assert row.rounding_share == pytest.approx(share, rel=1e-2)
        assert row.bits == bits
    assert outcome.path is not None
    assert sum(outcome.report.files.values()) == out.stat().st_size
    assert svdcli.verify(out, model).ok
    svdcli.expand(out, dense)
    for name, tensor in read_tensors(dense).items():
        assert (tensor.dtype, tensor.shape) == (original[name].dtype, original[name].shape)
        if name in stored:
            torch.testing.assert_close(tensor.double(), stored[name], rtol=2**-8, atol=1e-3)
        else:
            assert torch.equal(tensor, original[name])


def test_a_dry_run_knows_every_byte(model: Path, tmp_path: Path) -> None:
    wanted: dict[str, Any] = {"keep": 0.6, "bits": "4", "group_size": 32}
    predicted = svdcli.compress(model, tmp_path / "o.safetensors", dry_run=True, **wanted).report
    written = svdcli.compress(model, tmp_path / "o.safetensors", **wanted).report
    assert predicted.files == written.files
    assert predicted.selected == written.selected


def test_a_plan_gives_the_same_bytes_again(model: Path, tmp_path: Path) -> None:
    first = svdcli.compress(model, tmp_path / "a.safetensors", rank=32, bits=4)
    svdcli.compress(model, tmp_path / "b.safetensors", plan=first.plan)
    one, other = (read_tensors(tmp_path / f"{name}.safetensors") for name in "ab")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_packed_output_is_no_source(model: Path, tmp_path: Path) -> None:
    svdcli.compress(model, tmp_path / "o.safetensors", rank=32, bits=8)
    with pytest.raises(SvdcliError, match="written by svdcli already"):
        svdcli.compress(tmp_path / "o.safetensors", rank=16)


def test_a_damaged_code_does_not_verify(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.safetensors"
    svdcli.compress(model, out, rank=32, bits=4)
    data = bytearray(out.read_bytes())
    data[-1000:] = bytes(1000)
    out.write_bytes(data)
    assert not svdcli.verify(out, model).ok


@pytest.fixture(scope="module")
def moments(readable: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """What calibrating a family's model gives."""
    made: dict[str, Path] = {}

    def measured(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("moments") / f"{family}.safetensors"
            text = svdcli.Texts("words", (" ".join(f"w{i * i % 90 + 2}" for i in range(3000)),))
            svdcli.calibrate(readable(family), made[family], text, samples=24, seq_len=32)
        return made[family]

    return measured


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_bits_and_ranks_of_one_budget(
    share: float, readable: Any, moments: Callable[[str], Path], tmp_path: Path
) -> None:
    model = readable("llama")
    outcome = svdcli.compress(
        model, tmp_path / "o", calibration=moments("llama"), keep_bytes=share, group_size=32
    )
    selected = outcome.report.selected
    assert selected.bytes_after <= share * selected.bytes_before
    assert svdcli.verify(tmp_path / "o", model).ok
    assert outcome.report.predicted_loss is not None
    again = svdcli.compress(
        model, tmp_path / "p", calibration=moments("llama"), keep_bytes=share, group_size=32
    )
    assert tree(tmp_path / "o") == tree(tmp_path / "p")
    assert again.report.predicted_loss == outcome.report.predicted_loss


def test_the_size_of_the_output_is_never_above_what_was_asked(
    readable: Any, moments: Callable[[str], Path], tmp_path: Path
) -> None:
    model = readable("llama")
    whole = sum(file.stat().st_size for file in model.iterdir())
    outcome = svdcli.compress(
        model, tmp_path / "o", calibration=moments("llama"), size=int(0.8 * whole), bits="auto"
    )
    assert outcome.report.total.bytes_after <= 0.8 * whole


@pytest.mark.parametrize("share", [0.17, 0.3])
@pytest.mark.parametrize("family", ["llama", "gpt2"])  # gpt2 stores (in, out), and has biases
def test_the_plan_knows_what_rounding_will_cost(
    family: str, share: float, readable: Any, moments: Callable[[str], Path], tmp_path: Path
) -> None:
    """The predicted loss against that of what is stored, in the metric of the calibration."""
    model = readable(family)
    outcome = svdcli.compress(
        model, tmp_path / "o", calibration=moments(family), keep_bytes=share, group_size=32
    )
    opened, stored = open_moments(moments(family)), dense_of(tmp_path / "o")
    with open_checkpoint(model) as original:
        lost = 0.0
        for name, approx in stored.items():
            measured = opened.of(name)
            assert measured is not None
            metric = metric_of(measured, torch.device("cpu"), centred=family == "gpt2")
            w = original.read_tensor(name)
            if measured.transposed:
                w, approx = w.T, approx.T
            lost += weighted_error(w, approx, metric) / 2
    assert outcome.report.predicted_loss == pytest.approx(lost, rel=0.15)


@pytest.mark.parametrize("bits", [8, 4])
def test_ranks_count_by_their_bytes(bits: int, tmp_path: Path) -> None:
    """A rank that saves no parameters saves bytes where numbers have few bits."""
    save_file({"a.weight": weight(128, 256).to(torch.bfloat16)}, tmp_path / "m.safetensors")
    out = tmp_path / "o.safetensors"
    report = svdcli.compress(tmp_path / "m.safetensors", out, rank=96, bits=bits).report
    [row] = report.layers
    assert (row.rank, row.bits) == (96, bits)
    assert 128 * 256 < 96 * (128 + 256)
    assert row.bytes_after < row.bytes_before


def test_a_budget_that_holds_everything_says_so(
    readable: Any, moments: Callable[[str], Path], tmp_path: Path
) -> None:
    model = readable("llama")
    with pytest.raises(NothingSelectedError, match="the budget holds every layer as it is"):
        svdcli.compress(model, tmp_path / "o", calibration=moments("llama"), keep_bytes=1.0)


@pytest.mark.parametrize("bits", [8, 16])
def test_groups_where_there_are_none_are_refused(bits: int, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--group-size changes nothing"):
        svdcli.compress(model, tmp_path / "o.safetensors", rank=16, bits=bits, group_size=32)


def test_auto_without_a_calibration_is_refused(tmp_path: Path) -> None:
    done = cli("compress", write_model(tmp_path / "m"), "--keep-bytes", "0.3", "--bits", "auto")
    assert (done.code, done.out) == (2, b"")
    assert "takes a calibration" in done.err


def test_a_short_record_keeps_apart_what_layers_do_not_share(model: Path, tmp_path: Path) -> None:
    """The first layer is packed, and the second is not."""
    plan = svdcli.compress(model, tmp_path / "o.safetensors", rank=32, bits=4, dry_run=True).plan
    plain = tuple(replace(layer, packing=PLAIN) for layer in plan.layers[1:])
    data = replace(plan, layers=(plan.layers[0], *plain)).to_json()
    record = {**data, "source": dict.fromkeys(("name", "fingerprint", "bytes", "parameters"), 0)}
    record["left_out"] = {}
    short = condensed(record, shared_fields(record))
    assert len(str(short)) < len(str(record))
    assert check_record(short, "o")["layers"] == record["layers"]


def test_an_interrupted_run_goes_on_to_the_same_bytes(model: Path, tmp_path: Path) -> None:
    def stop(phase: str, *_: object) -> None:
        if phase == "write":
            raise KeyboardInterrupt

    unbroken, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    svdcli.compress(model, unbroken, rank=32, bits=4)
    with pytest.raises(KeyboardInterrupt):
        svdcli.compress(model, out, rank=32, bits=4, progress=stop)
    assert not out.exists()
    outcome = svdcli.compress(model, out, rank=32, bits=4)
    assert not outcome.started_over
    one, other = read_tensors(unbroken), read_tensors(out)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [row.rounding_share for row in outcome.report.layers] == [
        row.rounding_share for row in svdcli.report(unbroken).layers
    ]


@pytest.mark.parametrize("shape", [(160, 5), (-1, -1), (160, 4 * 10**12), (32, 160)])
def test_a_stored_shape_that_is_another_is_one_line(
    shape: tuple[int, int], model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "o.safetensors"
    svdcli.compress(model, out, rank=32, bits=4)
    data = bytearray(out.read_bytes())
    length = int.from_bytes(data[:8], "little")
    info = json.loads(data[8 : 8 + length])["1.svd_up.weight_shape"]
    start, end = (8 + length + offset for offset in info["data_offsets"])
    data[start:end] = struct.pack("<2q", *shape)
    out.write_bytes(data)
    for arguments in (("verify", out, "--against", model), ("expand", out)):
        done = cli(*arguments)
        assert (done.code, done.out) == (1, b"")
        assert "a stored shape of 1.weight is" in done.err
        assert done.err.count("\n") == 1
