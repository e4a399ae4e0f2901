"""PyTorch's own files (.bin, .pt, .pth, .ckpt, ...), read without running any code from them."""

from __future__ import annotations

import pickle
import re
import struct
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from svdcli.errors import BadCheckpointError, UsageError
from svdcli.files.dtypes import DTYPE_NAMES, bytes_of
from svdcli.plan.tensors import TensorInfo

# What torch says of a pickle that holds more than its safe list allows.
_NEEDS_CODE = re.compile(r"Unsupported (global|class)|Trying to |Can only (build|create|SETITEM)")
_UNKNOWN_GLOBAL = re.compile(r"Unsupported global: GLOBAL (\S+) was not")
_WANTS_A_DICT = re.compile(r"Can only SETITEMS? for .* but got <class '([^']+)'>")
_MOST_PLACEHOLDERS = 200  # each costs another try to load
# What a training script saves beside the weights: its tensors are as large as theirs.
_NO_WEIGHTS = re.compile(r"optim|sched|exp_avg|momentum|scaler|callback|rng", re.IGNORECASE)
_DEEPEST = 12  # levels of dicts in dicts that are looked through
# Dicts with less than this share of the chosen one's bytes are counters and buffers, not a choice.
_WORTH_TELLING = 0.01


class PickledFile:
    """The tensors of one `torch.save` file, memory-mapped where its format allows.

    state_dict is the path of keys under which they lie, "" at the top. tied maps each tensor to
    another one with the same storage, offset and shape. left_out names what is not taken; notes
    says where there was a choice. Raises BadCheckpointError where the file needs code to unpickle,
    or is not a state dict; UsageError where the asked-for key names none.
    """

    def __init__(self, path: Path, state_dict: str | None = None) -> None:
        self.path = path
        self.left_out: dict[str, str] = {}
        self.tied: dict[str, str] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        loaded, placeholders = _load(path)
        chosen, self.notes = _choose(loaded, path, state_dict, placeholders)
        self.state_dict = ".".join(chosen.keys)
        self._leave_out_the_rest(loaded, chosen.keys)
        self._take(chosen.tensors)

    def _leave_out_the_rest(self, loaded: object, keys: tuple[str, ...]) -> None:
        """Name what lies beside the chosen dict, on every level down to it."""
        above: tuple[str, ...] = ()
        level = loaded
        for key in keys:
            inside = _inside(level)
            for sibling in inside:
                if sibling != key:
                    name = ".".join((*above, sibling))
                    self.left_out[name] = f"beside {key!r} in {self.path.name}"
            above = (*above, key)
            level = inside[key]

    def _take(self, tensors: Mapping[Any, Any]) -> None:
        """Check and keep the tensors of the chosen dict, and tie those that share memory to the
        first of them."""
        seen: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
        for key, value in tensors.items():
            name = str(key)
            if not isinstance(value, torch.Tensor):
                if isinstance(value, _Placeholder):
                    raise _needs_code(self.path)
                self.left_out[name] = f"a {type(value).__name__} in {self.path.name}, not a tensor"
                continue
            self._check(name, value)
            place = (value.data_ptr(), tuple(value.shape), tuple(value.stride()))
            if value.numel() and place in seen:
                self.tied |= {name: seen[place], seen[place]: name}
            seen.setdefault(place, name)
            self._tensors[name] = value

    def _check(self, name: str, value: torch.Tensor) -> None:
        """Raises BadCheckpointError for a tensor that no safetensors file can hold."""
        if name in self._tensors:
            raise BadCheckpointError(f"{self.path} has two tensors called {name!r}", "rename one")
        if value.is_meta or value.layout != torch.strided or value.dtype not in DTYPE_NAMES:
            raise BadCheckpointError(
                f"{self.path}: tensor {name!r} is {value.layout} {value.dtype}, which safetensors "
                f"cannot hold",
                "convert it first",
            )
        # Views repeat few numbers many times: a small file may ask for any amount of memory.
        if value.nbytes > 16 * self.path.stat().st_size:
            raise BadCheckpointError(
                f"{self.path}: tensor {name!r} needs {value.nbytes} bytes, far more than its file",
                "clone it first",
            )

    @property
    def infos(self) -> list[TensorInfo]:
        return [
            TensorInfo(name, DTYPE_NAMES[t.dtype], tuple(t.shape))
            for name, t in self._tensors.items()
        ]

    def read_bytes(self, name: str) -> memoryview:
        return bytes_of(self._tensors[name])

    def read_tensor(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name].detach().resolve_conj()
        return tensor.clone(memory_format=torch.contiguous_format)


