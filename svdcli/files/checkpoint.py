"""Open a checkpoint from its headers alone, then read one tensor at a time.

A checkpoint is one safetensors file, a directory of them (Hugging Face or not), or the same in
PyTorch's zip format.
"""

from __future__ import annotations

import copy
import hashlib
import os
import re
import shutil
import signal
import struct
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from svdcli.errors import BadCheckpointError, SvdcliError, UsageError
from svdcli.files.folder import choose_weights, list_companions, read_json, shard_note
from svdcli.files.formats import FIRST_BYTES, SAFETENSORS, Format, by_bytes, format_of
from svdcli.files.header import Header, read_header
from svdcli.files.quantised import Quantised, dtype_of, is_read, quantised_weights
from svdcli.files.stacks import is_split, slices_of
from svdcli.plan.facts import ModelFacts
from svdcli.plan.parts import part_configs
from svdcli.plan.tensors import TensorInfo

if TYPE_CHECKING:
    import torch

    from svdcli.files.pickled import PickledFile

STANDARD = "-"  # standard input or output, where a path is expected
CHUNK = 1 << 24  # bytes that are read at once
_HASHED = 1 << 18  # and hashed
METADATA_KEY = "svdcli"
RECORD = "svdcli.json"
STANDALONE = "svdcli_model.py"  # what `compress --self-contained` puts beside the weights
_SAMPLE = 4096  # bytes at either end of a tensor by which it is told from others
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class TensorRef:
    """Where one tensor lies: which weight file, and from which byte."""

    info: TensorInfo
    file: str
    offset: int


