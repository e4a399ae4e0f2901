"""The header reader against the reference reader: what it accepts, the reference accepts, with the
same content."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import entry, framed, small_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize, safe_open
from safetensors.torch import save

from svdcli.errors import BadCheckpointError
from svdcli.files.dtypes import TORCH_DTYPES
from svdcli.files.header import LARGEST_HEADER, Header, read_header, render_header
from svdcli.plan.tensors import DTYPE_BITS, TensorInfo

WHERE = "some/file"


def read(raw: bytes) -> Header:
    return read_header(io.BytesIO(raw), len(raw), WHERE)


def summary(header: Header) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {e.info.name: (e.info.dtype, e.info.shape) for e in header.entries}


def reference(raw: bytes) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (item["dtype"], tuple(item["shape"])) for name, item in deserialize(raw)}


# Round trips --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (8,), (4, 2)])
def test_reference_reads_what_we_render(dtype: str, shape: tuple[int, ...]) -> None:
    tensor = TensorInfo("t", dtype, shape)
    if math.prod(shape) * DTYPE_BITS[dtype] % 8:
        pytest.skip("less than a byte cannot be stored")
    data = bytes(range(tensor.nbytes))
    raw = render_header([tensor], {"format": "pt"}) + data
    ((name, item),) = deserialize(raw)
    assert (name, item["dtype"], tuple(item["shape"]), bytes(item["data"])) == (
        "t",
        dtype,
        shape,
        data,
    )
    assert summary(read(raw)) == {"t": (dtype, shape)}


@pytest.mark.parametrize("dtype", sorted(TORCH_DTYPES))
def test_we_read_what_the_reference_writes(dtype: str) -> None:
    torch_dtype = TORCH_DTYPES[dtype]
    raw = save(
        {
            "t": torch.zeros(2, 3, torch_dtype.itemsize, dtype=torch.uint8).view(torch_dtype),
            "u": torch.ones(3),
        }
    )
    assert summary(read(raw)) == {"t": (dtype, (2, 3, 1)), "u": ("F32", (3,))}


def test_offsets_point_at_the_bytes() -> None:
    raw = save(small_tensors(), {"a": "b"})
    header = read(raw)
    expected = {name: bytes(item["data"]) for name, item in deserialize(raw)}
    assert {
        e.info.name: raw[e.offset : e.offset + e.info.nbytes] for e in header.entries
    } == expected
    assert header.metadata == {"a": "b"}
    assert header.size == len(raw)


@pytest.mark.parametrize(
    "name", ["", " ", "a\nb", "\0", "层.weight", "😀", "[bold]x", 'q"\\', "\u202e", "x" * 9000]
)
def test_any_text_is_a_name(name: str) -> None:
    raw = render_header([TensorInfo(name, "U8", (1,))], {name: name}) + b"\1"
    assert set(reference(raw)) == set(summary(read(raw))) == {name}
    assert read(raw).metadata == {name: name}


def test_reserved_space_is_padding() -> None:
    tensors = [TensorInfo("t", "U8", (1,))]
    raw = render_header(tensors, {}, reserved=4096) + b"\1"
    assert len(raw) == 4097
    assert summary(read(raw)) == reference(raw)
    with pytest.raises(ValueError, match="does not fit"):
        render_header(tensors, {}, reserved=20)


def test_a_file_without_tensors_is_valid() -> None:
    raw = framed({"__metadata__": {"a": "b"}})
    assert read(raw) == Header((), {"a": "b"}, len(raw))


def test_a_pipe_is_read_no_further_than_the_header() -> None:
    raw = framed({"t": entry("U8", [3], [0, 3])}, b"abc")
    stream = io.BytesIO(raw + b"more")
    header = read_header(stream, None, WHERE)
    assert header.size == len(raw)
    assert stream.tell() == len(raw) - 3


# Everything that breaks the format ----------------------------------------------------------------


def one(item: Any, data: bytes = b"1234") -> bytes:
    return framed({"t": item}, data)


def with_extra(text: str) -> bytes:
    """One good tensor with one more field, as JSON text."""
    return framed('{"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4],' + text + "}}", b"1234")


def with_number(text: str, *, data: bytes = b"1234") -> bytes:
    """One tensor whose only size is this JSON text."""
    return framed(
        '{"t":{"dtype":"U8","shape":[' + text + f'],"data_offsets":[0,{len(data)}]}}}}', data
    )


GOOD = framed({"t": entry()}, b"1234")
PAIR = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
MALFORMED = {
    "zero bytes": b"",
    "one byte": b"\0",
    "seven bytes": b"\2" + bytes(6),
    "only the length": GOOD[:8],
    "not safetensors": b"hello, this is a text file\n" * 10,
    "zip": b"PK\3\4" + bytes(100),
    "length beyond the limit": framed({}, bytes(64), length=LARGEST_HEADER + 1),
    "length of all ones": framed({}, bytes(64), length=2**64 - 1),
    "length beyond the file": framed({}, length=1000),
    "length one too long": framed({"t": entry()}, length=len(GOOD) - 8 - 4 + 1),
    "length one too short": framed({"t": entry()}, b"1234", length=len(GOOD) - 8 - 4 - 1),
    "length zero": framed("", b"1234"),
    "cut in the header": GOOD[:20],
    "cut in the data": GOOD[:-1],
    "no data": GOOD[:-4],
    "trailing byte": GOOD + b"x",
    "trailing megabyte": GOOD + bytes(1 << 20),
    "empty header, trailing byte": framed({}, b"x"),
    "not JSON": framed("{t: 1}"),
    "not UTF-8": framed(b'{"\xff":1}'),
    "list": framed("[]"),
    "number": framed("12"),
    "string": framed('"{}"'),
    "null": framed("null"),
    "two objects": framed("{}{}"),
    "padded with zeros": framed(b"{}" + bytes(6)),
    "comma": framed('{"t":' + PAIR + ",}", b"1234"),
    "nested lists": framed('{"t":' + "[" * 100_000 + "]" * 100_000 + "}"),
    "nested objects": framed('{"t":' * 100_000 + "1" + "}" * 100_000),
    "nested and unclosed": framed('{"t":' * 100_000),
    "nested in a field": with_extra('"x":' + "[" * 200 + "]" * 200),
    "same name twice": framed('{"t":' + PAIR + ',"t":' + PAIR + "}", b"1234"),
    "same name twice, one escaped": framed('{"t":' + PAIR + ',"\\u0074":' + PAIR + "}", b"1234"),
    "field twice": framed(
        '{"t":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"1234"
    ),
    "metadata twice": framed('{"__metadata__":{},"__metadata__":{}}'),
    "overlap": framed({"a": entry(offsets=[0, 4]), "b": entry(offsets=[2, 6])}, b"123456"),
    "same place": framed({"a": entry(offsets=[0, 4]), "b": entry(offsets=[0, 4])}, b"1234"),
    "empty tensor inside another": framed(
        {"a": entry(), "b": entry(shape=[0], offsets=[2, 2])}, b"1234"
    ),
    "hole": framed({"a": entry(offsets=[0, 4]), "b": entry(offsets=[5, 9])}, b"123456789"),
    "hole at the start": one(entry(offsets=[1, 5]), b"12345"),
    "out of range": one(entry(offsets=[4, 8])),
    "far out of range": one(entry(offsets=[2**62, 2**62 + 4])),
    "backwards": one(entry(offsets=[4, 0])),
    "larger than its file": one(entry("F32", [2**40], [0, 2**42])),
    "fewer bytes than its shape": one(entry(shape=[2])),
    "more bytes than its shape": one(entry(shape=[0])),
    "negative offset": one(entry(offsets=[-4, 0])),
    "negative size": one(entry(shape=[-1])),
    "two negative sizes": one(entry(shape=[-1, -1])),
    "bool size": one(entry(shape=[True])),
    "bool offset": one(entry("U8", [1], [False, True]), b"1"),
    "float size": one(entry(shape=[1.0])),
    "float offset": one(entry(offsets=[0, 4.0])),
    "size in exponent form": with_number("4e0"),
    "minus zero": with_number("-0", data=b""),
    "string size": one(entry(shape=["1"])),
    "null size": one(entry(shape=[None])),
    "huge size": one(entry(shape=[10**30])),
    "size of thousands of digits": with_number("9" * 9000),
    "NaN size": with_number("NaN"),
    "infinite size": with_number("Infinity"),
    "product that overflows": one(entry("U8", [2**62, 4, 0], [0, 0]), b""),
    "half a byte": one(entry("F4", [3], [0, 1]), b"1"),
    "no dtype": one({"shape": [1], "data_offsets": [0, 4]}),
    "no shape": one({"dtype": "F32", "data_offsets": [0, 4]}),
    "no offsets": one({"dtype": "F32", "shape": [1]}),
    "tensor is a list": one(["F32"]),
    "tensor is null": one(None),
    "tensor is a number": one(4),
    "shape is a number": one(entry(shape=1)),
    "shape is nested": one(entry(shape=[[1]])),
    "one offset": one(entry(offsets=[0])),
    "three offsets": one(entry(offsets=[0, 4, 4])),
    "offsets are an object": one(entry(offsets={"0": 0, "1": 4})),
    "unknown dtype": one(entry("F31")),
    "dtype in small letters": one(entry("f32")),
    "empty dtype": one(entry("")),
    "dtype is a number": one(entry(4)),
    "dtype is a list": one(entry(["F32"])),
    "metadata is a list": framed({"__metadata__": ["a"]}),
    "metadata is a string": framed({"__metadata__": "a"}),
    "metadata holds a number": framed({"__metadata__": {"a": 1}}),
    "metadata holds null": framed({"__metadata__": {"a": None}}),
    "metadata holds an object": framed({"__metadata__": {"a": {}}}),
    "lone surrogate in a name": framed('{"\\ud800":' + PAIR + "}", b"1234"),
    "surrogates in the wrong order": framed('{"\\ude00\\ud83d":' + PAIR + "}", b"1234"),
    "lone surrogate in a metadata key": framed('{"__metadata__":{"\\udfff":"a"}}'),
    "lone surrogate in a metadata value": framed('{"__metadata__":{"a":"\\ud800"}}'),
    "lone surrogate in a field": with_extra('"x":"\\ud800"'),
    "control character in a name": framed(b'{"\1":' + PAIR.encode() + b"}", b"1234"),
    "NaN in a field": with_extra('"x":NaN'),
    "infinity in a field": with_extra('"x":-Infinity'),
    "number too large in a field": with_extra('"x":1e999'),
}


def test_the_good_one_is_good() -> None:
    assert summary(read(GOOD)) == reference(GOOD) == {"t": ("F32", (1,))}


@pytest.mark.parametrize("raw", MALFORMED.values(), ids=MALFORMED)
def test_malformed_is_refused(raw: bytes) -> None:
    with pytest.raises(BadCheckpointError) as caught:
        read(raw)
    assert WHERE in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("same name twice", "'t' twice"),
        ("overlap", "'b' overlaps"),
        ("hole", "hole of 1 bytes"),
        ("cut in the data", "1 bytes are missing"),
        ("trailing byte", "1 bytes follow"),
        ("unknown dtype", "'F31'"),
        ("length beyond the file", "1000 bytes in a file of 10"),
        ("zero bytes", "empty"),
    ],
)
def test_the_message_says_what_is_wrong(case: str, says: str) -> None:
    with pytest.raises(BadCheckpointError, match=says):
        read(MALFORMED[case])


@pytest.mark.parametrize(
    "raw",
    [
        framed({}, length=LARGEST_HEADER),
        framed({}, length=2**63),
        framed({"t": entry("F64", [2**40], [0, 2**43])}),
        framed('{"__metadata__":{"a":"' + "x" * 1000),
    ],
)
@pytest.mark.parametrize("pipe", [True, False])
def test_a_lie_about_size_allocates_nothing(raw: bytes, pipe: bool) -> None:
    tracemalloc.start()
    try:
        if pipe:  # a pipe's promise about its data can only be checked by reading on
            with contextlib.suppress(BadCheckpointError):
                read_header(io.BytesIO(raw), None, WHERE)
        else:
            with pytest.raises(BadCheckpointError):
                read(raw)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


# Mutations ----------------------------------------------------------------------------------------

BASES = [
    framed(
        {
            "__metadata__": {"a": "b"},
            "t": entry("U8", [4], [0, 4]),
            "u": entry("F16", [2, 1], [4, 8]),
        },
        bytes(8),
    ),
    framed(
        {
            "t": entry("F32", [], [0, 4]),
            "e": entry("I64", [0, 3], [4, 4]),
            "f": entry("F4", [2], [4, 5]),
        },
        bytes(5),
    ),
    save(
        {"x.weight": torch.zeros(2, 2), "x.bias": torch.zeros(2, dtype=torch.bfloat16)},
        {"format": "pt"},
    ),
]
TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[{}\[\]:,]|[^{}\[\]:,"]+')
NUMBERS = [
    "0",
    "-0",
    "1",
    "2",
    "4",
    "8",
    "-1",
    "1.0",
    "1e0",
    "01",
    "NaN",
    str(2**62),
    str(2**64),
    "9" * 400,
]
STRINGS = [
    '"t"',
    '"\\u0074"',
    '""',
    '"\\ud800"',
    '"\\ud83d\\ude00"',
    '"__metadata__"',
    '"dtype"',
    '"shape"',
    '"I8"',
    '"F4"',
]
OTHERS = [
    "true",
    "null",
    "[]",
    "[0]",
    "[0,4]",
    "{}",
    "",
    " ",
    "\n",
    ",",
    ":",
    "{",
    "}",
    "[",
    "]",
    '"',
    "\\",
    "\x7f",
    "é",
]
FIELDS = [
    '"x":1',
    '"x":NaN',
    '"x":-1e999',
    '"x":"\\ud800"',
    '"x":' + "[" * 200 + "]" * 200,
    '"a":"b"',
    '"__metadata__":{}',
]


def alike(token: bytes) -> list[str]:
    """What could stand in a token's place without breaking the JSON."""
    return STRINGS if token.startswith(b'"') else NUMBERS if token.isdigit() else OTHERS


