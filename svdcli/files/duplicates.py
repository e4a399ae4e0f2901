"""Tensors of a checkpoint that are equal to the byte, of which one need be stored."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from svdcli.files.checkpoint import Checkpoint
from svdcli.plan.tensors import TensorInfo

# Smaller ones are not looked at: what is saved must be worth a tensor that readers miss.
_WORTHWHILE = 2**16


def equal_tensors(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, list[str]]:
    """{the first of several tensors with the same bytes, dtype and shape: the others}, of these
    names. Whole tensors are read only where their beginnings and ends are equal."""
    alike: dict[tuple[str, tuple[int, ...], bytes], list[TensorInfo]] = {}
    by_shape: dict[tuple[str, tuple[int, ...]], list[TensorInfo]] = {}
    for name in names:
        info = checkpoint.tensors[name].info
        if info.nbytes >= _WORTHWHILE:
            by_shape.setdefault((info.dtype, info.shape), []).append(info)
    for (dtype, shape), infos in by_shape.items():
        for info in infos if len(infos) > 1 else ():
            alike.setdefault((dtype, shape, checkpoint.sample(info.name)), []).append(info)

    equal: dict[str, list[str]] = {}
    for infos in alike.values():
        by_digest: dict[bytes, list[str]] = {}
        for info in infos if len(infos) > 1 else ():
            by_digest.setdefault(_digest(checkpoint, info.name), []).append(info.name)
        for first, *others in by_digest.values():
            if others:
                equal[first] = others
    return equal


def _digest(checkpoint: Checkpoint, name: str) -> bytes:
    digest = hashlib.sha256()
    for chunk in checkpoint.chunks(name):
        digest.update(chunk)
    return digest.digest()
