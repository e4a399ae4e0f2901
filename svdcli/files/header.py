"""Safetensors headers: read with suspicion, written into space that was reserved for them. Stdlib
only."""

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
_PREFIX = 8


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


def read_header(stream: Readable, size: int | None, where: str) -> Header:
    """Read and check the header at the front of `stream`.

    size is the file's length, None where it is not known (a pipe); then nothing is read beyond the
    header. Raises BadCheckpointError where the header breaks the format in any way; never allocates
    more than the header's limit.
    """
    prefix = _read_up_to(stream, _PREFIX)
    if len(prefix) == 0:
        raise BadCheckpointError(f"{where} is empty", "give a safetensors file")
    if len(prefix) < _PREFIX:
        raise _not_safetensors(where, f"it has only {len(prefix)} bytes")
    length = struct.unpack("<Q", prefix)[0]
    if length > LARGEST_HEADER:
        raise _not_safetensors(
            where, f"its header would be {length} bytes, more than {LARGEST_HEADER}"
        )
    if size is not None and _PREFIX + length > size:
        raise _not_safetensors(where, f"its header would be {length} bytes in a file of {size}")
    raw = _read_up_to(stream, length)
    if len(raw) < length:
        raise _damaged(where, f"it ends inside its header, after {_PREFIX + len(raw)} bytes")
    fields = _parse(raw, where)
    metadata = _check_metadata(fields.pop("__metadata__", {}), where)
    entries = _check_entries(fields, _PREFIX + length, where)
    end = max((entry.offset + entry.info.nbytes for entry in entries), default=_PREFIX + length)
    if size is not None and size != end:
        kind = (
            f"it is cut short: {end - size} bytes are missing"
            if size < end
            else f"{size - end} bytes follow its last tensor"
        )
        raise _damaged(where, kind)
    return Header(entries, metadata, end)


def render_header(
    tensors: Sequence[TensorInfo], metadata: Mapping[str, str], reserved: int | None = None
) -> bytes:
    """The header of a file that holds `tensors` one after the other, length prefix included, padded
    with spaces.

    reserved is the number of bytes to fill; without it the next multiple of 8. Raises ValueError
    where it does not fit.
    """
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
    total = reserved if reserved is not None else _PREFIX + -(-len(raw) // 8) * 8
    if len(raw) + _PREFIX > total:
        raise ValueError(f"a header of {len(raw)} bytes does not fit into {total}")
    return struct.pack("<Q", total - _PREFIX) + raw.ljust(total - _PREFIX)


def header_size(tensors: Sequence[TensorInfo], metadata: Mapping[str, str]) -> int:
    """The bytes that a header takes, length prefix included."""
    return len(render_header(tensors, metadata))


def _read_up_to(stream: Readable, count: int) -> bytes:
    parts: list[bytes] = []
    while count:
        part = stream.read(min(count, 1 << 20))
        if not part:
            break
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _not_safetensors(where: str, why: str) -> BadCheckpointError:
    return BadCheckpointError(
        f"{where} is not a safetensors file: {why}", "check the path, or download the file again"
    )


def _damaged(where: str, why: str) -> BadCheckpointError:
    return BadCheckpointError(f"{where} is damaged: {why}", "download or write the file again")


class _DuplicateKeyError(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _DuplicateKeyError(f"its header names {twice!r} twice")
    return fields


def _count(text: str) -> int:
    """JSON knows -0, the reference reader does not."""
    if text.startswith("-"):
        raise ValueError(f"{text} is negative")
    return int(text)


def _parse(raw: bytes, where: str) -> dict[str, Any]:
    if not raw.startswith(b"{"):
        raise _not_safetensors(where, "its header does not begin with '{'")
    try:
        fields = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_int=_count)
    except _DuplicateKeyError as error:
        raise _damaged(where, str(error)) from error
    except (ValueError, RecursionError) as error:
        raise _not_safetensors(
            where, "its header is not JSON, or holds numbers or nesting that no header has"
        ) from error
    if not isinstance(fields, dict):
        raise _not_safetensors(where, "its header is not a JSON object")
    return fields


def _check_metadata(metadata: object, where: str) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise _damaged(where, "its __metadata__ is not a map of strings")
    try:
        "".join(itertools.chain(metadata, metadata.values())).encode("utf-8")
    except UnicodeEncodeError as error:
        raise _damaged(where, "its __metadata__ is not Unicode text") from error
    return metadata


def _check_entries(fields: dict[str, Any], data_start: int, where: str) -> tuple[Entry, ...]:
    spans = sorted(
        (_check_one(name, item, where) for name, item in fields.items()), key=lambda span: span[1:]
    )
    at = 0
    entries = []
    for info, begin, end in spans:
        if begin != at:
            kind = (
                "overlaps the tensor before it"
                if begin < at
                else f"leaves a hole of {begin - at} bytes before it"
            )
            raise _damaged(where, f"tensor {info.name!r} {kind}")
        entries.append(Entry(info, data_start + begin))
        at = end
    return tuple(entries)


def _check_one(name: str, item: object, where: str) -> tuple[TensorInfo, int, int]:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _damaged(where, f"the tensor name {name!r} is not Unicode text") from error
    if not isinstance(item, dict) or item.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(
            where, f"tensor {name!r} does not have dtype, shape and data_offsets, and nothing else"
        )
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _damaged(where, f"tensor {name!r} has the unknown dtype {dtype!r}")
    if not isinstance(shape, list) or not all(_is_count(size) for size in shape):
        raise _damaged(where, f"tensor {name!r} has the shape {str(shape)[:60]}")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(_is_count(value) for value in offsets)
    ):
        raise _damaged(where, f"tensor {name!r} has the offsets {str(offsets)[:60]}")
    info = TensorInfo(name, dtype, tuple(shape))
    if any(
        product >= 2**64
        for product in itertools.accumulate((*shape, DTYPE_BITS[dtype]), operator.mul)
    ):
        raise _damaged(
            where, f"tensor {name!r} has the shape {str(shape)[:60]}, more than 64 bits can count"
        )
    if (info.parameters * DTYPE_BITS[dtype]) % 8 or offsets[1] - offsets[0] != info.nbytes:
        raise _damaged(
            where,
            f"tensor {name!r} holds {offsets[1] - offsets[0]} bytes, its shape and dtype need "
            f"{info.nbytes}",
        )
    return info, offsets[0], offsets[1]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
