"""Several ranks heal as one process does that reads what all of them read, hold the same bits, and
end together: a rank that is killed costs the block that was under way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import replicas_worker
import torch
import zoo
from agents import COMMAND, ranks_alone, until
from helpers import cli, complaint
from zoo import words_tokenizer

import svdcli
from svdcli.errors import SvdcliError
from svdcli.healing.blocks import WHOLE, Batches
from svdcli.healing.replicas import BFLOAT16, PLAIN, POWER_SGD, Replicas
from svdcli.ranks import FollowedError, OtherRankError


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(a tiny Llama with a tokenizer, the same in factors, the same at 8 bits)."""
    folder = tmp_path_factory.mktemp("replicas")
    teacher = zoo.save("llama", folder / "model")
    words_tokenizer(teacher)
    svdcli.compress(teacher, folder / "small", svdcli.Recipe("keep", 0.4))
    svdcli.compress(teacher, folder / "packed", svdcli.Recipe("keep", 0.9, bits="8"))
    return teacher, folder / "small", folder / "packed"


@pytest.fixture(scope="module")
def found(models: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of two ranks found."""
    folder = tmp_path_factory.mktemp("found")
    work = "import sys, replicas_worker; replicas_worker.main(sys.argv[1:])"
    with ranks_alone(work, [[*models, folder]] * 2, folder, with_store=True) as ranks:
        ends = [rank.end(300) for rank in ranks]
    assert [done.code for done in ends] == [0, 0], ends
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def command(models: tuple[Path, Path, Path], folder: Path, steps: int) -> list[object]:
    text = folder / "text.txt"
    text.write_text(" ".join(f"w{(i * i + 3 * i) % 94 + 2}" for i in range(6000)))
    line: list[object] = ["heal", models[1], "--teacher", models[0], "--text", text]
    return [*line, "--seq-len", 32, "--steps", steps, "-o", folder / "healed", "--json"]


@pytest.mark.parametrize("which", [1, 2], ids=["factors", "packed"])
def test_two_ranks_learn_what_one_process_learns_from_both_batches(
    which: int, models: tuple[Path, Path, Path], found: list[Any]
) -> None:
    ours = found[0][0][str(models[which])]
    alone = replicas_worker.healed(models[0], models[which], Replicas(accumulated=2))
    assert [block.name for block in ours] == [block.name for block in alone]
    assert ours[-1].name == WHOLE
    for one, other in zip(ours, alone, strict=True):
        assert one.steps == other.steps == replicas_worker.STEPS
        assert one.before == pytest.approx(other.before, rel=1e-6)
        # What was learned is little in so few steps: it is what has to be the same
        assert one.after < one.before
        assert one.before - one.after == pytest.approx(other.before - other.after, rel=0.01)


def test_all_ranks_hold_the_same_bits(found: list[Any]) -> None:
    first, second = (blocks for blocks, _ in found)
    for name, blocks in first.items():
        for one, other in zip(blocks, second[name], strict=True):
            assert (one.before, one.after) == (other.before, other.after)
            assert one.weights.keys() == other.weights.keys()
            assert all(torch.equal(one.weights[key], other.weights[key]) for key in one.weights)


@pytest.mark.parametrize("which", [1, 2], ids=["factors", "packed"])
def test_ranks_that_share_weights_learn_the_same_and_hold_half(
    which: int, models: tuple[Path, Path, Path], found: list[Any]
) -> None:
    for blocks, exchanged in found:
        plain = blocks[str(models[which])][-1]
        shared, held = exchanged["shared"][str(models[which])]
        assert (shared.name, shared.steps) == (plain.name, plain.steps)
        assert shared.before == pytest.approx(plain.before, rel=1e-5)
        assert shared.after < shared.before
        assert shared.before - shared.after == pytest.approx(plain.before - plain.after, rel=1e-3)
        assert shared.weights.keys() == plain.weights.keys()
        for name, weight in plain.weights.items():
            torch.testing.assert_close(shared.weights[name], weight, rtol=1e-5, atol=1e-5)
        assert held.keys() == {"teacher", "student", "trained"}
        for count, here in held.values():
            assert 0.45 < here / count < 0.55


def test_the_command_shares_weights_where_one_rank_cannot_hold_them(
    models: tuple[Path, Path, Path], found: list[Any]
) -> None:
    for _, exchanged in found:
        (blocks, notes), (shared, told) = exchanged["told"][None], exchanged["told"][0]
        assert list(shared) == list(blocks) == ["model.layers.0", "model.layers.1", WHOLE]
        for name, errors in blocks.items():
            assert shared[name] == pytest.approx(errors, rel=1e-5)
        assert not any("FSDP2" in note for note in notes)
        (note,) = (note for note in told if "FSDP2" in note)
        assert "shared among 2 ranks" in note


def test_what_ranks_exchange(found: list[Any]) -> None:
    for _, exchanged in found:
        assert exchanged["says"] == 0
        assert exchanged["least"] == 6
        assert exchanged["union"] == {0, 1}
        sums = {name: total.tolist() for name, total in exchanged["summed"].items()}
        assert sums == {"of 0": [1, 1], "of 1": [1, 1], "of all": 2}


def test_gradients_are_averaged_however_they_travel(found: list[Any]) -> None:
    """Of a matrix of rank one nothing is lost in PowerSGD's factors, and they are small."""
    sent = {}
    for _, exchanged in found:
        for how, (count, (matrix, vector, nothing), one) in exchanged["averages"].items():
            close = 1e-2 if how == BFLOAT16 else 1e-5
            torch.testing.assert_close(matrix, 1.5 * one, rtol=close, atol=close)
            torch.testing.assert_close(vector, torch.full((5,), 0.5), rtol=0, atol=0)
            assert nothing is None
            sent[how] = count
    numbers = 64 * 48 + 5 + 3 + 3
    assert sent == {
        PLAIN: 4 * numbers,
        BFLOAT16: 2 * numbers,
        POWER_SGD: 4 * (4 * (64 + 48) + 5 + 3 + 3),
    }


def test_what_one_rank_refuses_ends_all_and_rank_0_tells_it(found: list[Any]) -> None:
    expected = ((SvdcliError, OtherRankError), (FollowedError, FollowedError))
    for own, (_, exchanged) in zip(expected, found, strict=True):
        kinds, told = zip(*exchanged["refusals"], strict=True)
        assert kinds == own
        words = [line.removeprefix("rank 0: ").removeprefix("rank 1: ") for line in told]
        assert words == ["rank 0 refuses; do not", "rank 1 refuses; do not"]


def test_a_killed_rank_ends_the_run_and_the_journal_goes_on(
    models: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    line = command(models, tmp_path, 20)
    journal = tmp_path / "healed.partial" / "journal.jsonl"

    def begun() -> bool:
        assert ranks[0].running, ranks[0].end(0)
        return journal.exists() and '"block"' in journal.read_text()

    with ranks_alone(COMMAND, [line] * 2, tmp_path) as ranks:
        until(begun, "a block is done", 300)
        ranks[1].kill()
        first = ranks[0].end(120)
    assert first.code == 1, first.err
    said = [row for row in first.err.splitlines() if row.startswith("svdcli:")]
    assert said == [
        "svdcli: error: rank 1 is gone; run the same command again, it continues with the block it "
        "had reached"
    ]

    # Both go on with what is done, which rank 1 has never seen
    done = [json.loads(row) for row in journal.read_text().splitlines() if '"block"' in row]
    assert done
    with ranks_alone(COMMAND, [line] * 2, tmp_path) as ranks:
        ends = [rank.end(300) for rank in ranks]
    assert [done.code for done in ends] == [0, 0], ends
    blocks = json.loads(ends[0].out)["healing"]["blocks"]
    assert list(blocks) == ["model.layers.0", "model.layers.1", WHOLE]
    for row in done:
        assert blocks[row["block"]] == {key: row[key] for key in ("before", "after", "steps")}
    assert svdcli.verify(tmp_path / "healed", models[0]).ok


def test_ranks_that_were_asked_for_different_healing_end_with_one_line(
    models: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    line = command(models, tmp_path, 3)
    with ranks_alone(COMMAND, [line, [*line, "--seed", "1"]], tmp_path) as ranks:
        first, second = [rank.end(120) for rank in ranks]
    assert (first.code, second.code, second.err) == (2, 2, "")
    (told,) = first.err.splitlines()
    assert "rank 1 was asked for something else than rank 0" in told
    assert not (tmp_path / "healed.partial").exists()


def test_gradients_that_do_not_travel_are_not_compressed(
    models: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    line = command(models, tmp_path, 3)
    told = complaint(cli(*line, "--compress-gradients"), 2)
    assert "there is one process" in told
    assert not (tmp_path / "healed.partial").exists()


def test_more_ranks_than_batches_are_refused() -> None:
    three = Replicas()
    three.size = 3
    batches = Batches([{"input_ids": torch.zeros(1, 1)}] * 2, [])
    with pytest.raises(SvdcliError, match="fills 2 batches to train on, and there are 3 ranks"):
        batches.share(three)
