"""State dicts are found at any depth under any usual name; nothing of another library is run to get
at them."""

from __future__ import annotations

import argparse
import collections
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import cli, run, weight
from safetensors.torch import load_file

from svdcli.errors import BadCheckpointError, UsageError
from svdcli.files.checkpoint import open_checkpoint
from svdcli.plan.recipe import Recipe
from svdcli.verbs.compress import compress
from svdcli.verbs.inspect import inspect
from svdcli.verbs.verify import verify

NET = {"net.0.weight": weight(48, 40), "net.0.bias": torch.ones(48)}
SMALL = {"disc.weight": torch.ones(3, 4)}


def same_size() -> dict[str, torch.Tensor]:
    return {name: tensor + 1 for name, tensor in NET.items()}


FORMS: dict[str, Any] = {
    "params_ema": {"params_ema": NET},
    "net": {"net": NET, "epoch": 3},
    "state_dict_ema": {"state_dict_ema": NET},
    "weights": {"weights": NET},
    "generator": {"generator": NET, "discriminator": SMALL},
    "model.state_dict": {"model": {"state_dict": NET}},
    "a.b.c.d": {"a": {"b": {"c": {"d": NET}}}},
    "state_dict": {
        "state_dict": NET,
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(500, 500)}}}],
        "hyper_parameters": {"lr": 1e-3},
        "callbacks": {"EarlyStopping": {"best_score": torch.tensor(1.0)}},
    },
    "model": {
        "model": NET,
        "optimizer": {
            "state": {0: {"exp_avg": torch.ones(500, 500)}},
            "exp_avg": torch.ones(500, 500),
        },
    },
    "student": {"student": NET, "step": torch.tensor(7)},
    "0": (NET, {"lr": 0.1}),
    "1": [3, NET],
    "7": {7: NET},
    "models.0": {"models": [NET, SMALL]},
}


@pytest.mark.parametrize("key", FORMS)
def test_the_dict_of_tensors_is_found(tmp_path: Path, key: str) -> None:
    torch.save(FORMS[key], tmp_path / "x.pth")
    checkpoint = open_checkpoint(tmp_path / "x.pth")
    assert checkpoint.state_dict == key
    assert checkpoint.tensors.keys() == NET.keys()
    assert torch.equal(checkpoint.read_tensor("net.0.weight"), NET["net.0.weight"])
    assert checkpoint.notes == []


def test_a_dict_at_the_top_has_no_key(tmp_path: Path) -> None:
    torch.save(NET, tmp_path / "x.pth")
    assert open_checkpoint(tmp_path / "x.pth").state_dict == ""


def test_everything_beside_it_is_named(tmp_path: Path) -> None:
    torch.save(
        {"outer": {"net": NET, "version": 2}, "epoch": 3, "discriminator": SMALL},
        tmp_path / "x.pth",
    )
    left_out = open_checkpoint(tmp_path / "x.pth").left_out
    assert set(left_out) == {"epoch", "discriminator", "outer.version"}


@pytest.mark.parametrize(
    ("value", "taken"),
    [
        ({"params": NET, "params_ema": same_size()}, "params_ema"),
        ({"model": NET, "ema": {"state": same_size()}}, "ema.state"),
        ({"a": NET, "b": same_size()}, "a"),
        ({"a": {"disc.weight": weight(12, 12)}, "b": NET}, "b"),
    ],
)
def test_of_several_the_largest_is_taken_and_the_choice_is_told(
    tmp_path: Path, value: Any, taken: str
) -> None:
    torch.save(value, tmp_path / "x.pth")
    checkpoint = open_checkpoint(tmp_path / "x.pth")
    assert checkpoint.state_dict == taken
    others = {"params", "model", "a", "b"} & set(value) - {taken}
    assert len(checkpoint.notes) == 1
    assert all(other in checkpoint.notes[0] for other in others)
    assert "--state-dict KEY" in checkpoint.notes[0]


@pytest.mark.parametrize("asked", ["params", "nested.ema", "ema"])
def test_the_key_decides(tmp_path: Path, asked: str) -> None:
    value = {
        "params": NET,
        "params_ema": same_size(),
        "nested": {"ema": {"w.weight": weight(64, 64)}},
    }
    torch.save(value, tmp_path / "x.pth")
    checkpoint = open_checkpoint(tmp_path / "x.pth", state_dict=asked)
    expected = value["params"] if asked == "params" else value["nested"]["ema"]
    assert checkpoint.tensors.keys() == expected.keys()
    assert all(
        torch.equal(checkpoint.read_tensor(name), tensor) for name, tensor in expected.items()
    )
    assert checkpoint.notes == []


def test_a_key_that_is_none(tmp_path: Path) -> None:
    torch.save({"a": {"net": NET}, "b": {"net": same_size()}}, tmp_path / "x.pth")
    with pytest.raises(UsageError, match=r"no dict of tensors called 'c'; it holds a\.net, b\.net"):
        open_checkpoint(tmp_path / "x.pth", state_dict="c")
    with pytest.raises(UsageError, match="several dicts"):
        open_checkpoint(tmp_path / "x.pth", state_dict="net")
    with pytest.raises(UsageError, match="PyTorch files"):
        open_checkpoint(
            Path(__file__).parents[2] / "sample_models" / "mlp.safetensors", state_dict="net"
        )


