"""The record that an output carries: recipe, plan and results as JSON, and how many bytes it will take before it exists.

A file carries it in its safetensors metadata under `svdcli`. A directory carries it in `svdcli.json`, with a SHA-256 of every
other file, and each of its weight files has the part about its own layers. Times are left out, so that the same work gives
the same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svdcli import __version__
from svdcli.errors import BadCheckpointError, UsageError
from svdcli.files.checkpoint import METADATA_KEY, RECORD, Checkpoint, read_file_header
from svdcli.files.folder import read_json
from svdcli.plan.recipe import FORMAT, LayerPlan, Plan, layer_from_json


@dataclass(frozen=True)
class Result:
    """What came of one layer: relative Frobenius error of what is stored, the solver that did it, the ones that failed."""

    relative_error: float
    solver: str
    fell_back: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        item: dict[str, Any] = {"relative_error": float(f"{self.relative_error:.6e}"), "solver": self.solver}
        return item if not self.fell_back else item | {"fell_back": list(self.fell_back)}


# As wide as a result can get: solvers and reasons come from short fixed lists.
WIDEST = Result(1.234567e-100, "randomized float64", ("randomized float32: no convergence",) * 4)
_SHA_WIDTH = 64
_SOURCE = {"name", "fingerprint", "bytes", "parameters"}
_SURROGATE = re.compile("[\ud800-\udfff]")


def source_json(checkpoint: Checkpoint, fingerprint: str) -> dict[str, Any]:
    source: dict[str, Any] = {
        "name": checkpoint.name,
        "fingerprint": fingerprint,
        "bytes": checkpoint.nbytes,
        "parameters": checkpoint.parameters,
    }
    if checkpoint.state_dict:
        source["state_dict"] = checkpoint.state_dict
    return source


def make_record(
    plan: Plan,
    source: Mapping[str, Any],
    left_out: Mapping[str, str],
    left_out_bytes: Mapping[str, int],
    results: Mapping[str, Result] | None = None,
    files: Mapping[str, tuple[int, str]] | None = None,
) -> dict[str, Any]:
    """The whole record; without results it has the widest values, for reserving space."""
    record = {"svdcli": __version__} | plan.to_json() | {"source": dict(source), "left_out": dict(left_out)}
    if left_out_bytes:
        record["left_out_bytes"] = dict(left_out_bytes)
    for name, item in record["layers"].items():
        item.update((WIDEST if results is None else results[name]).to_json())
    if files is not None:
        record["files"] = {name: {"bytes": size, "sha256": digest or "0" * _SHA_WIDTH} for name, (size, digest) in files.items()}
    return record


def part_of_record(record: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    """What one weight file of a directory says about its own layers."""
    return {
        "svdcli": record["svdcli"],
        "format": FORMAT,
        "fingerprint": record["fingerprint"],
        "layers": {name: item for name, item in record["layers"].items() if name in names},
    }


def render_metadata(record: Mapping[str, Any]) -> str:
    return unicode_json(record, separators=(",", ":"))


def unicode_json(data: Mapping[str, Any], **how: Any) -> str:
    """JSON in plain letters, or in escapes where half a surrogate pair (a file name that is not UTF-8) has no letters."""
    text = json.dumps(data, ensure_ascii=False, **how)
    return text if text.isascii() or not _SURROGATE.search(text) else json.dumps(data, **how)


def render_json(data: Mapping[str, Any]) -> bytes:
    """A JSON file as Hugging Face writes them: two spaces, a final newline."""
    return (unicode_json(data, indent=2) + "\n").encode()


def render_record(record: Mapping[str, Any], reserved: int | None = None) -> bytes:
    """`svdcli.json`, filled up to `reserved` bytes with spaces."""
    text = render_json(record)
    return text if reserved is None else text[:-1].ljust(reserved - 1) + b"\n"


def read_record(path: Path) -> dict[str, Any] | None:
    """The record of an output, checked for its version; None where `path` was not written by svdcli."""
    if path.is_dir():
        file = path / RECORD
        return check_record(read_json(file), str(file)) if file.is_file() else None
    if not path.name.endswith(".safetensors"):
        return None
    return record_in(read_file_header(path).metadata, str(path))


def record_of(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The record of an open checkpoint, or None where svdcli did not write it."""
    if checkpoint.is_directory:
        return read_record(checkpoint.path)
    return next((r for name, m in checkpoint.metadata.items() if (r := record_in(m, name)) is not None), None)


def stored_layers(checkpoint: Checkpoint, record: Mapping[str, Any]) -> list[LayerPlan]:
    """The factored layers of an output, checked against its headers.

    Raises BadCheckpointError where a factor is missing or has another shape or dtype than the record says.
    """
    try:
        layers = [layer_from_json(name, item) for name, item in record["layers"].items()]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadCheckpointError(f"{checkpoint.shown}: its svdcli record is damaged ({error})", "write it again") from error
    for layer in layers:
        for expected in layer.stored():
            ref = checkpoint.tensors.get(expected.name)
            if ref is None:
                raise BadCheckpointError(f"{checkpoint.shown} lacks {expected.name!r}, a factor", "write the output again")
            if ref.info != expected:
                raise BadCheckpointError(
                    f"{checkpoint.shown} has {expected.name!r} as {ref.info.dtype} {list(ref.info.shape)}, its record as "
                    f"{expected.dtype} {list(expected.shape)}",
                    "write the output again",
                )
    return layers


def record_in(metadata: Mapping[str, str], where: str) -> dict[str, Any] | None:
    """The record in a safetensors file's metadata, or None."""
    if METADATA_KEY not in metadata:
        return None
    try:
        record = json.loads(metadata[METADATA_KEY])
    except (ValueError, RecursionError) as error:
        raise BadCheckpointError(f"{where}: its svdcli metadata is not JSON", "write it again") from error
    return check_record(record, where)


def check_record(record: Any, where: str) -> dict[str, Any]:
    """Raises BadCheckpointError where the record is of a newer format or lacks what every record has."""
    if not isinstance(record, dict) or not isinstance(record.get("format"), int) or not isinstance(record.get("layers"), dict):
        raise BadCheckpointError(f"{where}: its svdcli record is damaged", "write the output again")
    if record["format"] > FORMAT:
        raise BadCheckpointError(f"{where} has format {record['format']}, this svdcli knows {FORMAT}", "upgrade svdcli")
    if "recipe" in record:
        try:
            Plan.from_json(record)
            if not isinstance(record["left_out"], dict) or not record["source"].keys() >= _SOURCE:
                raise KeyError("source")
        except (UsageError, KeyError, TypeError, AttributeError) as error:
            raise BadCheckpointError(f"{where}: its svdcli record is damaged", "write the output again") from error
    return record
