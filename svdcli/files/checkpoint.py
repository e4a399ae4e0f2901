"""Open a checkpoint from its headers alone, then read one tensor at a time.

A checkpoint is one safetensors file, a directory of them (Hugging Face or not), or the same in PyTorch's zip format.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

from svdcli.errors import BadCheckpointError, SvdcliError
from svdcli.files.header import Header, read_header
from svdcli.plan.tensors import TensorInfo

if TYPE_CHECKING:
    import torch

    from svdcli.files.pickled import PickledFile

STANDARD = "-"  # standard input or output, where a path is expected
CHUNK = 1 << 24
METADATA_KEY = "svdcli"
RECORD = "svdcli.json"
PICKLE_ENDINGS = (".bin", ".pt", ".pth")
_SAMPLE = 4096
# The same weights in other formats: carried over they would undo the saving.
_OTHER_WEIGHTS = re.compile(
    r"(^|/)(tf_model\.h5|flax_model\.msgpack|rust_model\.ot|consolidated[^/]*|pytorch_model[^/]*\.bin(\.index\.json)?"
    r"|[^/]*\.(gguf|onnx|onnx_data|tflite|mlmodel|llamafile))$|^original/"
)
_HIDDEN = (".git", ".cache", ".DS_Store", "__pycache__")


@dataclass(frozen=True)
class TensorRef:
    """Where one tensor lies: which weight file, and from which byte."""

    info: TensorInfo
    file: str
    offset: int


@dataclass
class Checkpoint:
    """A checkpoint's tensors (names to places), files and configuration. Nothing but headers has been read.

    files maps the name of each weight file to its size in bytes; carried lists the other files of a directory, left_out
    those that are not carried over, with the reason. tied maps a tensor to the one whose storage it shares.
    """

    path: Path
    name: str
    is_directory: bool
    tensors: dict[str, TensorRef] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    metadata: dict[str, dict[str, str]] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    index_name: str | None = None
    index_metadata: dict[str, Any] = field(default_factory=dict)
    carried: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    pickled: dict[str, PickledFile] = field(default_factory=dict)
    temporary: Path | None = None
    spooled_digest: str | None = None

    @property
    def infos(self) -> list[TensorInfo]:
        return [ref.info for ref in self.tensors.values()]

    @property
    def parameters(self) -> int:
        return sum(info.parameters for info in self.infos)

    @property
    def nbytes(self) -> int:
        """Bytes on disk of everything that the output stands for: weights, configuration, carried files."""
        return sum(self.files.values()) + sum(self.carried.values())

    @property
    def shown(self) -> str:
        """What to call it in a message."""
        return self.name if self.temporary is not None else str(self.path)

    @property
    def config_name(self) -> str:
        return "config.json"

    @property
    def transformers_opens_it(self) -> bool:
        return self.config is not None and ("model_type" in self.config or "architectures" in self.config)

    def file_path(self, name: str) -> Path:
        return self.path / name if self.is_directory else self.path

    def chunks(self, name: str) -> Iterator[bytes | memoryview]:
        """The bytes of one tensor, at most CHUNK at a time."""
        ref = self.tensors[name]
        if ref.file in self.pickled:
            whole = self.pickled[ref.file].read_bytes(name)
            for at in range(0, len(whole), CHUNK):
                yield whole[at : at + CHUNK]
            return
        buffer = memoryview(bytearray(min(CHUNK, ref.info.nbytes)))
        with self.file_path(ref.file).open("rb", buffering=0) as stream:
            stream.seek(ref.offset)
            left = ref.info.nbytes
            while left:
                part = buffer[: min(left, CHUNK)]
                _read_exactly(stream, part, ref)
                left -= len(part)
                yield part

    def read_tensor(self, name: str) -> torch.Tensor:
        """One tensor, in its own dtype and shape, in memory of its own."""
        import torch

        from svdcli.files.bytes_of import TORCH_DTYPES, bytes_of

        ref = self.tensors[name]
        if ref.file in self.pickled:
            return self.pickled[ref.file].read_tensor(name)
        tensor = torch.empty(ref.info.shape, dtype=TORCH_DTYPES[ref.info.dtype], device="cpu")
        with self.file_path(ref.file).open("rb", buffering=0) as stream:
            stream.seek(ref.offset)
            _read_exactly(stream, bytes_of(tensor), ref)
        return tensor

    def fingerprint(self) -> str:
        """SHA-256 over names, dtypes, shapes and the first and last 4 KiB of every tensor, in order of name.

        Independent of sharding; tells checkpoints apart without reading them whole.
        """
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            ref = self.tensors[name]
            digest.update(f"{name}\0{ref.info.dtype}\0{list(ref.info.shape)}\0".encode())
            for sample in self._samples(ref):
                digest.update(sample)
        return digest.hexdigest()

    def _samples(self, ref: TensorRef) -> Iterator[bytes]:
        if ref.file in self.pickled:
            data = self.pickled[ref.file].read_bytes(ref.info.name)
            yield bytes(data[:_SAMPLE])
            yield bytes(data[-_SAMPLE:])
            return
        with self.file_path(ref.file).open("rb", buffering=0) as stream:
            size = min(_SAMPLE, ref.info.nbytes)
            for at in (ref.offset, ref.offset + ref.info.nbytes - size):
                stream.seek(at)
                sample = bytearray(size)
                _read_exactly(stream, memoryview(sample), ref)
                yield bytes(sample)

    def state(self) -> str:
        """Changes whenever a weight file was written to: sizes and modification times, or what standard input held."""
        if self.spooled_digest is not None:
            return self.spooled_digest
        stats = [(name, (s := self.file_path(name).stat()).st_size, s.st_mtime_ns) for name in self.files]
        return hashlib.sha256(repr(stats).encode()).hexdigest()

    def close(self) -> None:
        """Remove what standard input was spooled to."""
        if self.temporary is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a file, a directory, or `-` for standard input, which is spooled to a temporary file.

    Raises BadCheckpointError for anything that is not a sound checkpoint.
    """
    if str(path) == STANDARD:
        return _open_stdin()
    path = Path(path)
    if not path.exists():
        raise BadCheckpointError(f"{path} does not exist", "check the path")
    if path.is_dir():
        return _open_directory(path)
    if not path.is_file():
        raise BadCheckpointError(f"{path} is not a regular file", "use - to read from a pipe")
    checkpoint = Checkpoint(path=path, name=path.name, is_directory=False)
    _add_file(checkpoint, path.name)
    return checkpoint