@st.composite
def mutated_tokens(draw: st.DrawFn) -> bytes:
    """Swap values, add fields, repeat or drop parts, so that what comes out is often JSON still,
    and sometimes sound."""
    base = draw(st.sampled_from(BASES))
    end = 8 + struct.unpack("<Q", base[:8])[0]
    tokens = TOKEN.findall(base[8:end])
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, len(tokens) - 1))
        change = draw(st.sampled_from(["alike", "field", "space", "any", "drop", "copy", "swap"]))
        if change == "alike":
            tokens[at] = draw(st.sampled_from(alike(tokens[at]))).encode()
        elif change == "field":
            brace = draw(
                st.sampled_from(
                    [place for place, token in enumerate(tokens) if token == b"{"] or [0]
                )
            )
            tokens.insert(brace + 1, draw(st.sampled_from(FIELDS)).encode() + b",")
        elif change == "space":
            tokens.insert(at, draw(st.sampled_from([b" ", b"\n\t", b"\0", b"\xa0"])))
        elif change == "any":
            tokens.insert(at, draw(st.sampled_from([*NUMBERS, *STRINGS, *OTHERS])).encode())
        elif change == "drop":
            del tokens[at : at + draw(st.integers(1, 4))]
        elif change == "copy":
            tokens[at:at] = tokens[at : at + draw(st.integers(1, 30))]
        else:
            other = draw(st.integers(0, len(tokens) - 1))
            tokens[at], tokens[other] = tokens[other], tokens[at]
        tokens = tokens or [b"{}"]
    return framed(b"".join(tokens), base[end:])


