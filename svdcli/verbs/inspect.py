"""What a checkpoint holds, and what compress would do with each tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from svdcli.files.checkpoint import open_checkpoint
from svdcli.files.record import record_of
from svdcli.files.report import JSON_VERSION
from svdcli.plan.layers import break_even, choose_layers
from svdcli.plan.layouts import LAYOUTS
from svdcli.plan.tensors import TensorInfo


@dataclass(frozen=True)
class InspectRow:
    """One tensor. break_even is the largest rank that saves parameters in the factored layout,
    pivoted_break_even in the pivoted one; both None for tensors that would not be selected, which
    have a reason."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parameters: int
    bytes: int
    selected: bool
    reason: str
    break_even: int | None
    pivoted_break_even: int | None


@dataclass(frozen=True)
class Inspection:
    """What is in a checkpoint and what compress would select."""

    path: str
    written_by_svdcli: bool
    files: Mapping[str, int]
    left_out: Mapping[str, str]
    tensors: tuple[InspectRow, ...]
    parameters: int
    bytes: int
    selected_parameters: int
    selected_bytes: int
    left_out_bytes: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def selected(self) -> tuple[InspectRow, ...]:
        return tuple(row for row in self.tensors if row.selected)

    def to_json(self) -> dict[str, Any]:
        return {"svdcli_json": JSON_VERSION, "kind": "inspection"} | asdict(self)


def inspect(
    model: str | Path,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    state_dict: str | None = None,
) -> Inspection:
    """List a checkpoint's tensors from its headers alone. Raises like `compress` for bad input and
    odd patterns."""
    with open_checkpoint(model, state_dict=state_dict) as checkpoint:
        checkpoint.take_apart(checkpoint.whole_stacks())
        selected, skipped = choose_layers(
            checkpoint.infos,
            include=include,
            exclude=exclude,
            tied=checkpoint.tied,
            facts=checkpoint.facts,
        )

        # Every tensor is listed, what is not selected with the reason
        reasons = {skip.tensor.name: skip.reason for skip in skipped}
        return Inspection(
            path=checkpoint.shown,
            written_by_svdcli=record_of(checkpoint) is not None,
            files=checkpoint.files | checkpoint.carried,
            left_out=checkpoint.left_out,
            tensors=tuple(_inspect_row(info, reasons) for info in checkpoint.infos),
            parameters=checkpoint.parameters,
            bytes=checkpoint.nbytes,
            selected_parameters=sum(info.parameters for info in selected),
            selected_bytes=sum(info.nbytes for info in selected),
            left_out_bytes=checkpoint.left_out_bytes,
            notes=tuple(checkpoint.notes),
        )


def _inspect_row(info: TensorInfo, reasons: Mapping[str, str]) -> InspectRow:
    """One tensor; reasons has the names of all that are not selected."""
    # Break-even ranks mean nothing for what stays as it is
    selected = info.name not in reasons
    factored = pivoted = None
    if selected:
        factored = break_even(info.shape)
        pivoted = LAYOUTS["pivoted"].largest_saving_rank(info, info.dtype)
    return InspectRow(
        name=info.name,
        dtype=info.dtype,
        shape=info.shape,
        parameters=info.parameters,
        bytes=info.nbytes,
        selected=selected,
        reason=reasons.get(info.name, ""),
        break_even=factored,
        pivoted_break_even=pivoted,
    )
