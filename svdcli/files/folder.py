"""How a folder is read: which weight files its loader opens, what goes along with them, and what
stays behind and why.

Stdlib only. The order of preference is that of transformers' `from_pretrained`: model.safetensors,
its index, pytorch_model.bin, its index; then the same with a variant, then what other libraries
write (diffusers, Mistral), then whatever weight files there are.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from svdcli.errors import BadCheckpointError, UsageError
from svdcli.files.formats import PICKLE_ENDINGS, format_of

# Never carried over and not worth a word.
_HIDDEN = frozenset({".git", ".cache", ".DS_Store", "__pycache__", ".ipynb_checkpoints"})
_INDEX = re.compile(
    r"^(?P<stem>.+)\.(?P<ending>safetensors|bin)\.index(\.(?P<variant>[^.]+))?\.json$"
)
_SHARD = re.compile(
    r"^(?P<stem>.+)-(?P<at>\d{5,})-of-(?P<count>\d{5,})\.(?P<ending>safetensors|bin)$"
)
_SINGLE = re.compile(
    r"^(?P<stem>model|pytorch_model|diffusion_pytorch_model)\.(?P<variant>(?!.*-of-\d)[^.]+)\.(safetensors|bin)$"
)
_UNFINISHED = re.compile(r"\.(incomplete|crdownload|aria2|part|partial|download|tmp)\d*$")
_HALF_A_FILE = re.compile(r"\.(safetensors|bin|pt|pth|ckpt|json|gguf|model|txt)(\.[0-9a-f]{8,})?$")
_HALF_BY_RSYNC = re.compile(r"^\..+\.(safetensors|bin|pt|pth|json)\.\w{6}$")
_PARTS_OF_META = re.compile(r"^consolidated\.\d+\.pth$")
# Names that carry the weights of other frameworks, whatever their spelling.
_OTHER_FRAMEWORKS = re.compile(
    r"\.(gguf|ggml|onnx|onnx[._]data(_\d+)?|tflite|mlmodel|llamafile|h5|keras|msgpack|ot|pte|engine|pb|imatrix|pdparams|nemo|rknn)$"
    r"|\.mnn(\.weight)?$"
    r"|\.(h5|msgpack)\.index\.json$|\.ckpt(-\d+)?\.(data-\d+-of-\d+|index|meta)$|(^|/)(ggml|openvino)[^/]*\.(bin|xml)$"
    r"|\.(mlpackage|mlmodelc)/|(^|/)variables/variables\.",
    re.IGNORECASE,
)
_OTHER_FOLDERS = frozenset(
    {
        "onnx",
        "openvino",
        "coreml",
        "tflite",
        "mlx",
        "metal",
        "gguf",
        "ggml",
        "original",
        "tensorrt",
        "flax",
        "tf",
    }
)
_STATES = re.compile(
    r"^((custom_checkpoint|training_state|grad_scaler|(\w+_)?optimizer|optim|scheduler|lr_scheduler|scaler|sampler|rng_state|random_states|dataloader)([_.\-\d][^/]*)?"
    r"\.(pt|pth|bin|pkl|safetensors|ckpt)|.*(optim_states|model_states)\.pt|.*\.distcp)$"
)
_NESTED = re.compile(
    r"^(tmp-)?(checkpoint|ckpt|global_step|step|epoch|iter|pytorch_model_fsdp|optimizer)[-_]?\d+$|^checkpoint-(final|best|last)$"
)
_WEIGHT_NAMES = re.compile(
    r"^(model|pytorch_model|weights|consolidated|checkpoint|last|best|final|epoch|step)\b",
    re.IGNORECASE,
)
_PICKLED = re.compile(r"\.(bin|pt|pth|ckpt|pkl|th|tar|npz)$")
# A pickle of this share of the weights is weights too; a smaller one (speakers, filters) belongs to
# the model.
_LARGE_SHARE = 0.1
_WORTH_TELLING = 1_000_000
_LARGEST_POINTER = 1024
_OWN_PICKLES = frozenset({"training_args.bin"})


@dataclass(frozen=True)
class WeightSet:
    """The weight files of a folder that are read, and the index that lists them, if any.

    variant is what `from_pretrained(variant=...)` must be told to open them. places maps a tensor
    to its file, as the index says.
    """

    files: tuple[str, ...]
    index: str | None = None
    variant: str | None = None
    places: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Companions:
    """The other files: carried ones with their bytes, left-out ones with reason and bytes."""

    carried: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    left_out_bytes: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def leave_out(self, name: str, reason: str, nbytes: int) -> None:
        self.left_out[name] = reason
        self.left_out_bytes[name] = nbytes


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises BadCheckpointError where it is not one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadCheckpointError(f"{path} is not JSON", "write or download it again") from error
    if not isinstance(data, dict):
        raise BadCheckpointError(f"{path} is not a JSON object", "write or download it again")
    return data


# Which weights ------------------------------------------------------------------------------------


def choose_weights(folder: Path, config: Mapping[str, Any] | None) -> WeightSet:
    """The weight files that a loader of this folder opens.

    Raises BadCheckpointError where there are none, where shards are missing, where a download is
    not finished, or where several sets have the same claim.
    """
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    _check_finished(folder, names)
    if "model_index.json" in names and _parts(folder):
        raise _no_weights(folder, names)
    explicit = (config or {}).get("transformers_weights")
    if isinstance(explicit, str) and explicit in names:
        return _named_set(folder, explicit)
    for choose in (
        _plain_set,
        _variant_set,
        _other_indexed_set,
        _shards_without_index,
        _loose_files,
    ):
        chosen = choose(folder, names)
        if chosen is not None:
            return chosen
    raise _no_weights(folder, names)


def _named_set(folder: Path, name: str) -> WeightSet:
    match = _INDEX.match(name)
    return WeightSet((name,)) if match is None else _indexed(folder, name, match["variant"])


def _plain_set(folder: Path, names: Sequence[str]) -> WeightSet | None:
    """What transformers opens when it is told nothing."""
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
        ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"),
        ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.bin.index.json"),
    ):
        if single in names:
            return WeightSet((single,))
        if index in names:
            return _indexed(folder, index, None)
    return None


def _variant_set(folder: Path, names: Sequence[str]) -> WeightSet | None:
    """The same under a variant's name, where there is only one variant."""
    sets: dict[str, str] = {}
    for ending in (".bin", ".safetensors"):  # the later one wins
        for name in names:
            match = _SINGLE.match(name) or _INDEX.match(name)
            if match is None or match["variant"] is None or ending not in name:
                continue
            earlier = sets.get(match["variant"], "")
            if not (
                earlier.endswith(ending) and name.endswith(".json")
            ):  # a single file comes first
                sets[match["variant"]] = name
    if len(sets) > 1:
        raise BadCheckpointError(
            f"{folder} holds several variants: {', '.join(sorted(sets))}",
            "keep the one that is meant",
        )
    for variant, name in sets.items():
        return (
            WeightSet((name,), variant=variant)
            if not name.endswith(".json")
            else _indexed(folder, name, variant)
        )
    return None


