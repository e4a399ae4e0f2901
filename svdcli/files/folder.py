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

# Never carried over, and not listed as left out.
_HIDDEN = frozenset({".git", ".cache", ".DS_Store", "__pycache__", ".ipynb_checkpoints"})
_INDEX = re.compile(
    r"^(?P<stem>.+)\.(?P<ending>safetensors|bin)\.index(\.(?P<variant>[^.]+))?\.json$"
)
_SHARD = re.compile(
    r"^(?P<stem>.+)-(?P<number>\d{5,})-of-(?P<count>\d{5,})\.(?P<ending>safetensors|bin)$"
)
_USUAL_STEMS = ("model", "pytorch_model")
_SINGLE = re.compile(
    r"^(?P<stem>model|pytorch_model|diffusion_pytorch_model)\.(?P<variant>(?!.*-of-\d)[^.]+)\.(safetensors|bin)$"
)
# Endings that downloads have until they are finished, behind the name that the file will get.
_UNFINISHED = re.compile(r"\.(incomplete|crdownload|aria2|part|partial|download|tmp)\d*$")
_HALF_A_FILE = re.compile(r"\.(safetensors|bin|pt|pth|ckpt|json|gguf|model|txt)(\.[0-9a-f]{8,})?$")
_HALF_BY_RSYNC = re.compile(r"^\..+\.(safetensors|bin|pt|pth|json)\.\w{6}$")
# Meta's own format: a part for each process, which only its own code joins.
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
# What training saves beside the weights: optimizers, schedulers, random numbers.
_STATES = re.compile(
    r"^((custom_checkpoint|training_state|grad_scaler|(\w+_)?optimizer|optim|scheduler|lr_scheduler|scaler|sampler|rng_state|random_states|dataloader)([_.\-\d][^/]*)?"
    r"\.(pt|pth|bin|pkl|safetensors|ckpt)|.*(optim_states|model_states)\.pt|.*\.distcp)$"
)
# Folders that training saves checkpoints in.
_NESTED = re.compile(
    r"^(tmp-)?(checkpoint|ckpt|global_step|step|epoch|iter|pytorch_model_fsdp|optimizer)[-_]?\d+$|^checkpoint-(final|best|last)$"
)
# Names that pickles of weights have.
_WEIGHT_NAMES = re.compile(
    r"^(model|pytorch_model|weights|consolidated|checkpoint|last|best|final|epoch|step)\b",
    re.IGNORECASE,
)
_PICKLED = re.compile(r"\.(bin|pt|pth|ckpt|pkl|th|tar|npz)$")
# A pickle of this share of the weights is weights too; a smaller one (speakers, filters) belongs to
# the model.
_LARGE_SHARE = 0.1
_WORTH_TELLING = 1_000_000  # a carried file of more bytes, and of that share, gets a note
_LARGEST_POINTER = 1024  # bytes that a Git LFS pointer takes at most
# Pickles that are no weights, and are carried.
_DOWNLOAD_AGAIN = "download it again; it continues"
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
    explicit = (config or {}).get("transformers_weights")  # overrides every usual name
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
    """What transformers opens where neither config nor caller names anything."""
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
    # Each variant, and the file or index that opens it. safetensors, which come last, win over
    # pickles, and a single file over an index.
    variants: dict[str, str] = {}
    for ending in (".bin", ".safetensors"):
        for name in names:
            match = _SINGLE.match(name) or _INDEX.match(name)
            if match is None or match["variant"] is None or ending not in name:
                continue
            has_single_file = variants.get(match["variant"], "").endswith(ending)
            if not (has_single_file and name.endswith(".json")):
                variants[match["variant"]] = name
    if not variants:
        return None

    # Nothing tells which of several is meant.
    if len(variants) > 1:
        raise BadCheckpointError(
            f"{folder} holds several variants: {', '.join(sorted(variants))}",
            "keep the one that is meant",
        )
    [(variant, name)] = variants.items()
    if name.endswith(".json"):
        return _indexed(folder, name, variant)
    return WeightSet((name,), variant=variant)


def _other_indexed_set(folder: Path, names: Sequence[str]) -> WeightSet | None:
    indexes = [name for name in names if _INDEX.match(name)]
    if len(indexes) > 1:
        raise BadCheckpointError(
            f"{folder} has several indexes: {', '.join(indexes)}", "keep the one that is meant"
        )
    return _indexed(folder, indexes[0], None) if indexes else None


