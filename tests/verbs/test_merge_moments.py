"""Parts of a calibration, added up, are the calibration of the whole text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import cli
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import svdcli
from svdcli.calibration import precision as module
from svdcli.calibration.moments import METADATA_OF_PART, open_moments
from svdcli.calibration.precision import is_faster_in_bfloat16
from svdcli.errors import BadCheckpointError, SvdcliError, UsageError
from svdcli.verbs.calibrate import Forecast, calibrate

Readable = Callable[..., Path]
LENGTH = 16
TEXT = svdcli.Texts("words", (" ".join(f"w{at * at % 90 + 2}" for at in range(900)),))
LINES = svdcli.Texts(
    "lines",
    ("\n".join(" ".join(f"w{at * j % 90 + 2}" for at in range(3 + j % 11)) for j in range(60)),),
)
FAMILIES = ("llama", "gpt2", "t5", "mixtral", "bert", "bert-classifier")


@pytest.fixture(scope="module", autouse=True)
def _small_batches() -> Iterator[None]:
    """Four windows in a batch, so that a little text makes several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("svdcli.text.tokens.TOKENS_IN_A_BATCH", 4 * LENGTH)
        yield


def how_to_read(family: str) -> tuple[svdcli.Texts, dict[str, Any]]:
    """Ten batches of windows, or as many of sentences."""
    if "bert" in family:
        return LINES, {"samples": 60}
    return TEXT, {"samples": 38, "seq_len": LENGTH}


def parts_of(
    model: Path, folder: Path, count: int, family: str = "llama", **options: Any
) -> list[Path]:
    """The files of all parts, each in a folder of its own."""
    texts, how = how_to_read(family)
    paths = []
    for number in range(1, count + 1):
        path = folder / f"{number} of {count}" / "part.safetensors"
        path.parent.mkdir()
        calibrate(model, path, texts, part=(number, count), **(how | options))
        paths.append(path)
    return paths


