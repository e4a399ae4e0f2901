"""Is an output what its record says, and how far is it from its original."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdcli.errors import BadCheckpointError, SvdcliError
from svdcli.files.checkpoint import (
    METADATA_KEY,
    RECORD,
    Checkpoint,
    open_checkpoint,
    sha256_of,
)
from svdcli.files.formats import PICKLE_ENDINGS, format_of
from svdcli.files.record import part_of_record, record_in, record_of, stored_layers
from svdcli.files.report import JSON_VERSION
from svdcli.plan.layouts import LAYOUTS
from svdcli.plan.plan import LayerPlan
from svdcli.progress import Progress, silent

if TYPE_CHECKING:
    pass


# verify -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. detail says what was found."""

    check: str
    subject: str
    ok: bool
    detail: str = ""


@dataclass(frozen=True)
class Verification:
    path: str
    against: str | None
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        return {"svdcli_json": JSON_VERSION, "kind": "verification", "ok": self.ok} | asdict(self)


def verify(
    output: str | Path, against: str | Path | None = None, *, progress: Progress = silent
) -> Verification:
    """Does an output still hold what its record says; and, against its original, are the errors and
    the copies right.

    Weights, their index and what makes a loader open them must be as they were written. Other files
    that changed, came or went are checks that pass, of the kind `BESIDE`, whose detail says so.
    Raises SvdcliError where `output` cannot be opened at all; everything else is a failed check.
    """
    with open_checkpoint(output) as checkpoint:
        record = record_of(checkpoint)
        if record is None or "recipe" not in record:
            raise SvdcliError(
                f"{checkpoint.shown} is not a whole output of svdcli compress", "name what it wrote"
            )
        checks = [
            Check("header", name, True, f"{size} bytes") for name, size in checkpoint.files.items()
        ]
        checks += _check_digests(checkpoint, record, progress)
        checks += _check_strangers(checkpoint, record)
        if not all(check.ok for check in checks if check.check == _STRANGE):
            return Verification(
                checkpoint.shown, None if against is None else str(against), tuple(checks)
            )  # not ours to judge
        layers = stored_layers(checkpoint, record)
        checks += _check_plan(checkpoint, record, layers)
        if against is not None:
            with _open_original(against, record) as original:
                checks += _check_against(checkpoint, record, layers, original, progress)
        return Verification(
            checkpoint.shown, None if against is None else str(against), tuple(checks)
        )


def _open_original(against: str | Path, record: Mapping[str, Any]) -> Checkpoint:
    """The original; of a PyTorch file with several dicts of tensors the one that was compressed."""
    key = record["source"].get("state_dict")
    is_pickle = Path(against).is_file() and format_of(Path(against)).reader == "pickle"
    return open_checkpoint(against, state_dict=key if is_pickle else None)


BESIDE = "other files"


_STRANGE = "no other weights"


_CONFIG, _ADAPTER = "config.json", "adapter_config.json"


def _check_digests(
    checkpoint: Checkpoint, record: Mapping[str, Any], progress: Progress
) -> Iterator[Check]:
    """Is every file that the record lists there, as it was written; only weights, and what they
    open with, must be."""
    files = record.get("files") or {}
    for done, (name, item) in enumerate(files.items(), 1):
        path = checkpoint.path / name
        state = "" if path.is_file() else "missing"
        if not state and sha256_of(path) != item.get("sha256"):
            state = "changed since svdcli wrote it"
        lost = _lost_by_config(checkpoint, record) if state and name == _CONFIG else ""
        if not state:
            yield Check("sha256", name, True)
        elif _is_weights(name):
            yield Check("sha256", name, False, state)
        elif lost:
            yield Check("sha256", name, False, f"{state}: {lost}")
        else:
            yield Check(BESIDE, name, True, state)
        progress("check", name, done, len(files))


def _check_strangers(checkpoint: Checkpoint, record: Mapping[str, Any]) -> Iterator[Check]:
    """Files that the record does not list: weights that a loader opens with ours, or in their
    place, are no note."""
    if not checkpoint.is_directory:
        return
    files = record.get("files") or {}
    for name in [*checkpoint.files, *checkpoint.carried, *checkpoint.left_out]:
        folder = f"{name.partition('/')[0]}/"
        told_as_one = name.startswith(folder) and any(listed.startswith(folder) for listed in files)
        if name in files or name == RECORD or told_as_one:
            continue
        if name in checkpoint.files:
            yield Check(
                _STRANGE,
                name,
                False,
                "came after svdcli wrote the output, and is what a loader opens",
            )
        elif name == _ADAPTER:
            yield Check(
                _STRANGE,
                name,
                False,
                "came after svdcli wrote the output, and makes transformers add an adapter",
            )
        else:
            yield Check(BESIDE, name, True, "came after svdcli wrote the output")