def _other_indexed_set(folder: Path, names: Sequence[str]) -> WeightSet | None:
    indexes = [name for name in names if _INDEX.match(name)]
    if len(indexes) > 1:
        raise BadCheckpointError(
            f"{folder} has several indexes: {', '.join(indexes)}", "keep the one that is meant"
        )
    return _indexed(folder, indexes[0], None) if indexes else None


def _indexed(folder: Path, index: str, variant: str | None) -> WeightSet:
    places = _weight_map(folder / index)
    shards = sorted(set(places.values()))
    for shard in shards:
        if Path(shard).is_absolute() or ".." in Path(shard).parts or "\\" in shard or "\0" in shard:
            raise BadCheckpointError(
                f"{folder / index} names {shard!r}, outside the directory",
                "do not trust this checkpoint",
            )
        try:
            there = (folder / shard).is_file()
        except OSError:
            there = False
        if not there:
            raise BadCheckpointError(
                f"{folder / index} names {shard!r}, which is missing", "download the missing shard"
            )
    return WeightSet(tuple(shards), index, variant, places)


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) for shard in weight_map.values()
    ):
        raise BadCheckpointError(
            f"{index} has no weight_map of file names", "write or download it again"
        )
    return {name: PurePosixPath(shard).as_posix() for name, shard in weight_map.items()}


def _shards_without_index(folder: Path, names: Sequence[str]) -> WeightSet | None:
    """Numbered shards whose index is not there: taken where all of them are."""
    groups: dict[tuple[str, str, int], dict[int, str]] = {}
    for name in names:
        match = _SHARD.match(name)
        if match is not None:
            key = (match["ending"], match["stem"], int(match["count"]))
            groups.setdefault(key, {})[int(match["at"])] = name
    if not groups:
        return None
    whole = {key: shards for key, shards in groups.items() if len(shards) >= key[2]}
    usual = {key: shards for key, shards in whole.items() if key[1] in ("model", "pytorch_model")}
    for candidates in (usual, whole):
        if len(candidates) == 1:
            return WeightSet(tuple(next(iter(candidates.values())).values()))
    if whole:
        shown = ", ".join(f"{stem}-*-of-{count:05d}.{ending}" for ending, stem, count in whole)
        raise BadCheckpointError(
            f"{folder} holds several sets of shards: {shown}", "keep the one that is meant"
        )
    raise _missing_shards(folder, groups)


