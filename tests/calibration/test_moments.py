"""Files of moments: what goes in comes out, and what is damaged is one clear error."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import svdcli
from svdcli.calibration.moments import (
    FORMAT,
    METADATA,
    LayerMoments,
    Provenance,
    Spool,
    check_provenance,
    metric_of,
    open_moments,
    write_moments,
)
from svdcli.errors import BadCheckpointError, SvdcliError
from svdcli.linalg.damping import damp
from svdcli.linalg.rounding import DAMPING_COLUMNS

PROVENANCE = Provenance("f" * 64, "a text", "a" * 64, 4096, 8, 512, 3, True, True, "nats")
LAYERS = {
    "a.q.weight": {"input": "a.q.weight", "output": "output.a.q.weight", "transposed": False},
    "a.k.weight": {"input": "a.q.weight", "output": "output.a.k.weight", "transposed": False},
    "b.weight": {"input": "b.weight", "output": None, "transposed": True},
}
Edit = Callable[[dict[str, Any]], Any]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sums() -> dict[str, Tensor]:
    return {
        "input.a.q.weight": normal(6, 6, seed=1),
        "mean.a.q.weight": normal(6, seed=2),
        "output.a.q.weight": normal(4, 4, seed=3),
        "output.a.k.weight": normal(4, seed=4),
        "input.b.weight": normal(5, 5, seed=5),
        "mean.b.weight": normal(5, seed=6),
        "sensitivity.a.q.weight": torch.tensor([0.3, 0.25]),
        "sensitivity.b.weight": torch.tensor([0.3, 0.0]),
    }


def spooled(folder: Path, tensors: dict[str, Tensor]) -> Spool:
    folder.mkdir()
    spool = Spool(folder)
    for key, value in tensors.items():
        spool.add(key, value)
    return spool


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A file with every kind of key, each scaled by 1."""
    path = tmp_path / "out" / "moments.safetensors"
    path.parent.mkdir()
    write_moments(
        path, spooled(tmp_path / "spool", sums()), dict.fromkeys(sums(), 1.0), LAYERS, PROVENANCE
    )
    return path


def edited(path: Path, edit: Edit) -> Path:
    """The same file with other metadata; edit changes them, or returns what takes their place."""
    with safe_open(path, "pt") as file:
        data = json.loads(file.metadata()[METADATA])
    replaced = edit(data)
    text = (
        replaced
        if isinstance(replaced, str)
        else json.dumps(data if replaced is None else replaced)
    )
    save_file(load_file(path), path, {METADATA: text})
    return path


def test_every_key_comes_back(written: Path) -> None:
    moments, expected = open_moments(written), sums()
    assert moments.provenance == PROVENANCE
    assert set(moments.layers) == set(LAYERS)
    for name, keys in LAYERS.items():
        found = moments.of(name)
        assert found is not None
        assert torch.equal(found.inputs, expected[f"input.{keys['input']}"])
        assert torch.equal(found.mean, expected[f"mean.{keys['input']}"])
        assert found.transposed is keys["transposed"]
        if keys["output"] is None:
            assert found.outputs is None
        else:
            assert found.outputs is not None
            assert torch.equal(found.outputs, expected[str(keys["output"])])
    assert [moments.metric_name(name) for name in LAYERS] == ["full", "diagonal", "inputs"]
    assert moments.loss_scale("a.q.weight") == pytest.approx(0.3 / 0.25)
    assert moments.loss_scale("a.k.weight") is None
    assert moments.loss_scale("b.weight") == 0
    assert moments.of("c.weight") is None
    assert moments.metric_name("c.weight") == ""


def test_the_reference_reader_finds_the_same(written: Path) -> None:
    found = load_file(written)
    assert found.keys() == sums().keys()
    assert all(torch.equal(found[key], value) for key, value in sums().items())


def test_sums_add_up_and_are_scaled(tmp_path: Path) -> None:
    spool = spooled(tmp_path / "spool", sums())
    for key, value in sums().items():
        spool.add(key, 2 * value.double())
    path = tmp_path / "m.safetensors"
    write_moments(
        path, spool, {key: 1 / (at + 1) for at, key in enumerate(spool.shapes)}, LAYERS, PROVENANCE
    )
    for at, (key, value) in enumerate(sums().items()):
        found = load_file(path)[key]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, 3 * value / (at + 1), rtol=1e-6, atol=1e-6)


