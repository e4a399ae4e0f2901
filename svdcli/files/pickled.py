"""PyTorch's own files (.bin, .pt, .pth), read without running any code from them."""

from __future__ import annotations

import pickle
import re
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from svdcli.errors import BadCheckpointError
from svdcli.files.bytes_of import DTYPE_NAMES, bytes_of
from svdcli.plan.tensors import TensorInfo

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")


class PickledFile:
    """The tensors of one `torch.save` file, memory-mapped where its format allows.

    tied maps each tensor to another one with the same storage, offset and shape. left_out names what is no tensor.
    Raises BadCheckpointError where the file needs code to unpickle, or is not a state dict.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.left_out: dict[str, str] = {}
        self.tied: dict[str, str] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        seen: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
        for name, value in _state_dict(_load(path), path, self.left_out).items():
            if not isinstance(value, torch.Tensor):
                self.left_out[str(name)] = f"a {type(value).__name__} in {path.name}, not a tensor"
                continue
            if str(name) in self._tensors:
                raise BadCheckpointError(f"{path} has two tensors called {str(name)!r}", "rename one of them")
            if value.is_meta or value.layout != torch.strided or value.dtype not in DTYPE_NAMES:
                raise BadCheckpointError(
                    f"{path}: tensor {name!r} is {value.layout} {value.dtype}, which safetensors cannot hold", "convert it first"
                )
            if value.nbytes > 16 * path.stat().st_size:
                raise BadCheckpointError(
                    f"{path}: tensor {name!r} needs {value.nbytes} bytes, far more than its file", "clone it first"
                )
            place = (value.data_ptr(), tuple(value.shape), tuple(value.stride()))
            if value.numel() and place in seen:
                self.tied |= {str(name): seen[place], seen[place]: str(name)}
            seen.setdefault(place, str(name))
            self._tensors[str(name)] = value

    @property
    def infos(self) -> list[TensorInfo]:
        return [TensorInfo(name, DTYPE_NAMES[t.dtype], tuple(t.shape)) for name, t in self._tensors.items()]

    def read_bytes(self, name: str) -> memoryview:
        return bytes_of(self._tensors[name])

    def read_tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name].detach().resolve_conj().clone(memory_format=torch.contiguous_format)


def _load(path: Path) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _load_loudly(path)


def _load_loudly(path: Path) -> object:
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        needs = " ".join(str(error).split())
        if "Unsupported global" in needs or "Unsupported class" in needs or "Trying to " in needs:
            raise BadCheckpointError(
                f"{path} needs code to unpickle, which svdcli never runs",
                "where you trust it, load it with torch and write it with safetensors.torch.save_file(model.state_dict(), ...)",
            ) from error
        raise BadCheckpointError(f"{path} is not a PyTorch file{_detail(needs)}", "download it again") from error
    except (FileNotFoundError, PermissionError):
        raise
    except (RuntimeError, OSError, EOFError, ValueError, LookupError, AttributeError, TypeError, struct.error) as error:
        raise BadCheckpointError(f"{path} is not a PyTorch file{_detail(str(error))}", "download it again") from error


def _detail(said: str) -> str:
    """What torch said, where that is words."""
    return f" ({said[:80]})" if re.search("[a-z]{3}", said) else ""


def _state_dict(loaded: object, path: Path, left_out: dict[str, str]) -> Mapping[Any, Any]:
    """The dict of tensors, unwrapped from the names under which training scripts save it."""
    if isinstance(loaded, Mapping):
        for wrapper in _WRAPPERS:
            inner = loaded.get(wrapper)
            if isinstance(inner, Mapping) and any(isinstance(value, torch.Tensor) for value in inner.values()):
                left_out.update({str(key): f"beside {wrapper!r} in {path.name}" for key in loaded if key != wrapper})
                return inner
        if any(isinstance(value, torch.Tensor) for value in loaded.values()):
            return loaded
    raise BadCheckpointError(f"{path} holds no dict of tensors", "save model.state_dict()")
