"""Is an output what its record says, and how far is it from its original."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from svdcli.errors import BadCheckpointError, SvdcliError
from svdcli.files.checkpoint import RECORD, Checkpoint, open_checkpoint, open_output, sha256_of
from svdcli.files.config import METHOD, method_for, method_of
from svdcli.files.formats import PICKLE_ENDINGS, format_of
from svdcli.files.record import (
    part_of_record,
    record_in,
    record_of,
    stored_layers,
    take_apart_again,
)
from svdcli.files.report import JSON_VERSION
from svdcli.plan.groups import spans_of
from svdcli.plan.layouts import LAYOUTS
from svdcli.plan.plan import LayerPlan, layer_from_json
from svdcli.progress import Progress, silent

BESIDE = "other files"
_STRANGE = "no other weights"
_CONFIG, _ADAPTER = "config.json", "adapter_config.json"
_CAME = "came after svdcli wrote the output"
_MISSHAPEN = "missing, or of another shape or dtype"
_NO_PERMUTATION = "svd_rows is no permutation"

# How far a recomputed relative error may be from the recorded one: other threads and machines sum
# in another order.
_OF_THE_ERROR, _ABSOLUTE = 1e-4, 1e-6

# Numbers in a config.json by which a model's layers are built, in the spellings of transformers.
_SIZES = frozenset(
    (
        *("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim"),
        *("intermediate_size", "moe_intermediate_size", "d_ff", "ffn_dim", "n_inner"),
        *("encoder_ffn_dim", "decoder_ffn_dim", "vocab_size"),
        *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"),
        *("encoder_layers", "decoder_layers"),
        *("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads"),
        *("encoder_attention_heads", "decoder_attention_heads", "head_dim", "d_kv"),
        *("num_experts", "num_local_experts", "n_routed_experts", "q_lora_rank", "kv_lora_rank"),
    )
)


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. detail says what was found."""

    check: str
    subject: str
    ok: bool
    detail: str = ""


@dataclass(frozen=True)
class Verification:
    """All checks of one output; against is the original, where one was given."""

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
    """Check that an output still holds what its record says; against its original, also the errors,
    the copies and the sizes in config.json.

    Weights, their index and what makes a loader open them must be as they were written. Other files
    that changed, came or went are checks that pass, named `BESIDE`, whose detail says so. Raises
    SvdcliError where `output` cannot be opened at all; everything else is a failed check.
    """
    with open_output(output) as checkpoint:
        record = record_of(checkpoint)
        if record is None or "recipe" not in record:
            raise SvdcliError(
                f"{checkpoint.shown} is not a whole output of svdcli compress", "name what it wrote"
            )

        # The files: that the headers are sound is known since they were opened
        checks = [
            Check("header", name, True, f"{size} bytes") for name, size in checkpoint.files.items()
        ]
        checks += _check_digests(checkpoint, record, progress)
        checks += _check_strangers(checkpoint, record)
        take_apart_again(checkpoint, record)

        # The tensors, unless there are weights among them that the record knows nothing of
        if all(check.ok for check in checks if check.check == _STRANGE):
            layers = stored_layers(checkpoint, record)
            checks += _check_plan(checkpoint, record, layers)
            if against is not None:
                with _open_original(against, record) as original:
                    checks += _check_against(checkpoint, record, layers, original, progress)
        shown = None if against is None else str(against)
        return Verification(checkpoint.shown, shown, tuple(checks))


def _open_original(against: str | Path, record: Mapping[str, Any]) -> Checkpoint:
    """The original; of a PyTorch file with several dicts of tensors the one that was compressed."""
    key = record["source"].get("state_dict")
    is_pickle = Path(against).is_file() and format_of(Path(against)).reader == "pickle"
    if not is_pickle:
        key = None
    original = open_checkpoint(against, state_dict=key)
    take_apart_again(original, record)
    return original


# Files --------------------------------------------------------------------------------------------