@st.composite
def mutated_bytes(draw: st.DrawFn) -> bytes:
    """Change, insert and remove bytes anywhere in the length and the header, or cut the file."""
    raw = bytearray(draw(st.sampled_from(BASES)))
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(end, len(raw)) - 1)) if raw else 0
        change = draw(st.sampled_from(["set", "flip", "insert", "delete", "cut", "length"]))
        if change == "set":
            raw[at : at + 1] = bytes([draw(st.sampled_from(b'{}[]",:0123456789-eE.\\ \n\0\xff'))])
        elif change == "flip":
            raw[at : at + 1] = bytes([raw[at] ^ (1 << draw(st.integers(0, 7)))]) if raw else b""
        elif change == "insert":
            raw[at:at] = draw(st.binary(min_size=1, max_size=4))
        elif change == "delete":
            del raw[at : at + draw(st.integers(1, 9))]
        elif change == "cut":
            del raw[at + draw(st.integers(0, 40)) :]
        else:
            raw[:8] = struct.pack(
                "<Q", draw(st.one_of(st.integers(0, 300), st.integers(0, 2**64 - 1)))
            )
    return bytes(raw)


def test_mutated_headers_are_read_right_or_refused(tmp_path: Path) -> None:
    file, seen = tmp_path / "mutated", {"sound": 0, "refused": 0}

    @given(raw=st.one_of(mutated_tokens(), mutated_bytes()))
    @settings(max_examples=1200, deadline=None, derandomize=True, database=None)
    def check(raw: bytes) -> None:
        try:
            header = read(raw)
        except BadCheckpointError:
            seen["refused"] += 1
            return
        seen["sound"] += 1
        assert summary(header) == reference(raw)
        file.write_bytes(raw)
        with safe_open(file, framework="pt") as opened:
            assert (opened.metadata() or {}) == header.metadata

    check()
    assert min(seen.values()) > 50, f"the mutations are too tame or too wild: {seen}"


def test_a_rendered_header_is_plain_json() -> None:
    raw = render_header([TensorInfo("é", "F32", (1,))], {"k": "v"})
    fields = json.loads(raw[8:])
    assert fields == {
        "__metadata__": {"k": "v"},
        "é": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
    }
    assert len(raw) % 8 == 0
