"""The record that an output carries: recipe, plan and results as JSON, and how many bytes it will
take before it exists.

A file carries it in its safetensors metadata under `svdcli`. A directory carries it in
`svdcli.json`, with a SHA-256 of every other file, and each of its weight files has the part about
its own layers. Times are left out, so that the same work gives the same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any

from svdcli.errors import BadCheckpointError, SvdcliError, UsageError
from svdcli.files.checkpoint import METADATA_KEY, RECORD, Checkpoint, read_file_header
from svdcli.files.folder import read_json
from svdcli.files.stacks import slices_of
from svdcli.plan.packing import PLAIN
from svdcli.plan.plan import FORMAT, LayerPlan, Plan, layer_from_json
from svdcli.plan.tensors import TensorInfo
from svdcli.version import __version__


@dataclass(frozen=True)
class Result:
    """What came of one layer: relative Frobenius error of what is stored, the solver that did it,
    the ones that failed, and, where it is packed, the rounding's share of the squared error in the
    metric that counts."""

    relative_error: float
    solver: str
    fell_back: tuple[str, ...] = ()
    rounding_share: float | None = None

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {
            "relative_error": float(f"{self.relative_error:.6e}"),
            "solver": self.solver,
        }
        if self.fell_back:
            data["fell_back"] = list(self.fell_back)
        if self.rounding_share is not None:
            data["rounding_share"] = float(f"{self.rounding_share:.3e}")
        return data


# As wide as a result can get: solvers and reasons come from short fixed lists.
WIDEST = Result(1.234567e-100, "randomized float64", ("randomized float32: no convergence",) * 4)
_USUAL_ERROR = 1.234567e-10  # as many letters as the error of a solver that did not fail can take
EVERY = "every_layer"
CONDENSED = 2  # the format of a record in which `every_layer` says what its layers share
# What layers may share: fields that every one has.
_SHARED = ("shape", "dtype", "rank", "layout", "stored_dtype", "solver", "metric")
_SHA_WIDTH = 64
# What every record says of its source.
_SOURCE = {"name", "fingerprint", "bytes", "parameters"}
STACKS = "stacks"  # of experts that were taken apart: [dtype, experts, rows, columns]
CONFIG_WAS = "config_was"
# Halves of surrogate pairs, in which Python reads file names that are not UTF-8.
_SURROGATE = re.compile("[\ud800-\udfff]")


def stacks_of(record: Mapping[str, Any], shown: str) -> list[TensorInfo]:
    """The stacks of experts that were taken apart in the source of an output. Raises
    BadCheckpointError where the record says something else of them."""
    stacks = []
    for name, entry in (record.get("source", {}).get(STACKS) or {}).items():
        try:
            dtype, *shape = entry
            stack = TensorInfo(str(name), str(dtype), tuple(int(size) for size in shape))
        except (TypeError, ValueError) as error:
            raise BadCheckpointError(
                f"{shown}: its svdcli record is damaged ({error})", "write it again"
            ) from error
        if not any(True for _ in slices_of(stack)):
            raise BadCheckpointError(
                f"{shown}: its svdcli record is damaged ({name} is no stack)", "write it again"
            )
        stacks.append(stack)
    return stacks


def left_out_copies(record: Mapping[str, Any], shown: str) -> list[tuple[TensorInfo, str]]:
    """The tensors that were left out since another one has the same bytes, with the names of these.
    Raises BadCheckpointError where the record says something else of them."""
    copies = []
    try:
        for name, source in (record.get("same") or {}).items():
            entry = record["skipped"].get(name) or record["dense"][name]
            shape = tuple(int(size) for size in entry["shape"])
            copies.append((TensorInfo(str(name), str(entry["dtype"]), shape), str(source)))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadCheckpointError(
            f"{shown}: its svdcli record is damaged ({error})", "write it again"
        ) from error
    return copies


def take_apart_again(checkpoint: Checkpoint, record: Mapping[str, Any]) -> None:
    """Have the stacks that were taken apart for an output stand as matrices here too: in its
    source, or in itself those of which nothing was factored."""
    checkpoint.take_apart({stack.name for stack in _in_one_piece(checkpoint, record)})


def _in_one_piece(checkpoint: Checkpoint, record: Mapping[str, Any]) -> list[TensorInfo]:
    """The stacks that the record names and the checkpoint holds as they are there; a tensor of no
    size under such a name only warns other loaders."""
    refs = [checkpoint.tensors.get(stack.name) for stack in stacks_of(record, checkpoint.shown)]
    return [ref.info for ref in refs if ref is not None and ref.info.parameters]


def source_json(
    checkpoint: Checkpoint, fingerprint: str, config_was: Sequence[Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """What the record says of the source; config_was is what its config.json held where the
    output's says something else."""
    source: dict[str, Any] = {
        "name": checkpoint.name,
        "fingerprint": fingerprint,
        "bytes": checkpoint.nbytes,
        "parameters": checkpoint.parameters,
    }
    if checkpoint.state_dict:
        source["state_dict"] = checkpoint.state_dict
    if checkpoint.stacks:
        source[STACKS] = {
            name: [ref.info.dtype, *ref.info.shape] for name, ref in checkpoint.stacks.items()
        }
    if config_was is not None:
        source[CONFIG_WAS] = list(config_was)
    return source