def _missing_shards(
    folder: Path, groups: Mapping[tuple[str, str, int], Mapping[int, str]]
) -> BadCheckpointError:
    (ending, stem, count), shards = max(groups.items(), key=lambda group: len(group[1]))
    first = 0 if 0 in shards else 1
    missing = [
        f"{stem}-{at:05d}-of-{count:05d}.{ending}"
        for at in range(first, first + count)
        if at not in shards
    ]
    return BadCheckpointError(
        f"{folder} has {len(shards)} of {count} shards: {missing[0]} is missing, and so is "
        f"their index",
        "download what is missing",
    )


def _loose_files(folder: Path, names: Sequence[str]) -> WeightSet | None:
    """Weight files under any name, safetensors before pickles; those of training and other
    frameworks aside."""
    own = [name for name in names if not _STATES.match(name) and not _OTHER_FRAMEWORKS.search(name)]
    own = [name for name in own if name not in _OWN_PICKLES]
    usual = [name for name in own if not name.startswith("consolidated")]
    ranks = [name for name in own if _PARTS_OF_META.match(name)]
    if len(ranks) > 1 and len(ranks) == len([name for name in own if name.endswith(".pth")]):
        raise BadCheckpointError(
            f"{folder} is in Meta's own format, split by rank: {', '.join(ranks[:3])}",
            "convert it to the Hugging Face format first",
        )
    for candidates in (usual, own):
        for endings in ((".safetensors",), (".bin",), PICKLE_ENDINGS):
            found = [name for name in candidates if name.endswith(endings)]
            readable = [name for name in found if format_of(folder / name).reader]
            if readable:
                return WeightSet(tuple(readable))
            if found:  # a page, a pointer: what it is will be said when it is opened
                return WeightSet(tuple(found))
    return None


# What is no model ---------------------------------------------------------------------------------


def _check_finished(folder: Path, names: Sequence[str]) -> None:
    """Raises BadCheckpointError where a download was left half-finished."""
    halves = [name for name in names if _is_half_a_file(name)]
    download = folder / ".cache" / "huggingface" / "download"
    if not halves and download.is_dir():
        halves = [str(path.relative_to(folder)) for path in sorted(download.rglob("*.incomplete"))]
    if halves:
        raise BadCheckpointError(
            f"the download of {folder} is not finished: {halves[0]}",
            "finish it; or remove that file if it is a leftover",
        )


def _is_half_a_file(name: str) -> bool:
    if name.endswith((".crdownload", ".!qB")) or _HALF_BY_RSYNC.match(name):
        return True
    match = _UNFINISHED.search(name)
    return match is not None and _HALF_A_FILE.search(name[: match.start()]) is not None


def _no_weights(folder: Path, names: Sequence[str]) -> BadCheckpointError:
    """Why nothing in this folder can be read, and what to give instead."""
    broken = [
        entry.name
        for entry in sorted(folder.iterdir())
        if entry.is_symlink() and not entry.exists()
    ]
    if broken:
        return BadCheckpointError(
            f"{folder / broken[0]} is a link to nothing", "download it again; it continues"
        )
    children, parts = _children(folder), _parts(folder)
    if "model_index.json" in names and parts:
        return BadCheckpointError(
            f"{folder} is a diffusers pipeline", f"compress one part of it: {', '.join(parts)}"
        )
    snapshots = _snapshots(folder)
    if snapshots:
        return BadCheckpointError(
            f"{folder} is an entry of the hub's cache", f"give a snapshot: {', '.join(snapshots)}"
        )
    entries = [child for child in children if child.name.startswith("models--")]
    if entries:
        inside = _snapshots(entries[0]) or [str(entries[0])]
        return BadCheckpointError(
            f"{folder} is the hub's cache", f"give a model in it, such as {inside[0]}"
        )
    if _is_distributed(folder, names):
        return BadCheckpointError(
            f"{folder} is a distributed checkpoint", _join_hint(folder, names)
        )
    if any(_UNFINISHED.search(path.name) for path in folder.parent.parent.glob("blobs/*")):
        return BadCheckpointError(
            f"the download of {folder} is not finished", "download it again; it continues"
        )
    if parts:
        return BadCheckpointError(
            f"{folder} holds no weights itself", f"give a folder inside it: {', '.join(parts[:5])}"
        )
    deeper = [
        path.relative_to(folder).as_posix()
        for child in children
        for path in sorted(child.iterdir())
        if path.is_file()
    ]
    for name in [*names, *deeper]:
        told = format_of(folder / name)
        if not told.reader and _OTHER_FRAMEWORKS.search(name):
            return BadCheckpointError(
                f"{folder} holds no weights but {name}, {told.name}", told.hint
            )
    return BadCheckpointError(
        f"{folder} holds no weights",
        "expected model.safetensors, an index with shards, or .bin files",
    )


