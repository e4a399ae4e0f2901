"""What work on tensors needs of a checkpoint, so that something else can take its place: the
difference of two checkpoints, an adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from svdcli.files.checkpoint import TensorRef
    from svdcli.plan.tensors import TensorInfo


class Source(Protocol):
    """Named tensors that are read one at a time."""

    @property
    def shown(self) -> str:
        """What to call it in a message."""

    @property
    def infos(self) -> list[TensorInfo]:
        """Name, dtype and shape of every tensor, in order."""

    @property
    def tensors(self) -> Mapping[str, TensorRef]:
        """The same by name, with the file that each is written to."""

    @property
    def opener(self) -> Callable[[], Source]:
        """Opens the same in another process; it pickles."""

    def read_tensor(self, name: str) -> Tensor:
        """One tensor, in its own dtype."""

    def chunks(self, name: str) -> Iterator[bytes | memoryview]:
        """The bytes of one tensor, in pieces."""

    def fingerprint(self) -> str:
        """Tells it from any other."""