def _indexed(folder: Path, index: str, variant: str | None) -> WeightSet:
    """The shards that an index names. Raises BadCheckpointError where one is missing or outside the
    folder."""
    places = _weight_map(folder / index)
    shards = sorted(set(places.values()))
    for shard in shards:
        outside = Path(shard).is_absolute() or ".." in Path(shard).parts
        if outside or "\\" in shard or "\0" in shard:
            raise BadCheckpointError(
                f"{folder / index} names {shard!r}, outside the directory",
                "do not trust this checkpoint",
            )
        try:
            exists = (folder / shard).is_file()
        except OSError:  # such as for a name that is too long
            exists = False
        if not exists:
            raise BadCheckpointError(
                f"{folder / index} names {shard!r}, which is missing", "download the missing shard"
            )
    return WeightSet(tuple(shards), index, variant, places)


def _weight_map(index: Path) -> dict[str, str]:
    """The file of every tensor, as an index says."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(map(_is_text, weight_map.values())):
        raise BadCheckpointError(
            f"{index} has no weight_map of file names", "write or download it again"
        )
    return {name: PurePosixPath(shard).as_posix() for name, shard in weight_map.items()}


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _shards_without_index(folder: Path, names: Sequence[str]) -> WeightSet | None:
    """Numbered shards whose index is not there: taken where all of them are."""
    # (ending, stem, count) of each set of shards, and its files by their numbers.
    groups: dict[tuple[str, str, int], dict[int, str]] = {}
    for name in names:
        match = _SHARD.match(name)
        if match is not None:
            key = (match["ending"], match["stem"], int(match["count"]))
            groups.setdefault(key, {})[int(match["number"])] = name
    if not groups:
        return None

    # The only complete set, or the only one under a usual name.
    complete = {key: shards for key, shards in groups.items() if len(shards) >= key[2]}
    usual = {key: shards for key, shards in complete.items() if key[1] in _USUAL_STEMS}
    for candidates in (usual, complete):
        if len(candidates) == 1:
            [shards] = candidates.values()
            return WeightSet(tuple(shards.values()))

    # Several, or none.
    if complete:
        shown = ", ".join(f"{stem}-*-of-{count:05d}.{ending}" for ending, stem, count in complete)
        raise BadCheckpointError(
            f"{folder} holds several sets of shards: {shown}", "keep the one that is meant"
        )
    raise _missing_shards(folder, groups)


def _missing_shards(
    folder: Path, groups: Mapping[tuple[str, str, int], Mapping[int, str]]
) -> BadCheckpointError:
    """The error of a folder whose sets of shards all have gaps: about the set with most of them."""
    (ending, stem, count), shards = max(groups.items(), key=lambda group: len(group[1]))
    first = 0 if 0 in shards else 1  # most writers count from 1
    missing = next(number for number in range(first, first + count) if number not in shards)
    return BadCheckpointError(
        f"{folder} has {len(shards)} of {count} shards: {stem}-{missing:05d}-of-{count:05d}."
        f"{ending} is missing, and so is their index",
        "download what is missing",
    )


def _loose_files(folder: Path, names: Sequence[str]) -> WeightSet | None:
    """Weight files under any name, safetensors before pickles; those of training and other
    frameworks aside."""
    candidates = [
        name
        for name in names
        if not _STATES.match(name)
        and not _OTHER_FRAMEWORKS.search(name)
        and name not in _OWN_PICKLES
    ]

    # Parts of one model that svdcli cannot join.
    parts = [name for name in candidates if _PARTS_OF_META.match(name)]
    pickles = [name for name in candidates if name.endswith(".pth")]
    if len(parts) > 1 and len(parts) == len(pickles):
        raise BadCheckpointError(
            f"{folder} is in Meta's own format, split by rank: {', '.join(parts[:3])}",
            "convert it to the Hugging Face format first",
        )

    # `consolidated` is a second copy of the weights, for another loader, unless nothing else is
    # there.
    usual = [name for name in candidates if not name.startswith("consolidated")]
    for group in (usual, candidates):
        for endings in ((".safetensors",), (".bin",), PICKLE_ENDINGS):
            weights = [name for name in group if name.endswith(endings)]
            readable = [name for name in weights if format_of(folder / name).reader]
            if readable:
                return WeightSet(tuple(readable))
            if weights:  # a page, a pointer: what it is will be said when it is opened
                return WeightSet(tuple(weights))
    return None


# What is no model ---------------------------------------------------------------------------------


def _check_finished(folder: Path, names: Sequence[str]) -> None:
    """Raises BadCheckpointError where a download was left half-finished."""
    unfinished = [name for name in names if _is_half_a_file(name)]
    download = folder / ".cache" / "huggingface" / "download"  # of `hf download --local-dir`
    if not unfinished and download.is_dir():
        incomplete = sorted(download.rglob("*.incomplete"))
        unfinished = [str(path.relative_to(folder)) for path in incomplete]
    if unfinished:
        raise BadCheckpointError(
            f"the download of {folder} is not finished: {unfinished[0]}",
            "finish it; or remove that file if it is a leftover",
        )


def _is_half_a_file(name: str) -> bool:
    if name.endswith((".crdownload", ".!qB")) or _HALF_BY_RSYNC.match(name):
        return True
    match = _UNFINISHED.search(name)
    if match is None:
        return False
    name_when_finished = name[: match.start()]
    return _HALF_A_FILE.search(name_when_finished) is not None


def _no_weights(folder: Path, names: Sequence[str]) -> BadCheckpointError:
    """Why nothing in this folder can be read, and what to give instead."""
    broken = _broken_link(folder)
    if broken is not None:
        return BadCheckpointError(f"{broken} is a link to nothing", _DOWNLOAD_AGAIN)

    # Folders of a known structure, whose weights lie deeper, or in pieces.
    parts = _parts(folder)
    if "model_index.json" in names and parts:
        return BadCheckpointError(
            f"{folder} is a diffusers pipeline", f"compress one part of it: {', '.join(parts)}"
        )
    in_cache = _no_weights_in_cache(folder)
    if in_cache is not None:
        return in_cache
    if _is_distributed(folder, names):
        return BadCheckpointError(
            f"{folder} is a distributed checkpoint", _join_hint(folder, names)
        )
    if any(_UNFINISHED.search(path.name) for path in folder.parent.parent.glob("blobs/*")):
        return BadCheckpointError(f"the download of {folder} is not finished", _DOWNLOAD_AGAIN)

    # Any other folder: weights below it, or those of another framework.
    if parts:
        return BadCheckpointError(
            f"{folder} holds no weights itself", f"give a folder inside it: {', '.join(parts[:5])}"
        )
    for name in [*names, *_files_one_below(folder)]:
        file_format = format_of(folder / name)
        if not file_format.reader and _OTHER_FRAMEWORKS.search(name):
            return BadCheckpointError(
                f"{folder} holds no weights but {name}, {file_format.name}", file_format.hint
            )
    return BadCheckpointError(
        f"{folder} holds no weights",
        "expected model.safetensors, an index with shards, or .bin files",
    )


def _broken_link(folder: Path) -> Path | None:
    """The first entry of the folder that links to nothing."""
    for entry in sorted(folder.iterdir()):
        if entry.is_symlink() and not entry.exists():
            return entry
    return None


def _no_weights_in_cache(folder: Path) -> BadCheckpointError | None:
    """What to give in place of the hub's cache or an entry of it; None for any other folder."""
    snapshots = _snapshots(folder)
    if snapshots:
        return BadCheckpointError(
            f"{folder} is an entry of the hub's cache", f"give a snapshot: {', '.join(snapshots)}"
        )
    entries = [child for child in _children(folder) if child.name.startswith("models--")]
    if entries:
        inside = _snapshots(entries[0]) or [str(entries[0])]
        return BadCheckpointError(
            f"{folder} is the hub's cache", f"give a model in it, such as {inside[0]}"
        )
    return None


