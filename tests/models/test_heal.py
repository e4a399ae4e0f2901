"""heal: blocks never get worse, sizes stay, what it was not to touch stays, and a kill loses one block at most."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from helpers import cli, complaint, contents, tree
from test_evaluate import words_tokenizer

import svdcli
from svdcli.errors import SvdcliError
from svdcli.files.workspace import Workspace
from svdcli.models import heal as module
from svdcli.models.fisher import ModelLoss, block_moments
from svdcli.models.heal import Effort

TEXT = svdcli.Texts("words", (" ".join(f"w{(i * i + 3 * i) % 94 + 2}" for i in range(3000)),))
HOW: dict[str, Any] = {"effort": Effort(steps=30), "samples": 64, "seq_len": 32}
Written = Callable[[str], Path]


@pytest.fixture(scope="module", params=["factored", "pivoted"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a tiny Llama, the same at keep 0.4), both with a tokenizer."""
    folder = tmp_path_factory.mktemp("heal")
    teacher = zoo.save("llama", folder / "model")
    words_tokenizer(teacher)
    svdcli.compress(teacher, folder / "small", svdcli.Recipe("keep", 0.4, layout=request.param))
    return teacher, folder / "small"


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svdcli.models.calibrate._TOKENS_IN_A_BATCH", 128)