def make_record(
    plan: Plan,
    source: Mapping[str, Any],
    left_out: Mapping[str, str],
    left_out_bytes: Mapping[str, int],
    results: Mapping[str, Result],
    files: Mapping[str, tuple[int, str]] | None = None,
) -> dict[str, Any]:
    """The whole record. A digest that is not known yet, "", takes as much room as one that is."""
    record: dict[str, Any] = {"svdcli": __version__, **plan.to_json()}
    record["source"] = dict(source)
    record["left_out"] = dict(left_out)
    if left_out_bytes:
        record["left_out_bytes"] = dict(left_out_bytes)
    for name, layer in record["layers"].items():
        layer.update(results[name].to_json())
    if files is not None:
        record["files"] = {
            name: {"bytes": size, "sha256": digest or "0" * _SHA_WIDTH}
            for name, (size, digest) in files.items()
        }
    return record


def usual_results(plan: Plan) -> dict[str, Result]:
    """Results as wide as they are where no solver gives way to another, for reserving space."""
    return {
        layer.tensor.name: Result(_USUAL_ERROR, layer.solver, (), _widest_share(layer))
        for layer in plan.factored
    }


def widest_results(plan: Plan) -> dict[str, Result]:
    """Results as wide as they can get, whatever happens."""
    return {
        layer.tensor.name: replace(WIDEST, rounding_share=_widest_share(layer))
        for layer in plan.factored
    }


def _widest_share(layer: LayerPlan) -> float | None:
    """A rounding's share that takes as many letters as any can; None where there is none."""
    return None if layer.packing == PLAIN else 1.234e-100


