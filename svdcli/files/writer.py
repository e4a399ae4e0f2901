"""Lay out the final files before any work is done, then write tensors at their offsets and headers
last."""

from __future__ import annotations

import errno
import itertools
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from svdcli.errors import SvdcliError
from svdcli.files.header import header_size, render_header
from svdcli.files.stacks import slices_of
from svdcli.plan.packing import PACKED, SCALE
from svdcli.plan.tensors import DTYPE_BITS, TensorInfo

_CHUNK = 1 << 24  # bytes that are read at once
# Bytes at whose multiples few-bit integers begin, so that they can be multiplied where a file is
# mapped into memory.
_ALIGNMENT = 64
_SHARD_STEM = re.compile(r"-\d{5,}-of-\d{5,}$")


@dataclass(frozen=True)
class Unit:
    """One piece of work: tensors that are read, and the tensors that take their place.

    kind is "copy", "factor", "expand", "stack" for matrices of experts that become one tensor
    again, "again" for a tensor that was left out as a copy of the one that is read, or "warn" for a
    tensor without bytes; name is the original tensor's name, or says more;
    file is the weight file that it came from. within is the stack of experts of which the tensor
    that it writes is a stretch.
    """

    name: str
    kind: str
    reads: tuple[str, ...]
    writes: tuple[TensorInfo, ...]
    file: str
    within: TensorInfo | None = None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.writes)


@dataclass(frozen=True)
class OutFile:
    """A weight file to be: its tensors in the order of their bytes, and the space that its header
    gets. stacks are those among the tensors that are written expert by expert."""

    name: str
    units: tuple[str, ...]
    tensors: tuple[TensorInfo, ...]
    header_bytes: int
    stacks: tuple[TensorInfo, ...] = ()

    @property
    def size(self) -> int:
        return self.header_bytes + sum(tensor.nbytes for tensor in self.tensors)

    def offsets(self) -> dict[str, int]:
        """Where each tensor begins, from the start of the file, and each matrix of a stack."""
        offsets = {}
        position = self.header_bytes
        for tensor in self.tensors:
            offsets[tensor.name] = position
            position += tensor.nbytes
        for stack in self.stacks:
            for matrix, begin in slices_of(stack):
                offsets[matrix.name] = offsets[stack.name] + begin
        return offsets


def group_units(units: Sequence[Unit], largest: int | None) -> dict[str, list[Unit]]:
    """Which units go to which file: as in the source, or packed in order into shards of at most
    `largest` bytes of tensors.

    A unit is never split, nor is a stack, so one that is larger than `largest` gets a shard of its
    own.
    """
    by_file: dict[str, list[Unit]] = {}
    for unit in units:
        by_file.setdefault(unit.file, []).append(unit)
    if largest is None:
        return {safetensors_name(file): group for file, group in by_file.items()}

    # Shards are packed file by file, each as full as the next unit lets it be.
    shards: list[list[Unit]] = [[]]
    taken = 0
    for together in _inseparable(itertools.chain.from_iterable(by_file.values())):
        nbytes = sum(unit.nbytes for unit in together)
        if taken and taken + nbytes > largest:
            shards.append([])
            taken = 0
        shards[-1] += together
        taken += nbytes

    # Their names are those that transformers gives to shards, behind the stem of the source's.
    stem = shard_stem(next(iter(by_file), "model.safetensors"))
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    return {
        f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors": shard
        for number, shard in enumerate(shards, 1)
    }


def _inseparable(units: Iterable[Unit]) -> Iterator[list[Unit]]:
    """Units in order, those of one stack together."""
    together: list[Unit] = []
    for unit in units:
        if together and (unit.within is None or unit.within != together[-1].within):
            yield together
            together = []
        together.append(unit)
    if together:
        yield together


def safetensors_name(file: str) -> str:
    """The name of the safetensors file that takes a weight file's place."""
    if file.endswith(".safetensors"):
        return file
    return re.sub(r"^pytorch_model", "model", file.rsplit(".", 1)[0]) + ".safetensors"


def shard_stem(file: str) -> str:
    """The name that a weight file's shards share: model-00001-of-00002.safetensors -> model."""
    return _SHARD_STEM.sub("", safetensors_name(file).removesuffix(".safetensors"))