def read_file_header(path: Path) -> Header:
    with path.open("rb") as stream:
        return read_header(stream, os.fstat(stream.fileno()).st_size, str(path))


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while data := stream.read(CHUNK):
            digest.update(data)
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises BadCheckpointError where it is not one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadCheckpointError(f"{path} is not JSON", "write or download it again") from error
    if not isinstance(data, dict):
        raise BadCheckpointError(f"{path} is not a JSON object", "write or download it again")
    return data


def _read_exactly(stream: Any, view: memoryview, ref: TensorRef) -> None:
    while len(view):
        count = stream.readinto(view)
        if not count:
            raise BadCheckpointError(f"{ref.file} ended inside tensor {ref.info.name!r}", "it changed while it was read")
        view = view[count:]


def _add_file(checkpoint: Checkpoint, name: str) -> None:
    path = checkpoint.file_path(name)
    if name.endswith(PICKLE_ENDINGS):
        from svdcli.files.pickled import PickledFile

        pickled = PickledFile(path)
        checkpoint.pickled[name] = pickled
        checkpoint.tied.update(pickled.tied)
        checkpoint.left_out.update(pickled.left_out)
        found = [TensorRef(info, name, 0) for info in pickled.infos]
    else:
        header = read_file_header(path)
        checkpoint.metadata[name] = header.metadata
        found = [TensorRef(entry.info, name, entry.offset) for entry in header.entries]
    checkpoint.files[name] = path.stat().st_size
    for ref in found:
        other = checkpoint.tensors.get(ref.info.name)
        if other is not None:
            raise BadCheckpointError(f"tensor {ref.info.name!r} is in both {other.file} and {name}", "remove the stray file")
        checkpoint.tensors[ref.info.name] = ref


def _open_directory(path: Path) -> Checkpoint:
    checkpoint = Checkpoint(path=path, name=path.name or path.resolve().name, is_directory=True)
    config = path / checkpoint.config_name
    if config.is_file():
        checkpoint.config = read_json(config)
    weights, index = _weight_files(path)
    if not weights:
        raise BadCheckpointError(f"{path} holds no weights", "expected model.safetensors, an index with shards, or .bin files")
    for name in weights:
        _add_file(checkpoint, name)
    if index is not None:
        _check_index(checkpoint, index)
    _list_other_files(checkpoint, {*weights, index, RECORD})
    return checkpoint