@dataclass
class Checkpoint:
    """A checkpoint's tensors by name, its files and its configuration. Of the weights, only headers
    have been read.

    files maps the name of each weight file to its size in bytes; carried lists the other files of a
    directory, left_out those that are not carried over, with the reason, left_out_bytes their
    sizes. tied maps a tensor to the one whose storage it shares. variant is the one that
    `from_pretrained` must be told to open these files; state_dict the key of a pickle under which
    the tensors lie. notes says what was decided while reading.

    quantised are weights that stand in the files as codes and scales; tensors has them as what they
    are read as, and config says nothing of them. parts are what they are made of. stacks are those
    of experts that were taken apart: tensors has the matrices of each expert in their place, and
    quantised and parts have them beside the stacks.
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
    left_out_bytes: dict[str, int] = field(default_factory=dict)
    variant: str | None = None
    state_dict: str = ""
    notes: list[str] = field(default_factory=list)
    tied: dict[str, str] = field(default_factory=dict)
    pickled: dict[str, PickledFile] = field(default_factory=dict)
    quantised: dict[str, Quantised] = field(default_factory=dict)
    parts: dict[str, TensorRef] = field(default_factory=dict)
    stacks: dict[str, TensorRef] = field(default_factory=dict)
    temporary: Path | None = None
    spooled_digest: str | None = None
    _first_state: str | None = None

    @property
    def infos(self) -> list[TensorInfo]:
        return [ref.info for ref in self.tensors.values()]

    @property
    def opener(self) -> Callable[[], Checkpoint]:
        """Opens the same in another process."""
        return _Opener(self.path, self.state_dict or None, tuple(self.stacks))

    def whole_stacks(self) -> list[str]:
        """The names of stacks of experts that can be taken apart."""
        stacks = []
        for name, ref in self.tensors.items():
            lies_in_order = ref.file not in self.pickled and self._has_scales_for_each(name)
            if lies_in_order and is_split(ref.info, self.tensors):
                stacks.append(name)
        return stacks

    def _has_scales_for_each(self, name: str) -> bool:
        """Tell whether a stack, where it is quantised, has scales for each matrix, or one for
        all."""
        weight = self.quantised.get(name)
        if weight is None:
            return True
        scale, shape = self.parts[weight.scale].info, weight.info.shape
        for_each = len(scale.shape) == 3 and scale.shape[0] == shape[0]
        return weight.zeros is None and (for_each or scale.parameters == 1)

    def take_apart(self, stacks: Collection[str]) -> None:
        """Have the experts' matrices stand in the place of these stacks."""
        tensors: dict[str, TensorRef] = {}
        for name, ref in self.tensors.items():
            if name not in stacks:
                tensors[name] = ref
                continue
            self.stacks[name] = ref
            if name in self.quantised:
                self._take_codes_apart(self.quantised[name])
            for matrix, begin in slices_of(ref.info):
                tensors[matrix.name] = TensorRef(matrix, ref.file, ref.offset + begin)
        self.tensors = tensors

    def _take_codes_apart(self, stack: Quantised) -> None:
        """Have stretches of the codes and scales of a stack stand for its matrices."""
        codes, scale = self.parts[stack.codes], self.parts[stack.scale]
        for number, (matrix, _) in enumerate(slices_of(stack.info)):
            own = replace(stack, info=matrix, codes=matrix.name)
            self.parts[matrix.name] = _stretch(codes, matrix.name, number)
            if scale.info.parameters > 1:
                own = replace(own, scale=f"{matrix.name}_scale")
                self.parts[own.scale] = _stretch(scale, own.scale, number)
            self.quantised[matrix.name] = own

    @property
    def in_stacks(self) -> set[str]:
        """The names of the matrices of stacks that were taken apart."""
        return {matrix.name for ref in self.stacks.values() for matrix, _ in slices_of(ref.info)}

    def _as_stored(self) -> dict[str, TensorRef]:
        """The tensors, stacks in one piece again."""
        matrices = self.in_stacks
        kept = {name: ref for name, ref in self.tensors.items() if name not in matrices}
        return kept | self.stacks

    @property
    def parameters(self) -> int:
        """Elements of all tensors together."""
        return sum(info.parameters for info in self.infos)

    @property
    def nbytes(self) -> int:
        """Bytes on disk of everything that the output stands for: weights, configuration, carried
        files. Of a pickle that holds more than the weights, these count."""
        sizes = [self._bytes_of_weights(name, size) for name, size in self.files.items()]
        return sum(sizes) + sum(self.carried.values())

    def _bytes_of_weights(self, name: str, size: int) -> int:
        pickle = self.pickled.get(name)
        if pickle is None or not pickle.left_out:
            return size
        return min(size, sum(info.nbytes for info in pickle.infos))

    @property
    def shown(self) -> str:
        """What to call it in a message."""
        return self.name if self.temporary is not None else str(self.path)

    @property
    def config_name(self) -> str:
        return "config.json"

    @property
    def transformers_opens_it(self) -> bool:
        """Does config.json name a class of transformers."""
        return self.config is not None and (
            "model_type" in self.config or "architectures" in self.config
        )

    @property
    def facts(self) -> ModelFacts | None:
        """What config.json says about the model's layers, where there is one."""
        return None if self.config is None else ModelFacts.of(self.config)

    def file_path(self, name: str) -> Path:
        """Where a file of this checkpoint is on disk."""
        return self.path / name if self.is_directory else self.path

    def chunks(self, name: str) -> Iterator[bytes | memoryview]:
        """The bytes of one tensor, at most CHUNK at a time."""
        ref = self.tensors.get(name) or self.stacks[name]
        if name in self.quantised or ref.file in self.pickled:
            data = self._bytes_in_memory(name)
            for begin in range(0, len(data), CHUNK):
                yield data[begin : begin + CHUNK]
            return
        # One buffer for all: who asks for the next piece has done with the last.
        buffer = memoryview(bytearray(min(CHUNK, ref.info.nbytes)))
        with self.file_path(ref.file).open("rb", buffering=0) as stream:
            stream.seek(ref.offset)
            left = ref.info.nbytes
            while left:
                part = buffer[: min(left, CHUNK)]
                _read_exactly(stream, part, ref)
                left -= len(part)
                yield part

    def _bytes_in_memory(self, name: str) -> memoryview:
        """The bytes of a tensor that does not lie in its file as it is read."""
        if name not in self.quantised:
            return self.pickled[self.tensors[name].file].read_bytes(name)
        from svdcli.files.dtypes import bytes_of

        return bytes_of(self.read_tensor(name))

    def read_tensor(self, name: str) -> torch.Tensor:
        """One tensor, in its own dtype and shape, in memory of its own; a quantised one as the
        numbers that it stands for."""
        if name in self.quantised:
            return self.quantised[name].numbers(lambda part: self._read(self.parts[part]))
        return self._read(self.tensors[name])

    def _integers(self, ref: TensorRef) -> tuple[int, ...]:
        """What a tensor of integers holds, without torch."""
        letter = {"I64": "q", "I32": "i"}.get(ref.info.dtype)
        if letter is None or ref.file in self.pickled:
            return tuple(int(number) for number in self._read(ref).flatten().tolist())
        data = bytearray(ref.info.nbytes)
        with self.file_path(ref.file).open("rb", buffering=0) as stream:
            stream.seek(ref.offset)
            _read_exactly(stream, memoryview(data), ref)
        return struct.unpack(f"<{ref.info.parameters}{letter}", data)

    def _read(self, ref: TensorRef) -> torch.Tensor:
        """What a file holds at a place."""
        import torch

        from svdcli.files.dtypes import TORCH_DTYPES, bytes_of

        name = ref.info.name
        if ref.file in self.pickled:
            return self.pickled[ref.file].read_tensor(name)
        tensor = torch.empty(ref.info.shape, dtype=TORCH_DTYPES[ref.info.dtype], device="cpu")
        with self.file_path(ref.file).open("rb", buffering=0) as stream:
            stream.seek(ref.offset)
            _read_exactly(stream, bytes_of(tensor), ref)
        return tensor

    def fingerprint(self) -> str:
        """SHA-256 over names, dtypes, shapes and the first and last 4 KiB of every tensor, in order
        of name.

        Independent of sharding; tells checkpoints apart without reading them whole.
        """
        digest = hashlib.sha256()
        for name, ref in sorted(self._as_stored().items()):
            digest.update(f"{name}\0{ref.info.dtype}\0{list(ref.info.shape)}\0".encode())
            for sample in self._samples(ref):
                digest.update(sample)
        return digest.hexdigest()

    def look_equal(self, first: str, second: str) -> bool:
        """Do two tensors of the same shape and dtype begin and end with the same bytes, 4 KiB of
        each."""
        return self.sample(first) == self.sample(second)

    def sample(self, name: str) -> bytes:
        """The first and the last 4 KiB of a tensor, or all of it."""
        return b"".join(self._samples(self.tensors[name]))

    def _samples(self, ref: TensorRef) -> Iterator[bytes]:
        """The first and the last bytes of a tensor, _SAMPLE of each or all that there are; of a
        quantised one those of its parts."""
        name = ref.info.name
        is_weight = ref is self.tensors.get(name) or ref is self.stacks.get(name)
        if is_weight and name in self.quantised:
            for part in self.quantised[name].parts:
                yield from self._samples(self.parts[part])
            return
        if ref.file in self.pickled:
            data = self.pickled[ref.file].read_bytes(name)
            yield bytes(data[:_SAMPLE])
            yield bytes(data[-_SAMPLE:])
            return
        with self.file_path(ref.file).open("rb", buffering=0) as stream:
            size = min(_SAMPLE, ref.info.nbytes)
            for begin in (ref.offset, ref.offset + ref.info.nbytes - size):
                stream.seek(begin)
                sample = bytearray(size)
                _read_exactly(stream, memoryview(sample), ref)
                yield bytes(sample)

    def state(self) -> str:
        """Changes whenever a weight file was written to: sizes and modification times, or what
        standard input held."""
        if self.spooled_digest is not None:
            return self.spooled_digest
        stats = []
        for name in self.files:
            status = self.file_path(name).stat()
            stats.append((name, status.st_size, status.st_mtime_ns))
        state = hashlib.sha256(repr(stats).encode()).hexdigest()
        self._first_state = self._first_state or state
        return state

    def check_unchanged(self) -> None:
        """Raise BadCheckpointError where a weight file was written to since `state` was first asked
        for."""
        if self._first_state not in (None, self.state()):
            raise BadCheckpointError(
                f"{self.shown} changed while it was read", "run the same command again"
            )

    def close(self) -> None:
        """Remove what standard input was spooled to."""
        if self.temporary is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _stretch(stack: TensorRef, name: str, number: int) -> TensorRef:
    """One of the tensors that lie one after the other in another, under a name of its own."""
    info = TensorInfo(name, stack.info.dtype, stack.info.shape[1:])
    return TensorRef(info, stack.file, stack.offset + number * info.nbytes)