@pytest.fixture(scope="module")
def both(readable: Readable, tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The two parts of a tiny Llama's calibration."""
    parts = parts_of(readable("llama"), tmp_path_factory.mktemp("both"), 2)
    return [part.read_bytes() for part in parts]


@pytest.fixture
def halves(both: list[bytes], tmp_path: Path) -> list[Path]:
    """Files of these, each in a folder of its own."""
    paths = [tmp_path / f"{number} of 2" / "part.safetensors" for number in (1, 2)]
    for path, part in zip(paths, both, strict=True):
        path.parent.mkdir()
        path.write_bytes(part)
    return paths


def whole(model: Path, out: Path, family: str = "llama", **options: Any) -> Path:
    texts, how = how_to_read(family)
    calibrate(model, out, texts, **(how | {"gradients": True} | options))
    return out


def furthest(one: Path, other: Path) -> float:
    """The largest difference of two files, in the largest entry of each moment."""
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    with safe_open(one, "pt") as first, safe_open(other, "pt") as second:
        assert first.metadata() == second.metadata()
    return max(float((a[key] - b[key]).abs().max() / a[key].abs().max()) for key in a)


# What comes of them -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_add_up_to_the_whole(family: str, readable: Readable, tmp_path: Path) -> None:
    """Experts too: what one of them lends another is known only when all parts are there."""
    model = readable(family)
    once = whole(model, tmp_path / "whole.safetensors", family)
    for count in (1, 3):
        out = tmp_path / f"{count}.safetensors"
        done = svdcli.merge_moments(parts_of(model, tmp_path, count, family), out)
        assert furthest(once, out) < 1e-6
        assert done.rounds == count
        assert done.bytes == out.stat().st_size == once.stat().st_size
    # One part takes the way of the whole text, to the bit
    assert (tmp_path / "1.safetensors").read_bytes() == once.read_bytes()
    assert (tmp_path / "3.safetensors").read_bytes() != once.read_bytes()


def test_the_order_of_arguments_does_not_matter(readable: Readable, tmp_path: Path) -> None:
    parts = parts_of(readable("mixtral"), tmp_path, 3)
    results = set()
    for order in (parts, parts[::-1], parts[1:] + parts[:1]):
        svdcli.merge_moments(order, tmp_path / "m.safetensors", force=True)
        results.add((tmp_path / "m.safetensors").read_bytes())
    assert len(results) == 1


@pytest.mark.parametrize("family", ["llama", "mixtral", "bert"])
def test_rounds_change_nothing_to_the_bit(family: str, readable: Readable, tmp_path: Path) -> None:
    """Neither the labels of a batch nor the order of sums depends on the memory there is."""
    told: list[Forecast] = []
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    whole(readable(family), paths[0], family, memory=10**9, announce=told.append)
    for path, share in zip(paths[1:], (0.5, 0.0), strict=True):
        memory = int(share * told[0].state_bytes)
        whole(readable(family), path, family, memory=memory, announce=told.append)
    rounds = [forecast.rounds for forecast in told]
    assert rounds[0] == 1 < rounds[1] < 5 < 8 < rounds[2]
    assert furthest(paths[0], paths[1]) == furthest(paths[0], paths[2]) == 0


def test_parts_are_shares_of_the_text(readable: Readable, tmp_path: Path) -> None:
    told: list[Forecast] = []
    parts_of(readable("llama"), tmp_path, 3, announce=told.append)
    assert [forecast.part for forecast in told] == ["1/3", "2/3", "3/3"]
    # Ten batches, of which the last has two windows: it is the first part's
    assert [forecast.samples for forecast in told] == [14, 12, 12]
    assert [forecast.tokens for forecast in told] == [14 * LENGTH, 12 * LENGTH, 12 * LENGTH]


def test_experts_that_a_part_never_reached_are_those_of_the_others(
    readable: Readable, tmp_path: Path
) -> None:
    """One batch a part: some experts see none of its tokens."""
    model = readable("mixtral")
    how = {"samples": 3, "seq_len": 2}
    parts = parts_of(model, tmp_path, 1, "mixtral", **how)
    svdcli.merge_moments(parts, tmp_path / "one.safetensors")
    once = whole(model, tmp_path / "whole.safetensors", "mixtral", **how)
    assert furthest(once, tmp_path / "one.safetensors") == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("svdcli.text.tokens.TOKENS_IN_A_BATCH", 2)
        once = whole(model, tmp_path / "whole.safetensors", "mixtral", **how, force=True)
        parts = parts_of(model, tmp_path, 3, "mixtral", **how)
        sizes = {len(load_file(part)) for part in parts}
        done = svdcli.merge_moments(parts, tmp_path / "three.safetensors")
    assert max(sizes) < len(load_file(once))
    assert furthest(once, tmp_path / "three.safetensors") < 1e-6
    assert done.saw_few


def test_what_memory_decides_elsewhere_a_part_decides_alike_everywhere(
    readable: Readable, tmp_path: Path
) -> None:
    """With the memory of another machine a whole text would do without gradients."""
    told: list[Forecast] = []
    parts = parts_of(
        readable("llama"), tmp_path, 1, memory=1, precision="auto", announce=told.append
    )
    assert told[0].gradients
    assert told[0].precision == "float32"
    svdcli.merge_moments(parts, tmp_path / "m.safetensors")
    assert open_moments(tmp_path / "m.safetensors").provenance.gradients
    without = tmp_path / "without"
    without.mkdir()
    parts_of(readable("llama"), without, 1, gradients=False, announce=told.append)
    assert not told[1].gradients


# Parts that do not fit ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"seed": 1}, "its seed is 1, not 0"),
        ({"samples": 30}, "its number of batches is 8, not 10"),
        ({"seq_len": 12}, "is of another calibration than"),
        ({"gradients": False}, "it was read without gradients"),
        ({"precision": "bfloat16"}, "its precision is bfloat16, not float32"),
        ({"include": ("*mlp*",)}, "its layers differ"),
    ],
)
def test_a_part_of_another_calibration_is_refused(
    other: dict[str, Any], says: str, halves: list[Path], readable: Readable, tmp_path: Path
) -> None:
    foreign = tmp_path / "other.safetensors"
    how = how_to_read("llama")[1] | other
    calibrate(readable("llama"), foreign, TEXT, part=(2, 2), **how)
    with pytest.raises(UsageError, match=says) as caught:
        svdcli.merge_moments([halves[0], foreign], tmp_path / "m.safetensors")
    assert str(foreign) in str(caught.value)
    assert not (tmp_path / "m.safetensors").exists()