def _children(folder: Path) -> list[Path]:
    return sorted(
        entry for entry in folder.iterdir() if entry.is_dir() and entry.name not in _HIDDEN
    )


def _parts(folder: Path) -> list[str]:
    """Folders inside it that hold weights."""
    return [str(child) for child in _children(folder) if _holds_weights(child)]


def _holds_weights(folder: Path) -> bool:
    names = [entry.name for entry in folder.iterdir()]
    return any(_INDEX.match(name) or name.endswith((".safetensors", ".bin")) for name in names)


def _snapshots(folder: Path) -> list[str]:
    """The revisions of a hub cache's entry, the one that `main` names first."""
    if not (folder / "snapshots").is_dir():
        return []
    revisions = sorted(entry for entry in (folder / "snapshots").iterdir() if entry.is_dir())
    try:
        main = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        main = ""
    return [str(path) for path in sorted(revisions, key=lambda path: path.name != main)]


def _is_distributed(folder: Path, names: Sequence[str]) -> bool:
    if any(name.endswith((".distcp", "model_states.pt", "optim_states.pt")) for name in names):
        return True
    if "latest_checkpointed_iteration.txt" in names or "zero_to_fp32.py" in names:
        return True
    children = [entry for entry in folder.iterdir() if entry.is_dir()]
    return any(child.name.startswith("mp_rank_") for child in children) or any(
        next(child.glob("*.distcp"), None) is not None for child in children
    )


def _join_hint(folder: Path, names: Sequence[str]) -> str:
    """How each kind is made one file."""
    if "zero_to_fp32.py" in names or any(name.endswith("_states.pt") for name in names):
        return "join it first with its own zero_to_fp32.py (DeepSpeed), and give what that writes"
    if "latest_checkpointed_iteration.txt" in names or any(
        (folder / n).is_dir() for n in ("mp_rank_00",)
    ):
        return (
            "convert it to the Hugging Face format with Megatron's own tools, and give "
            "what they write"
        )
    inside = next((path.parent for path in sorted(folder.glob("*/*.distcp"))), folder)
    return (
        f"join it first: python -m torch.distributed.checkpoint.format_utils "
        f"dcp_to_torch {inside} model.pt"
    )


def shard_note(name: str) -> str:
    """A note for one numbered shard that was given by itself; an empty string for any other
    file."""
    match = _SHARD.match(name)
    if match is None:
        return ""
    return f"{name} is one of {int(match['count'])} shards; give its folder for the whole model"


def in_hub_cache(path: Path) -> Path | None:
    """The cache entry (`models--ORG--NAME`) that a path lies in, as it is spelled; None outside of
    caches."""
    for folder in (path.absolute(), *path.absolute().parents):
        inside = folder.name.startswith(("models--", "datasets--", "spaces--"))
        if inside and ((folder / "snapshots").is_dir() or (folder / "blobs").is_dir()):
            return folder
    return None


# What goes along ----------------------------------------------------------------------------------


def list_companions(
    folder: Path,
    weights: WeightSet,
    own: set[str],
    config: Mapping[str, Any] | None,
    carry: Sequence[str] = (),
) -> Companions:
    """Sort every other file of the folder: carried over, or left out with a reason.

    own names files that are written anew. carry holds globs of files to take along all the same.
    Linked folders are followed. Raises UsageError for a glob that matches nothing.
    """
    companions = Companions()
    weight_bytes = sum((folder / name).stat().st_size for name in weights.files)
    globs = [f"{pattern}*" if pattern.endswith("/") else pattern for pattern in carry]
    used: set[str] = set()
    for name, nested in _walk(folder, config):
        if name in own:
            continue
        path = folder / name
        if not path.is_file():
            companions.leave_out(name, "not a regular file", 0)
            continue
        size = path.stat().st_size
        asked = [pattern for pattern in globs if fnmatch.fnmatchcase(name, pattern)]
        used.update(asked)
        reason = "" if asked else nested or _reason_to_leave(path, name, size, weight_bytes)
        if reason:
            companions.leave_out(name, reason, size)
            continue
        companions.carried[name] = size
        if size < _LARGEST_POINTER and path.read_bytes().startswith(b"version https://git-lfs"):
            companions.notes.append(
                f"{name} is a Git LFS pointer, not the file it stands for; run `git lfs pull` in "
                f"the source"
            )
        if size > _LARGE_SHARE * weight_bytes and size > _WORTH_TELLING and _is_weights(path):
            companions.notes.append(f"{name} goes along as it is ({size} bytes)")
    unused = [pattern for pattern in globs if pattern not in used]
    if unused:
        raise UsageError(
            f"--carry {unused[0]!r} matches no file of {folder}",
            "see `svdcli inspect` for what is left out",
        )
    _fold(companions)
    return companions