@dataclass(frozen=True)
class _Opener:
    """Opens a checkpoint that was open before, as a value."""

    path: Path
    state_dict: str | None
    stacks: tuple[str, ...]

    def __call__(self) -> Checkpoint:
        checkpoint = open_checkpoint(self.path, state_dict=self.state_dict)
        checkpoint.take_apart(self.stacks)
        return checkpoint


def open_checkpoint(
    path: str | Path, *, state_dict: str | None = None, carry: Sequence[str] = ()
) -> Checkpoint:
    """Open a file, a directory, or `-` for standard input, which is spooled to a temporary file.

    state_dict is the key under which a PyTorch file holds the tensors that are meant; carry are
    globs of files in a directory that go along although they would be left out. Raises
    BadCheckpointError for anything that is not a sound checkpoint, UsageError for a key or glob
    that names nothing.
    """
    if str(path) == STANDARD:
        return _open_stdin(state_dict)
    path = Path(path)
    if not path.exists():
        raise BadCheckpointError(f"{path} does not exist", _download_hint(str(path)))
    if path.is_dir():
        return _open_directory(path, state_dict, carry)
    if not path.is_file():
        raise BadCheckpointError(f"{path} is not a regular file", "use - to read from a pipe")
    if carry:
        raise UsageError("--carry is for directories", "leave it out for a single file")
    checkpoint = Checkpoint(path=path, name=path.name, is_directory=False)
    _add_file(checkpoint, path.name, state_dict)
    _check_state_dict(checkpoint, state_dict)
    note = shard_note(path.name)
    if note:
        checkpoint.notes.append(note)
    _read_quantised(checkpoint)
    return checkpoint