# Unpickling ---------------------------------------------------------------------------------------


class _Placeholder:
    """Stands where a pickle names a class or function of another library: takes everything, does
    nothing.

    So that tensors beside it (a Namespace of arguments, a NumPy scalar) can be had without that
    library.
    """

    def __new__(cls, *_: Any, **__: Any) -> _Placeholder:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        """Nothing is kept."""

    def __setstate__(self, _: Any) -> None:
        """Nothing is kept."""


class _PlainDict:
    """Stands for a dict of another library: what is unpickled is a plain one."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return {}


def _load(path: Path) -> tuple[object, bool]:
    """What the file holds, and whether placeholders had to stand in for classes of other
    libraries."""
    placeholders: dict[str, type] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while True:
            try:
                with torch.serialization.safe_globals(list(placeholders.values())):
                    return _load_safely(path), bool(placeholders)
            except pickle.UnpicklingError as error:
                message = " ".join(str(error).split())
                if _add_placeholder(placeholders, message):
                    continue
                if _NEEDS_CODE.search(message):
                    raise _needs_code(path) from error
                raise _no_pytorch_file(path, message) from error
            except (FileNotFoundError, PermissionError):
                raise
            except _DAMAGED as error:
                raise _no_pytorch_file(path, str(error)) from error


def _add_placeholder(placeholders: dict[str, type], message: str) -> bool:
    """Make one for the class that torch says it does not know, or one that fits better. False where
    that does not help."""
    if len(placeholders) >= _MOST_PLACEHOLDERS:
        return False

    # A class that has no placeholder yet.
    unknown = _UNKNOWN_GLOBAL.search(message)
    if unknown is not None:
        name = unknown[1]
        if "." not in name:
            name = f"builtins.{name}"  # torch leaves that away
        if name not in placeholders:
            placeholders[name] = _class_called(name, _Placeholder)
            return True

    # A class whose placeholder is asked to be a dict.
    wants_dict = _WANTS_A_DICT.search(message)
    if wants_dict is not None:
        name = wants_dict[1]
        if issubclass(placeholders.get(name, _PlainDict), _Placeholder):
            placeholders[name] = _class_called(name, _PlainDict)
            return True
    return False


def _class_called(full_name: str, base: type) -> type:
    """An inert class under another class's name, which is what torch's safe list goes by."""
    module, _, name = full_name.rpartition(".")
    return type(name, (base,), {"__module__": module, "__qualname__": name})


# What torch raises for files that are cut short, or are no pickles at all.
_DAMAGED = (
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    struct.error,
)


def _load_safely(path: Path) -> object:
    """What the file holds, mapped into memory where its format allows: only zip archives do."""
    if path.suffix == ".safetensors":  # torch goes by the name, and would take it for one
        with path.open("rb") as stream:
            return torch.load(stream, map_location="cpu", weights_only=True)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)


def _needs_code(path: Path) -> BadCheckpointError:
    return BadCheckpointError(
        f"{path} needs code to unpickle, which svdcli never runs",
        "where you trust it, load it with torch and write it with "
        "safetensors.torch.save_file(model.state_dict(), ...)",
    )


def _no_pytorch_file(path: Path, message: str) -> BadCheckpointError:
    """What the file is in place of one: text, a pickle of another kind, or torch's message, where
    that is words and no advice to load it unsafely."""
    with path.open("rb") as stream:
        first = stream.read(60)
    if first and all(32 <= byte < 127 or byte in b"\r\n\t" for byte in first):
        line = first.decode("ascii").splitlines()[0]
        return BadCheckpointError(
            f"{path} is a text file ({line[:50]!r})", "download the file itself"
        )
    if re.match(rb"\x80[\x02-\x05]", first):
        hint = "load it with what wrote it, and save a dict of tensors with torch.save"
        return BadCheckpointError(
            f"{path} is not a PyTorch file but a pickle of another kind", hint
        )
    is_useful = re.search("[a-z]{3}", message) and "weights_only" not in message
    detail = f" ({message[:80]})" if is_useful else ""
    return BadCheckpointError(f"{path} is not a PyTorch file{detail}", "download it again")


# Finding the state dict ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Candidate:
    """A dict of tensors, and the keys that lead to it."""

    keys: tuple[str, ...]
    tensors: Mapping[Any, Any]

    @property
    def shown(self) -> str:
        return ".".join(self.keys) or "the top level"

    @property
    def nbytes(self) -> int:
        tensors = [value for value in self.tensors.values() if isinstance(value, torch.Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _choose(
    loaded: object, path: Path, asked: str | None, placeholders: bool
) -> tuple[_Candidate, tuple[str, ...]]:
    """The dict of tensors that is meant, and a note where there were several.

    The largest wins; of two that are as large, the moving average (as their own loaders prefer).
    """
    candidates = list(_candidates(loaded, (), set()))
    if not candidates:
        if placeholders:
            raise _needs_code(path)
        raise BadCheckpointError(f"{path} holds no dict of tensors", "save model.state_dict()")

    # The one that was asked for, or the largest.
    if asked is not None:
        return _asked_for(candidates, path, asked), ()
    ordered = sorted(candidates, key=lambda c: (c.nbytes, "ema" in c.shown.lower()), reverse=True)
    best = ordered[0]

    # A person should know what else could have been meant.
    passed_over = [c for c in ordered[1:] if c.nbytes >= _WORTH_TELLING * best.nbytes]
    if not passed_over:
        return best, ()
    listed = ", ".join(f"{c.shown} ({c.nbytes} bytes)" for c in passed_over[:4])
    if len(passed_over) > 4:
        listed = f"{listed} and {len(passed_over) - 4} more"
    note = (
        f"{path.name} holds several dicts of tensors: {best.shown} ({best.nbytes} bytes) was "
        f"taken, not {listed}; --state-dict KEY decides"
    )
    return best, (note,)


def _asked_for(candidates: list[_Candidate], path: Path, asked: str) -> _Candidate:
    """By its whole path of keys, or by its last key where only one has that."""
    by_path = [c for c in candidates if ".".join(c.keys) == asked]
    by_last_key = [c for c in candidates if c.keys and c.keys[-1] == asked]
    matching = by_path or by_last_key
    if len(matching) == 1:
        return matching[0]
    names = ", ".join(c.shown for c in candidates[:8])
    what = "several dicts" if matching else "no dict"
    raise UsageError(f"{path} holds {what} of tensors called {asked!r}", f"it holds {names}")


def _candidates(value: object, keys: tuple[str, ...], seen: set[int]) -> Iterator[_Candidate]:
    """Every dict that holds tensors itself, outside of what training keeps for itself."""
    if id(value) in seen or len(keys) > _DEEPEST:  # pickles may hold themselves
        return
    seen.add(id(value))
    if isinstance(value, Mapping) and _holds_tensors(value):
        yield _Candidate(keys, value)
    for key, child in _inside(value).items():
        if not _NO_WEIGHTS.search(key):
            yield from _candidates(child, (*keys, key), seen)


def _holds_tensors(mapping: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, torch.Tensor) for value in mapping.values())


def _inside(value: object) -> dict[str, object]:
    """What a dict, list or tuple holds, by key or index; nothing of anything else."""
    if isinstance(value, Mapping):
        return {str(key): child for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return {str(index): child for index, child in enumerate(value)}
    return {}