def _walk(folder: Path, config: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    """Every file below the folder, with the reason where it lies in a checkpoint of its own."""
    pipeline = _modules_of_a_pipeline(folder)
    reasons = {"": ""}
    above = {
        "": frozenset({os.path.realpath(folder)})
    }  # a link to a folder that leads to it goes round in circles
    for place, folders, names in os.walk(folder, followlinks=True):
        here = Path(place).relative_to(folder).as_posix().removeprefix(".")
        kept = []
        for child in sorted(folders):
            real = os.path.realpath(Path(place) / child)
            if child in _HIDDEN or real in above[here]:
                continue
            kept.append(child)
            below = f"{here}/{child}".removeprefix("/")
            above[below] = above[here] | {real}
            reasons[below] = reasons[here]
            if (
                not reasons[here]
                and below not in pipeline
                and _is_nested_checkpoint(Path(place) / child, config)
            ):
                reasons[below] = "a checkpoint of its own"
        folders[:] = kept
        for name in sorted(names):
            if name not in _HIDDEN:
                yield f"{here}/{name}".removeprefix("/"), reasons[here]


def _modules_of_a_pipeline(folder: Path) -> set[str]:
    """Folders that sentence-transformers lists as modules of the model."""
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        return {str(module["path"]) for module in modules}
    except (OSError, ValueError, TypeError, KeyError):
        return set()


def _is_nested_checkpoint(folder: Path, config: Mapping[str, Any] | None) -> bool:
    """An older save of the same model, or a state of its training."""
    if _NESTED.match(folder.name):
        return True
    names = [entry.name for entry in folder.iterdir() if entry.is_file()]
    if any(_STATES.match(name) for name in names):
        return True
    if "config.json" not in names or not _holds_weights(folder):
        return False
    try:
        theirs = read_json(folder / "config.json")
    except (BadCheckpointError, OSError):
        return False
    mine = config or {}
    said = [key for key in ("model_type", "architectures") if theirs.get(key) is not None]
    return bool(said) and all(theirs[key] == mine.get(key) for key in said)


def _reason_to_leave(path: Path, name: str, size: int, weight_bytes: int) -> str:
    """Why a file is not carried over, or an empty string."""
    leaf, top = path.name, name.partition("/")[0]
    if _STATES.match(leaf):
        return "a state of training"
    if leaf in _OWN_PICKLES or leaf.startswith(
        "adapter_model."
    ):  # which adapter_config.json asks for
        return ""
    if _OTHER_FRAMEWORKS.search(name) or (
        "/" in name and top.lower() in _OTHER_FOLDERS and _is_weights(path)
    ):
        return "weights in another format, not compressed"
    if "/" in name:
        return ""
    if leaf.endswith(".safetensors") or _SHARD.match(leaf) or _INDEX.match(leaf):
        return "not among the weights that a loader of this folder opens"
    if _PICKLED.search(leaf) and (_WEIGHT_NAMES.match(leaf) or size > _LARGE_SHARE * weight_bytes):
        return "other weights, not among those that a loader of this folder opens"
    return ""


def _is_weights(path: Path) -> bool:
    return path.suffix not in (".json", ".txt", ".md", ".py", ".model", ".yaml", ".yml")


def _fold(companions: Companions) -> None:
    """Many left-out files of one folder, for one reason, are named as the folder."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, reason in companions.left_out.items():
        if "/" in name:
            groups.setdefault((name.partition("/")[0], reason), []).append(name)
    for (top, reason), names in groups.items():
        if len(names) < 2 or any(name.startswith(f"{top}/") for name in companions.carried):
            continue
        nbytes = sum(companions.left_out_bytes.pop(name) for name in names)
        for name in names:
            del companions.left_out[name]
        key = f"{top}/"
        if key in companions.left_out:
            key = f"{top}/ ({reason})"
        companions.leave_out(key, f"{reason} ({len(names)} files)", nbytes)