def _weight_files(path: Path) -> tuple[list[str], str | None]:
    """The weight files of a directory and the index that lists them; what transformers would open comes first."""
    names = sorted(entry.name for entry in path.iterdir() if entry.is_file())
    for single, ending in (("model.safetensors", ".safetensors"), ("pytorch_model.bin", ".bin")):
        if single in names:
            return [single], None
        indexes = [name for name in names if name.endswith(f"{ending}.index.json")]
        if len(indexes) > 1:
            raise BadCheckpointError(f"{path} has several indexes: {', '.join(indexes)}", "keep the one that is meant")
        if indexes:
            return _shards(path, indexes[0]), indexes[0]
        found = [n for n in names if n.endswith(ending) and not _OTHER_WEIGHTS.search(n) and n != "training_args.bin"]
        if found:
            return found, None
    return [name for name in names if name.endswith((".pt", ".pth")) and not _OTHER_WEIGHTS.search(name)], None


def _weight_map(path: Path, index: str) -> dict[str, str]:
    weight_map = read_json(path / index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise BadCheckpointError(f"{path / index} has no weight_map of file names", "write or download it again")
    return {name: PurePosixPath(shard).as_posix() for name, shard in weight_map.items()}


def _shards(path: Path, index: str) -> list[str]:
    shards = sorted(set(_weight_map(path, index).values()))
    for shard in shards:
        if Path(shard).is_absolute() or ".." in Path(shard).parts or "\\" in shard or "\0" in shard:
            raise BadCheckpointError(f"{path / index} names {shard!r}, outside the directory", "do not trust this checkpoint")
        try:
            found = (path / shard).is_file()
        except OSError:
            found = False
        if not found:
            raise BadCheckpointError(f"{path / index} names {shard!r}, which is missing", "download the missing shard")
    return shards


def _check_index(checkpoint: Checkpoint, index: str) -> None:
    for name, shard in _weight_map(checkpoint.path, index).items():
        ref = checkpoint.tensors.get(name)
        if ref is None or ref.file != shard:
            raise BadCheckpointError(f"{checkpoint.path / index} says {name!r} is in {shard}, it is not", "download it again")
    metadata = read_json(checkpoint.path / index).get("metadata")
    checkpoint.index_name = index
    checkpoint.index_metadata = metadata if isinstance(metadata, dict) else {}


def _list_other_files(checkpoint: Checkpoint, own: set[str | None]) -> None:
    for folder, folders, names in os.walk(checkpoint.path):
        folders[:] = sorted(name for name in folders if name not in _HIDDEN)
        for name in sorted(names):
            relative = (Path(folder) / name).relative_to(checkpoint.path).as_posix()
            if relative in own or name in _HIDDEN:
                continue
            if not (Path(folder) / name).is_file():
                checkpoint.left_out[relative] = "not a regular file"
            elif _OTHER_WEIGHTS.search(relative):
                checkpoint.left_out[relative] = "weights in another format, not compressed"
            else:
                checkpoint.carried[relative] = (Path(folder) / name).stat().st_size


def _open_stdin() -> Checkpoint:
    if sys.stdin.isatty():
        raise SvdcliError("standard input is a terminal", "pipe a safetensors file in, or give a path")
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="svdcli-"))
    try:
        path = folder / "model.safetensors"
        with path.open("wb") as spool:
            _, digest = _copy_whole(sys.stdin.buffer, spool, room=shutil.disk_usage(folder).free)
        checkpoint = open_checkpoint(path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    checkpoint.name, checkpoint.temporary, checkpoint.spooled_digest = "standard input", folder, digest
    return checkpoint


def open_from_pipe() -> Header:
    """The header of a safetensors file on standard input, which is read to its end and thrown away.

    Raises BadCheckpointError where it ends early or goes on too long.
    """
    with open(os.devnull, "wb") as nowhere:
        return _copy_whole(sys.stdin.buffer, nowhere)[0]


def _copy_whole(source: BinaryIO, spool: BinaryIO, *, room: int | None = None) -> tuple[Header, str]:
    """Copy one safetensors file from a pipe: (its header, the SHA-256 of all of it). A header that lies is refused early."""
    tee = _Tee(source, spool)
    header = read_header(tee, None, "standard input")
    if room is not None and header.size > room:
        raise BadCheckpointError(f"standard input promises {header.size} bytes, more than the disk holds", "set TMPDIR")
    while tee.count <= header.size and tee.read(CHUNK):
        pass
    if tee.count != header.size:
        kind = "is cut short" if tee.count < header.size else "goes on after its last tensor"
        raise BadCheckpointError(f"standard input {kind}", f"the header promises {header.size} bytes")
    return header, tee.digest.hexdigest()


class _Tee:
    def __init__(self, source: BinaryIO, spool: BinaryIO) -> None:
        self.source, self.spool, self.count, self.digest = source, spool, 0, hashlib.sha256()

    def read(self, count: int) -> bytes:
        data = self.source.read(count)
        self.spool.write(data)
        self.digest.update(data)
        self.count += len(data)
        return data
