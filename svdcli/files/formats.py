"""What a file is, by its first bytes: its name only decides where the bytes say nothing. Stdlib
only."""

from __future__ import annotations

import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

FIRST_BYTES = 512  # enough for every signature below
PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".pth.tar", ".pt.tar", ".th")
_ZIP = b"PK\x03\x04"
# Pickle protocol 2, then the magic number with which `torch.save` began files before PyTorch 1.6.
_LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_TAR_OFFSET = 257  # where a tar archive has its signature
_LARGEST_JSON = 1 << 26  # a larger file is not read to learn what its JSON is


@dataclass(frozen=True)
class Format:
    """One kind of file. reader is "safetensors" or "pickle" where svdcli reads it.

    Else name says what it is and hint what to do with it.
    """

    name: str
    reader: str = ""
    hint: str = ""


SAFETENSORS = Format("a safetensors file", "safetensors")
PICKLE = Format("a PyTorch file", "pickle")
_DOWNLOAD = "download the file itself"
_HTML = Format(
    "an HTML page, not a checkpoint",
    hint=f"a server sent it in place of the file: {_DOWNLOAD}, logged in",
)
_XML = Format(
    "an XML page, not a checkpoint", hint=f"a server sent it in place of the file: {_DOWNLOAD}"
)
_POINTER = Format(
    "a Git LFS pointer, not the weights it stands for", hint="run `git lfs pull` in its repository"
)
_GGUF = Format(
    "a GGUF file, whose weights are quantised",
    hint="start from the safetensors files that it was made from",
)
_GGML = Format(
    "a GGML file, whose weights are quantised", hint="start from the files that it was made from"
)
_HDF5 = Format(
    "an HDF5 file (Keras or TensorFlow)",
    hint="open it with its library and save a PyTorch state dict",
)
_NPY = Format("a NumPy array", hint="save a dict of tensors with safetensors.numpy.save_file")
_NPZ = Format("a NumPy archive (.npz)", hint="save its arrays with safetensors.numpy.save_file")
_KERAS = Format("a Keras archive", hint="open it with Keras and save a PyTorch state dict")
_SCRIPT = Format(
    "a TorchScript archive", hint="load it with torch.jit.load and save its state_dict()"
)
_ARCHIVE = Format("an archive", hint="unpack it, and give what is inside")
_TFLITE = Format(
    "a TensorFlow Lite model", hint="start from the PyTorch weights that it was made from"
)
_TENSORFLOW = Format(
    "a TensorFlow checkpoint", hint="convert it to PyTorch first, for example with transformers 4"
)
_FLAX = Format(
    "a Flax checkpoint", hint="convert it to PyTorch first, for example with transformers 4"
)
_ONNX = Format("an ONNX model", hint="start from the PyTorch weights that it was made from")
_SHARD_OF_DCP = Format(
    "one file of a distributed checkpoint",
    hint="join it first: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER "
    "model.pt",
)
_INDEX = Format("an index of shards", hint="give the folder that it lies in")
_JSON = Format("a JSON file", hint="give the weight file, or its folder")

# Signatures that stand at the very beginning of a file.
_BEGINNINGS: tuple[tuple[bytes, Format], ...] = (
    (_LEGACY_TORCH, PICKLE),
    (b"GGUF", _GGUF),
    (b"lmgg", _GGML),
    (b"tjgg", _GGML),
    (b"fmgg", _GGML),
    (b"\x89HDF\r\n\x1a\n", _HDF5),
    (b"\x93NUMPY", _NPY),
    (b"version https://git-lfs", _POINTER),
    (b"\x1f\x8b", _ARCHIVE),
    (b"BZh", _ARCHIVE),
    (b"\xfd7zXZ\x00", _ARCHIVE),
    (b"\x28\xb5\x2f\xfd", _ARCHIVE),
    (b"7z\xbc\xaf\x27\x1c", _ARCHIVE),
    (b"Rar!\x1a\x07", _ARCHIVE),
)

# Names that tell where bytes do not.
_BY_NAME: tuple[tuple[re.Pattern[str], Format], ...] = (
    (re.compile(r"\.distcp$"), _SHARD_OF_DCP),
    (
        re.compile(r"\.data-\d+-of-\d+$|\.ckpt(-\d+)?\.(index|meta)$|(^|/)saved_model\.pb$"),
        _TENSORFLOW,
    ),
    (re.compile(r"\.msgpack$"), _FLAX),
    (re.compile(r"\.onnx$|\.onnx[._]data$"), _ONNX),
    (re.compile(r"\.h5$"), _HDF5),
    (re.compile(r"\.gguf$"), _GGUF),
)


def format_of(path: Path) -> Format:
    """What the file at `path` is.

    A file that its bytes do not tell is what its name says: PyTorch's endings are PICKLE, all else
    is SAFETENSORS, whose reader says what is wrong with it. Raises OSError where it cannot be read.
    """
    with path.open("rb") as stream:
        first = stream.read(FIRST_BYTES)
    if path.name.endswith(".distcp"):
        return _SHARD_OF_DCP
    if first.startswith(_ZIP):
        return _in_zip(path)
    file_format = by_bytes(first)
    if file_format is None and first.lstrip()[:1] == b"{":
        file_format = _in_json(path)
    return file_format or _by_name(path.name)


def by_bytes(first: bytes) -> Format | None:
    """What a file is that begins with `first` (FIRST_BYTES of it are enough), or None."""
    # A safetensors header begins behind its length, which takes 8 bytes.
    if first[8:9] == b"{" and not first.startswith(_ZIP):
        return SAFETENSORS
    for beginning, file_format in _BEGINNINGS:
        if first.startswith(beginning):
            return file_format
    if first.startswith(_ZIP) or re.match(rb"\x80[\x02-\x05]", first):
        return PICKLE
    if first[_TAR_OFFSET : _TAR_OFFSET + 5] == b"ustar":
        return _ARCHIVE
    if first[4:8] == b"TFL3":
        return _TFLITE
    return _markup(first)


def _markup(first: bytes) -> Format | None:
    text = first.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<script")):
        return _HTML
    if text.startswith(b"<?xml"):
        return _HTML if b"<html" in text else _XML
    return None


def _by_name(name: str) -> Format:
    for pattern, file_format in _BY_NAME:
        if pattern.search(name):
            return file_format
    if name.lower().endswith(PICKLE_ENDINGS):
        return PICKLE
    return SAFETENSORS


def _in_zip(path: Path) -> Format:
    """Zip archives are told apart by what is in them; one that cannot be listed is left to
    PyTorch's reader."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return PICKLE
    leaves = {name.rpartition("/")[2] for name in names}
    if "data.pkl" in leaves:
        return _SCRIPT if "constants.pkl" in leaves else PICKLE
    if names and all(name.endswith(".npy") for name in names):
        return _NPZ
    if "model.weights.h5" in leaves:
        return _KERAS
    return _ARCHIVE


def _in_json(path: Path) -> Format:
    if path.stat().st_size > _LARGEST_JSON:
        return _by_name(path.name)
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return _by_name(path.name)
    if isinstance(data, dict) and "weight_map" in data:
        return _INDEX
    return _JSON


def without_ending(name: str) -> str:
    """A weight file's name without the ending that tells its format: model.pth.tar -> model."""
    endings = sorted(
        (".safetensors", *PICKLE_ENDINGS), key=len, reverse=True
    )  # the longest that fits
    for ending in endings:
        if name.lower().endswith(ending) and len(name) > len(ending):
            return name[: -len(ending)]
    return name.rsplit(".", 1)[0]