def shared_fields(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the first layer says and others may say too."""
    first: Mapping[str, Any] = next(iter(record["layers"].values()), {})
    return {key: first[key] for key in _SHARED if key in first}


def condensed(record: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    """The same record where what layers share, if anything, is said once; `check_record` gives
    every layer its own again."""
    if not shared:
        return dict(record)
    layers = {name: _without(layer, shared) for name, layer in record["layers"].items()}
    return {**record, "format": CONDENSED, EVERY: dict(shared), "layers": layers}


def _without(layer: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    """What a layer says that is not shared."""
    return {key: value for key, value in layer.items() if key not in shared or shared[key] != value}


def _uncondensed(record: Mapping[str, Any], shown: str) -> dict[str, Any]:
    """A condensed record as it was before."""
    if not all(isinstance(layer, dict) for layer in record["layers"].values()):
        raise _damaged(shown)
    shared = record[EVERY]
    layers = {name: shared | layer for name, layer in record["layers"].items()}
    whole_record = {**record, "format": FORMAT, "layers": layers}
    del whole_record[EVERY]
    return whole_record


def is_inside(name: str) -> bool:
    """Is this the name of a file below the folder that it is looked for in, on every system."""
    path = PureWindowsPath(name)  # which takes both kinds of slashes
    return bool(path.parts) and not path.anchor and ".." not in path.parts and "\0" not in name


def _damaged(shown: str, detail: str = "") -> BadCheckpointError:
    return BadCheckpointError(
        f"{shown}: its svdcli record is damaged{detail}", "write the output again"
    )


def _check_files(files: Any, shown: str) -> None:
    """Raises BadCheckpointError where a record's `files` is no map of files below its folder."""
    if files is None:
        return
    if not isinstance(files, dict) or not all(isinstance(file, dict) for file in files.values()):
        raise _damaged(shown, " (files)")
    for name in files:
        if not is_inside(name):
            raise BadCheckpointError(
                f"{shown} names {name!r}, outside its folder", "do not trust this output"
            )


def part_of_record(record: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    """What one weight file of a directory says about its own layers."""
    return {
        "svdcli": record["svdcli"],
        "format": FORMAT,
        "fingerprint": record["fingerprint"],
        "layers": {name: layer for name, layer in record["layers"].items() if name in names},
    }


def render_metadata(record: Mapping[str, Any]) -> str:
    """A record as a safetensors file's metadata holds it."""
    return unicode_json(record, separators=(",", ":"))


def unicode_json(data: Any, **options: Any) -> str:
    """JSON in plain letters, or in escapes where half a surrogate pair (a file name that is not
    UTF-8) has no letters."""
    text = json.dumps(data, ensure_ascii=False, **options)
    if not text.isascii() and _SURROGATE.search(text):
        return json.dumps(data, **options)
    return text


def render_json(data: Mapping[str, Any]) -> bytes:
    """A JSON file as Hugging Face writes them: two spaces, a final newline."""
    return (unicode_json(data, indent=2) + "\n").encode()


def render_record(record: Mapping[str, Any], reserved: int | None = None) -> bytes:
    """`svdcli.json`, a line a layer or file, filled up to `reserved` bytes with spaces.

    Raises ValueError where it does not fit.
    """
    fields = ",\n".join(f"  {unicode_json(key)}: {_lines(value)}" for key, value in record.items())
    text = f"{{\n{fields}\n}}\n".encode()
    if reserved is None:
        return text
    if len(text) > reserved:
        raise ValueError(f"a record of {len(text)} bytes does not fit into {reserved}")
    return text[:-1].ljust(reserved - 1) + b"\n"


def _lines(value: Any) -> str:
    """A line for each entry of a map of maps; anything else on one."""
    if not isinstance(value, dict) or not any(isinstance(v, dict) for v in value.values()):
        return unicode_json(value)
    lines = [f"    {unicode_json(key)}: {unicode_json(entry)}" for key, entry in value.items()]
    entries = ",\n".join(lines)
    return f"{{\n{entries}\n  }}"


def read_record(path: Path) -> dict[str, Any] | None:
    """The record of an output, checked for its version; None where `path` was not written by
    svdcli."""
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
    for name, metadata in checkpoint.metadata.items():
        record = record_in(metadata, name)
        if record is not None:
            return record
    return None


def check_not_compressed(checkpoint: Checkpoint, hint: str) -> None:
    """Raises SvdcliError for what svdcli wrote."""
    if record_of(checkpoint) is not None:
        raise SvdcliError(f"{checkpoint.shown} is compressed already", hint)


def stored_layers(checkpoint: Checkpoint, record: Mapping[str, Any]) -> list[LayerPlan]:
    """The factored layers of an output, checked against its headers.

    Raises BadCheckpointError where a factor is missing or has another shape or dtype than the
    record says.
    """
    try:
        layers = [layer_from_json(name, layer) for name, layer in record["layers"].items()]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadCheckpointError(
            f"{checkpoint.shown}: its svdcli record is damaged ({error})", "write it again"
        ) from error
    there = {info.name: info for info in checkpoint.infos}
    for stack in _in_one_piece(checkpoint, record):
        there |= {matrix.name: matrix for matrix, _ in slices_of(stack)}
    for layer in layers:
        for factor in (*layer.stored(), *layer.spans()):
            _check_factor(checkpoint.shown, there.get(factor.name), factor)
    return layers


def _check_factor(shown: str, stored: TensorInfo | None, factor: TensorInfo) -> None:
    """Raises BadCheckpointError where what a checkpoint holds is not this factor as the record has
    it."""
    if stored is None:
        raise BadCheckpointError(
            f"{shown} lacks {factor.name!r}, a factor", "write the output again"
        )
    if stored != factor:
        raise BadCheckpointError(
            f"{shown} has {factor.name!r} as {stored.dtype} {list(stored.shape)}, "
            f"its record as {factor.dtype} {list(factor.shape)}",
            "write the output again",
        )


def check_listed(checkpoint: Checkpoint, record: Mapping[str, Any]) -> None:
    """Raises BadCheckpointError where a tensor that was not factored is in the record and not in
    the weight files, nor another one that is equal to it."""
    there = set(checkpoint.tensors)
    for copy, source in left_out_copies(record, checkpoint.shown):
        ref = checkpoint.tensors.get(source)
        if ref is not None and (ref.info.dtype, ref.info.shape) == (copy.dtype, copy.shape):
            there.add(copy.name)
    for stack in _in_one_piece(checkpoint, record):
        there.update(matrix.name for matrix, _ in slices_of(stack))
    for name in (*(record.get("dense") or ()), *(record.get("skipped") or ())):
        if name not in there:
            raise BadCheckpointError(
                f"{checkpoint.shown} lacks {name!r}, which its record lists",
                "write the output again",
            )


def record_in(metadata: Mapping[str, str], shown: str) -> dict[str, Any] | None:
    """The record in a safetensors file's metadata, or None. shown is what messages call it."""
    if METADATA_KEY not in metadata:
        return None
    try:
        record = json.loads(metadata[METADATA_KEY])
    except (ValueError, RecursionError) as error:
        raise BadCheckpointError(
            f"{shown}: its svdcli metadata is not JSON", "write it again"
        ) from error
    return check_record(record, shown)


def check_record(data: Any, shown: str) -> dict[str, Any]:
    """The record, with every layer's own fields.

    Raises BadCheckpointError where it is of a newer format, lacks what every record has, or names
    files that are not in the output's folder.
    """
    # What every record has, that of a newer format too.
    if not isinstance(data, dict):
        raise _damaged(shown)
    if not isinstance(data.get("format"), int) or not isinstance(data.get("layers"), dict):
        raise _damaged(shown)
    record: dict[str, Any] = data
    if record["format"] == CONDENSED and isinstance(record.get(EVERY), dict):
        record = _uncondensed(record, shown)
    _check_files(record.get("files"), shown)
    if record["format"] > FORMAT:
        raise BadCheckpointError(
            f"{shown} has format {record['format']}, this svdcli knows {FORMAT}", "upgrade svdcli"
        )

    # What the record of a whole output has, and one weight file's part of it has not.
    if "recipe" in record:
        try:
            Plan.from_json(record)
            if not isinstance(record["left_out"], dict) or not record["source"].keys() >= _SOURCE:
                raise KeyError("source")
            _check_note(record["source"].get(CONFIG_WAS, []))
        except (UsageError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(shown) from error
    return record


def _check_note(note: Any) -> None:
    """Raises TypeError where a note of what the config held is not one of `config.change`."""
    for entry in note:
        path = entry["path"]
        is_path = isinstance(path, list) and len(path) > 0
        if not is_path or not all(isinstance(step, str) for step in path):
            raise TypeError("a path that is none")
