"""Ranks that a launcher started share a calibration, and what comes of it is what parts by hand
give."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from agents import COMMAND, free_port, ranks_alone
from helpers import tree
from safetensors import safe_open
from safetensors.torch import load_file

import svdcli
from svdcli.calibration.moments import METADATA
from svdcli.calibration.work import Work
from svdcli.engine import crew
from svdcli.engine.compute import Compute
from svdcli.errors import UsageError
from svdcli.ranks import Place, assembled
from svdcli.verbs import calibrate as module

Readable = Callable[..., Path]
TEXT = " ".join(f"w{at * at % 90 + 2}" for at in range(4000))
HOW: dict[str, Any] = {"samples": 100, "seq_len": 32}  # two batches
OPTIONS = ("--text", "t.txt", "--samples", "100", "--seq-len", "32", "--json")
OPTIONS += ("--precision", "float32")


@pytest.fixture
def texts(folder: Path) -> svdcli.Texts:
    (folder / "t.txt").write_text(TEXT)
    return svdcli.read_texts("t.txt")


def about(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        data: dict[str, Any] = json.loads(file.metadata()[METADATA])
    return data


def test_ranks_do_what_parts_by_hand_do(
    readable: Readable, texts: svdcli.Texts, folder: Path
) -> None:
    """Three of them, of which one finds no batch left. Rank 0 alone speaks."""
    model = readable("llama")
    line = ("calibrate", model, *OPTIONS, "--sensitivity", "-o", "ranks.safetensors")
    with ranks_alone(COMMAND, [line] * 3, folder) as ranks:
        first, *others = [rank.end(240) for rank in ranks]
    assert first.code == 0, first.err
    assert {(done.code, done.out, done.err) for done in others} == {(0, b"", "")}
    assert json.loads(first.out)["rounds"] == 2
    assert first.err.count("wrote ranks.safetensors") == 1
    assert first.err.count("on 2 ranks: moments of inputs and loss gradients") == 1
    assert {path.name for path in folder.iterdir()} == {"t.txt", "ranks.safetensors"}

    # The same by hand, with as many threads
    assert torch.get_num_threads() == 1
    parts = [folder / f"{number}.safetensors" for number in (1, 2)]
    for number, part in enumerate(parts, 1):
        svdcli.calibrate(model, part, texts, part=(number, 2), **HOW)
    svdcli.merge_moments(parts, "hand.safetensors")
    ranks, hand = load_file("ranks.safetensors"), load_file("hand.safetensors")
    sensitivities = {key for key in ranks if key.startswith("sensitivity.")}
    assert ranks.keys() - sensitivities == hand.keys()
    assert all(torch.equal(ranks[key], value) for key, value in hand.items())
    assert about(folder / "ranks.safetensors") == about(folder / "hand.safetensors") | {
        "sensitivity": True
    }

    # Sensitivities are those of the whole text
    svdcli.calibrate(model, "whole.safetensors", texts, sensitivity=True, **HOW)
    whole = load_file("whole.safetensors")
    assert len(sensitivities) == 14
    for key in sensitivities:
        torch.testing.assert_close(ranks[key], whole[key], rtol=1e-3, atol=1e-6)


def test_ranks_that_were_asked_for_different_things_end_with_one_line(
    readable: Readable, texts: svdcli.Texts, folder: Path
) -> None:
    line = ("calibrate", readable("llama"), *OPTIONS, "-o", "c.safetensors", "-q", "--seed")
    lines = [(*line, seed) for seed in (0, 1)]
    with ranks_alone(COMMAND, lines, folder, with_store=True) as ranks:
        ends = [rank.end(120) for rank in ranks]
    said = []
    for done in ends:
        assert done.code != 0
        assert done.out == b""
        said += done.err.splitlines()
    assert len(said) == 1
    assert "this rank was asked for something else than rank 0" in said[0]
    assert not (folder / "c.safetensors").exists()


def test_ranks_read_and_compress_in_one_run(
    readable: Readable, texts: svdcli.Texts, folder: Path
) -> None:
    """The third of them finds no batch left. By hand: parts, added up, for one process."""
    model = readable("llama")
    line = ("compress", model, "--keep", "0.5", *OPTIONS, "-o", "ranks")
    with ranks_alone(COMMAND, [line] * 3, folder) as ranks:
        first, *others = [rank.end(240) for rank in ranks]
    assert first.code == 0, first.err
    assert {(done.code, done.out, done.err) for done in others} == {(0, b"", "")}
    assert first.err.count("on 2 ranks: moments of inputs and loss gradients") == 1
    assert json.loads(first.out)["measured"]["drift"]["kl"]["value"] > 0
    assert {path.name for path in folder.iterdir()} == {"t.txt", "ranks"}

    read, _ = svdcli.read_texts("t.txt", stdlib=False, held_out=False).split(0.9)
    parts = [folder / f"{number}.safetensors" for number in (1, 2)]
    for number, part in enumerate(parts, 1):
        svdcli.calibrate(model, part, read, part=(number, 2), **HOW)
    svdcli.merge_moments(parts, "hand.safetensors")
    svdcli.compress(model, "hand", keep=0.5, calibration="hand.safetensors")
    weights = "model.safetensors"
    assert (folder / "ranks" / weights).read_bytes() == (folder / "hand" / weights).read_bytes()


def test_local_processes_leave_the_reading_to_one_with_all_threads(
    readable: Readable, texts: svdcli.Texts, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew, "_cores", lambda: 2)
    reading = svdcli.Reading(texts, samples=100, seq_len=32)
    torch.set_num_threads(2)
    svdcli.compress(readable("llama"), "two", keep=0.5, reading=reading, compute=Compute(jobs=2))
    assert torch.get_num_threads() == 2
    svdcli.compress(readable("llama"), "one", keep=0.5, reading=reading)
    assert tree(folder / "two") == tree(folder / "one")


def alone_in_a_team(model: Path, out: Path, texts: svdcli.Texts, **options: Any) -> Any:
    """The way of ranks, with one of them."""
    kept: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "read_alone", kept.append)
        svdcli.calibrate(model, out, texts, **(HOW | options))
    with assembled(Place(0, 1, 0, "127.0.0.1", free_port())) as team:
        return module.calibrate_together(kept[0], team)


def test_a_launch_that_was_cut_short_takes_the_parts_that_are_whole(
    readable: Readable, texts: svdcli.Texts, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, read = readable("mixtral"), []
    merged, added_up = module.merged, Work.added_up

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    def watched(*arguments: Any) -> Any:
        read.append(arguments)
        return added_up(*arguments)

    monkeypatch.setattr(Work, "added_up", watched)
    monkeypatch.setattr(module, "merged", stop)
    for seed in (0, 1):
        with pytest.raises(KeyboardInterrupt):
            alone_in_a_team(model, folder / "c.safetensors", texts, seed=seed)
    # Another seed is another command
    assert len(read) == 2
    assert len(list(folder.glob(".c.safetensors.parts-*/1.safetensors"))) == 2
    monkeypatch.setattr(module, "merged", merged)
    done = alone_in_a_team(model, folder / "c.safetensors", texts, seed=1)
    assert len(read) == 2
    svdcli.calibrate(model, folder / "whole.safetensors", texts, seed=1, gradients=True, **HOW)
    whole = (folder / "whole.safetensors").read_bytes()
    assert (folder / "c.safetensors").read_bytes() == whole
    assert done.bytes == len(whole)
    assert done.saw_few == ()
    left = {path.name for path in folder.iterdir()}
    assert left == {"t.txt", "c.safetensors", "whole.safetensors"}


def test_a_part_that_is_damaged_is_read_again(
    readable: Readable, texts: svdcli.Texts, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "merged", stop)
        with pytest.raises(KeyboardInterrupt):
            alone_in_a_team(readable("llama"), folder / "c.safetensors", texts)
    (part,) = folder.glob(".c.safetensors.parts-*/1.safetensors")
    part.write_bytes(part.read_bytes()[:-8])
    assert alone_in_a_team(readable("llama"), folder / "c.safetensors", texts).layers == 14


def test_a_launch_of_parts_by_hand_is_refused(
    readable: Readable, texts: svdcli.Texts, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    out = folder / "c.safetensors"
    with pytest.raises(UsageError, match="a part is for a process by itself"):
        svdcli.calibrate(readable("llama"), out, texts, part=(1, 2), **HOW)
    assert svdcli.calibrate(readable("llama"), out, texts, alone=True, **HOW).layers == 14
