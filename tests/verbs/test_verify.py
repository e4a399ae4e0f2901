"""verify fails where weights are not what was written, and only tells what became of the files
beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import cli, complaint, write_model, write_sharded
from safetensors.torch import load_file, save_file

import svdcli
from svdcli import Recipe
from svdcli.files.record import is_inside
from svdcli.verbs.verify import BESIDE, Check


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """One weight file, a config.json of transformers, a tokenizer and a subfolder."""
    svdcli.compress(write_model(tmp_path / "m"), tmp_path / "o", Recipe("rank", 9))
    return tmp_path / "o"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    svdcli.compress(write_model(tmp_path / "n", shards=3), tmp_path / "s", Recipe("rank", 9))
    return tmp_path / "s"


def failed(path: Path) -> list[Check]:
    return [check for check in svdcli.verify(path).checks if not check.ok]


def spoil(path: Path, at: int = -3) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    path.write_bytes(data)


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


# Weights ------------------------------------------------------------------------------------------


def test_a_factor_that_changed(output: Path) -> None:
    spoil(output / "model.safetensors")
    assert [(check.check, check.subject) for check in failed(output)] == [
        ("sha256", "model.safetensors")
    ]
    assert (
        "does not verify: sha256, model.safetensors (changed since svdcli wrote it); write"
        in cli("verify", output).err
    )


def test_a_copied_tensor_that_changed(output: Path) -> None:
    path = output / "model.safetensors"
    norm = bytes(bytearray(load_file(path)["norm.weight"].untyped_storage()))
    spoil(path, path.read_bytes().find(norm) + 3)
    assert [check.subject for check in failed(output)] == ["model.safetensors"]


def test_a_record_that_changed(output: Path) -> None:
    edit(
        output / "svdcli.json",
        lambda record: record["layers"]["layers.0.up.weight"].update(solver="gram"),
    )
    assert [(check.check, check.subject) for check in failed(output)] == [
        ("header agrees with plan", "model.safetensors")
    ]


def test_an_index_that_changed(shards: Path) -> None:
    edit(
        shards / "model.safetensors.index.json",
        lambda index: index["metadata"].update(total_size=1),
    )
    assert [check.subject for check in failed(shards)] == ["model.safetensors.index.json"]


def test_weights_in_a_folder_of_their_own_are_weights(tmp_path: Path) -> None:
    """As sentence-transformers keeps its dense layers: carried over as they are."""
    model = write_model(tmp_path / "m")
    (model / "2_Dense").mkdir()
    save_file({"linear.weight": torch.ones(4, 4)}, model / "2_Dense" / "model.safetensors")
    svdcli.compress(model, tmp_path / "o", Recipe("rank", 9))
    spoil(tmp_path / "o" / "2_Dense" / "model.safetensors")
    assert [check.subject for check in failed(tmp_path / "o")] == ["2_Dense/model.safetensors"]
    (tmp_path / "o" / "2_Dense" / "model.safetensors").unlink()
    assert [check.detail for check in failed(tmp_path / "o")] == ["missing"]


def test_weights_that_a_loader_opens_in_place_of_ours(shards: Path) -> None:
    shutil.copy(
        shards.parent / "n" / "model-00001-of-00003.safetensors", shards / "model.safetensors"
    )
    assert [check.subject for check in failed(shards)] == ["model.safetensors"]
    line = complaint(cli("verify", shards, "-q"), 1)
    assert (
        "model.safetensors (came after svdcli wrote the output, and is what a loader opens); "
        "move it elsewhere" in line
    )


def test_weights_that_are_opened_along_with_ours(tmp_path: Path) -> None:
    model = tmp_path / "m"
    write_model(model, config=None)
    (model / "model.safetensors").rename(model / "net.safetensors")
    svdcli.compress(model, tmp_path / "o", Recipe("rank", 9))
    assert svdcli.verify(tmp_path / "o").ok
    save_file({"more.weight": torch.ones(3)}, tmp_path / "o" / "more.safetensors")
    assert [check.subject for check in failed(tmp_path / "o")] == ["more.safetensors"]


def test_an_adapter_that_transformers_would_put_on_top(output: Path) -> None:
    (output / "adapter_config.json").write_text("{}")
    assert [check.subject for check in failed(output)] == ["adapter_config.json"]


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.pop("quantization_config"),
        lambda config: config.update(quantization_config={"quant_method": "gptq"}),
        lambda config: config.update(quantization_config=3),
        lambda config: config.update(transformers_weights="other.safetensors"),
    ],
    ids=["lost", "another", "odd", "elsewhere"],
)
def test_a_config_with_which_the_weights_do_not_open(
    output: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    edit(output / "config.json", change)
    assert [check.subject for check in failed(output)] == ["config.json"]


def test_a_config_that_is_gone(output: Path) -> None:
    (output / "config.json").unlink()
    assert [check.subject for check in failed(output)] == ["config.json"]


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        (lambda config: config.update(hidden_size=128), "hidden_size is 128, and 64"),
        (
            lambda config: config["text_config"].update(vocab_size=81),
            "text_config.vocab_size is 81",
        ),
    ],
    ids=["outer", "inner"],
)
def test_sizes_in_the_config_that_are_not_the_original_s(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], detail: str
) -> None:
    config = {"model_type": "llava", "hidden_size": 64, "text_config": {"vocab_size": 80}}
    model = write_model(tmp_path / "m", config)
    svdcli.compress(model, tmp_path / "o", Recipe("rank", 9, dtype="F16"))
    assert svdcli.verify(tmp_path / "o", model).ok
    edit(tmp_path / "o" / "config.json", change)
    (failure,) = [check for check in svdcli.verify(tmp_path / "o", model).checks if not check.ok]
    assert (failure.check, failure.subject) == ("config sizes", "config.json")
    assert failure.detail.startswith(detail)


def test_a_config_that_transformers_wrote_anew_may_lack_sizes(output: Path) -> None:
    """It leaves out what is its default."""
    edit(output / "config.json", lambda config: (config.pop("hidden_size"), config.update(bos=1)))
    assert svdcli.verify(output, output.parent / "m").ok


# Beside them --------------------------------------------------------------------------------------


def test_a_checkpoint_that_was_carried_along_did_not_come_afterwards(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    write_model(model / "checkpoint-500")
    svdcli.compress(model, tmp_path / "o", Recipe("rank", 9), carry=["checkpoint-500/*"])
    assert not [check for check in svdcli.verify(tmp_path / "o").checks if check.check == BESIDE]
    write_model(tmp_path / "o" / "checkpoint-600")
    assert [
        check.subject for check in svdcli.verify(tmp_path / "o").checks if check.check == BESIDE
    ] == ["checkpoint-600/"]


def test_what_a_hub_and_its_users_do_is_noted_and_no_failure(output: Path) -> None:
    (output / "README.md").write_text("# card\n")
    (output / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (output / "pytorch_model.bin").write_bytes(b"other weights, which come second")
    (output / "tokenizer.json").write_text('{"changed": 1}')
    (output / "1_Pooling" / "config.json").unlink()
    edit(output / "config.json", lambda config: config.update(use_cache=False))
    done = cli("verify", output)
    assert (done.code, done.err) == (0, "")
    notes = [
        " ".join(line.split()[1:])
        for line in done.out.decode().splitlines()
        if line.startswith("note")
    ]
    assert sorted(notes) == [
        ".gitattributes: came after svdcli wrote the output",
        "1_Pooling/config.json: missing",
        "README.md: came after svdcli wrote the output",
        "config.json: changed since svdcli wrote it",
        "pytorch_model.bin: came after svdcli wrote the output",
        "tokenizer.json: changed since svdcli wrote it",
    ]
    data = json.loads(cli("verify", output, "--json").out)
    assert data["ok"] is True
    assert sum(check["check"] == "other files" and check["ok"] for check in data["checks"]) == 6
    assert "FAILED" not in done.out.decode()


def test_nothing_is_noted_of_an_output_as_it_was_written(output: Path, shards: Path) -> None:
    for path in (output, shards):
        found = svdcli.verify(path)
        assert found.ok
        assert {check.check for check in found.checks} == {
            "header",
            "sha256",
            "header agrees with plan",
            "tensor as planned",
        }
        assert "note" not in cli("verify", path).out.decode()


def test_a_config_that_no_weights_depend_on_may_change(tmp_path: Path) -> None:
    svdcli.compress(write_model(tmp_path / "m"), tmp_path / "o", Recipe("rank", 9, layout="dense"))
    edit(tmp_path / "o" / "config.json", lambda config: config.update(use_cache=False))
    assert svdcli.verify(tmp_path / "o").ok


def test_verify_against_needs_no_digest_to_notice(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    svdcli.compress(model / "model.safetensors", tmp_path / "o.safetensors", Recipe("rank", 9))
    data = bytearray((tmp_path / "o.safetensors").read_bytes())
    data[-50] ^= 0x40
    (tmp_path / "o.safetensors").write_bytes(data)
    assert not svdcli.verify(tmp_path / "o.safetensors", model / "model.safetensors").ok
    assert not svdcli.verify(tmp_path / "o.safetensors", tmp_path / "m").ok


# A record that names files elsewhere --------------------------------------------------------------

OUTSIDE = [
    "/etc/passwd",
    "../secret",
    "a/../../secret",
    "C:\\secret",
    "C:secret",
    "..\\secret",
    "\\\\host\\share",
    "a\0b",
    "",
    ".",
]


@pytest.mark.parametrize("name", OUTSIDE, ids=repr)
def test_a_file_outside_the_folder_is_never_read(
    output: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (output.parent / "secret").write_text("secret")
    opened: list[str] = []
    real = Path.open

    def watch(path: Path, *args: Any, **how: Any) -> Any:
        opened.append(str(path))
        return real(path, *args, **how)

    edit(
        output / "svdcli.json",
        lambda record: record["files"].update({name: {"bytes": 6, "sha256": "0" * 64}}),
    )
    monkeypatch.setattr(Path, "open", watch)
    for command in (["report"], ["verify"], ["expand", "-o", output.parent / "d"]):
        line = complaint(cli(command[0], output, *command[1:]), 1)
        assert "outside its folder; do not trust this output" in line
    with pytest.raises(svdcli.SvdcliError, match="outside its folder"):
        svdcli.load(output)
    assert not any("secret" in path or "passwd" in path for path in opened)
    assert not (output.parent / "d").exists()


@pytest.mark.parametrize("files", [3, [], {"a": 3}, {"a": None}])
def test_a_list_of_files_that_is_none(output: Path, files: Any) -> None:
    edit(output / "svdcli.json", lambda record: record.update(files=files))
    for command in ("report", "verify", "expand"):
        complaint(cli(command, output), 1)


@pytest.mark.parametrize("name", ["a.txt", "sub/a.txt", "..a", "a..b", "10:30.txt", "ä 日本"])
def test_names_that_stay_inside(name: str) -> None:
    assert is_inside(name)


def test_a_link_out_of_the_folder_is_followed(output: Path) -> None:
    """As in a hub's cache, whose files are links to where their bytes lie."""
    (output / "model.safetensors").rename(output.parent / "blob")
    (output / "model.safetensors").symlink_to(output.parent / "blob")
    assert svdcli.verify(output).ok


def test_a_carried_file_that_no_record_may_name_is_refused_before_work(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    (model / "C:notes").write_text("x")
    assert "'C:notes' cannot be carried over" in complaint(cli("compress", model, "--rank", "9"), 1)
    assert {path.name for path in tmp_path.iterdir()} == {"m"}


def test_an_index_that_came_beside_a_single_file_is_not_what_loaders_open(output: Path) -> None:
    write_sharded(output, {"model-00001-of-00001.safetensors": {"a": torch.ones(3)}})
    assert svdcli.verify(output).ok
