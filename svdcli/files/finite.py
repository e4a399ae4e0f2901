"""Where NaN and infinity come from: what a model answered, told by the weight that holds them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from svdcli.errors import BadCheckpointError, NotFiniteError
from svdcli.files.checkpoint import Checkpoint, open_checkpoint


@contextmanager
def weights_told(*sources: Checkpoint | str | Path) -> Iterator[None]:
    """Raise in place of a NotFiniteError one that names the first tensor of these checkpoints with
    NaN or infinity. Where all are finite, the error stays, and says so.

    Paths are opened, and every tensor is read once, but only after such an error.
    """
    try:
        yield
    except NotFiniteError as error:
        for source in sources:
            checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
            name = not_finite_in(checkpoint)
            if name is not None:
                raise BadCheckpointError(
                    f"{checkpoint.shown}: {name} holds NaN or infinity",
                    "the file was saved so: take another copy, or an earlier one",
                ) from error
        hint = f"every tensor is finite, so numbers overflow on the way: {error.hint}"
        raise NotFiniteError(error.message, hint) from error


def not_finite_in(checkpoint: Checkpoint) -> str | None:
    """Return the name of the first tensor with NaN or infinity; None where there is none."""
    for name in checkpoint.tensors:
        tensor = checkpoint.read_tensor(name)
        if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
            return name
    return None
