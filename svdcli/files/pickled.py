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

_NEEDS_CODE = re.compile(r"Unsupported (global|class)|Trying to |Can only (build|create|SETITEM)")
_UNKNOWN_GLOBAL = re.compile(r"Unsupported global: GLOBAL (\S+) was not")
_WANTS_A_DICT = re.compile(r"Can only SETITEMS? for .* but got <class '([^']+)'>")
_MOST_PLACEHOLDERS = 200
# What a training script saves beside the weights: its tensors are as large as theirs.
_NO_WEIGHTS = re.compile(r"optim|sched|exp_avg|momentum|scaler|callback|rng", re.IGNORECASE)
_DEEPEST = 12
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
            for other in inside:
                if other != key:
                    name = ".".join((*above, other))
                    self.left_out[name] = f"beside {key!r} in {self.path.name}"
            above, level = (*above, key), inside[key]

    def _take(self, tensors: Mapping[Any, Any]) -> None:
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
        if name in self._tensors:
            raise BadCheckpointError(f"{self.path} has two tensors called {name!r}", "rename one")
        if value.is_meta or value.layout != torch.strided or value.dtype not in DTYPE_NAMES:
            kind = f"{value.layout} {value.dtype}"
            raise BadCheckpointError(
                f"{self.path}: tensor {name!r} is {kind}, which safetensors cannot hold",
                "convert it first",
            )
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
        whole = self._tensors[name].detach().resolve_conj()
        return whole.clone(memory_format=torch.contiguous_format)


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
                said = " ".join(str(error).split())
                if _add_placeholder(placeholders, said):
                    continue
                if _NEEDS_CODE.search(said):
                    raise _needs_code(path) from error
                raise _no_pytorch_file(path, said) from error
            except (FileNotFoundError, PermissionError):
                raise
            except _DAMAGED as error:
                raise _no_pytorch_file(path, str(error)) from error


def _add_placeholder(placeholders: dict[str, type], said: str) -> bool:
    """Make one for the class that torch says it does not know, or one that fits better."""
    unknown, wants_dict = _UNKNOWN_GLOBAL.search(said), _WANTS_A_DICT.search(said)
    if len(placeholders) >= _MOST_PLACEHOLDERS:
        return False
    if unknown is not None:
        name = (
            unknown[1] if "." in unknown[1] else f"builtins.{unknown[1]}"
        )  # torch leaves that away
        if name not in placeholders:
            placeholders[name] = _class_called(name, _Placeholder)
            return True
    if wants_dict is not None and issubclass(
        placeholders.get(wants_dict[1], _PlainDict), _Placeholder
    ):
        placeholders[wants_dict[1]] = _class_called(wants_dict[1], _PlainDict)
        return True
    return False


def _class_called(full_name: str, base: type) -> type:
    """An inert class under another class's name, which is what torch's safe list goes by."""
    module, _, name = full_name.rpartition(".")
    return type(name, (base,), {"__module__": module, "__qualname__": name})


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


def _no_pytorch_file(path: Path, said: str) -> BadCheckpointError:
    """What the file is in place of one: text, a pickle of another kind, or what torch said of it,
    where that is words."""
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
    told = re.search("[a-z]{3}", said) and "weights_only" not in said
    detail = f" ({said[:80]})" if told else ""
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
    if asked is not None:
        return _asked_for(candidates, path, asked), ()
    ordered = sorted(candidates, key=lambda c: (c.nbytes, "ema" in c.shown.lower()), reverse=True)
    best = ordered[0]
    others = [c for c in ordered[1:] if c.nbytes >= _WORTH_TELLING * best.nbytes]
    if not others:
        return best, ()
    listed = ", ".join(f"{c.shown} ({c.nbytes} bytes)" for c in others[:4])
    more = f" and {len(others) - 4} more" if len(others) > 4 else ""
    note = (
        f"{path.name} holds several dicts of tensors: {best.shown} ({best.nbytes} bytes) was taken"
    )
    return best, (f"{note}, not {listed}{more}; --state-dict KEY decides",)


def _asked_for(candidates: list[_Candidate], path: Path, asked: str) -> _Candidate:
    """By its whole path of keys, or by its last key where only one has that."""
    whole = [c for c in candidates if ".".join(c.keys) == asked]
    last = [c for c in candidates if c.keys and c.keys[-1] == asked]
    matching = whole or last
    if len(matching) == 1:
        return matching[0]
    names = ", ".join(c.shown for c in candidates[:8])
    what = "several dicts" if matching else "no dict"
    raise UsageError(f"{path} holds {what} of tensors called {asked!r}", f"it holds {names}")


def _candidates(value: object, keys: tuple[str, ...], seen: set[int]) -> Iterator[_Candidate]:
    """Every dict that holds tensors itself, outside of what training keeps for itself."""
    if id(value) in seen or len(keys) > _DEEPEST:
        return
    seen.add(id(value))
    if isinstance(value, Mapping) and any(
        isinstance(item, torch.Tensor) for item in value.values()
    ):
        yield _Candidate(keys, value)
    for key, item in _inside(value).items():
        if not _NO_WEIGHTS.search(key):
            yield from _candidates(item, (*keys, key), seen)


def _inside(value: object) -> dict[str, object]:
    """What a dict, list or tuple holds, by key or place; nothing of anything else."""
    if isinstance(value, Mapping):
        return {str(key): item for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return {str(place): item for place, item in enumerate(value)}
    return {}
