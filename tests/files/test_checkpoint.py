"""Opening checkpoints of every kind: the same tensors, byte for byte, or one BadCheckpointError
that says why."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import tracemalloc
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    LLAMA,
    contents,
    size_of,
    small_tensors,
    weight,
    write_model,
    write_sharded,
    write_small,
)
from safetensors.torch import save_file

from svdcli.errors import BadCheckpointError
from svdcli.files.checkpoint import Checkpoint, open_checkpoint
from svdcli.plan.tensors import TensorInfo

Contents = dict[str, tuple[str, tuple[int, ...], bytes]]


def all_of(checkpoint: Checkpoint) -> Contents:
    return {
        info.name: (info.dtype, info.shape, b"".join(checkpoint.chunks(info.name)))
        for info in checkpoint.infos
    }


def expected(tensors: Mapping[str, torch.Tensor], folder: Path) -> Contents:
    """The bytes that the reference writer gives these tensors."""
    path = folder / "expected.safetensors"
    save_file(
        {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, path
    )
    found = contents(path)
    path.unlink()
    return found


def refused(path: Path | str) -> str:
    with pytest.raises(BadCheckpointError) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Safetensors --------------------------------------------------------------------------------------


def test_single_file(small: Path) -> None:
    checkpoint = open_checkpoint(small)
    assert all_of(checkpoint) == contents(small)
    assert not checkpoint.is_directory
    assert checkpoint.config is None
    assert checkpoint.nbytes == small.stat().st_size


def test_every_way_of_reading_agrees(small: Path) -> None:
    checkpoint = open_checkpoint(small)
    for name, tensor in small_tensors().items():
        raw = b"".join(checkpoint.chunks(name))
        found = checkpoint.read_tensor(name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert found.reshape(-1).view(torch.uint8).tolist() == list(raw)


def test_a_tensor_has_memory_of_its_own(small: Path) -> None:
    checkpoint = open_checkpoint(small)
    checkpoint.read_tensor("norm.weight").fill_(7)
    assert checkpoint.read_tensor("norm.weight").eq(1).all()
    assert all_of(checkpoint) == contents(small)


def test_directory(folder: Path) -> None:
    checkpoint = open_checkpoint(write_model(folder / "model"))
    assert all_of(checkpoint) == contents(folder / "model/model.safetensors")
    assert checkpoint.is_directory
    assert checkpoint.config == LLAMA
    assert set(checkpoint.carried) == {"config.json", "tokenizer.json", "1_Pooling/config.json"}
    assert checkpoint.nbytes == size_of(folder / "model")


def test_directory_without_config(folder: Path) -> None:
    (folder / "model").mkdir()
    write_small(folder / "model/anything.safetensors")
    checkpoint = open_checkpoint(folder / "model")
    assert all_of(checkpoint) == contents(folder / "model/anything.safetensors")
    assert checkpoint.config is None


def shards_of(count: int) -> dict[str, dict[str, torch.Tensor]]:
    tensors = sorted(small_tensors().items())
    return {
        f"model-{i + 1:05d}-of-{count:05d}.safetensors": dict(tensors[i::count])
        for i in range(count)
    }


def test_shards_with_an_index(folder: Path) -> None:
    checkpoint = open_checkpoint(write_sharded(folder / "model", shards_of(3)))
    assert all_of(checkpoint) == expected(small_tensors(), folder)
    assert len(checkpoint.files) == 3


def test_shards_in_a_subfolder(folder: Path) -> None:
    shards = {f"weights/{name}": tensors for name, tensors in shards_of(2).items()}
    checkpoint = open_checkpoint(write_sharded(folder / "model", shards))
    assert all_of(checkpoint) == expected(small_tensors(), folder)
    assert not checkpoint.carried


def test_a_symlink_is_followed(small: Path, folder: Path) -> None:
    (folder / "model").mkdir()
    (folder / "model/model.safetensors").symlink_to(small)
    assert all_of(open_checkpoint(folder / "model")) == contents(small)


def test_safetensors_wins_over_pickles(folder: Path) -> None:
    write_model(folder / "model")
    (folder / "model/pytorch_model.bin").write_bytes(b"never opened")
    checkpoint = open_checkpoint(folder / "model")
    assert list(checkpoint.files) == ["model.safetensors"]
    assert "pytorch_model.bin" in checkpoint.left_out


def test_odd_names(folder: Path) -> None:
    tensors = {
        name: torch.ones(2)
        for name in ["", "a\nb", "\0", "层.weight", "[bold]x[/]", "../up", "weight", " "]
    }
    save_file(tensors, folder / "odd.safetensors")
    assert all_of(open_checkpoint(folder / "odd.safetensors")) == contents(
        folder / "odd.safetensors"
    )


@pytest.mark.parametrize("metadata", [None, {"only": "metadata"}])
def test_a_file_without_tensors(folder: Path, metadata: dict[str, str] | None) -> None:
    save_file({}, folder / "none.safetensors", metadata=metadata)
    checkpoint = open_checkpoint(folder / "none.safetensors")
    assert (checkpoint.infos, checkpoint.parameters) == ([], 0)


# PyTorch's own files ------------------------------------------------------------------------------


def old_tensors() -> dict[str, torch.Tensor]:
    """Without the dtypes that came after the legacy format, which torch writes but cannot read."""
    return {
        name: t
        for name, t in small_tensors().items()
        if "float8" not in name and not name.startswith("odd.uint")
    }


def as_parameters(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    return {
        name: torch.nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("ending", ["bin", "pt", "pth"])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_pickled_tensors(folder: Path, ending: str, legacy: bool) -> None:
    tensors = old_tensors() if legacy else small_tensors()
    torch.save(tensors, folder / f"model.{ending}", _use_new_zipfile_serialization=not legacy)
    assert all_of(open_checkpoint(folder / f"model.{ending}")) == expected(tensors, folder)


@pytest.mark.parametrize("wrap", [OrderedDict, as_parameters], ids=["ordered", "parameters"])
def test_pickled_forms_of_a_state_dict(folder: Path, wrap: Any) -> None:
    torch.save(wrap({"a.weight": weight(8, 8)}), folder / "model.bin")
    assert all_of(open_checkpoint(folder / "model.bin")) == expected(
        {"a.weight": weight(8, 8)}, folder
    )


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model", "module"])
def test_wrapped_state_dict(folder: Path, wrapper: str) -> None:
    torch.save(
        {wrapper: small_tensors(), "epoch": 3, "optimizer": {"lr": 0.1}}, folder / "model.pt"
    )
    checkpoint = open_checkpoint(folder / "model.pt")
    assert all_of(checkpoint) == expected(small_tensors(), folder)
    assert set(checkpoint.left_out) == {"epoch", "optimizer"}


def test_what_is_no_tensor_is_left_out(folder: Path) -> None:
    torch.save(
        {"a.weight": weight(8, 8), "step": 3, "name": "x", "none": None}, folder / "model.bin"
    )
    checkpoint = open_checkpoint(folder / "model.bin")
    assert set(all_of(checkpoint)) == {"a.weight"}
    assert set(checkpoint.left_out) == {"step", "name", "none"}


def test_views_are_read_row_by_row(folder: Path) -> None:
    whole = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    views = {
        "transposed": whole.T,
        "slice": whole[1:3, ::2],
        "expanded": torch.ones(1).expand(5),
        "conjugate": torch.tensor([1 + 2j, 3j]).conj(),
        "negated": torch.tensor([1 + 2j, 3j]).conj().imag,
    }
    torch.save(views, folder / "model.bin")
    assert all_of(open_checkpoint(folder / "model.bin")) == expected(views, folder)


def test_tied_tensors_are_known(folder: Path) -> None:
    shared, alike = weight(8, 8), weight(8, 8)
    tensors = {
        "a.weight": shared,
        "b.weight": shared,
        "c.weight": alike,
        "d.weight": shared.T,
        "e": shared[:4],
    }
    torch.save(tensors, folder / "model.bin")
    checkpoint = open_checkpoint(folder / "model.bin")
    assert checkpoint.tied == {"b.weight": "a.weight", "a.weight": "b.weight"}
    assert all_of(checkpoint) == expected(tensors, folder)


def test_sharded_pickles(folder: Path) -> None:
    tensors = sorted(small_tensors().items())
    shards = {f"pytorch_model-{i + 1:05d}-of-00002.bin": dict(tensors[i::2]) for i in range(2)}
    for name, part in shards.items():
        torch.save(part, folder / name)
    weight_map = {tensor: name for name, part in shards.items() for tensor in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert all_of(open_checkpoint(folder)) == expected(small_tensors(), folder)


class Trap:
    """Unpickling this runs code."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.proof,))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_code_is_never_run(folder: Path, legacy: bool) -> None:
    torch.save(
        {"a": torch.ones(2), "b": Trap(folder / "ran")},
        folder / "m.bin",
        _use_new_zipfile_serialization=not legacy,
    )
    message = refused(folder / "m.bin")
    assert "needs code to unpickle" in message
    assert "save_file" in message
    assert not (folder / "ran").exists()