def test_parts_of_other_texts_models_and_numbers_are_refused(
    halves: list[Path], readable: Readable, tmp_path: Path
) -> None:
    first, second = halves
    others = {
        "its text is": lambda path: calibrate(
            readable("llama"),
            path,
            svdcli.Texts("t", (TEXT.documents[0].upper(),)),
            part=(2, 2),
            **how_to_read("llama")[1],
        ),
        "its model is": lambda path: calibrate(
            readable("llama", torch.bfloat16), path, TEXT, part=(2, 2), **how_to_read("llama")[1]
        ),
        "it is one of 3 parts, not of 2": lambda path: calibrate(
            readable("llama"), path, TEXT, part=(2, 3), **how_to_read("llama")[1]
        ),
    }
    for number, (says, make) in enumerate(others.items()):
        path = tmp_path / f"other-{number}.safetensors"
        make(path)
        with pytest.raises(UsageError, match=says):
            svdcli.merge_moments([first, path], tmp_path / "m.safetensors")
    for given, says in (
        ([first], "part 2/2 is missing; run calibrate with --part 2/2"),
        ([first, second, first], f"{first} is given twice"),
        ([], "no parts are given"),
    ):
        with pytest.raises(UsageError, match=says):
            svdcli.merge_moments(given, tmp_path / "m.safetensors")
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(first.read_bytes())
    with pytest.raises(UsageError, match=r"copy.safetensors are both part 1/2"):
        svdcli.merge_moments([first, second, copy], tmp_path / "m.safetensors")
    with pytest.raises(SvdcliError, match="is the source"):
        svdcli.merge_moments([first, second], first, force=True)


def test_a_text_may_have_another_name_on_another_machine(
    halves: list[Path], readable: Readable, tmp_path: Path
) -> None:
    moved = svdcli.Texts("/mnt/words", TEXT.documents)
    how = how_to_read("llama")[1]
    calibrate(readable("llama"), halves[1], moved, part=(2, 2), force=True, **how)
    svdcli.merge_moments(halves, tmp_path / "m.safetensors")
    assert open_moments(tmp_path / "m.safetensors").provenance.text == TEXT.name


def test_a_part_is_no_file_of_moments_nor_the_other_way_round(
    readable: Readable, tmp_path: Path
) -> None:
    model = readable("llama")
    (part,) = parts_of(model, tmp_path, 1)
    with pytest.raises(BadCheckpointError, match="is a part of a calibration; run `svdcli merge-"):
        svdcli.compress(model, tmp_path / "o", keep=0.5, calibration=part)
    moments = tmp_path / "m.safetensors"
    svdcli.merge_moments([part], moments)
    with pytest.raises(BadCheckpointError, match="was not written by svdcli calibrate --part"):
        svdcli.merge_moments([moments], tmp_path / "again.safetensors")
    assert svdcli.compress(model, tmp_path / "o", keep=0.5, calibration=moments).path