def test_the_key_on_the_command_line_and_back(tmp_path: Path) -> None:
    torch.save({"params": NET, "params_ema": same_size()}, tmp_path / "x.pth")
    out = tmp_path / "out.safetensors"
    done = cli("compress", tmp_path / "x.pth", "--rank", "8", "--state-dict", "params", "-o", out)
    assert done.code == 0, done.err
    assert torch.equal(load_file(out)["net.0.bias"], NET["net.0.bias"])
    assert verify(out, tmp_path / "x.pth").ok  # which asks for the same key
    assert inspect(tmp_path / "x.pth").notes
    assert not inspect(tmp_path / "x.pth", state_dict="params").notes
    listed = cli("inspect", tmp_path / "x.pth", "--state-dict", "params", "--names")
    assert listed.out.decode().split() == ["net.0.weight"]


def test_a_choice_is_in_the_report(tmp_path: Path) -> None:
    torch.save({"params": NET, "params_ema": same_size()}, tmp_path / "x.pth")
    report = compress(tmp_path / "x.pth", recipe=Recipe("rank", 8)).report
    assert any("params_ema" in note for note in report.notes)
    assert "params" in report.left_out


# Objects of other libraries -----------------------------------------------------------------------


class Settings(dict):  # type: ignore[type-arg]
    """As training libraries have them: a dict of their own."""


def touch(proof: Path) -> None:
    proof.touch()


class Trap:
    """Unpickling this runs code."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return (touch, (self.proof,))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_objects_beside_the_tensors_do_not_matter(tmp_path: Path, legacy: bool) -> None:
    """Namespaces of arguments, numbers of NumPy, settings of a trainer: left out, and never brought
    to life."""
    import numpy

    value = {
        "model": NET,
        "args": argparse.Namespace(lr=1e-3, name="run"),
        "best": numpy.float64(0.5),
        "config": Settings(depth=3),
        "counts": collections.defaultdict(int, a=1),
        "trap": Trap(tmp_path / "ran"),
    }
    torch.save(value, tmp_path / "x.ckpt", _use_new_zipfile_serialization=not legacy)
    checkpoint = open_checkpoint(tmp_path / "x.ckpt")
    assert torch.equal(checkpoint.read_tensor("net.0.weight"), NET["net.0.weight"])
    assert set(checkpoint.left_out) == value.keys() - {"model"}
    assert not (tmp_path / "ran").exists()


def test_an_object_among_the_tensors_is_refused(tmp_path: Path) -> None:
    """It may be a tensor of another library, without which the model is not whole."""
    torch.save(NET | {"net.1.weight": Trap(tmp_path / "ran")}, tmp_path / "x.ckpt")
    with pytest.raises(BadCheckpointError, match="needs code to unpickle"):
        open_checkpoint(tmp_path / "x.ckpt")
    assert not (tmp_path / "ran").exists()


def test_functions_of_the_system_are_refused_in_any_place(tmp_path: Path) -> None:
    class System:
        def __reduce__(self) -> tuple[Any, ...]:
            import os

            return (os.system, (f"touch {tmp_path / 'ran'}",))

    torch.save({"model": NET, "x": System()}, tmp_path / "x.ckpt")
    with pytest.raises(BadCheckpointError, match="needs code to unpickle"):
        open_checkpoint(tmp_path / "x.ckpt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        (b"Entry not found", "a text file ('Entry not found')"),
        (pickle.dumps({"a": [1.0]}), "a pickle of another kind"),
        (bytes(5000), ""),
    ],
    ids=["text", "pickle", "zeros"],
)
def test_what_torch_did_not_write_is_named_in_plain_words(
    tmp_path: Path, raw: bytes, word: str
) -> None:
    (tmp_path / "x.pt").write_bytes(raw)
    with pytest.raises(BadCheckpointError) as caught:
        open_checkpoint(tmp_path / "x.pt")
    assert word in str(caught.value)
    assert "weights_only" not in str(caught.value)


def test_what_is_left_out_of_a_pickle_is_no_saving(tmp_path: Path) -> None:
    torch.save({"net": NET, "optimizer": {"state": {0: torch.ones(500, 500)}}}, tmp_path / "x.pth")
    assert open_checkpoint(tmp_path / "x.pth").nbytes == sum(
        tensor.nbytes for tensor in NET.values()
    )
    torch.save(NET, tmp_path / "y.pth")
    assert open_checkpoint(tmp_path / "y.pth").nbytes == (tmp_path / "y.pth").stat().st_size


def test_a_dict_that_holds_itself(tmp_path: Path) -> None:
    value: dict[str, Any] = {"net": NET}
    value["self"] = value
    torch.save(value, tmp_path / "x.pth")
    assert open_checkpoint(tmp_path / "x.pth").state_dict == "net"


def test_a_pipe_may_bring_a_pickle(tmp_path: Path) -> None:
    torch.save({"params": NET}, tmp_path / "x.pth")
    done = run(
        "compress",
        "-",
        "--rank",
        "8",
        "-o",
        tmp_path / "o.safetensors",
        input=(tmp_path / "x.pth").read_bytes(),
    )
    assert done.code == 0, done.err
    assert torch.equal(load_file(tmp_path / "o.safetensors")["net.0.bias"], NET["net.0.bias"])
    page = run(
        "compress",
        "-",
        "--rank",
        "8",
        "-o",
        tmp_path / "p.safetensors",
        input=b"<html>Login</html>",
    )
    assert page.code == 1
    assert "standard input is an HTML page" in page.err