def _files_one_below(folder: Path) -> list[str]:
    """Files of the folders in this one, by their names in it."""
    names = []
    for child in _children(folder):
        for path in sorted(child.iterdir()):
            if path.is_file():
                names.append(path.relative_to(folder).as_posix())
    return names


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
    revisions = [entry for entry in (folder / "snapshots").iterdir() if entry.is_dir()]
    try:
        main = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        main = ""
    revisions.sort()
    revisions.sort(key=lambda path: path.name != main)
    return [str(path) for path in revisions]


def _is_distributed(folder: Path, names: Sequence[str]) -> bool:
    """Are the weights split over the processes that wrote them: by PyTorch, DeepSpeed or
    Megatron."""
    if any(name.endswith((".distcp", "model_states.pt", "optim_states.pt")) for name in names):
        return True
    if "latest_checkpointed_iteration.txt" in names or "zero_to_fp32.py" in names:
        return True
    for child in folder.iterdir():
        if child.is_dir() and (child.name.startswith("mp_rank_") or any(child.glob("*.distcp"))):
            return True
    return False


def _join_hint(folder: Path, names: Sequence[str]) -> str:
    """How a distributed checkpoint is made one file."""
    if "zero_to_fp32.py" in names or any(name.endswith("_states.pt") for name in names):
        return "join it first with its own zero_to_fp32.py (DeepSpeed), and give what that writes"
    if "latest_checkpointed_iteration.txt" in names or (folder / "mp_rank_00").is_dir():
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
    globs = [f"{glob}*" if glob.endswith("/") else glob for glob in carry]  # a folder is all of it
    used: set[str] = set()

    # Each file is carried or left out; a glob of the person's overrides every reason.
    for name, nested in _walk(folder, config):
        if name in own:
            continue
        path = folder / name
        if not path.is_file():
            companions.leave_out(name, "not a regular file", 0)
            continue
        size = path.stat().st_size
        matching = [glob for glob in globs if fnmatch.fnmatchcase(name, glob)]
        used.update(matching)
        reason = ""
        if not matching:
            reason = nested or _reason_to_leave(path, name, size, weight_bytes)
        if reason:
            companions.leave_out(name, reason, size)
        else:
            companions.carried[name] = size
            companions.notes += _notes_on_carried(path, name, size, weight_bytes)

    # A glob that nothing matches is a mistake.
    unused = [glob for glob in globs if glob not in used]
    if unused:
        raise UsageError(
            f"--carry {unused[0]!r} matches no file of {folder}",
            "see `svdcli inspect` for what is left out",
        )
    _fold(companions)
    return companions