def _check_digests(
    checkpoint: Checkpoint, record: Mapping[str, Any], progress: Progress
) -> Iterator[Check]:
    """Compare every file that the record lists with its digest. Only weights, and what they open
    with, have to be there as they were written."""
    files = record.get("files") or {}
    for done, (name, entry) in enumerate(files.items(), 1):
        path = checkpoint.path / name
        state = ""
        if not path.is_file():
            state = "missing"
        elif sha256_of(path) != entry.get("sha256"):
            state = "changed since svdcli wrote it"
        lost = ""
        if state and name == _CONFIG:
            lost = _lost_by_config(checkpoint, record)
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
    """Name the files that the record does not list. It is a failure where a loader would open them
    with the output's weights, or in their place."""
    if not checkpoint.is_directory:
        return
    files = record.get("files") or {}
    for name in [*checkpoint.files, *checkpoint.carried, *checkpoint.left_out]:
        # A folder below is listed as one name; where the record has files of it, it is no stranger
        folder = f"{name.partition('/')[0]}/"
        told_as_one = name.startswith(folder) and any(listed.startswith(folder) for listed in files)
        if name in files or name == RECORD or told_as_one:
            continue
        if name in checkpoint.files:
            yield Check(_STRANGE, name, False, f"{_CAME}, and is what a loader opens")
        elif name == _ADAPTER:
            yield Check(_STRANGE, name, False, f"{_CAME}, and makes transformers add an adapter")
        else:
            yield Check(BESIDE, name, True, _CAME)


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
    layers = [layer_from_json(name, layer) for name, layer in record["layers"].items()]
    needed = method_for(layers)
    if needed == METHOD and method_of(config) != METHOD:
        return "no longer says that svdcli wrote the weights"
    if needed is not None and method_of(config) != needed:
        return f"no longer says that the weights are those of {needed}"
    return ""


# Tensors ------------------------------------------------------------------------------------------


def _check(name: str, subject: str, ok: bool, failure: str) -> Check:
    """A check whose detail says what is wrong, where something is."""
    detail = "" if ok else failure
    return Check(name, subject, ok, detail)


def _check_plan(
    checkpoint: Checkpoint, record: Mapping[str, Any], layers: Sequence[LayerPlan]
) -> Iterator[Check]:
    """Compare headers, dense tensors and the order of rows with the record."""
    from svdcli.engine.solve import has_row_order

    # What the header of each weight file says of the layers in it
    layer_of = {}
    for layer in layers:
        for tensor in layer.stored():
            layer_of[tensor.name] = layer.tensor.name
    for file, metadata in checkpoint.metadata.items():
        inside = [name for name, ref in checkpoint.tensors.items() if ref.file == file]
        names = {layer_of[name] for name in inside if name in layer_of}
        expected = record
        if checkpoint.is_directory:
            expected = part_of_record(record, names)
        same = _record_or_none(metadata, file) == json.loads(json.dumps(expected))
        detail = f"{len(names)} layers" if same else "differs"
        yield Check("header agrees with plan", file, same, detail)

    # Tensors that were copied; the shapes of factors were checked when the layers were read
    same_as = dict(record.get("same", {}))
    for name, entry in {**record["dense"], **record["skipped"]}.items():
        ref = checkpoint.tensors.get(same_as.get(name, name))
        planned = (entry.get("dtype"), entry.get("shape"))
        same = ref is not None and (ref.info.dtype, list(ref.info.shape)) == planned
        yield _check("tensor as planned", name, same, _MISSHAPEN)

    for layer in layers:
        if LAYOUTS[layer.layout].ends_in_rows:
            same = has_row_order(checkpoint, layer)
            yield _check("row order", layer.tensor.name, same, _NO_PERMUTATION)
        for span, numbers in zip(layer.spans(), spans_of(layer.members), strict=True):
            same = checkpoint.read_tensor(span.name).tolist() == list(numbers)
            yield _check("place in its group", span.name, same, "is not where the record has it")


def _record_or_none(metadata: Mapping[str, str], file: str) -> dict[str, Any] | None:
    try:
        return record_in(metadata, file)
    except BadCheckpointError:
        return None