def open_output(path: str | Path) -> Checkpoint:
    """Open what svdcli wrote, which is on this disk or nowhere. Raises as `open_checkpoint`."""
    if str(path) != STANDARD and not Path(path).exists():
        raise BadCheckpointError(f"{path} does not exist", "check the path")
    return open_checkpoint(path)


def check_names_model(checkpoint: Checkpoint, hint: str) -> None:
    """Raise SvdcliError, with a hint at what to do, where this is no directory whose config.json
    names a model. A file that lies in one has that for a hint."""
    if checkpoint.is_directory and checkpoint.transformers_opens_it:
        return
    if not checkpoint.is_directory and (checkpoint.path.parent / "config.json").is_file():
        hint = f"give the folder that it lies in, {checkpoint.path.parent}"
    raise SvdcliError(f"{checkpoint.shown} has no config.json that names a model", hint)


def _download_hint(asked: str) -> str:
    if _HUB_NAME.fullmatch(asked):
        return (
            f"check the path; from the hub, download it first: hf download {asked} "
            f"--local-dir FOLDER"
        )
    return "check the path"


def _check_state_dict(checkpoint: Checkpoint, state_dict: str | None) -> None:
    if state_dict is not None and not checkpoint.pickled:
        raise UsageError(
            "--state-dict is for PyTorch files",
            "leave it out: a safetensors file holds tensors alone",
        )


