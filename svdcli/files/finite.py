"""Where NaN and infinity come from: what a model answered, told by the weight that holds them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from svdcli.errors import BadCheckpointError, NotFiniteError
from svdcli.files.checkpoint import Checkpoint, open_checkpoint


@contextmanager
def weights_told(*sources: Checkpoint | str | Path) -> Iterator[None]:
    """Raise in place of a NotFiniteError one that names the tensor it comes from: the first with
    NaN or infinity, of the first of these checkpoints that has one. Where all are finite, it tells
    the largest number of them.

    Paths are opened, and every tensor is read once, but only after such an error.
    """
    try:
        yield
    except NotFiniteError as error:
        largest = (0.0, "", "")
        for source in sources:
            checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
            for name, magnitude in _magnitudes(checkpoint):
                if not math.isfinite(magnitude):
                    raise BadCheckpointError(
                        f"{checkpoint.shown}: {name} holds NaN or infinity",
                        "the file was saved so: take another copy, or an earlier one",
                    ) from error
                largest = max(largest, (magnitude, name, checkpoint.shown))
        magnitude, name, shown = largest
        raise NotFiniteError(
            f"{shown}: {error.message}",
            f"all weights are finite, the largest number, {magnitude:.2g}, is in {name}: compute "
            f"in float32, or take another copy of the model",
        ) from error


def _magnitudes(checkpoint: Checkpoint) -> Iterator[tuple[str, float]]:
    """(name, largest magnitude) of every tensor of floating-point numbers; NaN where it has one."""
    import torch

    for name in checkpoint.tensors:
        tensor = checkpoint.read_tensor(name)
        if tensor.is_floating_point() and tensor.numel():
            wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
            yield name, max(abs(value) for value in map(float, wide.aminmax()))
