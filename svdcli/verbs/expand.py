"""A compressed checkpoint back as a dense one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from svdcli.engine.publish import destination, disk_errors, finish, identity, write
from svdcli.engine.run import Run
from svdcli.errors import BadCheckpointError, SvdcliError
from svdcli.files.blueprint import ExpandDesign
from svdcli.files.checkpoint import STANDARD, Checkpoint, open_output, sha256_of
from svdcli.files.record import check_listed, record_of, stored_layers, take_apart_again
from svdcli.files.workspace import Workspace
from svdcli.plan.plan import LayerPlan
from svdcli.progress import Progress, silent


def expand(
    output: str | Path,
    out: str | Path | None = None,
    *,
    force: bool = False,
    progress: Progress = silent,
) -> Path | None:
    """Write an output of compress as an ordinary checkpoint again: original names, shapes and
    dtypes, low-rank weights.

    out defaults to `<stem>.dense.safetensors` or `<name>-dense` beside the output. Returns where it
    is (None for standard output). Raises like `compress`.
    """
    import torch

    with open_output(output) as checkpoint:
        # Factors that transformers saved have no record, but a way back all the same
        record = record_of(checkpoint)
        if record is None:
            hint = (
                "factors that transformers saved: "
                "svdcli.load(PATH).dequantize().save_pretrained(DENSE), from Python"
            )
            raise SvdcliError(f"{checkpoint.shown} was not written by svdcli compress", hint)

        # Nothing is made of weights that are not what compress wrote
        take_apart_again(checkpoint, record)
        layers = stored_layers(checkpoint, record)
        check_listed(checkpoint, record)
        _check_undamaged(checkpoint, record, layers)

        with destination(checkpoint, out, ".dense", "-dense", force) as target:
            workspace = Workspace(target, is_file=not checkpoint.is_directory)
            with disk_errors(target), workspace.locked():
                if workspace.resume(identity(checkpoint, "expand"), force=force):
                    # Products of the factors: the CPU does them, and no seed plays a part
                    name = target.name if workspace.is_file else None
                    design = ExpandDesign(checkpoint, record, layers, name)
                    run = Run(checkpoint, torch.device("cpu"), progress, workspace)
                    written, results, _ = write(run, design, layers)
                    finish(run, written, results)
            return None if out == STANDARD else target


def _check_undamaged(
    checkpoint: Checkpoint, record: Mapping[str, Any], layers: Sequence[LayerPlan]
) -> None:
    """Raises BadCheckpointError where a weight file of a directory is not what was written,
    config.json is gone, or an order of rows is none."""
    from svdcli.engine.solve import has_row_order

    files = record.get("files") or {}
    if "config.json" in files and checkpoint.config is None:
        raise BadCheckpointError(
            f"{checkpoint.path} has lost its config.json", "put it back, or write the output again"
        )
    for name, entry in files.items():
        if name in checkpoint.files and sha256_of(checkpoint.path / name) != entry.get("sha256"):
            raise BadCheckpointError(
                f"{checkpoint.path / name} was changed after svdcli wrote it", "see `svdcli verify`"
            )
    for layer in layers:
        if not has_row_order(checkpoint, layer):
            raise BadCheckpointError(
                f"the svd_rows of {layer.tensor.name} are no order of its rows",
                "write the output again",
            )