def test_every_block_gets_better_and_the_model_with_them(pair: tuple[Path, Path], tmp_path: Path) -> None:
    teacher, small = pair
    before = tree(small)
    found = svdcli.heal(small, teacher, TEXT, tmp_path / "healed", **HOW)
    assert tree(small) == before
    blocks = found.report.healing["blocks"]
    assert list(blocks) == ["model.layers.0", "model.layers.1"]
    assert all(item["after"] < item["before"] for item in blocks.values())
    assert svdcli.verify(tmp_path / "healed", teacher).ok
    dense = svdcli.load(teacher)
    ours, healed = svdcli.load(small), svdcli.load(tmp_path / "healed")
    ids = torch.randint(2, 96, (8, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        gaps = [(m.model(ids).last_hidden_state - dense.model(ids).last_hidden_state).norm() for m in (ours, healed)]
    assert gaps[1] < gaps[0]


def test_only_factors_change(pair: tuple[Path, Path], tmp_path: Path) -> None:
    teacher, small = pair
    svdcli.heal(small, teacher, TEXT, tmp_path / "healed", **HOW)
    old, new = (contents(folder / "model.safetensors") for folder in (small, tmp_path / "healed"))
    assert old.keys() == new.keys()
    changed = {name for name in old if old[name] != new[name]}
    assert changed
    assert all(name.endswith(("svd_up.weight", "svd_down.weight")) for name in changed)
    assert all(old[name][:2] == new[name][:2] for name in old)


def test_the_reported_error_is_that_of_the_stored_weights(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """An oracle for one block: both models run in one piece, the gradient's moment by an ordinary backward pass."""
    teacher, small = pair
    found = svdcli.heal(small, teacher, TEXT, tmp_path / "healed", **HOW)
    from svdcli.models.calibrate import read_batches
    from svdcli.models.tokens import load_tokenizer

    dense, ours = svdcli.load(teacher), svdcli.load(small)
    batches, _, _ = read_batches(dense, load_tokenizer(teacher), TEXT, 64, 32, "")
    count = min(32, len(batches))
    few = [batches[len(batches) * i // count] for i in range(count)]
    torch.manual_seed(0)
    h = block_moments(dense.requires_grad_(False), few, {"model.layers.0"}, 1000, torch.device("cpu"))["model.layers.0"].double()
    h += module.DAMPING * h.diagonal().mean() * torch.eye(h.shape[0], dtype=torch.float64)
    held = [batch for place, batch in enumerate(batches) if place % module.HELD_OUT_ONE_IN == module.HELD_OUT_ONE_IN - 1]
    held = held[: module._MOST_HELD_OUT]
    for model, key in ((ours, "before"), (svdcli.load(tmp_path / "healed"), "after")):
        wrong = whole = 0.0
        for batch in held:
            with torch.no_grad():
                y, z = (m.model(**batch, output_hidden_states=True).hidden_states[1].double() for m in (dense, model))
            wrong += float(((z - y) @ h * (z - y)).sum())
            whole += float((y @ h * y).sum())
        assert found.report.healing["blocks"]["model.layers.0"][key] == pytest.approx(wrong / whole, rel=1e-3)


def test_block_moments_are_those_of_a_backward_pass_in_one_piece(pair: tuple[Path, Path]) -> None:
    model = svdcli.load(pair[0]).requires_grad_(False)
    batches = [{"input_ids": torch.randint(2, 96, (2, 12), generator=torch.Generator().manual_seed(i))} for i in range(3)]
    torch.manual_seed(5)
    found = block_moments(model, batches, {"model.layers.0", "model.layers.1"}, 1, torch.device("cpu"))
    torch.manual_seed(5)
    loss, sums = ModelLoss(), dict.fromkeys(found, 0)
    loss.batches = batches
    for index, batch in enumerate(batches):
        embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        last = []
        hook = model.model.layers[1].register_forward_hook(lambda m, a, out, last=last: last.append(out))
        output = model(inputs_embeds=embedded, output_hidden_states=True, use_cache=False)
        hook.remove()
        hidden = output.hidden_states
        tensor, gradient = loss.seed(index, output)
        ends = [hidden[1], last[0][0] if isinstance(last[0], tuple) else last[0]]
        for name, grad in zip(sorted(found), torch.autograd.grad(tensor, ends, gradient), strict=True):
            rows = grad.reshape(-1, grad.shape[-1])
            sums[name] = sums[name] + rows.T @ rows
    for name, moment in found.items():
        torch.testing.assert_close(moment, sums[name] / loss.events, rtol=1e-4, atol=1e-9)


def test_a_block_that_finds_nothing_better_stays_as_it_was(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: Any) -> None:
    teacher, small = pair
    monkeypatch.setattr(module, "RATE", 50.0)
    found = svdcli.heal(small, teacher, TEXT, tmp_path / "healed", **HOW)
    assert all(item["after"] == item["before"] for item in found.report.healing["blocks"].values())
    old, new = (contents(folder / "model.safetensors") for folder in (small, tmp_path / "healed"))
    assert old == new


def test_a_run_that_was_cut_short_continues_to_the_same_bytes(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: Any) -> None:
    teacher, small = pair
    svdcli.heal(small, teacher, TEXT, tmp_path / "whole", **HOW)
    note, trained = Workspace.note, []

    def stop_after_one_block(self: Workspace, line: dict[str, Any]) -> None:
        note(self, line)
        if "block" in line:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "note", stop_after_one_block)
        with pytest.raises(KeyboardInterrupt):
            svdcli.heal(small, teacher, TEXT, tmp_path / "cut", **HOW)
    assert not (tmp_path / "cut").exists()
    train = module._Trainer.train
    monkeypatch.setattr(module._Trainer, "train", lambda self: (trained.append(self.turn.name), train(self))[1])
    svdcli.heal(small, teacher, TEXT, tmp_path / "cut", **HOW)
    assert trained == ["model.layers.1"]
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")
    assert not (tmp_path / "cut.partial").exists()


@pytest.mark.parametrize("family", ["gpt2", "t5", "bert"])
def test_other_architectures_heal(family: str, written: Written, tmp_path: Path) -> None:
    teacher = shutil.copytree(written(family), tmp_path / "model")
    words_tokenizer(teacher)
    svdcli.compress(teacher, tmp_path / "small", svdcli.Recipe("keep", 0.4, layout="pivoted"))
    lines = svdcli.Texts(
        "lines", ("\n".join(" ".join(f"w{(i * j) % 94 + 2}" for j in range(3, 12 + i % 9)) for i in range(300)),)
    )
    text = lines if family == "bert" else TEXT
    found = svdcli.heal(tmp_path / "small", teacher, text, tmp_path / "healed", **HOW)
    blocks = found.report.healing["blocks"]
    assert blocks
    assert any(item["after"] < item["before"] for item in blocks.values())
    assert svdcli.verify(tmp_path / "healed", teacher).ok


def test_what_cannot_be_healed_is_refused(
    pair: tuple[Path, Path], written: Written, compressed_mlp: Path, tmp_path: Path
) -> None:
    teacher, small = pair
    with pytest.raises(SvdcliError, match="is not the model that"):
        svdcli.heal(small, written("qwen3"), TEXT, tmp_path / "healed")
    with pytest.raises(SvdcliError, match="was not written by svdcli"):
        svdcli.heal(teacher, teacher, TEXT, tmp_path / "healed")
    with pytest.raises(SvdcliError, match="no config"):
        svdcli.heal(compressed_mlp, teacher, TEXT, tmp_path / "healed")
    svdcli.compress(teacher, tmp_path / "dense", svdcli.Recipe("keep", 0.4, layout="dense"))
    with pytest.raises(SvdcliError, match="holds no factors"):
        svdcli.heal(tmp_path / "dense", teacher, TEXT, tmp_path / "healed")
    assert not (tmp_path / "healed").exists()


def test_the_command(pair: tuple[Path, Path], tmp_path: Path) -> None:
    teacher, small = pair
    text = tmp_path / "text.txt"
    text.write_text(TEXT.documents[0])
    line = ["heal", small, "--teacher", teacher, "--text", text, "--seq-len", "32", "--samples", "32"]
    done = cli(*line, "-o", tmp_path / "healed", "--steps", "5", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["healing"]["blocks"].keys() == {"model.layers.0", "model.layers.1"}
    shown = cli("report", tmp_path / "healed").out.decode()
    assert "model.layers.1: " in shown
    assert "exists" in complaint(cli(*line, "-o", tmp_path / "healed", "--steps", "5"))
    assert "--minutes" in complaint(cli(*line, "-o", tmp_path / "b", "--minutes", "0"), 2)
    assert "--steps" in complaint(cli(*line, "-o", tmp_path / "b", "--steps", "0"), 2)