def read_file_header(path: Path) -> Header:
    """The header of a safetensors file. Raises BadCheckpointError where it is none."""
    with path.open("rb") as stream:
        return read_header(stream, os.fstat(stream.fileno()).st_size, str(path))


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    # pieces that stay in a cache, in memory that is used again
    buffer = memoryview(bytearray(_HASHED))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def _read_exactly(stream: Any, view: memoryview, ref: TensorRef) -> None:
    """Fill `view` from the stream, which may give less than it is asked for. Raises
    BadCheckpointError where it ends before."""
    while len(view):
        count = stream.readinto(view)
        if not count:
            raise BadCheckpointError(
                f"{ref.file} ended inside tensor {ref.info.name!r}: it changed while it was read",
                "run the same command again when it is whole",
            )
        view = view[count:]


def _add_file(
    checkpoint: Checkpoint,
    name: str,
    state_dict: str | None,
    places: Mapping[str, str] | None = None,
) -> list[str]:
    """Read one weight file's header, and return the names of tensors that an earlier file has too.

    places tells which file counts for those; without it they are an error.
    """
    path = checkpoint.file_path(name)
    file_format = format_of(path)
    if not file_format.reader:
        raise BadCheckpointError(f"{path} is {file_format.name}", file_format.hint)
    if file_format.reader == "pickle":
        refs = _add_pickle(checkpoint, name, state_dict)
    else:
        header = read_file_header(path)
        checkpoint.metadata[name] = header.metadata
        refs = [TensorRef(entry.info, name, entry.offset) for entry in header.entries]
    checkpoint.files[name] = path.stat().st_size
    return [ref.info.name for ref in refs if _add_tensor(checkpoint, ref, places or {})]


def _add_pickle(checkpoint: Checkpoint, name: str, state_dict: str | None) -> list[TensorRef]:
    """Open a PyTorch file, note what it says beside its tensors, and return these."""
    # Here, since it imports torch, which takes longer than most commands.
    from svdcli.files.pickled import PickledFile

    pickled = PickledFile(checkpoint.file_path(name), state_dict)
    checkpoint.pickled[name] = pickled
    checkpoint.state_dict = pickled.state_dict
    checkpoint.tied.update(pickled.tied)
    checkpoint.left_out.update(pickled.left_out)
    checkpoint.notes += pickled.notes
    return [TensorRef(info, name, 0) for info in pickled.infos]


def _add_tensor(checkpoint: Checkpoint, ref: TensorRef, places: Mapping[str, str]) -> bool:
    """Add one tensor; was it there already. The index says which one counts; without an index that
    is an error."""
    name = ref.info.name
    earlier = checkpoint.tensors.get(name)
    if earlier is not None and places.get(name) not in (ref.file, earlier.file):
        raise BadCheckpointError(
            f"tensor {name!r} is in both {earlier.file} and {ref.file}", "remove the stray file"
        )
    if earlier is None or places[name] == ref.file:
        checkpoint.tensors.pop(name, None)  # so that it stands among those of its file
        checkpoint.tensors[name] = ref
    return earlier is not None


def _open_directory(path: Path, state_dict: str | None, carry: Sequence[str]) -> Checkpoint:
    # config.json comes first: it may name the weights, and tells a nested copy of the model.
    checkpoint = Checkpoint(path=path, name=path.name or path.resolve().name, is_directory=True)
    config = path / checkpoint.config_name
    if config.is_file():
        checkpoint.config = read_json(config)

    # The weights that a loader of this folder opens.
    weights = choose_weights(path, checkpoint.config)
    repeated: list[str] = []
    for name in weights.files:
        repeated += _add_file(checkpoint, name, state_dict, weights.places)
    if repeated:
        what = f"{repeated[0]} lies in several files"
        if len(repeated) > 1:
            what = f"{len(repeated)} tensors such as {repeated[0]} lie in several files"
        checkpoint.notes.append(f"{what}; taken from the one that {weights.index} names")
    _check_state_dict(checkpoint, state_dict)
    checkpoint.variant = weights.variant

    # What an output writes anew, and what goes along with the weights.
    own = {*weights.files, RECORD}
    if weights.index is not None:
        _read_index(checkpoint, weights.index, weights.places)
        own.add(weights.index)
    _read_quantised(checkpoint)
    companions = list_companions(path, weights, own, checkpoint.config, carry)
    checkpoint.carried = companions.carried
    checkpoint.left_out |= companions.left_out
    checkpoint.left_out_bytes |= companions.left_out_bytes
    checkpoint.notes += companions.notes
    return checkpoint