def lay_out(name: str, units: Sequence[Unit], metadata: Mapping[str, str]) -> OutFile:
    """Fix the size and every offset of one file whose header has room for this metadata.

    Wide dtypes come first, so that every tensor is aligned to its element; before them few-bit
    integers whose size keeps what follows aligned. Raises SvdcliError where two tensors have the
    same name.
    """
    stacks = tuple(dict.fromkeys(unit.within for unit in units if unit.within is not None))
    alone = (unit.writes for unit in units if unit.within is None)
    written = itertools.chain(itertools.chain.from_iterable(alone), stacks)
    tensors = sorted(written, key=lambda tensor: -DTYPE_BITS[tensor.dtype])
    first = _aligned_integers(tensors)
    tensors.sort(key=lambda tensor: tensor.name not in first)
    seen: set[str] = set()
    for tensor in tensors:
        if tensor.name in seen:
            raise SvdcliError(
                f"two tensors would be called {tensor.name!r}",
                "exclude the layer, or rename the tensor",
            )
        seen.add(tensor.name)
    file = OutFile(
        name=name,
        units=tuple(unit.name for unit in units),
        tensors=tuple(tensors),
        header_bytes=0,
        stacks=stacks,
    )
    return with_header(file, header_size(tensors, metadata))


def with_header(file: OutFile, least: int) -> OutFile:
    """The file with a header of at least so many bytes, a multiple of 8."""
    if _aligned_integers(file.tensors):
        least = -(-least // _ALIGNMENT) * _ALIGNMENT
    return replace(file, header_bytes=least)


def _aligned_integers(tensors: Sequence[TensorInfo]) -> set[str]:
    """The names of few-bit integers, which have scales beside them, that leave what follows them
    aligned."""
    names = {tensor.name for tensor in tensors}
    found: set[str] = set()
    for tensor in tensors:
        has_scales = tensor.name.removesuffix(PACKED) + SCALE in names
        if has_scales and tensor.dtype in ("I8", "I32") and tensor.nbytes % _ALIGNMENT == 0:
            found.add(tensor.name)
    return found


class WeightWriter:
    """Writes tensors into files of their final size; what it has written is no valid file until
    `finish`.

    Raises OSError where the disk is full; the space is claimed at once, so that this happens before
    any work is done.
    """

    def __init__(self, folder: Path, files: Sequence[OutFile]) -> None:
        self._folder = folder
        self._files = {file.name: file for file in files}
        self._places: dict[str, tuple[str, int]] = {}
        for file in files:
            for tensor, offset in file.offsets().items():
                self._places[tensor] = (file.name, offset)
            path = folder / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as stream:
                _claim(stream.fileno(), file.size)
                stream.truncate(file.size)

    def place(self, tensor: str) -> tuple[Path, int]:
        """The path of one tensor's file, and its offset there."""
        file, offset = self._places[tensor]
        return self._folder / file, offset

    def place_in(self, tensor: str) -> tuple[str, int]:
        """The file of one tensor, as it is called in the folder, and its offset there."""
        return self._places[tensor]

    def write(self, tensor: str, chunks: Iterable[bytes | bytearray | memoryview]) -> int:
        """Write one tensor's bytes at its offset and return their CRC-32."""
        return write_at(*self.place(tensor), chunks)

    def finish(self, name: str, metadata: Mapping[str, str]) -> None:
        """Write the header of one file, which makes it valid, and flush it to disk."""
        file = self._files[name]
        with (self._folder / name).open("r+b") as stream:
            stream.write(render_header(file.tensors, metadata, file.header_bytes))
            sync(stream.fileno())


def write_at(path: Path, offset: int, chunks: Iterable[bytes | bytearray | memoryview]) -> int:
    """Write a stretch of a file that is there already, and return its CRC-32."""
    checksum = 0
    with path.open("r+b", buffering=0) as stream:
        stream.seek(offset)
        for chunk in chunks:
            view = memoryview(chunk)
            checksum = zlib.crc32(view, checksum)
            while len(view):  # an unbuffered stream may take less than it is given
                view = view[stream.write(view) or 0 :]
    return checksum


def chunks_at(path: Path, offset: int, count: int) -> Iterator[bytes]:
    """A stretch of a file in pieces; ends early where the file does."""
    with path.open("rb", buffering=0) as stream:
        stream.seek(offset)
        while count:
            data = stream.read(min(count, _CHUNK))
            if not data:
                return
            yield data
            count -= len(data)


def checksum_at(path: Path, offset: int, count: int) -> int | None:
    """CRC-32 of a stretch of a file, or None where the file is shorter."""
    checksum = 0
    for data in chunks_at(path, offset, count):
        checksum = zlib.crc32(data, checksum)
        count -= len(data)
    return checksum if count == 0 else None


def write_file(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a small or copied file and flush it to disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        for chunk in chunks:
            stream.write(chunk)
        stream.flush()
        sync(stream.fileno())


def _claim(descriptor: int, size: int) -> None:
    """Take the space of a file on disk; nothing on systems or disks that cannot. Raises OSError
    where the disk is full."""
    if not size or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def sync(descriptor: int) -> None:
    """Wait until a file or folder is on disk."""
    os.fsync(descriptor)
