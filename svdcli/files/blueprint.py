"""The layout of an output, fixed before any work: every file, every offset, every byte count."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any, Protocol, TypeVar

from svdcli.errors import SvdcliError
from svdcli.files.checkpoint import METADATA_KEY, RECORD, STANDALONE, Checkpoint
from svdcli.files.config import change, change_back, changes_of, render_like, without_note
from svdcli.files.header import header_size
from svdcli.files.record import (
    CONFIG_WAS,
    Result,
    condensed,
    is_inside,
    left_out_copies,
    make_record,
    part_of_record,
    render_json,
    render_metadata,
    render_record,
    shared_fields,
    source_json,
    stacks_of,
    usual_results,
    widest_results,
)
from svdcli.files.stacks import slices_of, stacks_by_matrix
from svdcli.files.writer import (
    OutFile,
    Unit,
    group_units,
    lay_out,
    safetensors_name,
    shard_stem,
    with_header,
)
from svdcli.plan.layouts import WHOLE
from svdcli.plan.packing import PLAIN
from svdcli.plan.parts import tripwires
from svdcli.plan.plan import LayerPlan, Plan
from svdcli.plan.tensors import TensorInfo

Metadata = dict[str, str]

# Spare bytes of a record, for layers on which a solver gives way to another: so many for one in so
# many layers, or a share of the weights.
_SPARE_FOR_A_LAYER = 256
_LAYERS_THAT_SHARE_IT = 64
_SHARE_OF_WEIGHTS = 2048


@dataclass(frozen=True)
class Blueprint:
    """files are the weight files; texts are written as they are; carried are copied from the
    source; record_bytes is the size of `svdcli.json`, 0 where there is none."""

    files: tuple[OutFile, ...]
    texts: Mapping[str, bytes]
    carried: Mapping[str, int]
    record_bytes: int

    @property
    def total(self) -> int:
        """Bytes of the whole output."""
        return sum(self.sizes().values())

    def sizes(self) -> dict[str, int]:
        """Bytes of every file of the output, by name."""
        sizes = {file.name: file.size for file in self.files}
        sizes |= {name: len(text) for name, text in self.texts.items()}
        sizes |= self.carried
        if self.record_bytes:
            sizes[RECORD] = self.record_bytes
        return sizes


@dataclass(frozen=True)
class CompanionFile:
    """A Python file that opens the model where svdcli is not installed, and what config.json says
    about it."""

    name: str
    text: bytes
    auto_map: Mapping[str, str]


_Same = TypeVar("_Same")


class Design(Protocol):
    """What publishing needs to know of an output: its files before any work, and what becomes of
    the results. units are what has to be done."""

    @property
    def checkpoint(self) -> Checkpoint: ...

    @property
    def units(self) -> Sequence[Unit]: ...

    def blueprint(self) -> Blueprint:
        """Every file with its size and its tensors' offsets."""

    def fits(self, results: Mapping[str, Result]) -> bool:
        """Is there room for these results."""

    def with_room(self: _Same) -> _Same:
        """The same files with room for any results."""

    def metadata(self, file: OutFile, results: Mapping[str, Result]) -> Metadata:
        """The final metadata of one weight file."""

    def record(
        self, results: Mapping[str, Result], files: Mapping[str, tuple[int, str]], reserved: int
    ) -> bytes:
        """The final `svdcli.json`, where the blueprint has room for one."""