def _read_index(checkpoint: Checkpoint, index: str, places: Mapping[str, str]) -> None:
    """Keep the index's own metadata, and note where it is wrong. places maps a tensor to its file,
    as the index says."""
    # Tensors that it promises and no shard has: a loader misses them too.
    absent = [name for name in places if name not in checkpoint.tensors]
    if absent:
        others = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        checkpoint.notes.append(
            f"{index} names {absent[0]}{others}, which no shard holds; the output lacks it too"
        )

    # Tensors that are in another shard than it says.
    for name, shard in places.items():
        ref = checkpoint.tensors.get(name)
        if ref is not None and ref.file != shard:
            checkpoint.notes.append(f"{index} has {name} in {shard}, it is in {ref.file}")
            break  # one is enough of a warning

    metadata = read_json(checkpoint.path / index).get("metadata")
    checkpoint.index_name = index
    checkpoint.index_metadata = metadata if isinstance(metadata, dict) else {}


def _read_quantised(checkpoint: Checkpoint) -> None:
    """Have codes and scales that other tools wrote stand for the numbers that they mean."""
    # What svdcli wrote itself it reads by its record
    if any(METADATA_KEY in metadata for metadata in checkpoint.metadata.values()):
        return
    if checkpoint.is_directory and (checkpoint.path / RECORD).exists():
        return
    config = checkpoint.config or {}
    parts_of_config = (config, *(part for _, part in part_configs(config)))
    details: dict[str, Any] = {}
    for part in parts_of_config:
        found = part.get("quantization_config")
        if found and not (isinstance(found, dict) and is_read(found)):
            return
        details = details or found or {}
    if checkpoint.config is not None and not details:
        return  # a loader takes them for what they are, too

    # The weights, each in the place of its codes
    stored = dict(checkpoint.tensors)
    infos = {name: ref.info for name, ref in stored.items()}
    weights, activations, assumed = quantised_weights(
        details,
        dtype_of(config),
        infos,
        lambda name: checkpoint._integers(stored[name]),
        checkpoint.shown,
    )
    if not weights:
        return
    of_codes = {weight.codes: weight for weight in weights.values()}
    parts = {part for weight in weights.values() for part in weight.parts} | activations
    parts |= {f"{name}_shape" for name in weights} & stored.keys()
    checkpoint.tensors = {}
    for name, ref in stored.items():
        if name in of_codes:
            info = of_codes[name].info
            checkpoint.tensors[info.name] = TensorRef(info, ref.file, ref.offset)
        elif name not in parts:
            checkpoint.tensors[name] = ref
    checkpoint.quantised = weights
    checkpoint.parts = {name: stored[name] for name in parts}
    if checkpoint.config is not None:
        checkpoint.config = copy.deepcopy(config)
        for part in (checkpoint.config, *(part for _, part in part_configs(checkpoint.config))):
            part.pop("quantization_config", None)
    method = details.get("quant_method")
    checkpoint.notes += [*assumed, _note_of(weights, infos, method, activations)]


def _note_of(
    weights: Mapping[str, Quantised],
    infos: Mapping[str, TensorInfo],
    method: str | None,
    activations: set[str],
) -> str:
    """What is said of weights that are read as what they stand for."""
    stored = " and ".join(sorted({infos[weight.codes].dtype for weight in weights.values()}))
    by = f" ({method})" if method else ""
    dtype = next(iter(weights.values())).info.dtype
    many = len(weights) > 1
    what = f"{len(weights)} weights in {stored}{by} are" if many else f"1 weight in {stored}{by} is"
    they = "they stay" if many else "it stays"
    stands = "they stand" if many else "it stands"
    note = (
        f"{what} read, counted and, where {they} dense, written as the {dtype} numbers that "
        f"{stands} for"
    )
    if len(activations) == 1:
        note += "; 1 scale of activations is left out"
    elif activations:
        note += f"; {len(activations)} scales of activations are left out"
    return note


