"""The whole output before any of it exists: every file, every offset, every byte."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from svdcli.files.checkpoint import METADATA_KEY, RECORD, Checkpoint
from svdcli.files.record import (
    Result,
    make_record,
    part_of_record,
    render_json,
    render_metadata,
    render_record,
    source_json,
)
from svdcli.files.writer import OutFile, Unit, group_units, lay_out, safetensors_name, shard_stem
from svdcli.plan.recipe import FORMAT, LayerPlan, Plan
from svdcli.plan.tensors import TensorInfo

Metadata = dict[str, str]


@dataclass(frozen=True)
class Blueprint:
    """files are the weight files; texts are written as they are; carried are copied from the source; record_bytes is the
    size of `svdcli.json`, 0 where there is none."""

    files: tuple[OutFile, ...]
    texts: Mapping[str, bytes]
    carried: Mapping[str, int]
    record_bytes: int

    @property
    def total(self) -> int:
        return sum(self.sizes().values())

    def sizes(self) -> dict[str, int]:
        """Bytes of every file of the output, by name."""
        record = {RECORD: self.record_bytes} if self.record_bytes else {}
        return {f.name: f.size for f in self.files} | {n: len(t) for n, t in self.texts.items()} | dict(self.carried) | record


@dataclass(frozen=True)
class Beside:
    """A Python file that opens the model where svdcli is not installed, and what config.json says about it."""

    name: str
    text: bytes
    auto_map: Mapping[str, str]


class CompressDesign:
    """How a plan becomes files. One value draws the blueprint, and later fills in the results."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, out_name: str | None, beside: Beside | None = None) -> None:
        """out_name is the name of a file output, None for a directory; beside is what makes a directory self-contained."""
        self.checkpoint, self.plan, self.out_name, self.beside = checkpoint, plan, out_name, beside
        self.units = compress_units(checkpoint, plan)
        self._source = source_json(checkpoint, plan.fingerprint)

    def blueprint(self) -> Blueprint:
        record = self._record(None)
        groups = group_units(self.units, self.plan.recipe.max_shard_size)
        if self.out_name is not None:
            groups = {self.out_name: self.units}
        files = [lay_out(name, group, self._metadata(group, record)) for name, group in groups.items()]
        if self.out_name is not None:
            return Blueprint(tuple(files), {}, {}, 0)
        texts, carried = directory_texts(self.checkpoint, files, self._config())
        if self.beside is not None:
            texts[self.beside.name] = self.beside.text
            carried.pop(self.beside.name, None)
        sizes = Blueprint(tuple(files), texts, carried, 0).sizes()
        with_files = self._record(None, {name: (size, "") for name, size in sizes.items()})
        return Blueprint(tuple(files), texts, carried, len(render_record(with_files)))

    def metadata(self, file: OutFile, results: Mapping[str, Result]) -> Metadata:
        """The final metadata of one weight file."""
        members = set(file.units)
        return self._metadata([unit for unit in self.units if unit.name in members], self._record(results))

    def record(self, results: Mapping[str, Result], files: Mapping[str, tuple[int, str]], reserved: int) -> bytes:
        """The final `svdcli.json`."""
        return render_record(self._record(results, files), reserved)

    def _record(self, results: Mapping[str, Result] | None, files: Mapping[str, tuple[int, str]] | None = None) -> dict[str, Any]:
        return make_record(self.plan, self._source, self.checkpoint.left_out, self.checkpoint.left_out_bytes, results, files)

    def _metadata(self, group: Sequence[Unit], record: Mapping[str, Any]) -> Metadata:
        own = record if self.out_name is not None else part_of_record(record, {unit.name for unit in group})
        return _base_metadata(self.checkpoint, group) | {METADATA_KEY: render_metadata(own)}

    def _config(self) -> dict[str, Any] | None:
        config = self.checkpoint.config
        if config is None or self.plan.recipe.layout == "dense" or not self.plan.factored:
            return config
        config = config | {"quantization_config": {"quant_method": "svdcli", "format": FORMAT, "layout": self.plan.recipe.layout}}
        return config if self.beside is None else config | {"auto_map": self.beside.auto_map}


class ExpandDesign:
    """How factored layers become ordinary ones again: the checkpoint as it was, with the low-rank weights."""

    def __init__(self, checkpoint: Checkpoint, layers: Sequence[LayerPlan], out_name: str | None) -> None:
        self.checkpoint, self.out_name = checkpoint, out_name
        self.units = expand_units(checkpoint, layers)

    def blueprint(self) -> Blueprint:
        groups = {self.out_name: self.units} if self.out_name is not None else group_units(self.units, None)
        files = [lay_out(name, group, _base_metadata(self.checkpoint, group)) for name, group in groups.items()]
        if self.out_name is not None:
            return Blueprint(tuple(files), {}, {}, 0)
        config = self.checkpoint.config
        if config is not None:
            config = {key: value for key, value in config.items() if key != "quantization_config"}
        texts, carried = directory_texts(self.checkpoint, files, config)
        return Blueprint(tuple(files), texts, carried, 0)

    def metadata(self, file: OutFile, results: Mapping[str, Result]) -> Metadata:
        members = set(file.units)
        return _base_metadata(self.checkpoint, [unit for unit in self.units if unit.name in members])