class CompressDesign:
    """How a plan becomes files. One value draws the blueprint, and later fills in the results.

    Records get room for results without fall-backs, and for some with; `with_room` draws the same
    files with room for all. A size that was asked for must hold whatever happens, so there the
    widest results are counted from the start.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        out_name: str | None,
        model_code: CompanionFile | None = None,
        *,
        roomy: bool = False,
    ) -> None:
        """out_name is the name of a file output, None for a directory; model_code is what makes a
        directory self-contained; roomy gives records room for any results."""
        self.checkpoint = checkpoint
        self.plan = plan
        self.out_name = out_name
        self.model_code = model_code
        self.roomy = roomy or plan.recipe.target == "size"
        self.units = compress_units(checkpoint, plan)
        self._config, changed = self._changed_config()
        self._source = source_json(checkpoint, plan.fingerprint, changed)
        self._usual = usual_results(plan)
        self._widest = widest_results(plan)
        self._shared, self._blueprint = self._choose_form()

    @property
    def source_bytes(self) -> int:
        """What the output must stay below: the source's files, or its tensors where the bytes of
        one serve several, as pickles allow and safetensors files do not. Of quantised weights what
        they take on disk, and not the numbers that they are read as."""
        if self.checkpoint.quantised:
            return self.checkpoint.nbytes
        tensors = sum(info.nbytes for info in self.checkpoint.infos)
        return max(self.checkpoint.nbytes, tensors + sum(self.checkpoint.carried.values()))

    def with_room(self) -> CompressDesign:
        return CompressDesign(
            self.checkpoint, self.plan, self.out_name, self.model_code, roomy=True
        )

    def blueprint(self) -> Blueprint:
        return self._blueprint

    def _choose_form(self) -> tuple[dict[str, Any], Blueprint]:
        """(fields that a file's layers share and that are said once, the blueprint): only where
        that makes the output smaller than its source, which it is not with a record that has every
        layer's own fields."""
        full = self._draw({})
        if not self.plan.recipe.saves_bytes or full.total < self.source_bytes:
            return {}, full
        shared = shared_fields(self._record(self._usual))
        condensed_form = self._draw(shared)
        if condensed_form.total < self.source_bytes:
            return shared, condensed_form
        return {}, full

    def _draw(self, shared: Mapping[str, Any]) -> Blueprint:
        # Weight files, whose headers have spare bytes for the results that are still to come.
        usual = self._record(self._usual)
        widest = self._record(self._widest)
        groups = group_units(self.units, self.plan.recipe.max_shard_size)
        if self.out_name is not None:
            groups = {self.out_name: self.units}
        files = []
        for name, group in groups.items():
            file = lay_out(name, group, self._metadata(group, usual, shared))
            widest_header = header_size(file.tensors, self._metadata(group, widest, shared))
            reserved = self._with_spare(file.header_bytes, widest_header, [file])
            files.append(with_header(file, reserved))
        if self.out_name is not None:
            return Blueprint(tuple(files), {}, {}, 0)

        # In a directory, everything else too; the record lists all of it, so its size comes last.
        texts, carried = directory_texts(self.checkpoint, files, self._config)
        if self.model_code is not None:
            texts[self.model_code.name] = self.model_code.text
            carried.pop(self.model_code.name, None)
        blueprint = Blueprint(tuple(files), texts, carried, 0)
        sizes = blueprint.sizes()
        _check_names(sizes)
        return replace(blueprint, record_bytes=self._record_bytes(files, sizes, shared))

    def fits(self, results: Mapping[str, Result]) -> bool:
        """Is there room for the final results."""
        blueprint = self._blueprint
        for file in blueprint.files:
            if header_size(file.tensors, self.metadata(file, results)) > file.header_bytes:
                return False
        if not blueprint.record_bytes:
            return True
        return self._record_size(results, blueprint.sizes(), self._shared) <= blueprint.record_bytes

    def metadata(self, file: OutFile, results: Mapping[str, Result]) -> Metadata:
        """The final metadata of one weight file."""
        group = _units_of(file, self.units)
        return self._metadata(group, self._record(results), self._shared)

    def record(
        self, results: Mapping[str, Result], files: Mapping[str, tuple[int, str]], reserved: int
    ) -> bytes:
        """The final `svdcli.json`."""
        return render_record(condensed(self._record(results, files), self._shared), reserved)

    def _record_bytes(
        self, files: Sequence[OutFile], sizes: Mapping[str, int], shared: Mapping[str, Any]
    ) -> int:
        usual = self._record_size(self._usual, sizes, shared)
        widest = self._record_size(self._widest, sizes, shared)
        return self._with_spare(usual, widest, files)

    def _record_size(
        self, results: Mapping[str, Result], sizes: Mapping[str, int], shared: Mapping[str, Any]
    ) -> int:
        files = {name: (size, "") for name, size in sizes.items() if name != RECORD}
        return len(render_record(condensed(self._record(results, files), shared)))

    def _with_spare(self, usual: int, widest: int, files: Sequence[OutFile]) -> int:
        """Bytes to reserve for a record, between the usual one and the widest: all of it where
        weights are large, little where they are not."""
        if self.roomy:
            return widest
        layers = sum(unit.kind == "factor" for unit in self.units)
        weights = sum(file.size - file.header_bytes for file in files)
        spare = max(
            _SPARE_FOR_A_LAYER * (1 + layers // _LAYERS_THAT_SHARE_IT),
            weights // _SHARE_OF_WEIGHTS // 8 * 8,  # headers are multiples of 8 bytes
        )
        return min(widest, usual + spare)

    def _record(
        self, results: Mapping[str, Result], files: Mapping[str, tuple[int, str]] | None = None
    ) -> dict[str, Any]:
        return make_record(
            self.plan,
            self._source,
            self.checkpoint.left_out,
            self.checkpoint.left_out_bytes,
            results,
            files,
        )

    def _metadata(
        self, group: Sequence[Unit], record: Mapping[str, Any], shared: Mapping[str, Any]
    ) -> Metadata:
        """The metadata of one weight file: a lone one has the whole record, one of a directory the
        part about its own layers."""
        if self.out_name is None:
            record = part_of_record(record, {unit.name for unit in group})
        metadata = _base_metadata(self.checkpoint, group)
        metadata[METADATA_KEY] = render_metadata(condensed(record, shared))
        return metadata

    def _changed_config(self) -> tuple[dict[str, Any] | None, list[dict[str, Any]] | None]:
        """(the config.json of the output, a note of what it says in place of what); (None, None)
        where there is none."""
        config = self.checkpoint.config
        if config is None or self.out_name is not None:
            return None, None
        auto_map = None if self.model_code is None else self.model_code.auto_map
        changes = changes_of(
            config, self.plan, auto_map, transformers=self.checkpoint.transformers_opens_it
        )
        return change(config, changes)


class ExpandDesign:
    """How factored layers become ordinary ones again: the checkpoint as it was, with the low-rank
    weights."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        record: Mapping[str, Any],
        layers: Sequence[LayerPlan],
        out_name: str | None,
    ) -> None:
        """record is that of the output that is expanded, layers are those that it lists as
        factored; out_name is the name of a file output, None for a directory."""
        self.checkpoint = checkpoint
        self._record = record
        self.out_name = out_name
        stacks = stacks_of(record, checkpoint.shown)
        self.units = expand_units(checkpoint, layers, stacks)
        for info, source in left_out_copies(record, checkpoint.shown):
            file = checkpoint.tensors[source].file
            self.units.append(Unit(info.name, "again", (source,), (info,), file))

    def blueprint(self) -> Blueprint:
        groups = group_units(self.units, None)
        if self.out_name is not None:
            groups = {self.out_name: self.units}
        files = [
            lay_out(name, group, _base_metadata(self.checkpoint, group))
            for name, group in groups.items()
        ]
        if self.out_name is not None:
            return Blueprint(tuple(files), {}, {}, 0)
        texts, carried = directory_texts(self.checkpoint, files, self._config_of_before())
        if self._self_contained:
            carried.pop(STANDALONE, None)
        return Blueprint(tuple(files), texts, carried, 0)

    def fits(self, results: Mapping[str, Result]) -> bool:
        return True

    def with_room(self) -> ExpandDesign:
        return self

    def record(
        self, results: Mapping[str, Result], files: Mapping[str, tuple[int, str]], reserved: int
    ) -> bytes:
        raise AssertionError("an ordinary checkpoint has no record")

    @property
    def _self_contained(self) -> bool:
        recipe = self._record.get("recipe") or {}
        return bool(recipe.get("self_contained"))

    def _config_of_before(self) -> dict[str, Any] | None:
        """The config.json of the source. Outputs of early versions have no note of what was changed
        in it."""
        config = self.checkpoint.config
        source = self._record.get("source") or {}
        if config is None:
            return None
        if CONFIG_WAS in source:
            return change_back(config, source[CONFIG_WAS])
        return without_note(config, self_contained=self._self_contained)

    def metadata(self, file: OutFile, results: Mapping[str, Result]) -> Metadata:
        return _base_metadata(self.checkpoint, _units_of(file, self.units))


def _units_of(file: OutFile, units: Sequence[Unit]) -> list[Unit]:
    """The units whose tensors are in one weight file."""
    names = set(file.units)
    return [unit for unit in units if unit.name in names]


def _check_names(names: Iterable[str]) -> None:
    """Raises SvdcliError for a file that no reader of the record would take for one of the
    output."""
    for name in names:
        if not is_inside(name):
            raise SvdcliError(
                f"the file {name!r} cannot be carried over: its name is a path on other systems",
                "rename it",
            )


def compress_units(checkpoint: Checkpoint, plan: Plan) -> list[Unit]:
    """One unit a tensor of the source. Where experts that were taken apart stay ordinary matrices,
    they are written as the stack that they were, since no loader finds them in any other way.

    In a directory that transformers would open, one factored layer of every part also gets a
    zero-size tensor under its old name, the tripwire: a loader without svdcli then fails loudly
    instead of making weights up. The old name of an expert is that of the stack that it came in.
    """
    layers = {layer.tensor.name: layer for layer in plan.factored}
    with_others = {bias.name for layer in plan.factored for bias in layer.biases}
    with_others |= {member.name for layer in plan.factored for member in layer.members[1:]}
    warned: set[str] = set()
    if checkpoint.is_directory and checkpoint.transformers_opens_it and plan.recipe.keeps_factors:
        factored = [layer for layer in plan.factored if layer.layout != WHOLE]
        warned.update(tripwires(layer.tensor.module for layer in factored))

    whole = _whole_stacks(checkpoint, layers)
    again = {} if plan.recipe.keeps_factors else _stacks_again(checkpoint, layers)
    stack_of = stacks_by_matrix(ref.info for ref in checkpoint.stacks.values())
    units = []
    for name, ref in checkpoint.tensors.items():
        layer = layers.get(name)
        if name in whole:
            # a stack stands where its first matrix does
            stack = whole[name]
            if stack is not None:
                units.append(Unit(stack.name, "copy", (stack.name,), (stack,), ref.file))
            continue
        if name in with_others or name in plan.same:
            continue  # written with its layer, or with its group, or under another name
        if layer is None:
            units.append(Unit(name, "copy", (name,), (ref.info,), ref.file, again.get(name)))
            continue
        # Which layer has the tripwire may change when another one stays dense, so it is a unit of
        # its own.
        if layer.tensor.module in warned:
            old = stack_of.get(name, ref.info).name
            tripwire = TensorInfo(old, layer.stored_dtype, (0,))
            units.append(Unit(f"{name} of no size", "warn", (), (tripwire,), ref.file))
        reads = tuple(tensor.name for tensor in layer.originals)
        units.append(Unit(name, "factor", reads, layer.written(), ref.file, again.get(name)))
    return units


def _whole_stacks(
    checkpoint: Checkpoint, layers: Mapping[str, LayerPlan]
) -> dict[str, TensorInfo | None]:
    """The matrices of all stacks where none of them is factored: then stacks stay what they were.
    Each maps to None, but for the first of a stack, which maps to that.

    A loader that has one expert as a layer of its own has all of them so.
    """
    whole: dict[str, TensorInfo | None] = {}
    for ref in checkpoint.stacks.values():
        names = [matrix.name for matrix, _ in slices_of(ref.info)]
        whole |= dict.fromkeys(names) | {names[0]: ref.info}
    return whole if layers.keys().isdisjoint(whole) else {}


def _stacks_again(checkpoint: Checkpoint, layers: Mapping[str, LayerPlan]) -> dict[str, TensorInfo]:
    """{matrix of a stack: the stack that it is written into}, of stacks whose matrices are all
    written as such, in one dtype."""
    again: dict[str, TensorInfo] = {}
    for ref in checkpoint.stacks.values():
        matrices = [matrix for matrix, _ in slices_of(ref.info)]
        held = [layers[matrix.name] for matrix in matrices if matrix.name in layers]
        dtypes = {layer.stored_dtype for layer in held}
        if len(held) < len(matrices):
            dtypes.add(ref.info.dtype)
        if len(dtypes) == 1 and all(layer.packing == PLAIN for layer in held):
            stack = replace(ref.info, dtype=dtypes.pop())
            again |= dict.fromkeys((matrix.name for matrix in matrices), stack)
    return again


def in_one_dtype(checkpoint: Checkpoint, plan: Plan) -> Plan:
    """The plan with the experts of a stack in the dtype of the stack, where ordinary matrices are
    written and not all of its experts are in the dtype that was asked for."""
    if plan.recipe.keeps_factors or plan.recipe.dtype is None:
        return plan
    factored = {layer.tensor.name for layer in plan.factored}
    mixed: set[str] = set()
    for ref in checkpoint.stacks.values():
        names = {matrix.name for matrix, _ in slices_of(ref.info)}
        if not names <= factored:
            mixed |= names
    layers = []
    for layer in plan.layers:
        in_its_own = layer.tensor.name in mixed
        layers.append(replace(layer, stored_dtype=layer.tensor.dtype) if in_its_own else layer)
    return replace(plan, layers=tuple(layers))


def expand_units(
    checkpoint: Checkpoint, layers: Sequence[LayerPlan], stacks: Sequence[TensorInfo] = ()
) -> list[Unit]:
    """One unit a layer that was factored, one for each stack of experts that was taken apart, and
    one for each other tensor but tripwires."""
    layer_of: dict[str, LayerPlan] = {}
    for layer in layers:
        for tensor in (*layer.stored(), *layer.spans()):
            layer_of[tensor.name] = layer
    may_be_tripwires = {layer.tensor.name for layer in layers if layer.keeps_factors}
    may_be_tripwires |= {stack.name for stack in stacks}

    stack_of = stacks_by_matrix(stacks)
    units = []
    expanded: set[str] = set()
    for name, ref in checkpoint.tensors.items():
        owner = layer_of.get(name)
        stack = stack_of.get(name if owner is None else owner.tensor.name)
        if stack is not None:
            if stack.name not in expanded:  # it stands where the first part of its matrices does
                reads = tuple(matrix.name for matrix, _ in slices_of(stack))
                held = checkpoint.stacks.get(stack.name)
                kind = "copy" if held is not None and held.info == stack else "stack"
                units.append(Unit(stack.name, kind, reads, (stack,), ref.file))
            expanded.add(stack.name)
        elif owner is None:
            if not (name in may_be_tripwires and ref.info.parameters == 0):
                units.append(Unit(name, "copy", (name,), (ref.info,), ref.file))
        elif owner.tensor.name not in expanded:  # a layer stands where its first factor does
            expanded.add(owner.tensor.name)
            reads = tuple(tensor.name for tensor in owner.stored())
            units.append(Unit(owner.tensor.name, "expand", reads, owner.originals, ref.file))
    return units


def directory_texts(
    checkpoint: Checkpoint, files: Sequence[OutFile], config: dict[str, Any] | None
) -> tuple[dict[str, bytes], dict[str, int]]:
    """The files of a directory that are written anew (index, changed config), and those carried
    over with their sizes."""
    # config.json, written as the source's is.
    texts: dict[str, bytes] = {}
    if config is not None and (config != checkpoint.config or checkpoint.quantised):
        text = checkpoint.file_path(checkpoint.config_name).read_text(encoding="utf-8")
        texts[checkpoint.config_name] = render_like(text, config) or render_json(config)

    # An index where loaders need one: for several files, and for a lone one under another name than
    # they look for.
    index_name = _index_name(checkpoint, files)
    lone = _lone_file(checkpoint, index_name)
    if len(files) > 1 or (checkpoint.index_name is not None and files[0].name != lone):
        texts[index_name] = render_json(_index_of(files, checkpoint.index_metadata))

    carried = {name: size for name, size in checkpoint.carried.items() if name not in texts}
    return texts, carried


def _index_of(files: Sequence[OutFile], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The index of these files. metadata is that of the source's index, whose totals change."""
    places: list[tuple[str, str]] = []
    nbytes = parameters = 0
    for file in files:
        for tensor in file.tensors:
            places.append((tensor.name, file.name))
            nbytes += tensor.nbytes
            parameters += tensor.parameters
    totals = {"total_size": nbytes}
    if "total_parameters" in metadata:
        totals["total_parameters"] = parameters
    return {"metadata": {**metadata, **totals}, "weight_map": dict(sorted(places))}


def _index_name(checkpoint: Checkpoint, files: Sequence[OutFile]) -> str:
    """The name that loaders look for: the source's own where it has one; a variant stands before
    the last ending."""
    if checkpoint.index_name is not None:
        return re.sub(
            r"^(.+)\.(safetensors|bin)\.index", _as_safetensors_index, checkpoint.index_name
        )
    stem = PurePosixPath(shard_stem(files[0].name)).name
    if checkpoint.variant is None:
        return f"{stem}.safetensors.index.json"
    stem = stem.removesuffix(f".{checkpoint.variant}")
    return f"{stem}.safetensors.index.{checkpoint.variant}.json"


def _as_safetensors_index(match: re.Match[str]) -> str:
    """pytorch_model.bin.index -> model.safetensors.index"""
    return safetensors_name(f"{match[1]}.{match[2]}") + ".index"


def _lone_file(checkpoint: Checkpoint, index: str) -> str:
    """The one weight file that loaders take where there is no index of this name."""
    if checkpoint.variant is None:
        return index.removesuffix(".index.json")
    stem = index.removesuffix(f".safetensors.index.{checkpoint.variant}.json")
    return f"{stem}.{checkpoint.variant}.safetensors"


def _base_metadata(checkpoint: Checkpoint, group: Sequence[Unit]) -> Metadata:
    """The metadata that a weight file has from its source, without the record of another output."""
    metadata = {"format": "pt"}  # which transformers asks for
    if group:
        metadata |= checkpoint.metadata.get(group[0].file, {})
    metadata.pop(METADATA_KEY, None)
    return metadata
