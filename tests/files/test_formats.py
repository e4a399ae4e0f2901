"""What a file is, its first bytes say, whatever its name is."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import weight
from safetensors.torch import save, save_file

from svdcli.errors import BadCheckpointError
from svdcli.files.checkpoint import open_checkpoint
from svdcli.files.formats import (
    FIRST_BYTES,
    PICKLE,
    SAFETENSORS,
    by_bytes,
    format_of,
    without_ending,
)

TENSORS = {"a.weight": weight(24, 20)}


def torch_bytes(value: Any, *, legacy: bool = False) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


def zip_bytes(*names: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return stream.getvalue()


def tar_bytes() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("x"))
    return stream.getvalue()


READ = {
    "safetensors": (save(TENSORS), SAFETENSORS),
    "torch zip": (torch_bytes(TENSORS), PICKLE),
    "torch before 1.6": (torch_bytes(TENSORS, legacy=True), PICKLE),
}
TOLD = {
    "gguf": (b"GGUF\x03\0\0\0" + bytes(100), "GGUF"),
    "ggml": (b"lmgg" + bytes(100), "GGML"),
    "page": (b"\n <!DOCTYPE html><html><title>Login</title></html>", "HTML"),
    "page in lower case": (b"<html><body>404</body></html>", "HTML"),
    "error of a store": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "XML"),
    "pointer": (b"version https://git-lfs.example/spec/v1\noid sha256:00\nsize 1\n", "Git LFS"),
    "keras": (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
    "numpy": (b"\x93NUMPY\x01\x00" + bytes(100), "NumPy array"),
    "numpy archive": (zip_bytes("a.npy", "b.npy"), "npz"),
    "keras 3": (zip_bytes("config.json", "model.weights.h5"), "Keras"),
    "zip": (zip_bytes("model.safetensors"), "archive"),
    "tar": (tar_bytes(), "archive"),
    "gzip": (b"\x1f\x8b\x08" + bytes(60), "archive"),
    "tflite": (b"\x20\0\0\0TFL3" + bytes(100), "TensorFlow Lite"),
    "index": (json.dumps({"weight_map": {}}).encode(), "index of shards"),
    "json": (json.dumps({"model_type": "llama"}).encode(), "JSON"),
    "torchscript": (
        zip_bytes("net/data.pkl", "net/constants.pkl", "net/code/net.py"),
        "TorchScript",
    ),
}
NAMES = ("model.safetensors", "model.bin", "model.ckpt", "model.pth.tar", "model.pkl", "model")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", READ)
def test_what_svdcli_reads_is_read_under_any_name(tmp_path: Path, kind: str, name: str) -> None:
    raw, expected = READ[kind]
    (tmp_path / name).write_bytes(raw)
    assert format_of(tmp_path / name) == expected
    checkpoint = open_checkpoint(tmp_path / name)
    assert torch.equal(checkpoint.read_tensor("a.weight"), TENSORS["a.weight"])


@pytest.mark.parametrize("name", ["model.safetensors", "model.bin", "model"])
@pytest.mark.parametrize("kind", TOLD)
def test_everything_else_is_named_with_a_way_on(tmp_path: Path, kind: str, name: str) -> None:
    raw, word = TOLD[kind]
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(BadCheckpointError) as caught:
        open_checkpoint(tmp_path / name)
    assert word in caught.value.message
    assert caught.value.hint
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("__0_0.distcp", "distributed checkpoint"),
        ("model.ckpt.data-00000-of-00001", "TensorFlow checkpoint"),
        ("saved_model.pb", "TensorFlow checkpoint"),
        ("flax_model.msgpack", "Flax"),
        ("model.onnx", "ONNX"),
    ],
)
def test_what_bytes_do_not_tell_the_name_does(tmp_path: Path, name: str, word: str) -> None:
    (tmp_path / name).write_bytes(bytes(range(256)))
    with pytest.raises(BadCheckpointError, match=word):
        open_checkpoint(tmp_path / name)


def test_first_bytes_are_enough() -> None:
    for raw, expected in READ.values():
        assert by_bytes(raw[:FIRST_BYTES]) == expected


@pytest.mark.parametrize("length", [0x7B, 0x80, 0x1F, 0x3C, 0x20])
def test_no_length_of_a_header_looks_like_something_else(tmp_path: Path, length: int) -> None:
    """The first byte of a safetensors file is the last of its header's length: it may be any."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    size = length + 256 * (1 + len(header) // 256)
    (tmp_path / "x.bin").write_bytes(size.to_bytes(8, "little") + header.ljust(size) + bytes(4))
    assert open_checkpoint(tmp_path / "x.bin").tensors.keys() == {"a"}


def test_a_plain_pickle_is_no_page(tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(BadCheckpointError, match=r"PyTorch|no dict of tensors"):
        open_checkpoint(tmp_path / "x.pkl")


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("a.safetensors", "a"),
        ("a.pth.tar", "a"),
        ("a.b.ckpt", "a.b"),
        ("a.bin", "a"),
        ("a.xyz", "a"),
        ("a", "a"),
        (".pth", ""),
    ],
)
def test_endings(name: str, stem: str) -> None:
    assert without_ending(name) == stem


def test_a_safetensors_file_called_bin_in_a_directory(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "pytorch_model.bin")
    assert open_checkpoint(tmp_path).tensors.keys() == TENSORS.keys()