def _notes_on_carried(path: Path, name: str, size: int, weight_bytes: int) -> list[str]:
    """What a person should know of a file that goes along."""
    notes = []
    if size < _LARGEST_POINTER and path.read_bytes().startswith(b"version https://git-lfs"):
        notes.append(
            f"{name} is a Git LFS pointer, not the file it stands for; run `git lfs pull` in the "
            f"source"
        )
    is_large = size > _LARGE_SHARE * weight_bytes and size > _WORTH_TELLING
    if is_large and _is_weights(path):
        notes.append(f"{name} goes along as it is ({size} bytes)")
    return notes


def _walk(folder: Path, config: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    """Every file below the folder, with the reason where it lies in a checkpoint of its own."""
    # By the names of folders below this one, "" for itself: the reason for all in it, and the real
    # paths of those above it. A link to one of these would go round in circles.
    pipeline = _modules_of_a_pipeline(folder)
    reasons = {"": ""}
    above = {"": frozenset({os.path.realpath(folder)})}
    for path, children, names in os.walk(folder, followlinks=True):
        current = Path(path).relative_to(folder).as_posix().removeprefix(".")

        # Choose the folders to go on with. A nested checkpoint is all left out, whatever is in it.
        followed = []
        for child in sorted(children):
            real = os.path.realpath(Path(path) / child)
            if child in _HIDDEN or real in above[current]:
                continue
            followed.append(child)
            name = f"{current}/{child}".removeprefix("/")
            above[name] = above[current] | {real}
            reasons[name] = reasons[current]
            may_be_nested = not reasons[current] and name not in pipeline
            if may_be_nested and _is_nested_checkpoint(Path(path) / child, config):
                reasons[name] = "a checkpoint of its own"
        children[:] = followed  # os.walk goes on with what is left here, in this order

        for leaf in sorted(names):
            if leaf not in _HIDDEN:
                yield f"{current}/{leaf}".removeprefix("/"), reasons[current]


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

    # The same model, as far as its config says which one it is.
    try:
        nested = read_json(folder / "config.json")
    except (BadCheckpointError, OSError):
        return False
    outer = config or {}
    keys = [key for key in ("model_type", "architectures") if nested.get(key) is not None]
    return bool(keys) and all(nested[key] == outer.get(key) for key in keys)


def _reason_to_leave(path: Path, name: str, size: int, weight_bytes: int) -> str:
    """Why a file is not carried over, or an empty string."""
    leaf = path.name
    if _STATES.match(leaf):
        return "a state of training"
    if leaf in _OWN_PICKLES or leaf.startswith("adapter_model."):  # adapter_config.json asks for it
        return ""
    top, slash, _ = name.partition("/")
    in_other_folder = slash and top.lower() in _OTHER_FOLDERS
    if _OTHER_FRAMEWORKS.search(name) or (in_other_folder and _is_weights(path)):
        return "weights in another format, not compressed"
    if slash:
        return ""

    # At the top, other weights than those that are read stay behind.
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

    # A folder is named once for each reason, and only where none of it is carried.
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