def edited(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], Any]) -> Path:
    """The same file with other metadata and tensors."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        data = json.loads(file.metadata()[METADATA_OF_PART])
    change(data, tensors)
    save_file(tensors, path, {METADATA_OF_PART: json.dumps(data)})
    return path


LEADER = "model.layers.0.mlp.gate_proj.weight"
DAMAGES: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], Any]] = {
    "no rows": lambda data, tensors: data.pop("rows"),
    "no part": lambda data, tensors: data.pop("part"),
    "part 3 of 2": lambda data, tensors: data.update(part=3),
    "a list of leaders": lambda data, tensors: data.update(leaders=[LEADER]),
    "a leader of nothing": lambda data, tensors: data["leaders"].update(x=LEADER),
    "rows that are missing": lambda data, tensors: data["rows"].pop(LEADER),
    "rows below zero": lambda data, tensors: data["rows"].update({LEADER: -1}),
    "no seed": lambda data, tensors: data.pop("seed"),
    "no input": lambda data, tensors: tensors.pop(f"input.{LEADER}"),
    "a narrow mean": lambda data, tensors: tensors.update({f"mean.{LEADER}": torch.ones(3)}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_part_is_one_line(damage: str, halves: list[Path], tmp_path: Path) -> None:
    first, second = halves
    with pytest.raises(BadCheckpointError, match="sums are damaged") as caught:
        svdcli.merge_moments([first, edited(second, DAMAGES[damage])], tmp_path / "m.safetensors")
    assert str(second) in str(caught.value)


def test_what_is_not_finite_or_has_another_shape_names_its_part(
    halves: list[Path], tmp_path: Path
) -> None:
    first, second = halves
    before = second.read_bytes()

    def spoil(data: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[f"output.{LEADER}"].view(-1)[3] = float("nan")

    def narrow(data: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[f"output.{LEADER}"] = torch.ones(4, 4)

    for change, says in ((spoil, "holds NaN"), (narrow, "has another shape")):
        second.write_bytes(before)
        with pytest.raises(BadCheckpointError, match=f"2 of 2.*{says}"):
            svdcli.merge_moments([first, edited(second, change)], tmp_path / "m.safetensors")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == []


def test_a_part_of_a_later_format_asks_for_a_newer_svdcli(
    halves: list[Path], tmp_path: Path
) -> None:
    edited(halves[1], lambda data, tensors: data.update(format=2))
    with pytest.raises(BadCheckpointError, match="has format 2, this svdcli knows 1; upgrade"):
        svdcli.merge_moments(halves, tmp_path / "m.safetensors")


def test_what_a_part_cannot_do_is_refused(readable: Readable, tmp_path: Path) -> None:
    model, out = readable("llama"), tmp_path / "c.safetensors"
    how = how_to_read("llama")[1]
    with pytest.raises(UsageError, match="takes the moments of the whole text"):
        calibrate(model, out, TEXT, part=(1, 2), sensitivity=True, **how)
    with pytest.raises(UsageError, match="has 10 batches, too few for 11 parts"):
        calibrate(model, out, TEXT, part=(1, 11), **how)
    for number, of in ((0, 2), (3, 2), (-1, 2)):
        with pytest.raises(UsageError, match=f"there is no part {number}/{of}"):
            calibrate(model, out, TEXT, part=(number, of), **how)
    assert not list(tmp_path.iterdir())


# The command --------------------------------------------------------------------------------------


def test_the_commands_say_what_they_did(readable: Readable, folder: Path) -> None:
    model = readable("llama")
    (folder / "t.txt").write_text(TEXT.documents[0])
    read = ("--text", "t.txt", "--samples", "38", "--seq-len", str(LENGTH))
    for number in (1, 2):
        done = cli(
            "calibrate", str(model), *read, "--part", f"{number}/2", "-o", f"{number}.safetensors"
        )
        assert done.code == 0, done.err
        assert f"part {number}/2 of the text" in done.err
    merged = ("merge-moments", "2.safetensors", "1.safetensors", "-o", "m.safetensors")
    done = cli(*merged, "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert (told["kind"], told["tokens"], told["layers"]) == ("calibration", 38 * LENGTH, 14)
    assert "wrote m.safetensors: 14 layers" in done.err
    assert cli(*merged).code == 1
    done = cli(*merged, "--force", "-q")
    assert (done.code, done.out, done.err) == (0, b"", "")
    for wrong in ("3", "a/b", "1/2/3", "2/1", "0/3"):
        done = cli("calibrate", str(model), *read, "--part", wrong, "-o", "c.safetensors")
        assert done.code == 2
        assert len(done.err.splitlines()) == 1


def test_bfloat16_is_close_and_is_recorded(readable: Readable, tmp_path: Path) -> None:
    """Half a percent of the largest entry, a few times the rounding of one number: 2^-9."""
    model = readable("llama")
    exact = whole(model, tmp_path / "a.safetensors")
    rounded = whole(model, tmp_path / "b.safetensors", precision="bfloat16")
    assert open_moments(exact).provenance.precision == "float32"
    assert open_moments(rounded).provenance.precision == "bfloat16"
    one, other = load_file(exact), load_file(rounded)
    worst = max(float((one[key] - other[key]).abs().max() / one[key].abs().max()) for key in one)
    assert 0 < worst < 0.05
    assert {tensor.dtype for tensor in other.values()} == {torch.float32}


def speeds(fast: float) -> Callable[[torch.device, torch.dtype], float]:
    return lambda device, dtype: fast if dtype == torch.bfloat16 else 1.0


@pytest.mark.parametrize(
    ("fast", "expected"), [(0.0, "float32"), (1.4, "float32"), (1.6, "bfloat16")]
)
def test_auto_takes_what_the_machine_multiplies_faster(
    fast: float,
    expected: str,
    readable: Readable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "is_faster_in_bfloat16", is_faster_in_bfloat16)
    monkeypatch.setattr(module, "operations_a_second", speeds(fast))
    told: list[Forecast] = []
    path = whole(readable("llama"), tmp_path / "c.safetensors", announce=told.append)
    assert told[0].precision == open_moments(path).provenance.precision == expected
