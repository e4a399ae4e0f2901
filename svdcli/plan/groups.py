"""Layers that read the same input, and may share a basis: one `down` for all, an `up` for each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from svdcli.plan.tensors import TensorInfo, module_of

# Below the first layer of a group: the module that holds what all of them share.
SHARED = "svd_shared"
# Of each layer: which group it is in, and from which to which output of it.
SPAN = "svd_span"
_SPAN_NUMBERS = 3


@dataclass(frozen=True)
class Group:
    """Two or more weights (m_i, n) of layers that read the same input, in the order in which a file
    has them."""

    members: tuple[TensorInfo, ...]

    @property
    def stack(self) -> TensorInfo:
        """All of them one below the other, (m, n), under a name that no tensor has."""
        name = " + ".join(member.name for member in self.members)
        return TensorInfo(name, self.members[0].dtype, stacked_shape(self.members))

    @property
    def names(self) -> set[str]:
        """Of its weights."""
        return {member.name for member in self.members}

    @property
    def extra_bytes(self) -> int:
        """Bytes of what is stored besides its matrices."""
        return sum(tensor.nbytes for tensor in span_tensors(self.members))


def stacked_shape(members: Sequence[TensorInfo]) -> tuple[int, int]:
    """The shape of these weights one below the other."""
    return sum(member.shape[0] for member in members), members[0].shape[1]


def groups_of(tensors: Iterable[TensorInfo], inputs: Mapping[str, str]) -> tuple[Group, ...]:
    """The groups among these weights: of one dtype and width, and of one input by `inputs`, which
    has a key for the input of each."""
    alike: dict[tuple[str, str, int], list[TensorInfo]] = {}
    for tensor in tensors:
        read = inputs.get(tensor.name)
        if read is not None:
            alike.setdefault((read, tensor.dtype, tensor.shape[1]), []).append(tensor)
    return tuple(Group(tuple(members)) for members in alike.values() if len(members) > 1)


def home_of(members: Sequence[TensorInfo], dtype: str) -> TensorInfo:
    """What the factors of a group are called after: a weight in the module that they share."""
    name = f"{members[0].module}.{SHARED}.weight"
    return TensorInfo(name, dtype, stacked_shape(members))


def span_tensors(members: Sequence[TensorInfo]) -> tuple[TensorInfo, ...]:
    """The tensors that say of each layer of a group where its outputs are, in their order."""
    return tuple(
        TensorInfo(f"{module_of(member.name)}.{SPAN}", "I64", (_SPAN_NUMBERS,))
        for member in members
    )


def spans_of(members: Sequence[TensorInfo]) -> list[tuple[int, int, int]]:
    """What these hold: a number for the group, the same for the same layers, and the first output
    of the layer and the one after its last."""
    digest = hashlib.sha256("\n".join(member.name for member in members).encode()).digest()
    number = int.from_bytes(digest[:8], "big") >> 1  # of 63 bits
    spans = []
    start = 0
    for member in members:
        stop = start + member.shape[0]
        spans.append((number, start, stop))
        start = stop
    return spans
