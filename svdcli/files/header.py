"""Safetensors headers: checked as hostile input, written into space that was reserved for them.
Stdlib only."""

from __future__ import annotations

import itertools
import json
import operator
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from svdcli.errors import BadCheckpointError
from svdcli.plan.tensors import DTYPE_BITS, TensorInfo

LARGEST_HEADER = 100_000_000  # the limit of the reference reader
_PREFIX = 8  # bytes of the number before the header, which is the header's length
_READ_AT_ONCE = 1 << 20
_SHOWN_LETTERS = 60  # of a shape or offsets in a message: hostile ones may be endless


@dataclass(frozen=True)
class Entry:
    """One tensor of a file and where its bytes begin, counted from the start of the file."""

    info: TensorInfo
    offset: int


@dataclass(frozen=True)
class Header:
    """What one file says about itself: its tensors in the order of their bytes, its metadata, its
    size in bytes."""

    entries: tuple[Entry, ...]
    metadata: dict[str, str]
    size: int


class Readable(Protocol):
    def read(self, count: int, /) -> bytes: ...


def read_header(stream: Readable, size: int | None, shown: str) -> Header:
    """Read and check the header at the front of `stream`.

    size is the file's length, None where it is not known (a pipe); then nothing is read beyond the
    header. shown is what messages call the file. Raises BadCheckpointError where the header breaks
    the format in any way; never allocates more than the header's limit.
    """
    # The length of the header, which is not to be trusted before it was compared with what there
    # is.
    prefix = _read_up_to(stream, _PREFIX)
    if len(prefix) == 0:
        raise BadCheckpointError(f"{shown} is empty", "give a safetensors file")
    if len(prefix) < _PREFIX:
        raise _not_safetensors(shown, f"it has only {len(prefix)} bytes")
    length = struct.unpack("<Q", prefix)[0]
    if length > LARGEST_HEADER:
        problem = f"its header would be {length} bytes, more than {LARGEST_HEADER}"
        raise _not_safetensors(shown, problem)
    if size is not None and _PREFIX + length > size:
        raise _not_safetensors(shown, f"its header would be {length} bytes in a file of {size}")

    # The header itself.
    raw = _read_up_to(stream, length)
    if len(raw) < length:
        raise _damaged(shown, f"it ends inside its header, after {_PREFIX + len(raw)} bytes")
    fields = _parse(raw, shown)
    metadata = _check_metadata(fields.pop("__metadata__", {}), shown)
    entries = _check_entries(fields, _PREFIX + length, shown)

    # The file holds the tensors that the header promises, and nothing else.
    end = _PREFIX + length
    if entries:
        end = max(entry.offset + entry.info.nbytes for entry in entries)
    if size is not None and size < end:
        raise _damaged(shown, f"it is cut short: {end - size} bytes are missing")
    if size is not None and size > end:
        raise _damaged(shown, f"{size - end} bytes follow its last tensor")
    return Header(entries, metadata, end)


