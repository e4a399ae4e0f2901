"""calibrate and compress --text as commands: what they tell, what they leave behind, what they
refuse."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import zoo
from helpers import cli, complaint
from zoo import words_tokenizer

import svdcli
from svdcli.calibration.moments import open_moments
from svdcli.calibration.reading import read_batches
from svdcli.calibration.text_side import text_side
from svdcli.errors import UsageError
from svdcli.files.workspace import Workspace
from svdcli.ranks import LostRankError
from svdcli.text.tokens import Amount, grouped, load_tokenizer, sentences_of
from svdcli.verbs import calibrate as module

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
    done = cli(
        "calibrate", llama, "--text", llama.parent / "text.txt", *HOW, "--sensitivity", "-o", out
    )
    assert done.code == 0, done.err
    assert "768 tokens" in done.err
    assert "14 layers, 8 distinct inputs" in done.err
    return out


def test_a_text_of_few_tokens_is_noted(llama: Path, tmp_path: Path) -> None:
    few = svdcli.Texts("few", (" ".join(WORDS.split()[:33]),))
    svdcli.calibrate(llama, tmp_path / "few.safetensors", few, seq_len=32)
    outcome = svdcli.compress(
        llama,
        tmp_path / "out",
        svdcli.Recipe("keep", 0.5),
        calibration=tmp_path / "few.safetensors",
    )
    assert any("read 32 tokens, fewer than the" in note for note in outcome.report.notes)


def test_text_in_one_go_equals_calibrate_and_compress(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    done = cli(
        "compress", llama, "--keep", "0.5", "--text", text, *HOW, "-o", tmp_path / "one", "--json"
    )
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert (found["recipe"]["layout"], found["recipe"]["allocate"], found["recipe"]["floor"]) == (
        "pivoted",
        "global",
        0.0,
    )
    assert found["loss_unit"] == "nats"
    assert found["expected_loss"] > found["predicted_loss"] > 0
    assert found["measured"]["drift"]["kl"]["value"] > 0
    assert "tokens" in done.err
    assert list(tmp_path.iterdir()) == [tmp_path / "one"]
    first = svdcli.read_texts(str(text), stdlib=False, held_out=False).split(0.9)[0]
    svdcli.calibrate(llama, tmp_path / "stats.safetensors", first, samples=24, seq_len=32)
    two = cli(
        "compress",
        llama,
        "--keep",
        "0.5",
        "--calibration",
        tmp_path / "stats.safetensors",
        "-o",
        tmp_path / "two",
        "-q",
    )
    assert two.code == 0, two.err
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == other


def test_a_run_cut_short_keeps_its_calibration(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    monkeypatch.setattr(module, "read_alone", lambda *_: pytest.fail("calibrated twice"))
    done = cli(*line)
    assert done.code == 0, done.err
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    assert svdcli.verify(tmp_path / "out", llama).ok


@pytest.mark.parametrize("parts", [True, False])
def test_an_error_while_reading_leaves_parts_that_ranks_have_read_and_nothing_else(
    parts: bool, llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose_a_rank(request: module.Request) -> None:
        if parts:
            request.out.with_name(f".{request.out.name}.parts-1").mkdir()
        raise LostRankError("rank 1 is gone")

    line = ("compress", llama, "--keep", "0.5", "--text", text, *HOW, "-o", tmp_path / "out", "-q")
    with monkeypatch.context() as patch:
        patch.setattr(module, "read_alone", lose_a_rank)
        assert "rank 1 is gone" in complaint(cli(*line))
    left = [tmp_path / "out.partial"] if parts else []
    assert list(tmp_path.iterdir()) == left
    assert cli(*line).code == 0
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_measured_sensitivities_are_losses_of_the_model(
    llama: Path, text: Path, stats: Path, tmp_path: Path
) -> None:
    moments = open_moments(stats)
    weights = {name: moments.loss_scale(name) for name in moments.layers}
    assert all(weight is not None and weight >= 0 for weight in weights.values())
    done = cli(
        "compress", llama, "--keep", "0.5", "--calibration", stats, "-o", tmp_path / "out", "--json"
    )
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["loss_unit"] == "nats"
    assert report["total"]["parameters_after"] < report["total"]["parameters_before"]


def test_a_sensitivity_is_the_divergence_with_one_layer_cut(llama: Path, stats: Path) -> None:
    """The long way: the whole model, one weight replaced, every batch that was used."""
    import torch

    from svdcli.calibration.moments import metric_of
    from svdcli.linalg.whitening import weighted

    name = "model.layers.1.mlp.down_proj.weight"
    moments = open_moments(stats)
    model = svdcli.load(llama)
    texts = svdcli.Texts("t", (WORDS,))
    batches = read_batches(
        text_side(model, "", 96, ""), load_tokenizer(llama), texts, Amount(24), 32
    ).batches
    few = [batches[len(batches) * i // 4] for i in range(min(4, len(batches)))]
    with torch.no_grad():
        whole = [model(**batch).logits.log_softmax(-1) for batch in few]
        weight = model.get_parameter(name)
        layer = moments.of(name)
        assert layer is not None
        factors = weighted(
            weight.data,
            min(weight.shape) // 4,
            metric_of(layer, torch.device("cpu"), centred=False),
        )
        weight.data = factors.up @ factors.down
        cut = [model(**batch).logits.log_softmax(-1) for batch in few]
    divergence = sum(float((p.exp() * (p - q)).sum()) for p, q in zip(whole, cut, strict=True))
    share = factors.tail / (factors.tail + float(factors.sigma.square().sum()))
    expected = divergence / sum(p[..., 0].numel() for p in whole) / share
    assert moments.loss_scale(name) == pytest.approx(expected, rel=1e-3)


def test_bad_requests(llama: Path, text: Path, stats: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    both = ("compress", llama, "--keep", "0.5", "-o", out, "--text", text, "--calibration", stats)
    assert "not both" in complaint(cli(*both), 2)
    assert "exists" in complaint(cli("calibrate", llama, "--text", text, *HOW, "-o", stats))
    assert ".safetensors" in complaint(
        cli("calibrate", llama, "--text", text, "-o", tmp_path / "x.json"), 2
    )
    assert "--samples" in complaint(
        cli("calibrate", llama, "--text", text, "--samples", "0", "-o", tmp_path / "x.safetensors"),
        2,
    )
    assert "one of them" in complaint(cli("calibrate", llama, "-o", tmp_path / "x.safetensors"), 2)
    assert "folder" in complaint(
        cli("calibrate", llama, "--text", text, "-o", tmp_path / "no" / "x.safetensors")
    )
    assert "--metric" in complaint(
        cli("compress", llama, "--keep", "0.5", "--metric", "full", "-o", out), 2
    )
    assert "does not exist" in complaint(
        cli("compress", llama, "--keep", "0.5", "--calibration", tmp_path / "no", "-o", out)
    )
    few = tmp_path / "few.txt"
    few.write_text("w2")
    assert "tokens" in complaint(
        cli("compress", llama, "--keep", "0.5", "--text", few, "-o", out, "-q")
    )
    few.unlink()
    assert list(tmp_path.iterdir()) == []


# How much is read by default ----------------------------------------------------------------------


def test_the_default_is_counted_in_tokens() -> None:
    """131,072, or 16 for every input of the widest layer where that is more; samples that are asked
    for count as they are."""
    assert [Amount.to_calibrate(None, widest).tokens for widest in (64, 4096, 4097, 11008)] == [
        131072,
        131072,
        131072,
        176128,
    ]
    assert Amount.to_calibrate(7, 11008) == Amount(samples=7)
    assert [
        Amount.to_calibrate(None, 64).windows(length) for length in (2048, 512, 500, 10**6)
    ] == [64, 256, 263, 1]
    assert Amount(samples=7).windows(512) == 7
    assert Amount().windows(512) is None
    assert (Amount(tokens=5).times(8), Amount(samples=5).times(8)) == (
        Amount(tokens=40),
        Amount(samples=40),
    )
    with pytest.raises(UsageError, match="--samples 0"):
        Amount.to_calibrate(0, 64)


@pytest.mark.parametrize("wanted", [96, 1000, 2900, 10**6])
def test_windows_hold_the_tokens_asked_for_and_lie_evenly(wanted: int, llama: Path) -> None:
    """Windows of 32 share one token with the next, so that 3,000 words are 96 of them."""
    model = svdcli.load(llama)
    read = read_batches(
        text_side(model, "", 96, ""),
        load_tokenizer(llama),
        svdcli.Texts("t", (WORDS,)),
        Amount(tokens=wanted),
        32,
    )
    assert (
        read.tokens
        == sum(batch["input_ids"].numel() for batch in read.batches)
        == 32 * read.samples
    )
    assert read.samples == min(96, -(-wanted // 32))
    words = [int(word[1:]) for word in WORDS.split()]
    rows = [row for batch in read.batches for row in batch["input_ids"].tolist()]
    assert rows[0] == words[:32]
    assert rows[-1] == words[95 * 31 : 95 * 31 + 32]


@pytest.mark.parametrize("wanted", [500, 3000, 10**6])
def test_sentences_hold_the_tokens_asked_for_and_lie_evenly(wanted: int, llama: Path) -> None:
    """Long lines late in the text: how many are needed is found by counting, not by what the first
    ones are like."""
    lines = [
        f"x{i} " + " ".join(f"w{(i * j) % 94 + 2}" for j in range(3, 6 + 30 * (i > 500)))
        for i in range(1000)
    ]
    texts = svdcli.Texts("lines", ("\n".join(lines),))
    found = sentences_of(load_tokenizer(llama), texts, 20, Amount(tokens=wanted))
    assert [one.tokens for one in found] == [min(20, len(one.text.split())) for one in found]
    tokens = sum(one.tokens for one in found)
    if wanted == 10**6:
        assert [one.text for one in found] == lines
    else:
        assert wanted <= tokens < max(2 * wanted, 256 * 20)
        assert (found[0].text, found[-1].text) == (lines[0], lines[-1])
    places = [lines.index(one.text) for one in found]
    steps = {after - before for before, after in itertools.pairwise(places)}
    assert max(steps) - min(steps) <= 1
    assert min(steps) >= 1


def test_batches_are_counted_in_tokens_with_their_padding(llama: Path) -> None:
    lines = [" ".join(f"w{(i * j) % 94 + 2}" for j in range(3, 6 + i % 90)) for i in range(400)]
    sentences = sentences_of(
        load_tokenizer(llama), svdcli.Texts("lines", ("\n".join(lines),)), 64, Amount()
    )
    for padded in (True, False):
        groups = grouped(sentences, padded=padded)
        assert sorted(one.text for group in groups for one in group) == sorted(lines)
        assert all(len(group) * max(one.tokens for one in group) <= 2048 for group in groups)
        assert padded or all(len({one.tokens for one in group}) == 1 for group in groups)
        longest = [max(one.tokens for one in group) for group in groups]
        assert longest == sorted(longest)


def test_what_was_read_is_told_before_and_after(llama: Path, text: Path, tmp_path: Path) -> None:
    done = cli(
        "calibrate",
        llama,
        "--text",
        text,
        "--seq-len",
        "32",
        "-o",
        tmp_path / "c.safetensors",
        "--json",
    )
    assert done.code == 0, done.err
    assert "calibrating on 3,072 tokens, 96 windows of 32" in done.err
    found = json.loads(done.out)
    assert (found["samples"], found["tokens"], found["seq_len"]) == (96, 3072, 32)
    read = {"text": str(text), "samples": 96, "seq_len": 32, "tokens": 3072}
    assert (
        cli(
            "compress",
            llama,
            "--keep",
            "0.5",
            "--calibration",
            tmp_path / "c.safetensors",
            "-o",
            tmp_path / "out",
            "-q",
        ).code
        == 0
    )
    report = json.loads(cli("report", tmp_path / "out", "--json").out)
    assert report["calibration"] | read == report["calibration"]
    assert (
        report["calibration"]["text_sha256"]
        == svdcli.read_texts(str(text), stdlib=False, held_out=False).digest
    )
    assert (
        json.loads((tmp_path / "out" / "svdcli.json").read_text())["calibration"]
        == report["calibration"]
    )
    assert "96 windows of 32" in cli("report", tmp_path / "out").out.decode()
    plan = svdcli.compress(
        llama,
        None,
        svdcli.Recipe("keep", 0.5),
        calibration=tmp_path / "c.safetensors",
        dry_run=True,
    ).plan
    assert svdcli.Plan.from_json(plan.to_json()) == plan
    assert plan.calibration is not None
    svdcli.compress(llama, tmp_path / "plain", svdcli.Recipe("keep", 0.5))
    assert json.loads(cli("report", tmp_path / "plain", "--json").out)["calibration"] is None


def test_a_size_counts_what_is_told_about_the_text(llama: Path, tmp_path: Path) -> None:
    """Few tokens add a note besides. Whatever the record says must fit too."""
    few = svdcli.Texts("a text with a long name" * 20, (" ".join(WORDS.split()[:33]),))
    svdcli.calibrate(llama, tmp_path / "c.safetensors", few, seq_len=32)
    size = 200_000
    svdcli.compress(
        llama, tmp_path / "out", svdcli.Recipe("size", size), calibration=tmp_path / "c.safetensors"
    )
    total = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*"))
    assert total <= size
    assert json.loads(cli("report", tmp_path / "out", "--json").out)["notes"]


def test_heal_reads_the_default_too(llama: Path, tmp_path: Path) -> None:
    svdcli.compress(llama, tmp_path / "small", svdcli.Recipe("keep", 0.5))
    texts = svdcli.Texts("t", (WORDS,))
    found = svdcli.heal(
        tmp_path / "small",
        tmp_path / "healed",
        teacher=llama,
        texts=texts,
        effort=svdcli.Effort(steps=1),
        seq_len=32,
    )
    assert found.report.healing is not None
    assert 0 < found.report.healing["samples"] < 96  # all of the text, but for what is held out
