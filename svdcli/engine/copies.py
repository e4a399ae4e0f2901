"""Tensors that are equal to others, and need not be stored again."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import replace

from svdcli.files.checkpoint import Checkpoint
from svdcli.files.duplicates import equal_tensors
from svdcli.plan.plan import Plan
from svdcli.plan.tensors import module_of

# In the notes that say so.
_ONCE = "is stored once with it"
_APART = "weights of their own now"


def copies_in(checkpoint: Checkpoint, selected: Set[str], *, factors: bool) -> Mapping[str, str]:
    """{tensor that need not be stored: one with the same bytes}. In a directory these are the ones
    that the class makes of each other; from a lone file the pair comes back by the record, which
    loaders without svdcli do not know: only where these cannot open it anyway, since it holds
    factors. selected are tensors that are not copied."""
    written_otherwise = selected | checkpoint.in_stacks
    copied = [name for name in checkpoint.tensors if name not in written_otherwise]
    equal = equal_tensors(checkpoint, copied)
    if not equal:
        return {}
    if checkpoint.is_directory:
        from svdcli.models.kinds import tied_copies

        return tied_copies(checkpoint, equal) if checkpoint.transformers_opens_it else {}
    if not factors:
        return {}
    return {other: first for first, others in equal.items() for other in others}


def stored_once(checkpoint: Checkpoint, plan: Plan, equal: Mapping[str, str]) -> Plan:
    """The plan without the copies of tensors that are written as they are, and a note of them."""
    notes = tuple(note for note in plan.notes if _ONCE not in note and _APART not in note)
    plan = replace(plan, same={}, notes=notes)
    selected = {tensor.name for tensor in plan.originals}
    same = {
        name: source
        for name, source in equal.items()
        if name not in selected and source not in selected
    }
    plan = replace(plan, notes=(*plan.notes, *_no_longer_one(plan, equal)))
    if not same:
        return plan
    name, source = next(iter(same.items()))
    nbytes = sum(checkpoint.tensors[name].info.nbytes for name in same)
    note = (
        f"{module_of(name)} has the bytes of {module_of(source)}, and {_ONCE} ({nbytes} bytes less)"
    )
    if len(same) > 1:
        note = (
            f"{len(same)} tensors have the bytes of others ({nbytes} bytes less): such as "
            f"{module_of(name)}, which has those of {module_of(source)}, and {_ONCE}"
        )
    return replace(plan, same=same, notes=(*plan.notes, note))


def _no_longer_one(plan: Plan, equal: Mapping[str, str]) -> tuple[str, ...]:
    """A note of pairs with the same bytes of which a table is packed, by itself."""
    packed = {layer.tensor.name for layer in plan.factored if layer.role}
    apart = [pair for pair in equal.items() if not packed.isdisjoint(pair)]
    if not apart:
        return ()
    name, source = apart[0]
    others = f" ({len(apart)} such pairs)" if len(apart) > 1 else ""
    return (
        f"{module_of(name)} and {module_of(source)} hold the same numbers{others}: tables are "
        f"packed one by one, so that they are {_APART}",
    )