# Against the original -----------------------------------------------------------------------------


def _check_against(
    checkpoint: Checkpoint,
    record: Mapping[str, Any],
    layers: Sequence[LayerPlan],
    original: Checkpoint,
    progress: Progress,
) -> Iterator[Check]:
    """Compare config.json and every tensor of the original with what became of it."""
    same = original.fingerprint() == record["source"]["fingerprint"]
    failure = "is not the model that this output was made from"
    yield _check("source", original.shown, same, failure)
    yield from _check_sizes(checkpoint, original)

    factored = {layer.tensor.name: layer for layer in layers}
    others = {member.name for layer in layers for member in layer.members[1:]}
    refitted = {bias.name: bias for layer in layers for bias in layer.biases}
    same_as = dict(record.get("same", {}))
    for done, (name, ref) in enumerate(original.tensors.items(), 1):
        stored = checkpoint.tensors.get(same_as.get(name, name))
        form = (ref.info.dtype, ref.info.shape)
        has_same_form = stored is not None and (stored.info.dtype, stored.info.shape) == form
        if name in refitted:
            # Calibration may change a bias, but not its shape or dtype
            same = has_same_form and ref.info == refitted[name]
            yield _check("bias refitted", name, same, _MISSHAPEN)
        elif name in factored:
            yield _check_error(checkpoint, record, factored[name], original)
        elif name not in others:  # which are checked with the first of their group
            kept = same_as.get(name, name)
            same = has_same_form and _same_bytes(checkpoint, kept, original, name)
            yield _check("bytes unchanged", name, same, "differs from the original")
        progress("check", name, done, len(original.tensors))


def _check_sizes(checkpoint: Checkpoint, original: Checkpoint) -> Iterator[Check]:
    """Failures alone: sizes in config.json that are not the original's, with which the weights do
    not fit the model that transformers builds.

    A size that only one of them has is no failure: transformers leaves out what is its default.
    """
    before = _sizes_in(original.config or {})
    for key, size in _sizes_in(checkpoint.config or {}).items():
        if before.get(key, size) != size:
            detail = f"{key} is {size}, and {before[key]} in the original"
            yield Check("config sizes", _CONFIG, False, detail)


def _sizes_in(config: Mapping[str, Any], prefix: str = "") -> dict[str, int]:
    """{dotted name: number} of the sizes in a config and in those inside it."""
    sizes: dict[str, int] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            sizes |= _sizes_in(value, f"{prefix}{key}.")
        elif key in _SIZES and isinstance(value, int):
            sizes[f"{prefix}{key}"] = value
    return sizes


def _check_error(
    checkpoint: Checkpoint, record: Mapping[str, Any], layer: LayerPlan, original: Checkpoint
) -> Check:
    """Measure the error of a factored layer, and compare it with the record's."""
    from svdcli.engine.solve import has_row_order, stored_error

    name = layer.tensor.name
    originals = [original.tensors.get(tensor.name) for tensor in layer.originals]
    if [ref and ref.info for ref in originals] != list(layer.originals):
        return Check("relative error", name, False, "the original has another shape or dtype")
    if not has_row_order(checkpoint, layer):
        return Check("relative error", name, False, _NO_PERMUTATION)
    error = stored_error(original, checkpoint, layer)
    recorded = float(record["layers"][name]["relative_error"])
    agrees = abs(error - recorded) <= _OF_THE_ERROR * recorded + _ABSOLUTE
    detail = f"{error:.6f}"
    if not agrees:
        detail += f", the record says {recorded:.6f}"
    return Check("relative error", name, agrees, detail)


def _same_bytes(checkpoint: Checkpoint, kept: str, original: Checkpoint, name: str) -> bool:
    """Read both tensors chunk by chunk, up to the first difference."""
    pairs = zip(checkpoint.chunks(kept), original.chunks(name), strict=True)
    return all(ours == theirs for ours, theirs in pairs)