def compress_units(checkpoint: Checkpoint, plan: Plan) -> list[Unit]:
    """One unit a tensor of the source. The first factored layer of a directory that transformers would open also gets a
    zero-size tensor under its old name: a loader without svdcli then fails loudly instead of making weights up."""
    layers = {layer.tensor.name: layer for layer in plan.factored}
    refitted = {layer.bias.name for layer in plan.factored if layer.bias is not None}
    tripwire = checkpoint.is_directory and checkpoint.transformers_opens_it and plan.recipe.layout != "dense"
    units = []
    for name, ref in checkpoint.tensors.items():
        layer = layers.get(name)
        if name in refitted:
            continue  # written with its layer
        if layer is None:
            units.append(Unit(name, "copy", (name,), (ref.info,), ref.file))
            continue
        writes = layer.stored() if layer.bias is None else (*layer.stored(), layer.bias)
        if tripwire:
            writes, tripwire = (*writes, TensorInfo(name, layer.stored_dtype, (0,))), False
        units.append(Unit(name, "factor", (name,), writes, ref.file))
    return units


def expand_units(checkpoint: Checkpoint, layers: Sequence[LayerPlan]) -> list[Unit]:
    owner = {tensor.name: layer for layer in layers for tensor in layer.stored()}
    tripwires = {layer.tensor.name for layer in layers if layer.layout != "dense"}
    units, seen = [], set()
    for name, ref in checkpoint.tensors.items():
        layer = owner.get(name)
        if layer is None:
            if not (name in tripwires and ref.info.parameters == 0):
                units.append(Unit(name, "copy", (name,), (ref.info,), ref.file))
        elif layer.tensor.name not in seen:
            seen.add(layer.tensor.name)
            reads = tuple(tensor.name for tensor in layer.stored())
            units.append(Unit(layer.tensor.name, "expand", reads, (layer.tensor,), ref.file))
    return units


def directory_texts(
    checkpoint: Checkpoint, files: Sequence[OutFile], config: dict[str, Any] | None
) -> tuple[dict[str, bytes], dict[str, int]]:
    """The files of a directory that are written anew (index, changed config), and those carried over with their sizes."""
    texts: dict[str, bytes] = {}
    if config is not None and config != checkpoint.config:
        texts[checkpoint.config_name] = render_json(config)
    index_name = _index_name(checkpoint, files)
    lone = _lone_file(checkpoint, index_name)
    if len(files) > 1 or (checkpoint.index_name is not None and files[0].name != lone):
        totals = {"total_size": sum(tensor.nbytes for file in files for tensor in file.tensors)}
        if "total_parameters" in checkpoint.index_metadata:
            totals["total_parameters"] = sum(tensor.parameters for file in files for tensor in file.tensors)
        index = {
            "metadata": checkpoint.index_metadata | totals,
            "weight_map": dict(sorted((tensor.name, file.name) for file in files for tensor in file.tensors)),
        }
        texts[index_name] = render_json(index)
    return texts, {name: size for name, size in checkpoint.carried.items() if name not in texts}


def _index_name(checkpoint: Checkpoint, files: Sequence[OutFile]) -> str:
    """The name that loaders look for: the source's own where it has one; a variant stands before the last ending."""
    if checkpoint.index_name is not None:
        return re.sub(r"^(.+)\.(safetensors|bin)\.index", _as_safetensors_index, checkpoint.index_name)
    stem = PurePosixPath(shard_stem(files[0].name)).name
    if checkpoint.variant is None:
        return f"{stem}.safetensors.index.json"
    return f"{stem.removesuffix(f'.{checkpoint.variant}')}.safetensors.index.{checkpoint.variant}.json"


def _as_safetensors_index(found: re.Match[str]) -> str:
    return f"{safetensors_name(f'{found[1]}.{found[2]}')}.index"


def _lone_file(checkpoint: Checkpoint, index: str) -> str:
    """The one weight file that loaders take where there is no index of this name."""
    if checkpoint.variant is None:
        return index.removesuffix(".index.json")
    stem = index.removesuffix(f".safetensors.index.{checkpoint.variant}.json")
    return f"{stem}.{checkpoint.variant}.safetensors"


def _base_metadata(checkpoint: Checkpoint, group: Sequence[Unit]) -> Metadata:
    own = checkpoint.metadata.get(group[0].file, {}) if group else {}
    kept = {key: value for key, value in own.items() if key != METADATA_KEY}
    return {"format": "pt"} | kept


Design = CompressDesign | ExpandDesign
