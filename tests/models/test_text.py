"""calibrate and compress --text as commands: what they tell, what they leave behind, what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import zoo
from helpers import cli, complaint
from test_evaluate import words_tokenizer

import svdcli
from svdcli.files.moments import open_moments
from svdcli.files.workspace import Workspace
from svdcli.models import calibrate as module

WORDS = " ".join(f"w{(i * i + 3 * i) % 94 + 2}" for i in range(3000))
HOW = ("--seq-len", "32", "--samples", "24")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer, and text for it beside it."""
    folder = tmp_path_factory.mktemp("text")
    words_tokenizer(zoo.save("llama", folder / "model"))
    (folder / "text.txt").write_text(WORDS)
    return folder / "model"


@pytest.fixture
def text(llama: Path) -> Path:
    return llama.parent / "text.txt"


@pytest.fixture(scope="module")
def stats(llama: Path) -> Path:
    """A calibration with gradients and sensitivities."""
    out = llama.parent / "stats.safetensors"
    done = cli("calibrate", llama, "--text", llama.parent / "text.txt", *HOW, "--sensitivity", "-o", out)
    assert done.code == 0, done.err
    assert "768 tokens" in done.err
    assert "14 layers, 8 distinct inputs" in done.err
    return out


def test_a_text_of_few_tokens_is_noted(llama: Path, tmp_path: Path) -> None:
    few = svdcli.Texts("few", (" ".join(WORDS.split()[:33]),))
    svdcli.calibrate(llama, few, tmp_path / "few.safetensors", seq_len=32)
    outcome = svdcli.compress(llama, tmp_path / "out", svdcli.Recipe("keep", 0.5), calibration=tmp_path / "few.safetensors")
    assert any("read 32 tokens, fewer than the" in note for note in outcome.report.notes)


def test_text_in_one_go_equals_calibrate_and_compress(llama: Path, text: Path, tmp_path: Path) -> None:
    done = cli("compress", llama, "--keep", "0.5", "--text", text, *HOW, "-o", tmp_path / "one", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert (found["recipe"]["layout"], found["recipe"]["allocate"], found["recipe"]["floor"]) == ("pivoted", "global", 0.0)
    assert found["loss_unit"] == "nats"
    assert found["expected_loss"] > found["predicted_loss"] > 0
    assert found["measured"]["drift"]["kl"]["value"] > 0
    assert "tokens" in done.err
    assert list(tmp_path.iterdir()) == [tmp_path / "one"]
    first = svdcli.read_texts(str(text), stdlib=False, held_out=False).split(0.9)[0]
    svdcli.calibrate(llama, first, tmp_path / "stats.safetensors", samples=24, seq_len=32)
    two = cli("compress", llama, "--keep", "0.5", "--calibration", tmp_path / "stats.safetensors", "-o", tmp_path / "two", "-q")
    assert two.code == 0, two.err
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == other


def test_a_run_cut_short_keeps_its_calibration(llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = ("compress", llama, "--keep", "0.5", "--text", text, *HOW, "-o", tmp_path / "out")
    note = Workspace.note

    def stop(self: Workspace, item: dict[str, Any]) -> None:
        note(self, item)
        if "unit" in item:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "note", stop)
        assert cli(*line).code == 130
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(module, "calibrate", lambda *_, **__: pytest.fail("calibrated twice"))
    done = cli(*line)
    assert done.code == 0, done.err
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    assert svdcli.verify(tmp_path / "out", llama).ok


def test_measured_sensitivities_are_losses_of_the_model(llama: Path, text: Path, stats: Path, tmp_path: Path) -> None:
    moments = open_moments(stats)
    weights = {name: moments.weight(name) for name in moments.layers}
    assert all(weight is not None and weight >= 0 for weight in weights.values())
    done = cli("compress", llama, "--keep", "0.5", "--calibration", stats, "-o", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["loss_unit"] == "nats"
    assert report["total"]["parameters_after"] < report["total"]["parameters_before"]


def test_a_sensitivity_is_the_divergence_with_one_layer_cut(llama: Path, stats: Path) -> None:
    """The long way: the whole model, one weight replaced, every batch that was used."""
    import torch

    from svdcli.files.moments import metric_of
    from svdcli.linalg.whitening import weighted
    from svdcli.models.tokens import load_tokenizer

    name = "model.layers.1.mlp.down_proj.weight"
    moments = open_moments(stats)
    model = svdcli.load(llama)
    texts = svdcli.Texts("t", (WORDS,))
    batches, _, _ = module.read_batches(model, load_tokenizer(llama), texts, 24, 32, "")
    few = [batches[len(batches) * i // 4] for i in range(min(4, len(batches)))]
    with torch.no_grad():
        whole = [model(**batch).logits.log_softmax(-1) for batch in few]
        weight = model.get_parameter(name)
        layer = moments.of(name)
        assert layer is not None
        factors = weighted(weight.data, min(weight.shape) // 4, metric_of(layer, torch.device("cpu"), centred=False))
        weight.data = factors.up @ factors.down
        cut = [model(**batch).logits.log_softmax(-1) for batch in few]
    divergence = sum(float((p.exp() * (p - q)).sum()) for p, q in zip(whole, cut, strict=True))
    share = factors.tail / (factors.tail + float(factors.sigma.square().sum()))
    expected = divergence / sum(p[..., 0].numel() for p in whole) / share
    assert moments.weight(name) == pytest.approx(expected, rel=1e-3)


def test_bad_requests(llama: Path, text: Path, stats: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    both = ("compress", llama, "--keep", "0.5", "-o", out, "--text", text, "--calibration", stats)
    assert "not both" in complaint(cli(*both), 2)
    assert "exists" in complaint(cli("calibrate", llama, "--text", text, *HOW, "-o", stats))
    assert ".safetensors" in complaint(cli("calibrate", llama, "--text", text, "-o", tmp_path / "x.json"), 2)
    assert "--samples" in complaint(
        cli("calibrate", llama, "--text", text, "--samples", "0", "-o", tmp_path / "x.safetensors"), 2
    )
    assert "one of them" in complaint(cli("calibrate", llama, "-o", tmp_path / "x.safetensors"), 2)
    assert "folder" in complaint(cli("calibrate", llama, "--text", text, "-o", tmp_path / "no" / "x.safetensors"))
    assert "--metric" in complaint(cli("compress", llama, "--keep", "0.5", "--metric", "full", "-o", out), 2)
    assert "does not exist" in complaint(cli("compress", llama, "--keep", "0.5", "--calibration", tmp_path / "no", "-o", out))
    few = tmp_path / "few.txt"
    few.write_text("w2")
    assert "tokens" in complaint(cli("compress", llama, "--keep", "0.5", "--text", few, "-o", out, "-q"))
    few.unlink()
    assert list(tmp_path.iterdir()) == []
