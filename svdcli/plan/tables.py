"""Embedding tables in fewer bits: which they are, and their part of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from svdcli.plan.layouts import LAYOUTS, WHOLE
from svdcli.plan.packing import Packing
from svdcli.plan.plan import EMBEDDING, LayerPlan, Plan, Skipped
from svdcli.plan.roles import Roles
from svdcli.plan.tensors import FACTORED_DTYPES, TensorInfo
from svdcli.plan.words import NEAREST


def tables_of(tensors: Sequence[TensorInfo], skipped: Sequence[Skipped], roles: Roles) -> set[str]:
    """The tables of the vocabulary that were not selected as layers, nor excluded by a person."""
    excluded = {entry.tensor.name for entry in skipped if entry.reason.startswith("excluded by ")}
    left = {entry.tensor.name for entry in skipped} - excluded
    return {
        table.name
        for table in roles.tables
        if table.name in left and table.dtype in FACTORED_DTYPES and 0 not in table.shape
    }


def with_tables(plan: Plan, tables: set[str]) -> Plan:
    """The plan in which these tables, which it skips, are packed as its recipe says."""
    bits = plan.recipe.embedding_bits
    if bits == "16":
        return plan
    packing = Packing(int(bits), plan.recipe.group_size)
    layers = []
    for entry in plan.skipped:
        if entry.tensor.name in tables:
            layers.append(_table(entry.tensor, plan, packing))
    packed = {layer.tensor.name for layer in layers}
    skipped = tuple(entry for entry in plan.skipped if entry.tensor.name not in packed)
    return replace(plan, layers=(*plan.layers, *layers), skipped=skipped)


def _table(tensor: TensorInfo, plan: Plan, packing: Packing) -> LayerPlan:
    full = min(tensor.shape)
    dtype = plan.recipe.dtype or tensor.dtype
    table = LayerPlan(tensor, full, WHOLE, dtype, NEAREST, packing=packing, role=EMBEDDING)
    if LAYOUTS[WHOLE].nbytes(tensor, full, dtype, packing) >= tensor.nbytes:
        [table] = table.left_dense(f"{packing.bits} bits would not save bytes")
    return table