def _is_weights(name: str) -> bool:
    if re.search(r"\.safetensors\.index(\.[^.]+)?\.json$", name):
        return True
    return name.endswith((".safetensors", *PICKLE_ENDINGS)) and not name.endswith(
        "training_args.bin"
    )


def _lost_by_config(checkpoint: Checkpoint, record: Mapping[str, Any]) -> str:
    """Why the weights do not open with a config.json that was changed or is gone; empty where they
    do."""
    config = checkpoint.config or {}
    named = config.get("transformers_weights")
    if named is not None and named not in record["files"]:
        return f"names other weights, {named}"
    quantised = config.get("quantization_config")
    method = quantised.get("quant_method") if isinstance(quantised, dict) else None
    layout = LAYOUTS.get(str(record["recipe"].get("layout")))
    needs_plugin = bool(record["layers"]) and (layout is None or layout.keeps_factors)
    if needs_plugin and method != METADATA_KEY:
        return "no longer says that svdcli wrote the weights"
    return ""


def _check_plan(
    checkpoint: Checkpoint, record: Mapping[str, Any], layers: Sequence[LayerPlan]
) -> Iterator[Check]:
    from svdcli.engine.solve import has_row_order

    stored = {tensor.name: layer for layer in layers for tensor in layer.stored()}
    for file, metadata in checkpoint.metadata.items():
        names = {
            stored[n].tensor.name
            for n, ref in checkpoint.tensors.items()
            if ref.file == file and n in stored
        }
        expected = part_of_record(record, names) if checkpoint.is_directory else record
        same = _record_or_none(metadata, file) == json.loads(json.dumps(expected))
        yield Check(
            "header agrees with plan", file, same, f"{len(names)} layers" if same else "differs"
        )
    for name, item in {**record["dense"], **record["skipped"]}.items():
        ref = checkpoint.tensors.get(name)
        same = ref is not None and (ref.info.dtype, list(ref.info.shape)) == (
            item.get("dtype"),
            item.get("shape"),
        )
        yield Check(
            "tensor as planned", name, same, "" if same else "missing, or of another shape or dtype"
        )
    for layer in layers:
        if LAYOUTS[layer.layout].ends_in_rows:
            same = has_row_order(checkpoint, layer)
            yield Check(
                "row order", layer.tensor.name, same, "" if same else "svd_rows is no permutation"
            )


def _record_or_none(metadata: Mapping[str, str], file: str) -> dict[str, Any] | None:
    try:
        return record_in(metadata, file)
    except BadCheckpointError:
        return None


def _check_against(
    checkpoint: Checkpoint,
    record: Mapping[str, Any],
    layers: Sequence[LayerPlan],
    original: Checkpoint,
    progress: Progress,
) -> Iterator[Check]:
    from svdcli.engine.solve import has_row_order, stored_error

    same = original.fingerprint() == record["source"]["fingerprint"]
    yield Check(
        "source",
        original.shown,
        same,
        "" if same else "is not the model that this output was made from",
    )
    factored = {layer.tensor.name: layer for layer in layers}
    refitted = {layer.bias.name: layer.bias for layer in layers if layer.bias is not None}
    for done, (name, ref) in enumerate(original.tensors.items(), 1):
        layer = factored.get(name)
        if name in refitted:
            there = checkpoint.tensors.get(name)
            same = there is not None and there.info == ref.info == refitted[name]
            yield Check(
                "bias refitted", name, same, "" if same else "missing, or of another shape or dtype"
            )
        elif layer is None:
            there = checkpoint.tensors.get(name)
            equal = (
                there is not None
                and there.info == ref.info
                and _same_bytes(checkpoint, original, name)
            )
            yield Check(
                "bytes unchanged", name, equal, "" if equal else "differs from the original"
            )
        elif ref.info != layer.tensor:
            yield Check("relative error", name, False, "the original has another shape or dtype")
        elif not has_row_order(checkpoint, layer):
            yield Check("relative error", name, False, "svd_rows is no permutation")
        else:
            error = stored_error(original, checkpoint, layer)
            noted = float(record["layers"][name]["relative_error"])
            agrees = abs(error - noted) <= 1e-4 * noted + 1e-6
            yield Check(
                "relative error",
                name,
                agrees,
                f"{error:.6f}" + ("" if agrees else f", the record says {noted:.6f}"),
            )
        progress("check", name, done, len(original.tensors))


def _same_bytes(one: Checkpoint, other: Checkpoint, name: str) -> bool:
    return all(a == b for a, b in zip(one.chunks(name), other.chunks(name), strict=True))