def test_a_whole_module_is_refused_with_the_way_out(folder: Path) -> None:
    torch.save(torch.nn.Linear(4, 4), folder / "m.pt")
    message = refused(folder / "m.pt")
    assert "m.pt needs code to unpickle" in message
    assert "save_file(model.state_dict()" in message


@pytest.mark.parametrize(
    "value",
    [
        [torch.ones(2)],
        torch.ones(2),
        None,
        3,
        {},
        {"a": 1},
        {"optimizer": {"state": {0: {"a": torch.ones(1)}}}},
    ],
    ids=["list", "tensor", "none", "number", "empty", "no tensors", "optimizer alone"],
)
def test_what_is_no_state_dict(folder: Path, value: Any) -> None:
    torch.save(value, folder / "m.bin")
    assert "m.bin holds no dict of tensors" in refused(folder / "m.bin")


def test_two_keys_with_one_spelling_lose_nothing(folder: Path) -> None:
    torch.save({"0": torch.ones(2), 0: torch.zeros(3)}, folder / "m.bin")
    try:
        checkpoint = open_checkpoint(folder / "m.bin")
    except BadCheckpointError:
        return
    assert len(checkpoint.tensors) == 2


@pytest.mark.parametrize("kind", ["sparse", "complex128", "meta"])
def test_tensors_that_safetensors_cannot_hold(folder: Path, kind: str) -> None:
    odd = {
        "sparse": lambda: torch.eye(3).to_sparse(),
        "complex128": lambda: torch.ones(2, dtype=torch.complex128),
        "meta": lambda: torch.empty(2, device="meta"),
    }
    torch.save({"a.weight": weight(8, 8), "odd": odd[kind]()}, folder / "m.bin")
    assert "'odd'" in refused(folder / "m.bin")