def render_header(
    tensors: Sequence[TensorInfo], metadata: Mapping[str, str], reserved: int | None = None
) -> bytes:
    """The header of a file that holds `tensors` one after the other, length prefix included, padded
    with spaces.

    reserved is the number of bytes to fill; without it the next multiple of 8. Raises ValueError
    where it does not fit.
    """
    # Tensors follow each other without holes, as the format demands.
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        fields[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    raw = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()

    # Readers accept spaces behind the JSON, and nothing else.
    total = reserved if reserved is not None else _PREFIX + -(-len(raw) // 8) * 8
    if len(raw) + _PREFIX > total:
        raise ValueError(f"a header of {len(raw)} bytes does not fit into {total}")
    return struct.pack("<Q", total - _PREFIX) + raw.ljust(total - _PREFIX)


def header_size(tensors: Sequence[TensorInfo], metadata: Mapping[str, str]) -> int:
    """The bytes that a header takes, length prefix included."""
    return len(render_header(tensors, metadata))


def _read_up_to(stream: Readable, count: int) -> bytes:
    """The next `count` bytes, or what there is of them, a piece at a time: a header that lies about
    its length then takes no more memory than the file has bytes."""
    parts: list[bytes] = []
    while count:
        part = stream.read(min(count, _READ_AT_ONCE))
        if not part:
            break
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _not_safetensors(shown: str, why: str) -> BadCheckpointError:
    return BadCheckpointError(
        f"{shown} is not a safetensors file: {why}", "check the path, or download the file again"
    )


def _damaged(shown: str, why: str) -> BadCheckpointError:
    return BadCheckpointError(f"{shown} is damaged: {why}", "download or write the file again")


class _DuplicateKeyError(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict. Raises _DuplicateKeyError where it has a key twice, for which json
    alone would take the last."""
    fields: dict[str, Any] = {}
    for key, value in pairs:
        if key in fields:
            raise _DuplicateKeyError(f"its header names {key!r} twice")
        fields[key] = value
    return fields


def _count(text: str) -> int:
    """A whole number of a header. JSON knows -0, the reference reader does not."""
    if text.startswith("-"):
        raise ValueError(f"{text} is negative")
    return int(text)


def _parse(raw: bytes, shown: str) -> dict[str, Any]:
    """The JSON object of a header."""
    if not raw.startswith(b"{"):
        raise _not_safetensors(shown, "its header does not begin with '{'")
    try:
        fields = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_int=_count)
    except _DuplicateKeyError as error:
        raise _damaged(shown, str(error)) from error
    except (ValueError, RecursionError) as error:
        raise _not_safetensors(
            shown, "its header is not JSON, or holds numbers or nesting that no header has"
        ) from error
    if not isinstance(fields, dict):
        raise _not_safetensors(shown, "its header is not a JSON object")
    return fields


def _check_metadata(metadata: object, shown: str) -> dict[str, str]:
    """The metadata, where it maps strings to strings that UTF-8 can write."""
    if not isinstance(metadata, dict):
        raise _damaged(shown, "its __metadata__ is not a map of strings")
    if not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(shown, "its __metadata__ is not a map of strings")
    try:
        "".join(itertools.chain(metadata, metadata.values())).encode("utf-8")
    except UnicodeEncodeError as error:
        raise _damaged(shown, "its __metadata__ is not Unicode text") from error
    return metadata


def _check_entries(fields: dict[str, Any], data_start: int, shown: str) -> tuple[Entry, ...]:
    """The tensors in the order of their bytes, where these follow each other without overlap or
    hole."""
    spans = sorted(
        (_check_tensor(name, field, shown) for name, field in fields.items()),
        key=lambda span: span[1:],
    )
    position = 0
    entries = []
    for info, begin, end in spans:
        if begin < position:
            raise _damaged(shown, f"tensor {info.name!r} overlaps the tensor before it")
        if begin > position:
            hole = begin - position
            raise _damaged(shown, f"tensor {info.name!r} leaves a hole of {hole} bytes before it")
        entries.append(Entry(info, data_start + begin))
        position = end
    return tuple(entries)


def _check_tensor(name: str, field: object, shown: str) -> tuple[TensorInfo, int, int]:
    """One tensor of a header, and where its bytes begin and end behind the header. Raises
    BadCheckpointError for what the reference reader refuses too."""
    # The types of everything: Python's JSON knows more than a header may hold.
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _damaged(shown, f"the tensor name {name!r} is not Unicode text") from error
    if not isinstance(field, dict) or field.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(
            shown, f"tensor {name!r} does not have dtype, shape and data_offsets, and nothing else"
        )
    dtype, shape, offsets = field["dtype"], field["shape"], field["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _damaged(shown, f"tensor {name!r} has the unknown dtype {dtype!r}")
    if not _are_counts(shape):
        raise _damaged(shown, f"tensor {name!r} has the shape {str(shape)[:_SHOWN_LETTERS]}")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise _damaged(shown, f"tensor {name!r} has the offsets {str(offsets)[:_SHOWN_LETTERS]}")

    # The numbers fit each other. Every product on the way counts: one zero among the sizes does not
    # make up for others that overflow.
    products = itertools.accumulate((*shape, DTYPE_BITS[dtype]), operator.mul)
    if any(product >= 2**64 for product in products):
        raise _damaged(
            shown,
            f"tensor {name!r} has the shape {str(shape)[:_SHOWN_LETTERS]}, more than 64 bits can "
            f"count",
        )
    info = TensorInfo(name, dtype, tuple(shape))
    begin, end = offsets
    in_whole_bytes = info.parameters * DTYPE_BITS[dtype] % 8 == 0
    if not in_whole_bytes or end - begin != info.nbytes:
        raise _damaged(
            shown,
            f"tensor {name!r} holds {end - begin} bytes, its shape and dtype need {info.nbytes}",
        )
    return info, begin, end


def _are_counts(value: Any) -> bool:
    """Is this a list of whole numbers from 0 on that 63 bits hold."""
    return isinstance(value, list) and all(_is_count(number) for number in value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