def _open_stdin(state_dict: str | None) -> Checkpoint:
    if sys.stdin.isatty():
        raise SvdcliError(
            "standard input is a terminal", "pipe a safetensors file in, or give a path"
        )
    import tempfile

    # Spool it to a file, whose name tells the format where the bytes do not.
    with _signals_heard():
        reader = _format_of_stdin().reader
    folder = Path(tempfile.mkdtemp(prefix="svdcli-"))
    try:
        path = folder / ("model.pt" if reader == "pickle" else "model.safetensors")
        with path.open("wb") as spool, _signals_heard():
            if reader == "pickle":
                digest = _copy_to_the_end(sys.stdin.buffer, spool)
            else:
                free = shutil.disk_usage(folder).free
                _, digest = _copy_safetensors(sys.stdin.buffer, spool, free=free)
        checkpoint = open_checkpoint(path, state_dict=state_dict)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise

    # The spool is removed when the checkpoint is closed, and no message names it.
    checkpoint.name = "standard input"
    checkpoint.temporary = folder
    checkpoint.spooled_digest = digest
    return checkpoint


@contextmanager
def _signals_heard() -> Iterator[None]:
    """Interrupt what waits for bytes once a second: a signal that comes just before a read begins
    would else be heard when that ends, which may be never."""
    alarm = getattr(signal, "SIGALRM", None)
    if alarm is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(alarm, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 1, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(alarm, before)


def _format_of_stdin() -> Format:
    """What the pipe brings, by its first bytes; they stay in it. Raises BadCheckpointError for what
    svdcli does not read."""
    peek = getattr(sys.stdin.buffer, "peek", None)
    stdin_format = by_bytes(peek(FIRST_BYTES)) if peek is not None else None
    if stdin_format is None:
        return SAFETENSORS
    if not stdin_format.reader:
        raise BadCheckpointError(f"standard input is {stdin_format.name}", stdin_format.hint)
    return stdin_format


def _copy_to_the_end(source: BinaryIO, spool: BinaryIO) -> str:
    """Copy what has no length of its own; returns its SHA-256."""
    tee = _Tee(source, spool)
    while tee.read(CHUNK):
        pass
    return tee.digest.hexdigest()


def open_from_pipe() -> Header:
    """The header of a safetensors file on standard input, which is read to its end and thrown away.

    Raises BadCheckpointError where it ends early or goes on too long.
    """
    with open(os.devnull, "wb") as nowhere:
        return _copy_safetensors(sys.stdin.buffer, nowhere)[0]


def _copy_safetensors(
    source: BinaryIO, spool: BinaryIO, *, free: int | None = None
) -> tuple[Header, str]:
    """Copy one safetensors file from a pipe: (its header, the SHA-256 of all of it).

    free is the room that there is for it, in bytes. Raises BadCheckpointError where the header
    promises more than that, or anything else than what comes.
    """
    tee = _Tee(source, spool)
    header = read_header(tee, None, "standard input")
    if free is not None and header.size > free:
        raise BadCheckpointError(
            f"standard input promises {header.size} bytes, more than the disk holds", "set TMPDIR"
        )
    while tee.count <= header.size and tee.read(CHUNK):
        pass
    if tee.count != header.size:
        problem = "is cut short" if tee.count < header.size else "goes on after its last tensor"
        raise BadCheckpointError(
            f"standard input {problem}", f"the header promises {header.size} bytes"
        )
    return header, tee.digest.hexdigest()


class _Tee:
    """Reads from a stream, and writes, counts and hashes all that it reads."""

    def __init__(self, source: BinaryIO, spool: BinaryIO) -> None:
        self.source = source
        self.spool = spool
        self.count = 0
        self.digest = hashlib.sha256()

    def read(self, count: int) -> bytes:
        data = self.source.read(count)
        self.spool.write(data)
        self.digest.update(data)
        self.count += len(data)
        return data