def pickle_bytes(folder: Path, *, legacy: bool) -> bytes:
    torch.save(
        {"a.weight": weight(48, 40)},
        folder / "whole.bin",
        _use_new_zipfile_serialization=not legacy,
    )
    return (folder / "whole.bin").read_bytes()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.99])
def test_a_truncated_pickle_is_refused_by_name(folder: Path, share: float, legacy: bool) -> None:
    raw = pickle_bytes(folder, legacy=legacy)
    (folder / "m.bin").write_bytes(raw[: int(len(raw) * share)])
    assert "m.bin" in refused(folder / "m.bin")


@pytest.mark.parametrize(
    "raw",
    [
        b"hello " * 100,
        bytes(range(256)) * 4,
        b"\x80\x02.",
        pickle.dumps({"a": 1}, 0),
        pickle.dumps({"a": 1}, 4),
        pickle.dumps({"a": [1] * 500}, 5),
    ],
    ids=["text", "binary", "stub", "protocol 0", "protocol 4", "protocol 5"],
)
def test_junk_is_refused(folder: Path, raw: bytes) -> None:
    (folder / "m.bin").write_bytes(raw)
    assert "m.bin" in refused(folder / "m.bin")


def test_a_small_pickle_cannot_ask_for_much_memory(folder: Path) -> None:
    """A view that repeats one number is a few bytes in its file and any size in memory."""
    torch.save({"a.weight": torch.zeros(1).expand(2**13, 2**13)}, folder / "m.bin")
    tracemalloc.start()
    try:
        with contextlib.suppress(BadCheckpointError):
            open_checkpoint(folder / "m.bin").fingerprint()
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_flipped_bytes_never_escape(folder: Path, legacy: bool) -> None:
    raw = pickle_bytes(folder, legacy=legacy)
    for at in range(0, len(raw), len(raw) // 40):
        (folder / "m.bin").write_bytes(raw[:at] + bytes([raw[at] ^ 0xFF]) + raw[at + 1 :])
        with contextlib.suppress(BadCheckpointError):
            open_checkpoint(folder / "m.bin")


def test_opening_a_pickle_warns_about_nothing(folder: Path) -> None:
    (folder / "m.bin").write_bytes(pickle.dumps({"a": 1}, 4))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        refused(folder / "m.bin")
    assert caught == []


# Broken directories -------------------------------------------------------------------------------


def with_index(folder: Path, index: Any) -> Path:
    """A directory with the shards x (tensor a) and y (tensor b) and any index at all."""
    save_file({"a": torch.ones(2)}, folder / "x.safetensors")
    save_file({"b": torch.ones(2)}, folder / "y.safetensors")
    text = index if isinstance(index, (str, bytes)) else json.dumps(index)
    (folder / "model.safetensors.index.json").write_bytes(
        text if isinstance(text, bytes) else text.encode()
    )
    return folder


def test_index_names_a_missing_shard(folder: Path) -> None:
    message = refused(
        with_index(folder, {"weight_map": {"a": "x.safetensors", "c": "z.safetensors"}})
    )
    assert "'z.safetensors', which is missing" in message


@pytest.mark.parametrize(
    "shard",
    ["../x.safetensors", "sub/../../x.safetensors", "..", "{absolute}", "..\\x.safetensors"],
)
def test_index_names_a_path_outside(tmp_path: Path, shard: str) -> None:
    (tmp_path / "model/sub").mkdir(parents=True)
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    name = shard.format(absolute=tmp_path / "x.safetensors")
    assert "outside the directory" in refused(
        with_index(tmp_path / "model", {"weight_map": {"a": name}})
    )


@pytest.mark.parametrize("shard", ["", ".", "sub", "x\0", "x" * 5000, "\ud800"])
def test_index_names_no_file(folder: Path, shard: str) -> None:
    (folder / "sub").mkdir()
    refused(with_index(folder, {"weight_map": {"a": shard}}))


def test_index_names_a_tensor_that_no_shard_has(folder: Path) -> None:
    """transformers takes what the shards hold; the report says what the index got wrong."""
    weight_map = {"a": "x.safetensors", "b": "y.safetensors", "c": "y.safetensors"}
    checkpoint = open_checkpoint(with_index(folder, {"weight_map": weight_map}))
    assert set(checkpoint.tensors) == {"a", "b"}
    assert ["names c, which no shard holds" in note for note in checkpoint.notes] == [True]


def test_index_that_does_not_name_a_shard_leaves_it_out(folder: Path) -> None:
    checkpoint = open_checkpoint(
        with_index(folder, {"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}})
    )
    assert set(checkpoint.tensors) == {"a"}
    assert "y.safetensors" in checkpoint.left_out
    assert ["names b, which no shard holds" in note for note in checkpoint.notes] == [True]


@pytest.mark.parametrize(
    "index",
    [
        "",
        "{",
        "[]",
        "null",
        b"\xff\xfe",
        "[" * 100_000,
        {},
        {"weight_map": []},
        {"weight_map": {"a": 1}},
        {"weight_map": None},
    ],
    ids=[
        "empty",
        "cut",
        "list",
        "null",
        "not UTF-8",
        "deep",
        "no map",
        "list map",
        "number",
        "null map",
    ],
)
def test_index_that_is_none(folder: Path, index: Any) -> None:
    assert "index.json" in refused(with_index(folder, index))


def test_one_tensor_in_two_files_without_an_index(folder: Path) -> None:
    save_file({"a": torch.ones(2)}, folder / "x.safetensors")
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, folder / "y.safetensors")
    message = refused(folder)
    assert all(name in message for name in ("'a'", "x.safetensors", "y.safetensors"))


@pytest.mark.parametrize("first", ["x", "y"])
def test_one_tensor_in_two_shards_is_taken_where_the_index_says(folder: Path, first: str) -> None:
    save_file({"a": torch.zeros(2)}, folder / "x.safetensors")
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, folder / "y.safetensors")
    index = {
        "weight_map": {"a": f"{first}.safetensors", "b": "y.safetensors", "c": "x.safetensors"}
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tensors["a"].file == f"{first}.safetensors"
    assert checkpoint.read_tensor("a").tolist() == ([0.0, 0.0] if first == "x" else [1.0, 1.0])
    assert any("a lies in several files" in note for note in checkpoint.notes)


def test_a_shard_may_be_spelled_with_a_dot(folder: Path) -> None:
    """./x is x: read once, and not carried over as a stranger."""
    save_file({"a": torch.ones(2)}, folder / "x.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "./x.safetensors"}})
    )
    try:
        checkpoint = open_checkpoint(folder)
    except BadCheckpointError:
        return
    assert list(checkpoint.tensors) == ["a"]
    assert not checkpoint.carried


def test_a_damaged_shard_is_named(folder: Path) -> None:
    write_sharded(folder / "model", shards_of(2))
    shard = folder / "model/model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert shard.name in refused(folder / "model")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"3", b"\xff{}", b"[" * 100_000])
def test_config_that_is_no_json_object(folder: Path, text: bytes) -> None:
    write_model(folder / "model")
    (folder / "model/config.json").write_bytes(text)
    assert "config.json is not" in refused(folder / "model")


@pytest.mark.parametrize(
    "files", [[], ["config.json"], ["training_args.bin"], ["model.safetensors/x"]]
)
def test_a_directory_without_weights(folder: Path, files: list[str]) -> None:
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    assert "holds no weights" in refused(folder)


def test_missing_path(folder: Path) -> None:
    assert "does not exist" in refused(folder / "nothing.safetensors")


def test_symlink_to_itself(folder: Path) -> None:
    (folder / "loop").symlink_to("loop")
    refused(folder / "loop")


@pytest.mark.parametrize("special", ["fifo", "/dev/null", "/dev/zero"])
def test_only_regular_files_are_opened(folder: Path, special: str) -> None:
    path = folder / special
    if special == "fifo":
        os.mkfifo(path)
    assert "not a regular file" in refused(path)


def test_a_fifo_in_a_directory_is_left_alone(folder: Path) -> None:
    os.mkfifo(write_model(folder / "model") / "pipe")
    assert open_checkpoint(folder / "model").left_out == {"pipe": "not a regular file"}


def test_a_file_that_shrinks_while_it_is_read(small: Path) -> None:
    checkpoint = open_checkpoint(small)
    last = max(checkpoint.tensors.values(), key=lambda ref: ref.offset).info.name
    small.write_bytes(small.read_bytes()[:-1])
    with pytest.raises(BadCheckpointError, match="ended inside tensor"):
        b"".join(checkpoint.chunks(last))
    with pytest.raises(BadCheckpointError, match="ended inside tensor"):
        checkpoint.read_tensor(last)


# Fingerprints -------------------------------------------------------------------------------------


def fingerprint(path: Path) -> str:
    return open_checkpoint(path).fingerprint()


def test_fingerprint_does_not_depend_on_sharding_or_format(folder: Path) -> None:
    write_small(folder / "one.safetensors", {"some": "metadata"})
    torch.save(small_tensors(), folder / "one.bin")
    write_model(folder / "model", tensors=small_tensors())
    places = [folder / "one.safetensors", folder / "one.bin", folder / "model"]
    places += [write_sharded(folder / f"in{count}", shards_of(count)) for count in (1, 2, 5)]
    assert len({fingerprint(place) for place in places}) == 1


def test_fingerprint_changes_with_every_tensor(folder: Path) -> None:
    base = small_tensors()
    changed = [base]
    for name, tensor in base.items():
        changed.append(
            {**{other: t for other, t in base.items() if other != name}, f"{name}x": tensor}
        )
        changed.append({**base, name: tensor.reshape(1, *tensor.shape)})
        for at in {0, max(0, tensor.numel() - 1)} if tensor.numel() else ():
            raw = bytearray(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
            raw[at * tensor.element_size()] ^= 1
            changed.append(
                {**base, name: torch.frombuffer(raw, dtype=tensor.dtype).reshape(tensor.shape)}
            )
    seen = set()
    for tensors in changed:
        save_file(tensors, folder / "m.safetensors")
        seen.add(fingerprint(folder / "m.safetensors"))
    assert len(seen) == len(changed)


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_fingerprint_sees_both_ends_of_large_tensors(folder: Path, ending: str) -> None:
    size, seen = 20_000, []
    for at in (None, 0, 4095, size - 4096, size - 1):
        data = torch.zeros(size, dtype=torch.uint8)
        if at is not None:
            data[at] = 1
        path = folder / f"m.{ending}"
        save_file({"t": data}, path) if ending == "safetensors" else torch.save({"t": data}, path)
        seen.append(fingerprint(path))
    assert len(set(seen)) == len(seen)


def test_fingerprint_knows_dtypes_apart(folder: Path) -> None:
    seen = set()
    for dtype in (torch.int8, torch.uint8, torch.float8_e5m2, torch.bool):
        save_file({"t": torch.zeros(4, dtype=torch.uint8).view(dtype)}, folder / "m.safetensors")
        seen.add(fingerprint(folder / "m.safetensors"))
    assert len(seen) == 4


def test_infos_are_what_the_header_says(small: Path) -> None:
    found = {info.name: info for info in open_checkpoint(small).infos}
    assert found["layers.0.up.weight"] == TensorInfo("layers.0.up.weight", "F32", (48, 40))
    assert found["odd.scalar"] == TensorInfo("odd.scalar", "I32", ())
    assert found["odd.empty"] == TensorInfo("odd.empty", "F32", (0, 7))