def test_long_names_stay_apart(tmp_path: Path) -> None:
    deep = "model." + "inner." * 30 + "layers.{}.fc.weight"
    keys = [f"input.{deep.format(at)}" for at in range(4)]
    spool = spooled(
        tmp_path / "spool", {key: torch.full((2, 2), float(at)) for at, key in enumerate(keys)}
    )
    assert [float(spool.get(key)[0, 0]) for key in keys] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("key", "shape"),
    [("input.b.weight", (5, 4)), ("mean.b.weight", (4,)), ("output.a.q.weight", (4, 3))],
)
def test_moments_whose_shapes_do_not_fit_are_damaged(
    key: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    path = tmp_path / "m.safetensors"
    tensors = sums() | {key: normal(*shape)}
    write_moments(
        path, spooled(tmp_path / "spool", tensors), dict.fromkeys(tensors, 1.0), LAYERS, PROVENANCE
    )
    with pytest.raises(BadCheckpointError, match="damaged"):
        open_moments(path)


@pytest.mark.parametrize("key", ["input.b.weight", "mean.b.weight", "output.a.q.weight"])
def test_moments_that_are_not_finite_are_refused_with_the_layer(key: str, tmp_path: Path) -> None:
    tensors = sums()
    tensors[key].view(-1)[0] = math.nan
    path = tmp_path / "m.safetensors"
    write_moments(
        path, spooled(tmp_path / "spool", tensors), dict.fromkeys(tensors, 1.0), LAYERS, PROVENANCE
    )
    name = "b.weight" if "b.weight" in key else "a.q.weight"
    with pytest.raises(BadCheckpointError, match=f"of {name} hold NaN"):
        open_moments(path).of(name)


def test_the_same_moments_are_the_same_bytes_and_others_have_another_digest(
    written: Path, tmp_path: Path
) -> None:
    again, other = tmp_path / "again.safetensors", tmp_path / "other.safetensors"
    spool = spooled(tmp_path / "spool2", sums())
    write_moments(again, spool, dict.fromkeys(sums(), 1.0), LAYERS, PROVENANCE)
    write_moments(
        other, spool, dict.fromkeys(sums(), 1.0) | {"mean.b.weight": 1.001}, LAYERS, PROVENANCE
    )
    assert again.read_bytes() == written.read_bytes()
    assert open_moments(again).digest == open_moments(written).digest != open_moments(other).digest


def test_centred_moments_are_those_of_the_covariance() -> None:
    x = normal(50, 6).double() + 3
    outputs = torch.ones(4)
    moments = LayerMoments((x.T @ x / 50).float(), x.mean(0).float(), outputs, False)
    centred, plain = (
        metric_of(moments, torch.device("cpu"), centred=flag) for flag in (True, False)
    )
    assert centred.inputs.dtype == torch.float64
    torch.testing.assert_close(centred.inputs, x.T.cov(correction=0), rtol=0, atol=1e-5)
    assert torch.equal(plain.inputs, moments.inputs.double())
    assert centred.outputs is not None
    assert torch.equal(centred.outputs, outputs)


# Whole or not at all ------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [None, b"what was there"])
def test_a_write_that_fails_leaves_everything_as_it_was(
    tmp_path: Path, before: bytes | None
) -> None:
    spool, folder = spooled(tmp_path / "spool", sums()), tmp_path / "out"
    folder.mkdir()
    path = folder / "m.safetensors"
    if before is not None:
        path.write_bytes(before)
    next((tmp_path / "spool").iterdir()).unlink()
    with pytest.raises(FileNotFoundError):
        write_moments(path, spool, dict.fromkeys(sums(), 1.0), LAYERS, PROVENANCE)
    assert [file.read_bytes() for file in folder.iterdir()] == ([] if before is None else [before])


def test_nothing_is_left_beside_the_file(written: Path) -> None:
    assert list(written.parent.iterdir()) == [written]


# What is no file of moments -----------------------------------------------------------------------


def without(*path: str) -> Edit:
    def edit(data: dict[str, Any]) -> None:
        for key in path[:-1]:
            data = data[key]
        del data[path[-1]]

    return edit


def with_value(value: Any, *path: str) -> Edit:
    def edit(data: dict[str, Any]) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return edit


DAMAGES = {
    "no JSON": lambda data: "{",
    "null": lambda data: "null",
    "a list": lambda data: [1],
    "no format": without("format"),
    "format in words": with_value("one", "format"),
    "no layers": without("layers"),
    "layers in a list": with_value(["a.q.weight"], "layers"),
    "a layer in words": with_value("full", "layers", "a.q.weight"),
    "no input": without("layers", "a.q.weight", "input"),
    "no output": without("layers", "a.q.weight", "output"),
    "no direction": without("layers", "b.weight", "transposed"),
    "direction in words": with_value("yes", "layers", "b.weight", "transposed"),
    "an input that is not there": with_value("c.weight", "layers", "b.weight", "input"),
    "an output that is not there": with_value("output.c.weight", "layers", "b.weight", "output"),
    "an output in a list": with_value([1], "layers", "b.weight", "output"),
} | {f"no {name}": without(name) for name in Provenance.__dataclass_fields__ if name != "precision"}


def test_files_from_before_there_was_a_choice_ran_in_float32(written: Path) -> None:
    assert open_moments(edited(written, without("precision"))).provenance == PROVENANCE


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_metadata_is_one_error(written: Path, damage: str) -> None:
    with pytest.raises(BadCheckpointError, match="moments are damaged") as caught:
        open_moments(edited(written, DAMAGES[damage]))
    assert str(written) in str(caught.value)
    assert "calibrate again" in str(caught.value)


@pytest.mark.parametrize(
    "key", ["input.a.q.weight", "mean.a.q.weight", "output.a.q.weight", "output.a.k.weight"]
)
def test_a_missing_tensor_is_an_error(written: Path, key: str) -> None:
    with safe_open(written, "pt") as file:
        metadata = file.metadata()
    save_file(
        {name: value for name, value in load_file(written).items() if name != key},
        written,
        metadata,
    )
    with pytest.raises(BadCheckpointError, match="moments are damaged"):
        open_moments(written)


def test_a_newer_format_is_refused(written: Path) -> None:
    with pytest.raises(
        BadCheckpointError, match=f"has format {FORMAT + 1}, this svdcli knows {FORMAT}"
    ) as caught:
        open_moments(edited(written, with_value(FORMAT + 1, "format")))
    assert "upgrade" in str(caught.value)


def test_another_model_s_moments_are_refused(written: Path) -> None:
    moments = open_moments(written)
    check_provenance(moments, PROVENANCE.fingerprint, "m.safetensors")
    with pytest.raises(SvdcliError, match=r"another model than m\.safetensors"):
        check_provenance(moments, "0" * 64, "m.safetensors")


def test_a_file_cut_short_is_an_error_wherever_it_was_cut(written: Path) -> None:
    whole = written.read_bytes()
    for size in {
        0,
        7,
        8,
        100,
        *range(len(whole) // 9, len(whole), len(whole) // 9),
        len(whole) - 1,
    }:
        written.write_bytes(whole[:size])
        with pytest.raises(BadCheckpointError):
            open_moments(written)


def test_other_files_are_no_moments(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "m.safetensors")
    save_file({"a.weight": torch.ones(40, 40)}, tmp_path / "n.safetensors", {"format": "pt"})
    svdcli.compress(
        tmp_path / "n.safetensors", tmp_path / "o.safetensors", svdcli.Recipe("rank", 4)
    )
    for name in ("m", "n", "o"):
        with pytest.raises(BadCheckpointError, match="not written by svdcli calibrate"):
            open_moments(tmp_path / f"{name}.safetensors")
    with pytest.raises(SvdcliError, match="does not exist"):
        open_moments(tmp_path / "none.safetensors")


@pytest.mark.parametrize("spread", [1e-7, 1e-5, 1e-4, 1e-3, 1e-2, 1.0])
@pytest.mark.parametrize("n", [16, 64, 256])
def test_a_covariance_of_inputs_that_hardly_vary_has_a_root(n: int, spread: float) -> None:
    """Sums in float32 leave a remainder of either sign where the mean is taken out."""
    generator = torch.Generator().manual_seed(n)
    mean = torch.randn(n, generator=generator, dtype=torch.float64)
    x = mean + spread * torch.randn(2000, n, generator=generator, dtype=torch.float64)
    moments = LayerMoments((x.T @ x / 2000).float(), x.mean(0).float(), None, transposed=False)
    inputs = metric_of(moments, torch.device("cpu"), centred=True).inputs
    torch.linalg.cholesky(damp(inputs, DAMPING_COLUMNS))

    # Where they do vary it is what it was
    if spread == 1.0:
        centred = moments.inputs.double() - torch.outer(moments.mean, moments.mean).double()
        torch.testing.assert_close(inputs, centred, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("full", [True, False])
def test_a_disk_that_is_full_is_named(
    full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("unexpected pos 896 vs 790")

    free = 0 if full else 10**9
    monkeypatch.setattr(torch, "save", fail)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(OSError if full else RuntimeError, match="No space" if full else "pos 896"):
        Spool(tmp_path).put("a", torch.ones(3))
