"""eval against oracles: losses and divergences computed the long way, in float64."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import changed, cli, complaint

import svdcli
from svdcli.calibration.text_side import text_side
from svdcli.errors import BadCheckpointError, SvdcliError
from svdcli.text.texts import Texts, read_texts
from svdcli.text.tokens import Windows, batch_of, load_tokenizer, windows_of
from svdcli.verbs import evaluate as module
from svdcli.verbs.evaluate import compare, evaluate, mean_of

SAMPLE = Path(__file__).parents[2] / "sample_models" / "tiny-llama"
TEXT = Texts(
    "a test", ("import os\n\n\ndef main(path: str) -> None:\n    print(os.listdir(path))\n" * 40,)
)
Written = Callable[[str], Path]


@pytest.fixture(scope="module")
def small_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample model at keep 0.5."""
    out = tmp_path_factory.mktemp("eval") / "out"
    svdcli.compress(SAMPLE, out, svdcli.Recipe("keep", 0.5))
    return out


def losses(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids[None]).logits[0, :-1].double().log_softmax(-1)


@pytest.mark.parametrize("chunk", [2**25, 4096])
def test_a_decoder_s_scores_are_those_of_the_long_way(small_llama: Path, chunk: int) -> None:
    found = evaluate(small_llama, TEXT, against=SAMPLE, seq_len=48, samples=5)
    ours, theirs = (
        svdcli.load(small_llama, dtype=torch.float32),
        svdcli.load(SAMPLE, dtype=torch.float32),
    )
    windows = windows_of(load_tokenizer(SAMPLE), TEXT, 48, 5)
    loss, excess, kl, same = [], [], [], []
    for ids in windows.ids:
        p, q = losses(theirs, ids), losses(ours, ids)
        targets = ids[1:, None]
        loss.append(-q.gather(-1, targets).mean().item())
        excess.append(loss[-1] + p.gather(-1, targets).mean().item())
        kl.append((p.exp() * (p - q)).sum(-1).mean().item())
        same.append((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert found.compressed is not None
    assert found.drift is not None
    scores, _, drift = compare(ours, theirs, windows, chunk=chunk)
    assert drift is not None
    for mean, values in (
        (found.compressed.loss, loss),
        (found.drift.excess_loss, excess),
        (found.drift.kl, kl),
        (found.drift.top1, same),
        (scores.loss, loss),
        (drift.excess_loss, excess),
        (drift.kl, kl),
        (drift.top1, same),
    ):
        assert mean.value == pytest.approx(statistics.fmean(values), abs=1e-5)
        assert mean.error == pytest.approx(statistics.stdev(values) / math.sqrt(5), abs=1e-5)
    perplexity = math.exp(found.compressed.loss.value)
    assert found.compressed.perplexity.value == pytest.approx(perplexity)
    assert found.compressed.perplexity.error == pytest.approx(
        perplexity * found.compressed.loss.error
    )
    per_byte = found.compressed.loss.value / math.log(2) / windows.bytes_per_token
    assert found.compressed.bits_per_byte == pytest.approx(per_byte)
    assert found.tokens == 5 * 47


def test_a_model_does_not_differ_from_itself() -> None:
    found = evaluate(SAMPLE, TEXT, against=SAMPLE, seq_len=32, samples=3)
    assert found.drift is not None
    assert (found.drift.excess_loss.value, found.drift.top1.value) == (0, 1)
    assert abs(found.drift.kl.value) < 1e-6
    assert found.compressed == module.replace(found.original, path=str(SAMPLE))


def test_more_compression_drifts_further(small_llama: Path, tmp_path: Path) -> None:
    svdcli.compress(SAMPLE, tmp_path / "harder", svdcli.Recipe("keep", 0.2))
    drifts = [
        evaluate(out, TEXT, against=SAMPLE, seq_len=64, samples=4).drift
        for out in (small_llama, tmp_path / "harder")
    ]
    assert drifts[0].kl.value < drifts[1].kl.value
    assert drifts[0].top1.value > drifts[1].top1.value


def test_the_standard_error_counts_windows() -> None:
    assert mean_of([3.0]).error is None
    assert mean_of([1.0, 3.0]).value == 2
    assert mean_of([1.0, 3.0]).error == pytest.approx(1)


class FakeTokenizer:
    """A token a letter; with bos, one before each text."""

    def __init__(self, bos: int | None) -> None:
        self.bos_token_id = bos

    def __call__(
        self, text: str, add_special_tokens: bool = True, **_: Any
    ) -> dict[str, list[int]]:
        ids = [ord(letter) for letter in text]
        return {
            "input_ids": [self.bos_token_id, *ids]
            if add_special_tokens and self.bos_token_id is not None
            else ids
        }


@pytest.mark.parametrize(
    ("bos", "predicted"),
    [(None, list(range(ord("a") + 1, ord("a") + 22))), (7, list(range(ord("a"), ord("a") + 24)))],
)
def test_windows_predict_every_token_once(bos: int | None, predicted: list[int]) -> None:
    texts = Texts("letters", ("abcdefghijklm", "nopqrstuvwxyz"))
    windows = windows_of(FakeTokenizer(bos), texts, 4 if bos is None else 5)
    assert windows.ids[:, 1:].flatten().tolist()[: len(predicted)] == predicted
    assert windows.total == 26
    assert windows.bytes_per_token == 1
    few = windows_of(FakeTokenizer(bos), texts, 4, 3)
    assert few.ids.shape == (3, 4)
    assert few.ids[0, -1] < few.ids[1, -1] < few.ids[2, -1]


def test_a_text_too_short_is_refused() -> None:
    with pytest.raises(SvdcliError, match="only 1 tokens"):
        windows_of(FakeTokenizer(None), Texts("short", ("a",)), 8)


@pytest.fixture
def readers(readable: Written, tmp_path: Path) -> tuple[Path, Path]:
    """A tiny encoder and its compressed self, both with a tokenizer."""
    svdcli.compress(readable("bert"), tmp_path / "out", keep=0.5, layout="pivoted")
    return readable("bert"), tmp_path / "out"


SENTENCES = Texts(
    "words",
    ("\n".join(" ".join(f"w{(i * j) % 94 + 2}" for j in range(3, 3 + i % 20)) for i in range(40)),),
)


def test_an_encoder_is_judged_by_cosine_similarity(readers: tuple[Path, Path]) -> None:
    original, out = readers
    same = evaluate(original, SENTENCES, against=original).similarity
    assert same is not None
    assert same.minimum == pytest.approx(1, abs=1e-6)
    found = evaluate(out, SENTENCES, against=original).similarity
    assert found is not None
    assert found.minimum <= found.percentile_5 <= found.mean < 1 - 1e-4
    with pytest.raises(SvdcliError, match="give --against"):
        evaluate(out, SENTENCES)


def test_padding_does_not_change_an_embedding(readers: tuple[Path, Path]) -> None:
    model, tokenizer = svdcli.load(readers[1]), load_tokenizer(readers[1])
    side = text_side(model, "bert", len(tokenizer), "")
    lines = SENTENCES.documents[0].splitlines()[4:12]
    together = side.embed(model, batch_of(tokenizer, lines, 64))
    alone = torch.cat([side.embed(model, batch_of(tokenizer, [line], 64)) for line in lines])
    assert torch.allclose(together, alone, atol=1e-5)


def test_nan_is_an_error(small_llama: Path) -> None:
    model = svdcli.load(small_llama)
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(SvdcliError, match="NaN"):
        compare(model, None, Windows(torch.arange(8)[None], 1.0, 8))


def test_nan_in_the_original_is_told_by_its_weight(small_llama: Path, tmp_path: Path) -> None:
    name = "model.layers.1.input_layernorm.weight"
    original = changed(SAMPLE, tmp_path / "m", lambda tensors: tensors[name][3:4].fill_(torch.nan))
    with pytest.raises(BadCheckpointError, match=f"m: {name} holds NaN"):
        evaluate(small_llama, TEXT, against=original, seq_len=48, samples=2)


# The command --------------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_json(small_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.py").write_text(TEXT.documents[0])
    (tmp_path / "texts" / "b.bin").write_bytes(b"\xff\xfe\x00")
    options = (
        "--against",
        SAMPLE,
        "--text",
        tmp_path / "texts",
        "--samples",
        "2",
        "--seq-len",
        "32",
    )
    done = cli("eval", small_llama, *options, "--prompt", "def ", "--new-tokens", "4")
    assert done.code == 0, done.err
    for word in (
        "Perplexity",
        "excess loss",
        "KL divergence",
        "same next token",
        "Original",
        "Compressed",
    ):
        assert word in done.out.decode()
    found = json.loads(cli("eval", small_llama, *options, "--json").out)
    assert (found["svdcli_json"], found["kind"], found["model_kind"]) == (
        1,
        "evaluation",
        "decoder",
    )
    assert found["tokens"] == 62
    text = TEXT.documents[0].encode()
    piped = json.loads(
        cli(
            "eval",
            small_llama,
            "--text",
            "-",
            "--samples",
            "2",
            "--seq-len",
            "32",
            "--json",
            input=text,
        ).out
    )
    assert piped["compressed"]["loss"] == found["compressed"]["loss"]
    assert piped["drift"] is None


def test_a_prompt_needs_no_text(small_llama: Path) -> None:
    done = cli("eval", small_llama, "--prompt", "import ", "--new-tokens", "3", "--json")
    assert len(json.loads(done.out)["continuations"]) == 1


def test_stdlib_is_the_held_out_half() -> None:
    held, other = (read_texts(None, stdlib=True, held_out=half) for half in (True, False))
    assert not set(held.documents) & set(other.documents) - {""}


def test_files_that_are_no_text_are_named(small_llama: Path, tmp_path: Path) -> None:
    for name in ("a.txt", "b.bin", "c/d.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\xff\xfe" if name.endswith("bin") else b"import os " * 400)
    done = cli(
        "eval", small_llama, "--text", tmp_path, "--samples", "2", "--seq-len", "32", "--json"
    )
    assert (
        f"svdcli: {tmp_path}: files that are not UTF-8 are passed over: 2, such as b.bin\n"
        in done.err
    )
    assert json.loads(done.out)["text"] == str(tmp_path)
    assert "b.bin is not UTF-8 text" in complaint(
        cli("eval", small_llama, "--text", tmp_path / "b.bin")
    )


def test_what_cannot_be_read_is_refused(
    small_llama: Path, written: Written, readable: Written, tmp_path: Path
) -> None:
    assert "one of them" in complaint(cli("eval", small_llama), 2)
    assert "one of them" in complaint(cli("eval", small_llama, "--text", "x", "--stdlib"), 2)
    assert "does not exist" in complaint(cli("eval", small_llama, "--text", tmp_path / "none"))
    assert "no tokenizer" in complaint(cli("eval", written("llama"), "--stdlib"))
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    assert "holds no text" in complaint(cli("eval", small_llama, "--text", empty))
    assert "--samples" in complaint(cli("eval", small_llama, "--stdlib", "--samples", "0"), 2)
    assert "continues no text; leave out --prompt" in complaint(
        cli("eval", readable("bert"), "--prompt", "a"), 2
    )
    assert "does not read text" in complaint(cli("eval", readable("vit"), "--stdlib"))
